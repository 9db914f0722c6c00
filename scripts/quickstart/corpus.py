#!/usr/bin/python3
"""Turns the unpacked Debian text packages into a corpus: JSON lines, one document a page.

    corpus.py UNPACKED_DIR OUT.jsonl

UNPACKED_DIR holds one folder for each package, with what `dpkg -x` gives.

Man pages go through mandoc, which renders roff as HTML; that and the HTML packages go through html2text, which gives
Markdown. Each line has id, text, source, licence and language. Pages with little Japanese in them and exact repetitions
are left out and counted. The output is the same, byte for byte, for the same packages.
"""
import hashlib
import json
import multiprocessing
import pathlib
import re
import subprocess
import sys

import html2text
from lxml import html

# In Debian 12, and in Debian 13.
REFERENCE = ["usr/share/debian-reference", "usr/share/doc/debian-reference-common/docs"]
# Package, folder of its pages (the first that is there), file pattern, what of a page is its text (XPath), licence (as in
# its copyright file).
SOURCES = [
    ("manpages-ja", ["usr/share/man/ja"], "man[1-8]/*.gz", None, "DFSG-free, mixed; see the page's roff source"),
    ("manpages-ja-dev", ["usr/share/man/ja"], "man[1-8]/*.gz", None, "DFSG-free, mixed; see the page's roff source"),
    ("debian-reference-ja", REFERENCE, "ch*.ja.html", "//body/div[@class='chapter']",
     "GPL-2.0-or-later"),
    ("libreoffice-help-ja", ["usr/share/libreoffice/help/ja/text"], "**/*.html", "//*[@id='DisplayArea']", "MPL-2.0"),
]
# Navigation and what browsers do not show.
CLUTTER = ".//script|.//*[@hidden]|.//div[@class='toc' or @class='howtoget' or @id='DEBUG']|.//table[@class='head']" \
          "|.//table[@class='foot']"
JAPANESE = "[\u3040-\u30ff\u4e00-\u9fff]"  # kana and kanji
WIDE = "[\u3000-\u30ff\u4e00-\u9fff\uff00-\uffef]"  # and their punctuation
MIN_JAPANESE = 0.15  # of a page's letters


def roff_to_html(path):
    """The page as HTML, or nothing for a page that only refers to another one."""
    # Read from a file, mandoc follows .so requests, and those pages would be repetitions; from stdin it does not.
    roff = subprocess.run(["zcat", path], check=True, capture_output=True).stdout
    done = subprocess.run(["mandoc", "-Kutf-8", "-Thtml", "-Ofragment"], input=roff, check=False, capture_output=True)
    return done.stdout.decode("utf-8")


def html_to_text(page, xpath):
    """Markdown text of the parts of the page that xpath selects."""
    root = html.document_fromstring(page, parser=html.HTMLParser(encoding="utf-8"))
    parts = root.xpath(xpath) if xpath else [root]
    for part in parts:
        for element in part.xpath(CLUTTER):
            element.drop_tree()
    convert = html2text.HTML2Text(bodywidth=0)
    convert.ignore_links = convert.ignore_images = convert.ignore_emphasis = convert.unicode_snob = True
    return convert.handle("".join(html.tostring(part, encoding="unicode") for part in parts))


def tidy(text):
    """Takes back what Markdown escapes and what line wrapping in the sources left between Japanese characters, and leaves
    out indentation and lines without Japanese: code, tables and synopses, on which a small model would spend most of
    its few minutes."""
    text = re.sub(r"\\([-+.*_#>|\[\]()])", r"\1", text)
    text = re.sub(r"[ \t\u200b]+", " ", text)
    text = re.sub(f"(?<={WIDE}) (?={WIDE})", "", text)
    lines = [line.strip() for line in text.split("\n")]
    kept = [line for line in lines if not line or re.search(JAPANESE, line)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()


def japanese_share(text):
    letters = sum(c.isalpha() for c in text)
    return len(re.findall(JAPANESE, text)) / letters if letters else 0.0


def read_page(job):
    package, root, path, xpath, licence = job
    page = path.read_bytes() if xpath else roff_to_html(path).encode("utf-8")
    text = tidy(html_to_text(page, xpath)) if page.strip() else ""
    name = str(path.relative_to(root)).removesuffix(".gz").removesuffix(".html").removesuffix(".ja")
    return {"id": f"{package}/{name}", "text": text, "source": package, "licence": licence,
            "language": "ja" if japanese_share(text) >= MIN_JAPANESE else "other"}


def list_pages(unpacked):
    for package, folders, pattern, xpath, licence in SOURCES:
        roots = [unpacked / package / folder for folder in folders]
        root = next((folder for folder in roots if folder.is_dir()), roots[0])
        pages = sorted(p for p in root.glob(pattern) if not p.is_symlink())
        if not pages:
            sys.exit(f"corpus.py: no pages of {package} in {root}: unpack it there with dpkg -x")
        for path in pages:
            yield package, root, path, xpath, licence


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    jobs = list(list_pages(pathlib.Path(sys.argv[1])))
    seen, left_out, kept, size = set(), {"empty": 0, "repeated": 0, "little Japanese": 0}, {}, 0
    with multiprocessing.Pool() as pool, open(sys.argv[2], "w", encoding="utf-8") as out:
        for document in pool.imap(read_page, jobs, chunksize=16):
            text = document["text"].encode("utf-8")
            digest = hashlib.sha256(text).digest()
            reason = "empty" if not text else "little Japanese" if document["language"] != "ja" else \
                "repeated" if digest in seen else None
            if reason:
                left_out[reason] += 1
                continue
            seen.add(digest)
            size += len(text)
            kept[document["source"]] = kept.get(document["source"], 0) + 1
            out.write(json.dumps(document, ensure_ascii=False) + "\n")
    print(f"{sum(kept.values())} documents, {size / 1e6:.1f} MB of text: "
          + ", ".join(f"{n} from {package}" for package, n in kept.items()))
    print("left out: " + ", ".join(f"{n} {reason}" for reason, n in left_out.items()))


if __name__ == "__main__":
    main()
