#!/usr/bin/python3
"""What was skipped, and why: skipped.py RESULTS.xml..., files that ctest writes with --output-junit.

A test is skipped as a whole by its exit status (SKIP_RETURN_CODE), and prints "skipped: reason" before; so is a case of
Python's unittest, which prints "test_case (module.Class.test_case) ... skipped 'reason'", or so with the case's
description on a line between.
"""
import collections
import pathlib
import re
import sys
import xml.etree.ElementTree


def skips(path):
    """(test, reason, case) of each; the case of a test that is skipped as a whole is None."""
    for test in xml.etree.ElementTree.parse(path).getroot().iter("testcase"):
        output = test.findtext("system-out") or ""
        if test.find("skipped") is not None:
            reason = re.search(r"^skipped: (.*)$", output, re.MULTILINE)
            yield test.get("name"), reason.group(1) if reason else "it does not say why", None
        case = None
        for line in output.splitlines():
            named = re.match(r"(\w+) \(\S+\)", line)
            case = named.group(1) if named else case
            skipped = re.search(r"\.\.\. skipped ['\"](.*)['\"]$", line)
            if skipped:
                yield test.get("name"), skipped.group(1), case


def main():
    found = collections.defaultdict(list)
    for path in filter(pathlib.Path.exists, map(pathlib.Path, sys.argv[1:])):
        for test, reason, case in skips(path):
            found[test, reason].append(case)
    if found:
        print("\nSkipped:")
    for (test, reason), cases in found.items():
        of_it = "" if None in cases else f", {cases[0]}" if len(cases) == 1 else f", {len(cases)} cases"
        print(f"  {test}{of_it}: {reason}")


if __name__ == "__main__":
    main()
