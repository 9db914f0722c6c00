#!/usr/bin/python3
"""The rules of the house that no compiler checks.

    house.py REPOSITORY

1. A file includes only what lies on its own floor or below it, as the link lines of CMakeLists.txt have it.
2. No file of code or text is longer than 600 lines.
3. exit() is called in train/main.c only, and no source leaves work for later.
Prints each breach as file:line and ends with status 1 if there was any.
"""
import pathlib
import re
import sys

MAX_LINES = 600
# What each part of the house consists of (longest matching prefix wins), and on which parts it may stand.
PARTS = {
    "base": ["kernels/base/", "include/err.h", "include/log.h", "include/mix.h", "include/proc.h", "include/clock.h", "include/fs.h", "include/cgroup.h", "include/utf8.h", "include/path.h"],
    "kernels": ["kernels/", "include/tensor.h", "include/step_control.h", "include/ops.h", "include/ops.def", "include/arena.h"],
    "comm": ["comm/", "include/comm.h"],
    "config": ["train/config", "include/config.h", "include/options.def"],
    "h5": ["train/h5/"],
    "data": ["train/data/"],
    "model": ["train/model/"],
    "ckpt": ["train/ckpt/"],
    "parallel": ["train/parallel/", "train/optim"],
    "step": ["train/step", "train/graphs", "train/signals"],
    "run": ["train/"],
    "main": ["train/main.c"],
    "tests": ["tests/", "scripts/"],
}
STANDS_ON = {
    "base": [],
    "kernels": ["base"],
    "comm": ["kernels"],
    "config": ["base"],
    "h5": ["base"],
    "data": ["comm", "config", "h5"],
    "model": ["kernels", "config"],
    "ckpt": ["comm", "h5"],
    "parallel": ["comm", "model"],
    "step": ["data", "parallel"],
    "run": ["step", "ckpt"],
    "main": ["run"],
    "tests": ["run"],
}
SOURCES = {".c", ".h", ".cc", ".cu", ".cuh", ".def"}
TEXTS = SOURCES | {".sh", ".py", ".md", ".txt", ".yaml", ".cmake"}
TOP = ["train", "kernels", "comm", "include", "configs", "tests", "scripts", "CMakeLists.txt", "README.md"]


def part_of(path):
    prefixes = [(len(prefix), part) for part, all_prefixes in PARTS.items() for prefix in all_prefixes
                if path.startswith(prefix)]
    return max(prefixes)[1] if prefixes else None


def below(part):
    """The parts that `part` may include: itself and all that it stands on."""
    return {part}.union(*(below(lower) for lower in STANDS_ON[part]))


def resolve(root, path, name):
    """The included file as a path in the repository, or None for a header of the system."""
    for folder in (path.parent, root / "include", root / "train", root / "tests"):
        if (folder / name).is_file():
            return (folder / name).resolve().relative_to(root).as_posix()
    return None


def check_file(root, path):
    name = path.relative_to(root).as_posix()
    lines = path.read_text(encoding="utf-8").splitlines()
    if len(lines) > MAX_LINES:
        yield f"{name}:{len(lines)}: longer than {MAX_LINES} lines; divide it"
    if path.suffix not in SOURCES:
        return
    part = part_of(name)
    if part is None:
        yield f"{name}:1: belongs to no floor; name it in tests/lint/house.py"
        return
    for number, line in enumerate(lines, 1):
        included = re.match(r'\s*#\s*include\s+"([^"]+)"', line)
        target = resolve(root, path, included.group(1)) if included else None
        if included and target is None:
            yield f"{name}:{number}: {included.group(1)} is not in the repository; write <> for headers of libraries"
        if target and part_of(target) not in below(part):
            yield f"{name}:{number}: {part} includes {target} of {part_of(target)}, which does not lie below it"
        if re.search(r"(?<![\w.>])exit\(", line) and part not in ("main", "tests"):
            yield f"{name}:{number}: exit() outside train/main.c; return an error"
        if re.search(r"\b(TODO|FIXME|XXX)\b", line):
            yield f"{name}:{number}: work left for later; do it or open an issue"


def main():
    root = pathlib.Path(sys.argv[1]).resolve()
    files = [root / name for name in TOP if (root / name).is_file()]
    for name in TOP:
        files += sorted(p for p in (root / name).rglob("*") if p.is_file() and p.suffix in TEXTS)
    if not files:
        sys.exit(f"house.py: {root} is not the repository")
    breaches = [breach for path in files for breach in check_file(root, path)]
    print("\n".join(breaches) if breaches else f"{len(files)} files keep the rules of the house")
    sys.exit(1 if breaches else 0)


if __name__ == "__main__":
    main()
