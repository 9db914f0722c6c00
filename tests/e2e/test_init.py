"""`tatara init`: what it writes is planned and trained without a warning, whatever the size of data and vocabulary; what
cannot be fitted is refused with the reason and the remedy."""
import json
import os
import re
import shutil
import subprocess

import lib

# Documents of the corpus for training and held out, pieces of the tokenizer (0: the shared one, of 512), --size.
FITS = [
    (500, 60, 0, None),
    (500, 0, 0, None),
    (500, 60, 0, "1M"),
    (200, 5, 1000, None),
    (60, 3, 450, None),
    (3, 3, 450, None),
    (3, 0, 0, None),
    (3, 0, 0, "300k"),
]


class Init(lib.Case):
    def setUp(self):
        super().setUp()
        self.documents = (lib.options.data / "corpus.jsonl").read_text().splitlines()
        self.out = self.dir / "mine.yaml"

    def train_tokenizer(self, pieces):
        prefix = self.dir / f"tok{pieces}"
        subprocess.run(["spm_train", f"--input={lib.options.data / 'corpus.txt'}", f"--model_prefix={prefix}",
                        f"--vocab_size={pieces}", "--hard_vocab_limit=false", "--byte_fallback", "--minloglevel=2"],
                       check=True, capture_output=True)
        return prefix.with_suffix(".model")

    def prepare(self, name, documents, tokenizer):
        text, shards = self.dir / f"{name}.jsonl", self.dir / name
        text.write_text("\n".join(documents) + "\n")
        result = lib.tatara(["prepare", "--tokenizer", tokenizer, "--out", shards, text])
        self.assertEqual(result.status, 0, result)
        return shards

    def init(self, *words, status=0):
        result = lib.tatara(["init", "--out", self.out, *words])
        self.assertEqual(result.status, status, result)
        return result

    def values(self):
        """The options that the file sets, by name, and all of its comments as one text."""
        values, section = {}, ""
        lines = self.out.read_text().splitlines()
        for line in lines:
            match = re.match(r"( *)(\w+):(?: ([^#]*?) *(?:#.*)?)?$", line)
            if match and match.group(1):
                values[f"{section}.{match.group(2)}"] = match.group(3)
            elif match:
                section = match.group(2)
        return values, " ".join(line.split("# ", 1)[1] for line in lines if "# " in line)

    def check_run(self, ranks, *words):
        """Plans and trains it; returns the number of parameters and the options."""
        values, comments = self.values()
        lines = self.out.read_text().splitlines()
        self.assertLess(max(len(line) for line in lines if "path" not in line), 121)
        unexplained = [line.split(":")[0].strip() for line in lines if re.match(r"  \w+: [^#]*$", line)]
        self.assertLessEqual(set(unexplained), {"tokenizer", "train", "valid"})
        self.assertIn("20 a parameter", comments)
        parameters, memory = lib.plan(self, self.out, f"ranks={ranks}")
        result = lib.tatara(["train", self.out, f"run.dir={self.dir / 'run'}", *words], ranks, timeout=200)
        self.assertEqual(result.status, 0, result)
        # Of this machine, and of how busy its disk is, not of the configuration.
        passing = ("take turns", "is still being written")
        self.assertEqual([line for line in result.warnings() if not any(words in line for words in passing)], [])
        self.assertGreater(memory["total"], 0)
        return parameters, values

    def test_fits(self):
        for train, valid, pieces, size in FITS:
            with self.subTest(train=train, valid=valid, pieces=pieces, size=size):
                self.setUp()
                tokenizer = self.train_tokenizer(pieces) if pieces else lib.tokenizer()
                shards = self.prepare("train", self.documents[:train], tokenizer)
                held_out = ["--valid", self.prepare("valid", self.documents[-valid:], tokenizer)] if valid else []
                self.init("--tokenizer", tokenizer, *held_out, *(["--size", size] if size else []), "--ranks", 2, shards)
                parameters, values = self.check_run(2, "run.stop_at=1")
                self.assertEqual("log.eval_every" in values, valid > 0)
                if size:
                    wanted = float(size[:-1]) * {"k": 1e3, "M": 1e6}[size[-1]]
                    self.assertAlmostEqual(parameters, wanted, delta=0.25 * wanted)
                tokens = json.loads((shards / "dataset.json").read_text())["shards"][0]["tokens"]
                step = int(values["batch.global"]) * int(values["model.seq_len"])
                trained = int(values["run.steps"]) * step
                self.assertLessEqual(trained, 4 * tokens + step)
                self.assertGreater(trained, 2 * min(tokens, 5 * parameters) - step)

    def test_whole_run(self):
        result = self.init("--tokenizer", lib.tokenizer(), "--valid", lib.valid_shards(), lib.train_shards())
        _, values = self.check_run(1)
        program = str(lib.options.tatara)
        as_root = "--allow-run-as-root " if os.geteuid() == 0 else ""
        self.assertIn(f"{program} plan {self.out} ranks=", result.stdout)
        self.assertIn(f"{as_root}{program} train {self.out}\n", result.stdout)
        losses = lib.losses(self.dir / "run")
        self.assertEqual(len(losses), int(values["run.steps"]))
        self.assertLess(losses[-1], 0.5 * losses[0])

    def test_mixture(self):
        """Several datasets: each is read as often as the others."""
        other = self.prepare("a 'name' # with: signs", self.documents[:50], lib.tokenizer())
        self.init("--tokenizer", lib.tokenizer(), "--ranks", 3, lib.train_shards(), other)
        _, values = self.check_run(3, "run.stop_at=1")
        weights = [int(weight) for weight in re.findall(r"weight: (\d+)", self.out.read_text())]
        tokens = [json.loads((path / "dataset.json").read_text())["shards"][0]["tokens"]
                  for path in (lib.train_shards(), other)]
        self.assertEqual(weights, tokens)
        self.assertEqual(int(values["batch.global"]) // int(values["batch.micro"]) % 3, 0)

    def test_known_sizes(self):
        """In the proportions of models that are known, and within the ranges that training warns beyond."""
        for size, hidden, layers in (("10M", (320, 512), (4, 8)), ("124M", (640, 1024), (8, 20)),
                                     ("1.2B", (1536, 2048), (16, 30)), ("8B", (3584, 4608), (28, 44)),
                                     ("70B", (7168, 9728), (56, 96))):
            with self.subTest(size):
                self.setUp()
                self.init("--tokenizer", lib.tokenizer(), "--size", size, lib.train_shards())
                values, _ = self.values()
                self.assertTrue(hidden[0] <= int(values["model.hidden"]) <= hidden[1], values)
                self.assertTrue(layers[0] <= int(values["model.layers"]) <= layers[1], values)
                lib.plan(self, self.out)

    def test_many_ranks(self):
        """Ranks that this machine has no cores for are on others like it, and make the model no smaller."""
        parameters = []
        for ranks in (1, 640):
            self.setUp()
            self.init("--tokenizer", lib.tokenizer(), "--ranks", ranks, lib.train_shards())
            parameters.append(lib.plan(self, self.out, f"ranks={ranks}")[0])
            values, _ = self.values()
            self.assertEqual(int(values["batch.global"]) % (ranks * int(values["batch.micro"])), 0)
        self.assertEqual(parameters[0], parameters[1])

    def test_never_written_over(self):
        self.out.write_text("mine\n")
        words = ["init", "--out", self.out, "--tokenizer", lib.tokenizer(), lib.train_shards()]
        self.assertFails(lib.tatara(words), "usage", self.out, "exists", "--out")
        self.assertEqual(self.out.read_text(), "mine\n")

    def test_refused(self):
        short = json.dumps({"text": "猫は本を読む。"}, ensure_ascii=False)
        few = self.prepare("few", [short], lib.tokenizer())
        parts = self.dir / "parts" # of enough tokens together, but no shard has a sequence
        parts.mkdir()
        for i in range(12):
            shutil.copy(next(few.glob("*.h5")), parts / f"{i}.h5")
        common = ["--tokenizer", lib.tokenizer()]
        cases = [
            ("data", [*common, few], [few, "tokens in 1 shard", "65", "prepare more text"]),
            ("data", [*common, parts], [parts, "in 12 shards", "no shard has the 65"]),
            ("data", [*common, "--valid", few, lib.train_shards()], [few, "--valid-fraction", "leave --valid out"]),
            ("data", ["--tokenizer", lib.other_tokenizer(self.dir), lib.train_shards()], ["not made with", "other.model"]),
            ("data", ["--tokenizer", self.dir / "none.model", lib.train_shards()], ["none.model"]),
            ("data", [*common, self.dir / "none"], ["none"]),
            ("config", [*common, "--valid", lib.train_shards(), lib.train_shards()], ["held-out shards"]),
            ("config", [*common, lib.train_shards(), lib.train_shards()], ["listed twice", "weight"]),
            ("usage", [lib.train_shards()], ["--tokenizer"]),
            ("usage", common, ["which shards"]),
            ("usage", [*common, "--size", "big", lib.train_shards()], ["--size", "124M", "big"]),
            ("usage", [*common, "--size", "0", lib.train_shards()], ["--size"]),
            ("usage", [*common, "--size", "10MB", lib.train_shards()], ["10MB"]),
            ("usage", [*common, "--size", "nan", lib.train_shards()], ["nan"]),
            ("usage", [*common, "--ranks", "0", lib.train_shards()], ["--ranks"]),
            ("system", [*common, "--out", self.dir / "none/mine.yaml", lib.train_shards()], ["none/mine.yaml"]),
        ]
        for status, words, texts in cases:
            with self.subTest(words=list(map(str, words))):
                self.assertFails(lib.tatara(["init", "--out", self.out, *words]), status, *texts, within=40)
                self.assertFalse(self.out.exists())


if __name__ == "__main__":
    lib.main()
