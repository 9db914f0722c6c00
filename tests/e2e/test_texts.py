"""`tatara prepare` on texts as people have them: what is read, what is dropped and why, and what is refused with which
remedy. Most of it is tables: files, words of the command line, and what must come of them."""
import json

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
                open(path, "wb").write(content)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    def prepare(self, *words, ranks=0, **more):
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
            ("nested too deeply", '{"text": "a", "b": ' + "[" * 1000 + "]" * 1000 + "}", "more than 1000"),
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
            "broken.txt": (many.encode()[1:], "not UTF-8", "iconv -f UTF-8 -t UTF-8 -c"),
            "array.json": (json.dumps([DOCUMENT] * 3, indent=1), "not JSON", "jq -c"),
            "fields.jsonl": ('{"raw_content": "a", "meta": {"url": "u"}}\n' * 3, "fields are raw_content, meta, meta.url",
                             "--text-key", "fields.jsonl:1"),
            "utf16.jsonl": ((line() * 3).encode("utf-16-le"), "iconv -f UTF-16"),
        }
        for name, (text, *texts) in rows.items():
            with self.subTest(name):
                self.write({name: text})
                result = self.prepare("--max-document-bytes", 1000000, self.dir / name)
                self.assertFails(result, "data", self.dir / name, "no document is left", *texts)
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
        self.assertFails(self.prepare("--id-key", "nr", self.dir / "a.txt"), "data", "--id-key nr", "no input is JSONL")


if __name__ == "__main__":
    lib.main()
