"""`tatara prepare` on texts as people have them: what is read, what is dropped and why, and what is refused with which
remedy. Most of it is tables: files, words of the command line, and what must come of them."""
import bz2
import gzip
import io
import json
import lzma
import os
import random
import tarfile

import h5py

import lib

DOCUMENT = {"id": "a", "text": "鉄を作る。"}
JA = "日本語の文章です。改行します。\n"


def line(**fields):
    return json.dumps({**DOCUMENT, **fields}, ensure_ascii=False) + "\n"


class Texts(lib.Case):
    """What the tables' rows have in common."""

    def write(self, files):
        for name, content in files.items():
            path = self.dir / name if isinstance(name, str) else bytes(self.dir) + b"/" + name
            if isinstance(path, bytes):
                with open(path, "wb") as file:
                    file.write(content)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    def prepare(self, *words, ranks=0, **more):
        words = [os.fsdecode(word) if isinstance(word, bytes) else word for word in words]
        return lib.tatara(["prepare", "--overwrite", "--tokenizer", lib.tokenizer(), "--out", self.dir / "out", *words],
                          ranks, **more)

    def assertFails(self, result, status, *texts, within=30):
        super().assertFails(result, status, *texts, within=within)

    def assertPrepares(self, result, documents, *texts):
        self.assertEqual(result.status, 0, result)
        self.assertTrue(result.stdout.startswith(f"{documents} documents of "), result)
        for text in texts:
            self.assertIn(text, result.stdout)

    def labels(self):
        """(id, source, licence, language) of each document."""
        found = []
        for shard in sorted((self.dir / "out").glob("*.h5")):
            with h5py.File(shard, "r") as file:
                tables = [file[name].asstr()[:] for name in ("sources", "licences", "languages")]
                rows = zip(*(file[f"documents/{name}"][:] for name in ("source", "licence", "language")))
                ids = file["documents/id"].asstr()[:]
                found += [(i, *(table[r] for table, r in zip(tables, row))) for i, row in zip(ids, rows)]
        return found


class Records(Texts):
    def test_lines_that_are_kept(self):
        rows = {
            "integer": line(hash=12345678901234567890),
            "real": '{"text": "鉄", "score": 1e400}\n',
            "NUL in a name": '{"text": "鉄", "a\\u0000b": "c\\u0000d"}\n',
            "surrogate that nobody reads": '{"text": "鉄", "other": "\\ud83d"}\n',
            "marks": "\ufeff" + line() + "\ufeff" + line() + "\ufeff\n",
            "CRLF and blank lines": line().replace("\n", "\r\n") + "\r\n \n\n" + line(),
            "no newline at the end": line().strip(),
            "last of equal names": '{"text": 1, "text": "鉄"}\n',
        }
        for name, text in rows.items():
            with self.subTest(name):
                self.write({"a.jsonl": text})
                self.assertPrepares(self.prepare(self.dir / "a.jsonl"), text.count('"text"') - text.count('"text": 1'),
                                    "0 documents dropped")

    def test_numbers_are_ids_as_they_are_written(self):
        numbers = ["7", "-0", "12345678901234567890", "1e400", "1.50"]
        self.write({"a.jsonl": "".join(f'{{"id": {n}, "text": "鉄"}}\n' for n in numbers)})
        self.assertPrepares(self.prepare(self.dir / "a.jsonl"), len(numbers))
        self.assertEqual([label[0] for label in self.labels()], numbers)

    def test_reasons(self):
        """Each reason is counted, and its first document named, on any number of ranks."""
        rows = [
            ("empty", '{"text": " \\u3000\\n"}', ""),
            ("not UTF-8", b'{"text": "\xe9\x89"}', "byte 11 is 0xE9"),
            ("with NUL bytes", '{"text": "a\\u0000b"}', ""),
            ("with NUL bytes", '{"text": "a", "id": "a\\u0000b"}', ""),
            ("too large", json.dumps({"text": "long " * 100}), "--max-document-bytes"),
            ("not JSON", "{'text': 1}", "byte 2"),
            ("not JSON", line().strip() * 2, "jq -c"),
            ("cut-off JSON", '{"text": "a"', "jq -c"),
            ("with NaN or Infinity", '{"text": "a", "b": NaN}', "byte 20"),
            ("with NaN or Infinity", '{"text": "a", "b": [-Infinity]}', "byte 22"),
            ("nested too deeply", '{"text": "a", "b": ' + "[" * 500 + "]" * 500 + "}", "more than 500"),
            ("with an unpaired surrogate", '{"text": "a\\ud83d"}', ""),
            ("with an unpaired surrogate", '{"text": "a", "id": "\\ude00"}', ""),
            ("not a JSON object", "[1, 2]", "jq -c"),
            ("without a text field", '{"title": 1, "meta": {"body": "b"}}', "its fields are title, meta, meta.body"),
            ("whose text is null", '{"text": null}', "--text-key"),
            ("whose text is no string", '{"text": {"ja": "a"}}', "its fields are text, text.ja"),
        ]
        encoded = [text if isinstance(text, bytes) else text.encode() for _, text, _ in rows]
        good = line().encode()
        # Good lines between them, so that small shards cut the file into parts for both ranks.
        self.write({"a.jsonl": b"".join(good * 5 + text + b"\n" for text in encoded) + good * 5})
        for ranks in (0, 2):
            result = self.prepare("--max-document-bytes", 200, "--shard-tokens", 200, self.dir / "a.jsonl", ranks=ranks)
            self.assertPrepares(result, 5 * len(rows) + 5, f"{len(rows)} documents dropped")
            report = json.loads((self.dir / "out/dataset.json").read_text())
            for reason in {reason for reason, _, _ in rows}:
                with self.subTest(reason, ranks=ranks):
                    numbers = [i for i, row in enumerate(rows) if row[0] == reason]
                    place = f"{self.dir}/a.jsonl:{6 * numbers[0] + 6}"
                    self.assertIn(f"  {len(numbers)} {reason}, the first {place}", result.stdout)
                    self.assertIn(rows[numbers[0]][2], result.stdout)
                    self.assertEqual(report["dropped_from_inputs"][reason], len(numbers))
                    self.assertEqual(report["first_dropped"][reason], place)

    def test_nothing_left(self):
        """The error says the reason and the remedy that fits it."""
        large, many = JA * 40000, JA * 1000
        rows = {
            "large.txt": (large, "too large", "--max-document-bytes", "--documents"),
            "sjis.txt": (many.encode("cp932")[:20001], "not UTF-8", "iconv -f CP932"),
            "euc.txt": (many.encode("euc-jp")[:20001], "not UTF-8", "iconv -f EUC-JP"),
            "jis.txt": (many.encode("iso2022-jp"), "not UTF-8", "iconv -f ISO-2022-JP"),
            "utf16.txt": (many.encode("utf-16"), "not UTF-8", "iconv -f UTF-16"),
            "ascii16.txt": ("plain text\n".encode("utf-16-le") * 50, "with NUL bytes", "iconv -f UTF-16"),
            "latin1.txt": ("déjà vu, naïve\n".encode("latin-1"), "not UTF-8", "iconv -f ENCODING"),
            "ja16le.txt": (many.encode("utf-16-le"), "not UTF-8", "iconv -f UTF-16LE"),
            "ja16be.txt": (many.encode("utf-16-be"), "not UTF-8", "iconv -f UTF-16BE"),
            "ascii16be.txt": ("plain text\n".encode("utf-16-be") * 50, "iconv -f UTF-16BE"),
            "ja32le.txt": ((many + "𠮷").encode("utf-32-le"), "iconv -f UTF-32LE"),
            "ascii32be.txt": ("plain text\n".encode("utf-32-be") * 50, "iconv -f UTF-32BE"),
            "mark32.txt": (many.encode("utf-32"), "iconv -f UTF-32LE"),
            "korean.txt": ("한국어 문장입니다.\n".encode("euc-kr") * 50, "iconv -f EUC-KR"),
            "chinese.txt": ("这是中文的句子。\n".encode("gb2312") * 50, "iconv -f ENCODING"),
            "cut.txt": ("短い鉄".encode()[:-1], "last character is cut off", "iconv -f UTF-8"),
            "cut-late.txt": (("plain text\n" * 9000 + "鉄").encode()[:-1], "last character is cut off"),
            "program.txt": (b"\x7fELF\2\1\1" + bytes(range(256)) * 9 + bytes(900), "Leave binary files out"),
            "random.txt": (random.Random(1).randbytes(5000), "Leave binary files out"),
            "broken.txt": (many.encode()[1:], "not UTF-8", "iconv -f UTF-8 -t UTF-8 -c"),
            "array.jsonl": (json.dumps([DOCUMENT] * 3, indent=1), "not JSON", "jq -c"),
            "fields.jsonl": ('{"raw_content": "a", "meta": {"url": "u"}}\n' * 3, "fields are raw_content, meta, meta.url",
                             "--text-key", "fields.jsonl:1"),
            "utf16.jsonl": ((line() * 3).encode("utf-16-le"), "iconv -f UTF-16LE"),
            "late16.jsonl": (("\n" + line() * 3).encode("utf-16-le"), "iconv -f UTF-16LE"),
        }
        for name, (text, *texts) in rows.items():
            with self.subTest(name):
                self.write({name: text})
                result = self.prepare("--max-document-bytes", 1000000, self.dir / name)
                self.assertFails(result, "data", self.dir / name, "no document is left", *texts)
        self.write({"empty.jsonl": "\n", "one.jsonl": line()})
        self.assertFails(self.prepare(self.dir / "empty.jsonl"), "data", "no document is left", "empty")
        words = ["--valid-out", self.dir / "valid", "--valid-fraction", 0.999999999999]
        self.assertFails(self.prepare(*words, self.dir / "one.jsonl"), "data", "no document is left", "--valid-fraction")
        result = self.prepare("--max-document-bytes", 1000000, self.dir / "large.txt", self.dir / "sjis.txt", ranks=2)
        self.assertFails(result, "data", "no document is left")
        for text in ("large.txt", "sjis.txt", "CP932", "--max-document-bytes"):
            self.assertIn(text, result.stderr)


class Keys(Texts):
    RECORDS = ('{"raw": "鉄", "nr": 1e3, "meta": {"from": "新聞", "spdx": "CC0-1.0", "ja.lang": "ja"}}\n'
               '{"raw": "川", "nr": 12345678901234567890, "meta": {"from": null, "spdx": ["a"]}}\n')

    def test_fields_are_taken_from_where_they_lie(self):
        self.write({"a.jsonl": self.RECORDS})
        words = ["--text-key", "raw", "--id-key", "nr", "--source-key", "meta.from", "--licence-key", "meta.spdx",
                 "--language-key", "meta.ja.lang", "--source", "web", self.dir / "a.jsonl"]
        self.assertPrepares(self.prepare(*words), 2)
        self.assertEqual(self.labels(), [("1e3", "新聞", "CC0-1.0", "ja"),
                                         ("12345678901234567890", "web", "unknown", "unknown")])
        words[3] = "raw"  # one field may be taken twice
        self.assertPrepares(self.prepare(*words), 2)
        self.assertEqual([label[0] for label in self.labels()], ["鉄", "川"])

    def test_a_key_that_no_record_has(self):
        self.write({"a.jsonl": self.RECORDS, "a.txt": "鉄"})
        for key in ("id", "source", "licence", "language"):
            for name in ("body", "meta", "meta.body"):
                with self.subTest(key, name=name):
                    words = ["--text-key", "raw", f"--{key}-key", name, self.dir / "a.jsonl"]
                    self.assertFails(self.prepare(*words), "data", f"--{key}-key {name}",
                                     "fields are raw, nr, meta, meta.from, meta.spdx")
        self.assertFails(self.prepare("--text-key", "body", self.dir / "a.jsonl"), "data", "fields are raw", "(body)")
        self.assertFails(self.prepare("--text-key", "body", self.dir / "a.jsonl", self.dir / "a.txt", ranks=2), "data",
                         "--text-key body", "fields are raw")
        self.assertFails(self.prepare("--id-key", "nr", self.dir / "a.txt"), "data", "--id-key nr", "no record of JSON lines")


class Files(Texts):
    """Which files are taken, and how they are read."""

    def names(self):
        """The names of the files whose documents were kept: documents without an id have that of their file and place."""
        return [label[0].rsplit("@", 1)[0] for label in self.labels()]

    def test_json_lines_without_an_ending(self):
        lines = (line() * 3).encode()
        rows = {"wiki_00": lines, "part-00000": b"\n \n\xef\xbb\xbf" + lines, "X.JSONL": lines, "a.b.dump": lines,
                "wiki_01.gz": gzip.compress(lines), "wiki_02.bz2": bz2.compress(lines), "wiki_03.xz": lzma.compress(lines),
                "c4.json.gz": gzip.compress(lines), "misnamed.jsonl": gzip.compress(lines), "nl": lines[:-1],
                "one": b'{"text": "' + b"a" * 200000 + b'"}', "nan": b'{"text": "a", "b": NaN}\n' + lines}
        for name, content in rows.items():
            with self.subTest(name):
                self.write({name: content})
                self.assertPrepares(self.prepare(self.dir / name), 1 if name == "one" else 3)
                self.assertPrepares(self.prepare("--format", "jsonl", self.dir / name), 1 if name == "one" else 3)
        self.write({"plain": JA, "brace": "{ so begins a text", "list": "[1] so does this\n", "text.log": JA})
        for name in ("plain", "brace", "list", "text.log"):
            with self.subTest(name):
                self.assertPrepares(self.prepare(self.dir / name), 1, "0 documents dropped")

    def test_a_wrong_ending_of_a_compressed_file(self):
        lines = (line() * 3).encode()
        rows = {"xz.jsonl.gz": (lzma.compress(lines), "xz"), "gz.jsonl.bz2": (gzip.compress(lines), "gzip"),
                "plain.jsonl.gz": (lines, "plain text"), "plain.zst": (lines, "plain text")}
        for name, (content, kind) in rows.items():
            with self.subTest(name):
                self.write({name: content})
                result = self.prepare("--shard-tokens", 20, self.dir / name, ranks=2)
                self.assertPrepares(result, 3)
                self.assertEqual([f"{name} holds {kind}, " in warning for warning in result.warnings()], [True])

    def test_what_is_no_text(self):
        """Files that would have become tokens of braces or bytes are refused by name, with what to do."""
        pretty, lines = json.dumps([DOCUMENT] * 2, indent=1), line() * 3
        tar = io.BytesIO()
        with tarfile.open(fileobj=tar, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
        rows = {
            "array.json": (pretty, "jq -c"), "object": (json.dumps(DOCUMENT, indent=1), "jq -c"),
            "lines.txt": (lines, "--format jsonl"), "array.txt": (pretty, "--format text"),
            "array1.txt": (json.dumps([DOCUMENT] * 2), "jq -c"), "a.csv": ("id,text\n1,a\n", "--format text"),
            "a.parquet": (b"PAR1" + bytes(99), "Parquet"), "a.tar": (tar.getvalue(), "tar archive"),
            "a.tar.gz": (gzip.compress(tar.getvalue()), "tar archive"), "a.zip": (b"PK\3\4" + bytes(99), "zip archive"),
            "a.jsonl.lz4": (b"\x04\x22\x4d\x18" + bytes(99), "lz4"), "a.pdf": (b"%PDF-1.7\n", "PDF"),
            "pointer.jsonl": ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
            "empty.gz": (b"", "truncated"), "binary.gz": (bytes(99), "damaged or no gzip"),
            "a.jsonl.lzma": (lzma.compress(lines.encode(), lzma.FORMAT_ALONE), "as .lzma", "xz -d"),
            "a.jsonl.gz.gz": (gzip.compress(gzip.compress(lines.encode())), "compressed twice"),
            "short.jsonl.xz": (lzma.compress((lines * 99).encode())[:-9], "truncated"),
        }
        for name, (content, *texts) in rows.items():
            with self.subTest(name):
                self.write({name: content})
                self.assertFails(self.prepare(self.dir / name), "data", self.dir / name, *texts)
        self.assertPrepares(self.prepare("--format", "text", self.dir / "lines.txt"), 1)
        self.assertPrepares(self.prepare("--format", "text", self.dir / "array.txt"), 1)
        self.assertPrepares(self.prepare("--format", "jsonl", self.dir / "lines.txt"), 3)
        self.assertPrepares(self.prepare("--format", "text", self.dir / "a.csv"), 1)
        self.assertFails(self.prepare("--format", "xml", self.dir / "a.csv"), "usage", "auto, text or jsonl")

    TREE = {"c/0.jsonl": '{"text": "a"}\n', "c/a/1.jsonl": '{"text": "b"}\n', "c/a/b/2.jsonl": '{"text": "c"}\n',
            "c/a/b/d/3.jsonl": '{"text": "d"}\n', "c/a/t.txt": "e", "c/.hidden/4.jsonl": '{"text": "f"}\n',
            "c/.5.jsonl": '{"text": "g"}\n', "c/x[1].txt": "h", "c/README.md": "# Card", "c/a/LICENSE.txt": "All",
            "c/make.py": "import os", "c/config.json": '{\n "a": 1\n}\n', "c/dataset_infos.json": '{"default": {}}',
            "c/a/part-00000": '{"text": "i"}\n', "c/a/other-00000": '{"name": "i"}\n', "c/a/b/k.json": '{"text": "k"}\n',
            "c/.gitattributes": "*", "c/picture.png": b"\x89PNG", "c/README": "# Card", "c/a/dump": "no ending"}
    JSONL = ["0.jsonl", "1.jsonl", "2.jsonl", "3.jsonl"]

    def test_patterns(self):
        self.write(self.TREE)
        rows = {
            "c/**/*.jsonl": self.JSONL, "**/*.jsonl": self.JSONL, "c/*/*.jsonl": ["1.jsonl"], "c/*.jsonl": ["0.jsonl"],
            "c/**/b/*.jsonl": ["2.jsonl"], "c/**/**/*.jsonl": self.JSONL, "c/a/[bx]/?.jsonl": ["2.jsonl"],
            "c/**/[!0-2].jsonl": ["3.jsonl"], "c/x[1].txt": ["x[1].txt"], "c/.*.jsonl": [".5.jsonl"],
            "c/.hidden/*": ["4.jsonl"], "c/a/*/k.json": ["k.json"], "*/a/part-*": ["part-00000"],
            "c/*.md": ["README.md"], "c/make.*": ["make.py"], "c/*": None, "c/**": None, "c/": None,
            "c/a/b/*": ["d/3.jsonl", "2.jsonl", "k.json"],
        }
        self.write({"日本.txt": "j"})
        rows = {**rows, "??.txt": ["日本.txt"], "[月日]?.txt": ["日本.txt"], str(self.dir) + "/c/a/*.jsonl": ["1.jsonl"], "./c//*.jsonl": ["0.jsonl"]}
        every = ["0.jsonl", "1.jsonl", "2.jsonl", "3.jsonl", "k.json", "part-00000", "t.txt", "x[1].txt"]
        for pattern, names in rows.items():
            with self.subTest(pattern):
                result = self.prepare(pattern, wrap=["env", "-C", self.dir])
                self.assertPrepares(result, len(names or every))
                self.assertEqual(sorted(name.split("/")[-1] for name in self.names()),
                                 sorted(name.split("/")[-1] for name in names or every))
        for pattern in ("c/**/*.text", "c/[0", "c/*/*/*/*/*.jsonl", "no/**", "c/?/?.txt?", "c/**/no/*"):
            with self.subTest(pattern):
                self.assertFails(self.prepare(pattern, wrap=["env", "-C", self.dir]), "data", pattern)

    def test_what_folders_hold(self):
        self.write(self.TREE)
        result = self.prepare(self.dir / "c", ranks=2)
        self.assertPrepares(result, 8, "3 hidden", "4 cards, licences, scripts", "3 JSON that is no lines", "c/README",
                            "2 not text by their names")
        rows = [
            (["--include", "*.jsonl"], self.JSONL, "13 by --include"),
            (["--include", "*.md", "--include", "*.py"], ["README.md", "make.py"], ""),
            (["--include", "a/**"], ["1.jsonl", "2.jsonl", "3.jsonl", "t.txt", "LICENSE.txt", "part-00000", "other-00000",
                                     "k.json", "dump"], ""),
            (["--include", "**/b/*.jsonl"], ["2.jsonl"], ""),
            (["--exclude", "a"], ["0.jsonl", "x[1].txt"], "1 by --include or --exclude"),
            (["--exclude", "a/"], ["0.jsonl", "x[1].txt"], "1 by --include or --exclude"),
            (["--exclude", "*.txt", "--exclude", "a/b/**"], ["0.jsonl", "1.jsonl", "part-00000"], ""),
            (["--exclude", "a/*.jsonl", "--include", "*.jsonl"], ["0.jsonl", "2.jsonl", "3.jsonl"], ""),
        ]
        for words, names, text in rows:
            with self.subTest(words):
                result = self.prepare(*words, self.dir / "c")
                self.assertPrepares(result, len(names) - ("other-00000" in names), text)
                self.assertEqual(sorted(name.split("/")[-1] for name in self.names()),
                                 sorted(name for name in names if name != "other-00000"))
        self.assertPrepares(self.prepare("--exclude", "c/a/**", "c/**/*.jsonl", wrap=["env", "-C", self.dir]), 1)
        result = self.prepare(self.dir / "c/README.md", self.dir / "c/make.py", self.dir / "c/0.jsonl")
        self.assertPrepares(result, 3)
        warned = [warning.split("--exclude ")[1] for warning in result.warnings() if "--exclude" in warning]
        self.assertEqual(warned, ["README.md", "make.py"])
        for word, pattern in (("--include", "*.html"), ("--exclude", "*.html"), ("--exclude", "b")):
            with self.subTest(word, pattern=pattern):
                path = self.dir / ("c" if pattern != "b" else "c/0.jsonl")
                self.assertFails(self.prepare(word, pattern, path), "data", f"{word} {pattern}")
        pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
        self.write({"p/picture.png": pointer, "p/a.txt": JA})
        self.assertPrepares(self.prepare(self.dir / "p"), 1)
        for name in ("p/part.json.gz", "p/b.txt"):
            self.write({name: pointer})
            self.assertFails(self.prepare(self.dir / "p"), "data", name, "git lfs pull")
        self.write({"d/README.md": "# Card", "d/run.py": "import os"})
        self.assertFails(self.prepare(self.dir / "d"), "data", "no text", "README.md", "--include")

    def test_what_describes_a_data_set_is_left_out(self):
        cards = ["dataset_card.md", "datacard.md", "DATASHEET.md", "USE_POLICY.md", "TERMS.txt", "CODE_OF_CONDUCT.md",
                 "SECURITY.md", "CONTRIBUTING.md", "VERSION.txt", "requirements.txt", "requirements-dev.txt",
                 "robots.txt", "md5sums.txt", "SHA256SUMS.txt"]
        leftovers = ["a.jsonl.bak", "a.jsonl~", "b.jsonl.gz.incomplete", "a.tmp", "a.jsonl.part", "a.crc"]
        self.write({f"f/{name}": "word\n" for name in cards} | {f"f/{name}": line() for name in leftovers})
        self.write({"f/terms-of-art.txt": JA, "f/a.jsonl": line(), "f/b.jsonl.gz.part": gzip.compress(b"a" * 99)[:-9]})
        for path in (self.dir / "f", self.dir / "f" / "*"):
            self.assertPrepares(self.prepare(path), 2, f"{len(cards)} cards, licences, scripts",
                                f"{len(leftovers) + 1} backups and unfinished files")
        self.assertPrepares(self.prepare("--include", "*.bak", "--include", "TERMS.txt", self.dir / "f"), 2)

    def test_a_folder_of_lines_without_the_text(self):
        self.write({f"g/part-0000{i}": '\n{"raw": "鉄", "meta": {"url": "u"}}\n' for i in range(2)})
        for words in ([self.dir / "g"], [self.dir / "g/*"]):
            result = self.prepare(*words, ranks=2)
            self.assertFails(result, "data", "the fields of", "part-00000 are raw, meta, meta.url", "--text-key")
        self.assertPrepares(self.prepare("--text-key", "raw", self.dir / "g"), 2)

    def test_named_twice_is_read_once(self):
        self.write(self.TREE)
        os.symlink(self.dir / "c/0.jsonl", self.dir / "c/zero.jsonl")
        result = self.prepare(self.dir / "c/0.jsonl", self.dir / "c", self.dir / "c/a", ranks=2)
        self.assertPrepares(result, 8, "named twice, and read once")
        self.assertEqual(self.names()[0], "0.jsonl")

    def test_standard_input(self):
        lines = line() * 3
        self.write({"lines": lines})
        for name in ("-", "/dev/stdin", "/dev/fd/0"):
            for command in ('cat lines | "$@"', '"$@" <lines', 'gzip -c lines | "$@"', '(sleep 0.2; cat lines) | "$@"'):
                with self.subTest(name, command=command):
                    result = self.prepare(name, wrap=["env", "-C", self.dir, "sh", "-c", command, "sh"])
                    self.assertPrepares(result, 3)
        result = self.prepare("--text-key", "body", "-", wrap=["env", "-C", self.dir, "sh", "-c", 'cat lines | "$@"', "sh"])
        self.assertFails(result, "data", "fields are id, text")
        self.assertFails(self.prepare("-", ranks=2), "data", "one rank only")

    def test_names_of_any_bytes(self):
        self.write({b"\x93\xfa\x96{.txt": JA.encode(), b"tab\t\x1b[31m.jsonl": b'{"text": "a"}\n{"text": 1}\n',
                    "日本.txt": JA})
        result = self.prepare(self.dir)
        self.assertPrepares(result, 3, "\\x1B[31m.jsonl:2")
        self.assertNotIn("\x1b", result.stdout)
        self.assertEqual([name.split("/", 1)[1] for name in self.names()],
                         ["tab\\x09\\x1B[31m.jsonl", "\\x93\\xFA\\x96{.txt", "日本.txt"])
        result = self.prepare(bytes(self.dir) + b"/\x93\xfa\x96{.txt")
        self.assertPrepares(result, 1)
        self.assertEqual(self.labels()[0][1], "\\x93\\xFA\\x96{")
        report = json.loads((self.dir / "out/dataset.json").read_text())
        self.assertTrue(report["inputs"][0].endswith("/\\x93\\xFA\\x96{.txt"))
        self.assertFails(self.prepare(bytes(self.dir) + b"/\x93\x1b"), "data", "\\x93\\x1B")
        self.assertFails(self.prepare("--source", b"\x93", self.dir), "usage", "\\x93")
        self.write({"label.jsonl": '{"text": "a", "source": "\\u001b[31m", "id": "\\u0007"}'})
        self.assertPrepares(self.prepare(self.dir / "label.jsonl"), 1)
        shown = lib.tatara(["data", "show", "--sample", 1, "--tokenizer", lib.tokenizer(), self.dir / "out"])
        self.assertEqual(shown.status, 0, shown)
        self.assertIn("\\x1B[31m", shown.stdout)
        self.assertNotIn("\x1b", shown.stdout)
        self.assertNotIn("\x07", shown.stdout)


if __name__ == "__main__":
    lib.main()
