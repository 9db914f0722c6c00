"""Tokenizers: what is refused in their place, and what prepare says of what they do to the text."""
import ctypes
import json
import os
import pathlib
import re
import shutil
import subprocess

import h5py

import lib

PROMPT = "猫は"


class Checkpoint(lib.Case):
    """A checkpoint holds its tokenizer: a copied folder can be sampled where nothing else of the run is."""

    @classmethod
    def setUpClass(cls):
        cls.folder = lib.temp_dir(cls.addClassCleanup)
        cls.tokenizer = shutil.copy(lib.tokenizer(), cls.folder / "tok.model")
        config, run_dir = lib.write_config(cls.folder)
        words = [f"data.tokenizer={cls.tokenizer}", "run.steps=30", "checkpoint.async=true", "checkpoint.every=20"]
        result = lib.tatara(["train", config, *words], ranks=2)
        assert result.status == 0, result
        cls.checkpoint = run_dir / "step-00000030"
        cls.config_words = [config, *words]

    def setUp(self):
        super().setUp()
        self.copy = self.dir / "copy"
        shutil.copytree(self.checkpoint, self.copy)

    def sample(self, checkpoint, *words):
        return lib.tatara(["sample", "--ckpt", checkpoint, "--tokens", 20, "--temperature", 0, "--prompt", PROMPT, *words])

    def drop_tokenizer(self):
        """Makes the copy one of a version that kept no tokenizer."""
        path = self.copy / "manifest.json"
        text, entries = re.subn(r',\n[^\n]*"tokenizer.model"[^\n]*', "", path.read_text())
        self.assertEqual(entries, 1)
        body = text[:text.rindex(',\n"checksum"')].encode()
        xxhash = ctypes.CDLL("libxxhash.so.0").XXH3_64bits
        xxhash.restype, xxhash.argtypes = ctypes.c_uint64, (ctypes.c_char_p, ctypes.c_size_t)
        path.write_bytes(body + b',\n"checksum": "%016x"\n}\n' % xxhash(body, len(body)))
        (self.copy / "tokenizer.model").unlink()

    def test_copied(self):
        here = self.sample(self.checkpoint)
        self.assertEqual(here.status, 0, here)
        self.assertEqual((self.copy / "tokenizer.model").read_bytes(), self.tokenizer.read_bytes())
        away = self.tokenizer.rename(self.folder / "away.model")
        try:
            there = self.sample(self.copy)
        finally:
            away.rename(self.tokenizer)
        self.assertEqual((there.status, there.stdout), (0, here.stdout), there)
        shown = lib.tatara(["ckpt", "show", self.copy])
        self.assertRegex(shown.stdout, r"in 4 files, of 2 rank(.|\n)*, in tokenizer.model\n")

    def test_another_at_the_same_path(self):
        other = lib.other_tokenizer(self.dir)
        here = self.sample(self.checkpoint)
        away = self.tokenizer.rename(self.folder / "away.model")
        try:
            shutil.copy(other, self.tokenizer)
            there = self.sample(self.copy)
        finally:
            away.replace(self.tokenizer)
        self.assertEqual((there.status, there.stdout), (0, here.stdout), there)

    def test_damaged(self):
        model = self.copy / "tokenizer.model"
        lib.flip_bit(model, model.stat().st_size // 2)
        self.assertFails(lib.tatara(["ckpt", "verify", self.copy]), "data", model, "checksum")
        self.assertFails(self.sample(self.copy), "data", model, "checksum")
        model.unlink()
        self.assertFails(lib.tatara(["ckpt", "verify", self.copy]), "data", model, "missing")

    def test_earlier_version(self):
        self.drop_tokenizer()
        self.assertEqual(lib.tatara(["ckpt", "verify", self.copy]).status, 0)
        self.assertIn("not in the checkpoint", lib.tatara(["ckpt", "show", self.copy]).stdout)
        here = self.sample(self.checkpoint)
        there = self.sample(self.copy)
        self.assertEqual((there.status, there.stdout), (0, here.stdout), there)
        away = self.tokenizer.rename(self.folder / "away.model")
        try:
            self.assertFails(self.sample(self.copy), "data", self.tokenizer)
            named = self.sample(self.copy, "--tokenizer", away)
        finally:
            away.rename(self.tokenizer)
        self.assertEqual((named.status, named.stdout), (0, here.stdout), named)
        config, _ = self.config("resumed")
        resumed = lib.tatara(["train", config, f"checkpoint.resume={self.copy}", "run.steps=31"])
        self.assertEqual(resumed.status, 0, resumed)

    def test_planned(self):
        words = [*self.config_words, "model.vocab_size=512", "ranks=2"]
        planned = int(lib.plan_values(self, *words)["checkpoint.bytes"])
        without = int(lib.plan_values(self, *words, "data.tokenizer=''")["checkpoint.bytes"])
        self.assertEqual(planned - without, self.tokenizer.stat().st_size)
        self.assertLessEqual(sum(path.stat().st_size for path in self.checkpoint.iterdir()), planned)


def make_tokenizer(folder, name, *words, text=None):
    """Trains a tokenizer of README's options, changed by the words, on the corpus or another text."""
    options = ["--vocab_size=512", "--hard_vocab_limit=false", "--byte_fallback=true", "--character_coverage=1",
               "--normalization_rule_name=identity", "--remove_extra_whitespaces=false", "--add_dummy_prefix=false",
               "--num_threads=1", "--minloglevel=2"]
    source = folder / f"{name}.txt"
    source.write_text(text or (lib.options.data / "corpus.txt").read_text())
    subprocess.run(["spm_train", f"--input={source}", f"--model_prefix={folder / name}", *options, *words], check=True)
    return folder / f"{name}.model"


def write_texts(path, texts):
    path.write_text("".join(json.dumps({"id": f"{i:04d}", "text": text}) + "\n" for i, text in enumerate(texts)))
    return path


class Marks(lib.Case):
    """The tokens around each document are options of prepare, recorded, and what sample goes by."""

    END = "<|endoftext|>"
    TEXT = "猫は歌う。"

    def setUp(self):
        super().setUp()
        self.tokenizer = make_tokenizer(self.dir, "tok", "--eos_id=-1", f"--control_symbols={self.END}")
        self.input = write_texts(self.dir / "texts.jsonl", [self.TEXT] * 400)

    def prepare(self, name, *words, tokenizer=None):
        return lib.tatara(["prepare", "--tokenizer", tokenizer or self.tokenizer, "--out", self.dir / name, *words,
                           self.input])

    def shards(self, name, *words):
        result = self.prepare(name, *words)
        self.assertEqual(result.status, 0, result)
        return self.dir / name

    def documents(self, folder):
        (shard,) = folder.glob("*.h5")
        with h5py.File(shard, "r") as file:
            tokens, offsets, marks = file["tokens"][()], file["documents/offset"][()], dict(file.attrs)
        return [list(tokens[begin:end]) for begin, end in zip(offsets, offsets[1:])], marks

    def test_recorded(self):
        plain, marks = self.documents(self.shards("plain", "--eos-piece", self.END))
        self.assertNotIn("bos", marks)
        both, marks = self.documents(self.shards("both", "--eos-piece", self.END, "--bos"))
        bos, eos = int(marks["bos"]), int(marks["eos"])
        self.assertNotEqual(bos, eos)
        self.assertEqual(both, [[bos, *document] for document in plain])
        self.assertEqual({document[-1] for document in both}, {eos})
        report = json.loads((self.dir / "both/dataset.json").read_text())
        self.assertEqual((report["bos_piece"], report["eos_piece"]), ("<s>", self.END))
        shown = lib.tatara(["data", "show", "--verify", self.dir / "both"])
        self.assertIn(f"EOS {eos}, BOS {bos} before each document", shown.stdout)

    def test_refused(self):
        self.assertFails(self.prepare("none"), "data", self.tokenizer, "has no EOS piece", "--eos-piece")
        for piece in ("</doc>", "<unk>"):
            self.assertFails(self.prepare("none", "--eos-piece", piece), "data", self.tokenizer, f"no piece {piece}")
        without = make_tokenizer(self.dir, "without", "--bos_id=-1")
        self.assertFails(self.prepare("none", "--bos", tokenizer=without), "data", without, "no BOS piece")

    def test_mixture(self):
        plain = self.shards("plain", "--eos-piece", self.END)
        others = {"both": ["--eos-piece", self.END, "--bos"], "unk": ["--eos-piece", "<0x00>"]}
        config, _ = self.config()
        for name, words in others.items():
            other = self.shards(name, *words)
            for data in (f"data.train=[{{path: {plain}}}, {{path: {other}}}]",
                         f"data.train=[{{path: {plain}}}] data.valid=[{{path: {other}}}]"):
                with self.subTest(data=data):
                    words = [f"data.tokenizer={self.tokenizer}", *re.findall(r"data\.\w+=\[.*?\](?= data|$)", data)]
                    self.assertFails(lib.tatara(["train", config, *words]), "data", other, "--bos and --eos-piece")

    def test_sampled(self):
        """The model knows one document only, which begins after BOS and ends with END: so does what it says."""
        shards = self.shards("both", "--eos-piece", self.END, "--bos")
        run = self.train("run", f"data.tokenizer={self.tokenizer}", f"data.train=[{{path: {shards}}}]", "run.steps=60")
        result = lib.tatara(["sample", "--ckpt", run, "--tokens", 40, "--temperature", 0])
        self.assertEqual((result.status, result.stdout), (0, self.TEXT + "\n"), result)
        begun = lib.tatara(["sample", "--ckpt", run, "--tokens", 40, "--temperature", 0, "--prompt", self.TEXT[:2]])
        self.assertEqual(begun.stdout, self.TEXT + "\n", begun)


class Fidelity(lib.Case):
    """prepare encodes documents, decodes them and compares: what is lost is counted by kind, with the remedy."""

    # Tokenizers are trained on the corpus with the README's options and these words. What comes back of the documents:
    # the counts that are not 0, and words of the warning.
    TEXTS = ["猫は歌う。\n\n毎日  鉄を\n", "  学生が 静かに ", "ＡＢＣ①㍻"]
    CASES = {
        "identity": (["--user_defined_symbols=\u2581"], {}, []),
        "no_space": ([], {"changed_documents": 2, "spaces": 6}, ["6 spaces come back", "--user_defined_symbols=\u2581"]),
        "nfkc": (["--normalization_rule_name=nmt_nfkc", "--user_defined_symbols=\u2581"],
                 {"changed_documents": 2, "characters": 5, "newlines": 3},
                 ["5 characters changed", "3 newlines lost", "--normalization_rule_name=identity"]),
        "squeezed": (["--remove_extra_whitespaces=true", "--user_defined_symbols=\u2581"],
                     {"changed_documents": 2, "space_runs": 1, "trimmed": 1},
                     ["1 runs of spaces", "1 document(s) without", "--remove_extra_whitespaces=false"]),
        "no_bytes": (["--byte_fallback=false", "--user_defined_symbols=\u2581"],
                     {"changed_documents": 2, "newlines": 3, "unknown_tokens": 3, "byte_fallback": False},
                     ["<unk> (3)", "no byte fallback", "--byte_fallback"]),
        "prefix": (["--add_dummy_prefix=true", "--user_defined_symbols=\u2581"], {"adds_space": True}, []),
    }

    def prepare(self, tokenizer, out, ranks=0, texts=None):
        path = write_texts(self.dir / "texts.jsonl", texts or self.TEXTS)
        result = lib.tatara(["prepare", "--overwrite", "--tokenizer", tokenizer, "--out", out, path], ranks)
        self.assertEqual(result.status, 0, result)
        return result, json.loads((out / "dataset.json").read_text())

    def test_kinds(self):
        for name, (words, wanted, said) in self.CASES.items():
            with self.subTest(name=name):
                tokenizer, out = make_tokenizer(self.dir, name, *words), self.dir / "out"
                result, report = self.prepare(tokenizer, out)
                fidelity = dict(report["fidelity"])
                self.assertEqual((fidelity.pop("compared_documents"), fidelity.pop("tokens") > 0), (3, True))
                self.assertEqual(fidelity.pop("compared_bytes"), sum(len(text.encode()) for text in self.TEXTS))
                expected = {"byte_fallback": True, "adds_space": False, **wanted}
                self.assertEqual({key: n for key, n in fidelity.items() if n or key in expected}, expected)
                warnings = [line for line in result.warnings() if "does not give the text back" in line]
                self.assertEqual(len(warnings), 1 if said else 0, result)
                shown = lib.tatara(["data", "show", out]).stdout
                for text in said:
                    self.assertIn(text, warnings[0])
                    if not text.startswith("--"):
                        self.assertIn(text, shown)
                self.assertEqual(self.prepare(tokenizer, out, ranks=2)[1], report)

    def test_end_in_text(self):
        tokenizer = make_tokenizer(self.dir, "tok", "--user_defined_symbols=<|end|>")
        path = write_texts(self.dir / "texts.jsonl", ["猫<|end|>は", "犬"])
        result = lib.tatara(["prepare", "--tokenizer", tokenizer, "--eos-piece", "<|end|>", "--out", self.dir / "out", path])
        self.assertEqual(["1 times the text itself has the piece <|end|>" in line for line in result.warnings()], [True])
        self.assertIn("1 times the text itself", lib.tatara(["data", "show", self.dir / "out"]).stdout)

    def test_long_document(self):
        """Of a long document the beginning is compared, up to a character that is no space."""
        tokenizer = make_tokenizer(self.dir, "no_space", "--user_defined_symbols=\u2581")
        _, report = self.prepare(tokenizer, self.dir / "out", texts=["猫 " * 20000])
        self.assertEqual(report["fidelity"]["changed_documents"], 0)
        self.assertLess(abs(report["fidelity"]["compared_bytes"] - (32 << 10)), 5)

    def test_version(self):
        version = subprocess.run(["pkg-config", "--modversion", "sentencepiece"], capture_output=True, text=True)
        report = json.loads((lib.train_shards() / "dataset.json").read_text())
        self.assertEqual(report["sentencepiece"], version.stdout.strip())
        other = self.dir / "other"
        shutil.copytree(lib.valid_shards(), other)
        listed = json.loads((other / "dataset.json").read_text())
        (other / "dataset.json").write_text(json.dumps({**listed, "sentencepiece": "0.2.3"}))
        self.assertIn("SentencePiece 0.2.3", lib.tatara(["data", "show", other]).stdout)
        data = f"data.train=[{{path: {lib.train_shards()}}}, {{path: {other}}}]"
        config, _ = self.config()
        result = lib.tatara(["train", config, data, "run.steps=1", "optim.warmup_steps=0", "optim.decay_steps=1"], 2)
        self.assertEqual(result.status, 0, result)
        self.assertEqual([f"{other} was made with SentencePiece 0.2.3" in line for line in result.warnings()].count(True),
                         1, result)


class Unnamed(lib.Case):
    def test_sample(self):
        """A run that names no tokenizer records that of its shards, with which it can be sampled, and with no other."""
        run = self.train("run", "data.tokenizer=''", "model.vocab_size=512", "run.steps=1", "optim.warmup_steps=0",
                         "optim.decay_steps=1")
        words = ["sample", "--ckpt", run, "--tokens", 4]
        self.assertFails(lib.tatara(words), "usage", "--tokenizer")
        self.assertEqual(lib.tatara([*words, "--tokenizer", lib.tokenizer()]).status, 0)
        self.assertFails(lib.tatara([*words, "--tokenizer", lib.other_tokenizer(self.dir)]), "data", "--tokenizer")


class Names(lib.Case):
    def test_any_bytes(self):
        """A tokenizer and text whose names are not UTF-8, from prepare to sample, with a resume between."""
        folder = pathlib.Path(os.fsdecode(bytes(self.dir) + b"/\xff caf\xe9"))
        folder.mkdir()
        tokenizer = shutil.copy(lib.tokenizer(), folder / "tok.model")
        shards = self.dir / "shards"
        text = shutil.copy(lib.corpus(), folder / "corpus.jsonl")
        result = lib.tatara(["prepare", "--tokenizer", tokenizer, "--out", shards, text])
        self.assertEqual(result.status, 0, result)
        report = json.loads((shards / "dataset.json").read_text())
        self.assertTrue(report["tokenizer"].endswith("/\\xFF caf\\xE9/tok.model"), report)
        words = [f"data.tokenizer={tokenizer}", f"data.train=[{{path: {shards}}}]", "checkpoint.every=10"]
        self.train("run", *words, "run.stop_at=10")
        run = self.train("run", *words)
        self.assertEqual([path.name for path in lib.checkpoints(run)], ["step-00000010", "step-00000020"])
        result = lib.tatara(["sample", "--ckpt", run, "--tokens", 4])
        self.assertEqual(result.status, 0, result)


class Kinds(lib.Case):
    """What people give in place of a SentencePiece model or a shard is named."""

    LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 4241003\n"

    def test_in_place_of_tokenizer(self):
        for name, content, wanted in (
                ("pointer.model", self.LFS, ("Git-LFS pointer", "git lfs pull")),
                ("tokenizer.json", '{"version": "1.0", "model": {"type": "BPE"}}', ("is JSON", "tokenizer.model")),
                ("vocab.json", '\n {"<unk>": 0}', ("is JSON", "tokenizer.model")),
                ("tok.vocab", "<unk>\t0\n<s>\t0\n", ("not a SentencePiece model", "spm_train")),
                ("empty.model", "", ("is empty",))):
            with self.subTest(name=name):
                path = self.dir / name
                path.write_text(content)
                result = lib.tatara(["prepare", "--tokenizer", path, "--out", self.dir / "out", lib.corpus()])
                self.assertFails(result, "data", path, *wanted)
                config, _ = self.config()
                self.assertFails(lib.tatara(["train", config, f"data.tokenizer={path}"]), "data", path, *wanted)

    def test_in_place_of_shard(self):
        path = self.dir / "shard.h5"
        path.write_text(self.LFS)
        self.assertFails(lib.tatara(["data", "show", path]), "data", path, "Git-LFS pointer", "git lfs pull")


if __name__ == "__main__":
    lib.main()
