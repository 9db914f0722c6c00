"""What a run is told to do differently from the checkpoint that it goes on from.

The column `change` of include/options.def says what another value at a resume does: every option is flipped once, and the
column is held against what comes out.
"""
import pathlib
import re
import shutil

import lib

OPTIONS = pathlib.Path(__file__).resolve().parents[2] / "include" / "options.def"
ROW = re.compile(r"^(INT|NUM|BOOL|STR|PATH|CHOICE|DATASETS)\((\w+), (\w+), (.*)$", re.MULTILINE)
STEPS, HALF = 4, 2
# What counts of these is what they become.
RECORDED = ["device", "comm", "attention", "precision.product"]
WORDS = ["run.steps=4", "optim.warmup_steps=1", "optim.decay_steps=2", "precision.compute=fp32", "checkpoint.keep=9"]
# Where one more, half as much again, the other word is not to be had alone, or not the thing to try; OTHER is a folder with
# the same shards made by another tokenizer.
FLIPS = {
    "run.dir": "",  # every flip has another
    "run.steps": "run.steps=6 run.stop_at=4",
    "run.stop_at": "run.stop_at=4",
    "run.allow_changes": "run.allow_changes=model.rope_theta",
    "model.arch": "model.arch=gpt2 model.kv_heads=4",
    "model.heads": "model.heads=8 model.head_dim=8 model.kv_heads=4",  # the same shapes
    "model.kv_heads": "model.kv_heads=4",
    "model.head_dim": "model.head_dim=8 model.heads=8 model.kv_heads=4",
    "model.vocab_size": "model.vocab_size=1024",
    "data.tokenizer": "data.tokenizer={other}/other.model data.train=[{{path: {other}/shards}}]",
    "data.train": "data.train=[{{path: {train}}},{{path: {valid}}}]",
    "data.valid": "data.valid=[{{path: {valid}}}]",
    "batch.micro": "batch.micro=5",
    "batch.global": "batch.global=20",
    "optim.warmup_steps": "optim.warmup_steps=2",
    "optim.decay_steps": "optim.decay_steps=1",
    "optim.schedule": "optim.schedule=cosine",
    "parallel.zero": "parallel.zero=0",
    "precision.compute": "precision.compute=bf16",
    "precision.product": "precision.product=portable",
    "device": "device=cpu",
    "comm": "comm=mpi",
    "attention": "attention=flash",
    "graphs": "graphs=off",
    "checkpoint.init_from": "checkpoint.init_from={half}",
    "checkpoint.init_optimizer": "checkpoint.init_optimizer=true checkpoint.init_from={half}",
    "checkpoint.resume": "checkpoint.resume={half}",
    "log.eval_every": "log.eval_every=1 data.valid=[{{path: {valid}}}]",
}


def options():
    """Name and class of every option."""
    rows = []
    for kind, section, key, rest in ROW.findall(OPTIONS.read_text()):
        name = key if section == "top" else f"{section}.{key}"
        change = re.search(r"\b(HARMLESS|COURSE\(|FUNCTION)", rest).group(1).rstrip("(")
        rows.append((kind, name, change))
    return rows


def values(run_dir):
    """The effective configuration of a run, by name, as text."""
    section, found = "", {}
    for line in (run_dir / "config.yaml").read_text().splitlines():
        key, _, value = line.strip().partition(": ")
        if line.endswith(":"):
            section = line[:-1] + "."
        elif line.startswith(" "):
            found[section + key] = value
        else:
            found[key] = value
    return found


def flip(kind, name, value):
    """key=value with another value."""
    if kind == "INT":
        return f"{name}={int(value) + 1}"
    if kind == "NUM":
        return f"{name}={float(value) * 0.75 or 0.25:.9f}"
    if kind == "BOOL":
        return f"{name}={'false' if value == 'true' else 'true'}"
    return next(f"{name}={word}" for word in ("skip", "stop", "block", "linear", "fast", "on") if word in option_words(name)
                and word != value)


def option_words(name):
    section, _, key = name.rpartition(".")
    return re.search(rf'^CHOICE\({section or "top"}, {key}, \d+, "([^"]*)"', OPTIONS.read_text(), re.MULTILINE)[1].split("|")


class Changes(lib.Case):
    @classmethod
    def setUpClass(cls):
        cls.folder = lib.temp_dir(cls.addClassCleanup)
        cls.config_path, cls.base = lib.write_config(cls.folder, "base")
        for words in (["run.stop_at=2"], []):
            result = lib.tatara(["train", cls.config_path, *WORDS, *words])
            assert result.status == 0, result
        other = lib.other_tokenizer(cls.folder)
        result = lib.tatara(["prepare", "--tokenizer", other, "--out", cls.folder / "shards", lib.options.data / "corpus.jsonl"])
        assert result.status == 0, result
        cls.names = {"other": cls.folder, "train": lib.train_shards(), "valid": lib.valid_shards(),
                     "half": cls.base / f"step-{HALF:08d}"}

    def go_on(self, name, *words):
        """From half-way in a copy of the run's folder; returns it and how it ended."""
        run_dir = self.dir / name
        shutil.copytree(self.base / f"step-{HALF:08d}", run_dir / f"step-{HALF:08d}")
        return run_dir, lib.tatara(["train", self.config_path, *WORDS, f"run.dir={run_dir}", *words])

    def said(self, run_dir):
        (event,) = lib.events(run_dir, "resume")
        return [change["key"] for change in event["changes"]]

    def differs(self, run_dir):
        one, other = (lib.read_checkpoint(run / f"step-{STEPS:08d}") for run in (self.base, run_dir))
        return any(not lib.same_bits(one[name], other[name]) for name in one)

    def check_function(self, name, words):
        """Refused, and with leave either named or, with other shapes, refused all the same."""
        _, result = self.go_on(name, *words)
        if result.status == lib.STATUS["data"]:
            return self.assertFails(result, "data", "another model")
        self.assertFails(result, "config", name, "run.allow_changes=")
        keys = re.search(r"run\.allow_changes=(\S+)", result.errors()[0])[1]
        run_dir, result = self.go_on(f"{name}-allowed", *words, f"run.allow_changes={keys}")
        self.assertEqual(result.status, 0, result)
        self.assertIn(name, self.said(run_dir))

    def test_every_option(self):
        now, rows = values(self.base), options()
        self.assertEqual(sorted(now), sorted(name for _, name, _ in rows))
        for kind, name, change in rows:
            words = FLIPS[name] if name in FLIPS else flip(kind, name, now[name])
            words = re.split(r" (?=[\w.]+=)", words.format(**self.names)) if name in FLIPS and words else [words] if words else []
            with self.subTest(name, words=words):
                if change == "FUNCTION":
                    self.check_function(name, words)
                    continue
                run_dir, result = self.go_on(name, *words)
                self.assertEqual(result.status, 0, result)
                if name in RECORDED:  # then by what it became, and only where that is another
                    (event,) = lib.events(run_dir, "resume")
                    self.assertEqual(self.differs(run_dir), bool(event["arithmetic_changes"]), result)
                    continue
                self.assertEqual(name in self.said(run_dir), change == "COURSE", result)
                if change == "HARMLESS":
                    self.assertFalse(self.differs(run_dir), "other bits: the option is not harmless")
                elif name not in ("log.eval_batches", "data.valid"):
                    self.assertRegex(result.stderr, rf"changed since the checkpoint: {re.escape(name)}: .+ → .+: .+")

    def test_same(self):
        """Nothing is said where nothing has changed, wherever the data and the tokenizer lie."""
        moved = self.dir / "moved"
        shutil.copytree(lib.train_shards(), moved)
        shutil.copy(lib.tokenizer(), self.dir / "copy.model")
        run_dir, result = self.go_on("run", f"data.train=[{{path: {moved}}}]", f"data.tokenizer={self.dir / 'copy.model'}")
        self.assertEqual(result.status, 0, result)
        self.assertNotIn("changed since", result.stderr)
        self.assertFalse(self.differs(run_dir))

    def test_contents(self):
        """Other contents under the same path are another data set."""
        train = self.dir / "train"
        shutil.copytree(lib.train_shards(), train)
        run_dir, result = self.go_on("half", f"data.train=[{{path: {train}}}]", "run.stop_at=3")
        shutil.rmtree(train)
        shutil.copytree(lib.valid_shards(), train)
        result = lib.tatara(["train", self.config_path, *WORDS, f"run.dir={run_dir}", f"data.train=[{{path: {train}}}]"])
        self.assertRegex(result.stderr, r"changed since the checkpoint: data\.train: .*train 100% \(\w+\) → .*train 100% \(\w+\)")

    def test_batch(self):
        """The next unread sequence follows, and tokens are those that were read."""
        still = [*WORDS, "optim.lr=0", "optim.min_lr=0", "checkpoint.every=1"]  # then the loss tells what was read
        run_dir = self.train("wide", *still, "run.stop_at=2")
        self.train("wide", *still, "batch.global=20", "run.stop_at=3")
        straight = self.train("straight", *still, "batch.global=20", "run.stop_at=2")
        # 2 steps of 10 sequences, then one of 20: sequences 20 … 39, as in the second step of a run with 20 from the start.
        self.assertEqual(lib.losses(run_dir)[2], lib.losses(straight)[1])
        result = lib.tatara(["ckpt", "show", run_dir / "step-00000003"])
        self.assertRegex(result.stdout, r"(?m)^sequences +40 read$")
        self.assertRegex(result.stdout, rf"(?m)^tokens +{40 * 64}$")

    def test_length(self):
        """Sequences of another length begin the data anew, and it is said how many tokens are read again."""
        run_dir, result = self.go_on("short", "model.seq_len=32")
        self.assertIn("1280 tokens were read in sequences of 64; in those of 32 they are read again", result.stderr)
        result = lib.tatara(["ckpt", "show", run_dir / f"step-{STEPS:08d}"])
        self.assertRegex(result.stdout, r"(?m)^sequences +20 read$")
        self.assertRegex(result.stdout, rf"(?m)^tokens +{20 * 64 + 20 * 32}$")

    def test_kept(self):
        """The configurations of earlier attempts stay beside the new one; metrics say what changed, and the log of the jump."""
        run_dir, result = self.go_on("run", "run.stop_at=2")
        before = (run_dir / "config.yaml").read_text()
        result = lib.tatara(["train", self.config_path, *WORDS, f"run.dir={run_dir}", "optim.lr=2e-3"])
        self.assertEqual((run_dir / "config.1.yaml").read_text(), before)
        self.assertIn("lr: 0.002\n", (run_dir / "config.yaml").read_text())
        self.assertRegex(result.stderr, r"the learning rate of step 3 is [\d.e-]+; it would have been [\d.e-]+")
        change = lib.events(run_dir, "resume")[-1]["changes"][0]
        self.assertEqual((change["key"], change["before"], change["now"]), ("optim.lr", "0.003", "0.002"))

    def test_init_from(self):
        """Another run's weights make the same demand on the model, and none on the course."""
        config, run_dir = self.config("fresh")
        half = self.names["half"]
        result = lib.tatara(["train", config, *WORDS, f"checkpoint.init_from={half}", "model.norm_eps=1e-6", "optim.lr=1e-3"])
        self.assertFails(result, "config", "model.norm_eps: 1.0e-05 → 1.0e-06", "run.allow_changes=model.norm_eps")
        result = lib.tatara(["train", config, *WORDS, f"checkpoint.init_from={half}", "model.norm_eps=1e-6", "optim.lr=1e-3",
                             "run.allow_changes=model.norm_eps"])
        self.assertEqual(result.status, 0, result)
        self.assertIn("model.norm_eps", result.stderr)
        self.assertNotIn("optim.lr:", result.stderr)

    def test_arithmetic(self):
        """Another product, as another library or machine would have it, is named beside the option that asked for it."""
        run_dir, result = self.go_on("portable", "precision.product=portable")
        (event,) = lib.events(run_dir, "resume")
        self.assertEqual([change["key"] for change in event["arithmetic_changes"]], ["device"])
        self.assertIn("perhaps not the same bits", result.stderr)

    def test_ranks(self):
        """Sums in fp32 depend on the ranks; those of integers do not."""
        for reduce, said in (("exact", []), ("fast", ["ranks"])):
            words = [f"parallel.reduce={reduce}"]
            run_dir, _ = self.go_on(reduce, *words, "run.stop_at=3")
            result = lib.tatara(["train", self.config_path, *WORDS, f"run.dir={run_dir}", *words], ranks=2)
            self.assertEqual(result.status, 0, result)
            event = lib.events(run_dir, "resume")[-1]
            self.assertEqual([change["key"] for change in event["arithmetic_changes"]], said)


if __name__ == "__main__":
    lib.main()
