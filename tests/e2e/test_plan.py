"""`tatara plan` says what training takes: parameters of the shipped configurations, and memory as measured."""
import os
import pathlib
import shutil

import h5py

import lib

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"
# Parameters by published figures, or as the configuration's name and source imply; every shipped file has a row.
PARAMETERS = {
    "tiny": 0.16e6,
    "smoke": 1.74e6,
    "quickstart": 10.1e6,
    "gpt2-124m": 124_439_808,
    "llama-1b": 1_235_814_400,
    "llm-jp-4-8b": 8.59e9,
    "fugaku-13b": 13.2e9,
    "llm-jp-3-172b": 172_394_557_440,
}


class Configs(lib.Case):
    def test_every_config(self):
        files = {path.stem: path for path in CONFIGS.glob("*.yaml")}
        self.assertEqual(sorted(files), sorted(PARAMETERS), "a row of PARAMETERS for every file of configs/")
        for name, path in files.items():
            with self.subTest(name):
                parameters, memory = lib.plan(self, path)
                self.assertAlmostEqual(parameters, PARAMETERS[name], delta=0.02 * PARAMETERS[name])
                self.assertAlmostEqual(memory.pop("total"), sum(memory.values()), delta=lib.MIB)

    def test_what_saves_memory(self):
        """The directions in which the options move memory, of the largest model."""
        path = CONFIGS / "llm-jp-3-172b.yaml"
        words = ["model.recompute=none", "parallel.zero=0"]
        none = lib.plan(self, path, *words, "ranks=8")[1]
        block = lib.plan(self, path, words[1], "model.recompute=block", "ranks=8")[1]
        attention = lib.plan(self, path, words[1], "model.recompute=attention", "ranks=8")[1]
        elementwise = lib.plan(self, path, words[1], "model.recompute=elementwise", "ranks=8")[1]
        divided = lib.plan(self, path, words[0], "parallel.zero=1", "ranks=8")[1]
        self.assertLess(block["activations"], 0.5 * attention["activations"])
        self.assertLess(attention["activations"], 0.9 * none["activations"])
        self.assertLess(elementwise["activations"], 0.75 * none["activations"])
        self.assertAlmostEqual(divided["optimizer"], none["optimizer"] / 8, delta=0.01 * none["optimizer"])

    def test_ranks(self):
        for wrong in ("ranks=0", "ranks=many", "ranks=2x"):
            self.assertFails(lib.tatara(["plan", CONFIGS / "tiny.yaml", wrong]), "usage", wrong)


class Refusals(lib.Case):
    """What training refuses of the configuration, the tokenizer and the shards, the plan refuses in the same words."""

    def errors(self, command, *words):
        result = lib.tatara([command, self.config()[0], *words])
        return result.status, result.errors()

    def test_as_training(self):
        empty = self.dir / "empty"
        empty.mkdir()
        damaged = self.dir / "damaged"
        shutil.copytree(lib.train_shards(), damaged)
        os.truncate(next(damaged.glob("*.h5")), 5000)
        train, link, copy = lib.train_shards(), self.dir / "link", self.dir / "copy.h5"
        shard = next(train.glob("*.h5"))
        link.symlink_to(train)
        shutil.copy(shard, copy)
        for words, status in (
            (["data.train=[]"], "config"),
            (["model.vocab_size=256"], "config"),
            (["model.vocab_size=256", "data.tokenizer=''"], "data"),
            ([f"data.tokenizer={lib.other_tokenizer(self.dir)}"], "data"),
            ([f"data.tokenizer={self.config()[0]}"], "data"),
            ([f"data.train=[{{path: {empty}}}]"], "data"),
            ([f"data.train=[{{path: {damaged}}}]"], "data"),
            ([f"data.valid=[{{path: {self.config()[0]}}}]"], "data"),
            *(([f"data.valid=[{{path: {path}}}]"], "config") for path in (f"{train}/", f"{train}/.", link, shard, copy)),
            *(([f"data.train=[{{path: {train}}}, {{path: {path}}}]"], "config") for path in (f"{train}/", copy)),
            (["model.seq_len=65536"], "data"),
            (["model.heads=3"], "config"),
            (["optim.lr=fast"], "config"),
            (["run.allow_changes=optim.lr"], "config"),
            (["device=cpu", "attention=cudnn"], "unsupported"),
            (["device=cpu", "graphs=on"], "unsupported"),
            (["device=cpu", "comm=nccl"], "config"),
        ):
            with self.subTest(words):
                said = self.errors("train", *words)
                self.assertEqual((said[0], len(said[1])), (lib.STATUS[status], 1), said)
                self.assertEqual(self.errors("plan", *words), said)

    def test_start(self):
        """The checkpoint that a new run begins from: of another model it is refused, and it may be on another machine."""
        first = self.train("first", "run.stop_at=1")
        for option in ("checkpoint.init_from", "checkpoint.resume"):
            with self.subTest(option):
                words = [f"{option}={first}", f"run.dir={self.dir / option}"]
                self.assertEqual(self.errors("plan", *words), (0, []))
                said = self.errors("plan", *words, "model.layers=3")
                self.assertEqual((said[0], len(said[1])), (lib.STATUS["data"], 1), said)
                self.assertEqual(self.errors("train", *words, "model.layers=3"), said)
                absent = lib.tatara(["plan", self.config()[0], f"{option}={first}/none"])
                self.assertEqual(absent.status, 0, absent)
                self.assertIn(f"not checked     {option} {first}/none: it is not on this machine\n", absent.stdout)

    def test_not_here(self):
        """Where the tokenizer or shards are not on this machine, the plan says so and is made; what is here is checked."""
        config, _ = self.config()
        absent = self.dir / "none"
        words = ["model.vocab_size=512", f"data.tokenizer={absent}",
                 f"data.train=[{{path: {absent}}}, {{path: {absent}/a}}]"]
        result = lib.tatara(["plan", config, *words])
        self.assertEqual(result.status, 0, result)
        for option, path in (("tokenizer", absent), ("train", absent), ("train", f"{absent}/a")):
            self.assertIn(f"not checked     data.{option} {path}: it is not on this machine\n", result.stdout)
        mixed = f"data.train=[{{path: {absent}}}, {{path: {lib.train_shards()}}}]"
        self.assertFails(lib.tatara(["plan", config, "model.vocab_size=256", words[1], mixed]), "data", "vocab_size")
        self.assertFails(lib.tatara(["plan", config, words[1]]), "data", absent)
        self.assertRegex(lib.tatara(["plan", config]).stdout, r"(?m)^data +\d+ tokens, read 0.37 times$")


class Disk(lib.Case):
    """A run's disk is checked by the plan: a checkpoint must not be larger, and not much smaller."""

    def check(self, ranks, *words):
        run_dir = self.train("run", "run.stop_at=1", *words, ranks=ranks)
        values = lib.plan_values(self, self.config("plan")[0], *words, f"ranks={ranks}", f"run.dir={run_dir}")
        files = list(lib.checkpoints(run_dir)[-1].iterdir())
        taken, planned = sum(file.stat().st_size for file in files), int(values["checkpoint.bytes"])
        pieces = []
        for file in files:
            if file.name.startswith("rank-"):
                with h5py.File(file, "r") as data:
                    data.visititems(lambda _, item: pieces.append(item.nbytes) if isinstance(item, h5py.Dataset) else None)
        # It takes a page for a large piece's alignment, of which any part may be used; what describes a piece takes at
        # least 1.1 of the 1.7 KiB that are planned; and a file is planned with 8 KiB, the manifest with 16 more.
        slack = 1024 * len(pieces) + 4096 * sum(size >= 65536 for size in pieces) + 16384 * len(files)
        self.assertLessEqual(taken, planned)
        self.assertLess(planned, taken + slack)
        self.assertGreater(taken, 12 * 119104)
        return values, run_dir

    def test_small(self):
        values, run_dir = self.check(3, "checkpoint.keep=5", "checkpoint.every=2", "checkpoint.keep_every=4")
        self.assertEqual((values["run.dir"], values["run.last_step"]), (str(run_dir), "20"))
        self.assertEqual(values["checkpoints"], str(5 + 20 // 4 + 1))
        self.assertEqual(int(values["checkpoints.bytes"]), 11 * int(values["checkpoint.bytes"]))
        values = lib.plan_values(self, self.config("plan")[0], "checkpoint.keep=5", "run.on_nan=rewind")
        self.assertEqual(values["checkpoints"], str(5 + 1 + 1))

    def test_large(self):
        self.check(2, "model.arch=gpt2", "model.hidden=256", "model.heads=4", "model.kv_heads=4", "model.head_dim=64",
                   "model.ffn_hidden=1024")


class Memory(lib.Case):
    """Large enough that the program's constants do not hide a mistake: 19M parameters, hundreds of MiB."""

    MODEL = ["model.layers=3", "model.hidden=512", "model.heads=8", "model.kv_heads=4", "model.head_dim=64",
             "model.ffn_hidden=1408", "model.seq_len=512", "model.vocab_size=16384", "batch.micro=4",
             "batch.global=8", "run.steps=2", "optim.warmup_steps=0", "optim.decay_steps=0",
             "checkpoint.every=1", "run.threads=1"]

    def check(self, ranks, *words):
        words = [*self.MODEL, *words]
        run_dir = self.train("run", *words, ranks=ranks, timeout=120)
        _, memory = lib.plan(self, self.config("plan")[0], *words, f"ranks={ranks}")
        start, measured = lib.events(run_dir, "start")[0], lib.measured_bytes(run_dir)
        self.assertGreater(measured, 200 * lib.MIB)
        self.assertAlmostEqual(memory["total"], start["planned_bytes"], delta=lib.MIB, msg="not what the run says")
        self.assertAlmostEqual(memory["total"] / lib.MIB, measured / lib.MIB, delta=0.05 * measured / lib.MIB,
                               msg={kind: round(taken / lib.MIB, 1) for kind, taken in memory.items()})

    def test_bf16(self):
        self.check(1, "parallel.zero=0")

    def test_fp32_recompute(self):
        self.check(1, "precision.compute=fp32", "model.recompute=block")

    def test_bf16_recompute_2_ranks(self):
        self.check(2, "parallel.zero=1", "model.recompute=block")

    def test_fp32_2_ranks(self):
        self.check(2, "parallel.zero=0", "precision.compute=fp32")

    def test_does_not_grow(self):
        """What steps allocate they free. MPI's buffers in flight come and go with time, which the peak shows as growth
        of some hundred KiB in all, whenever that is; a leak grows with every step."""
        run_dir = self.train("run", "run.steps=1000", "optim.decay_steps=0", "checkpoint.every=0", "batch.global=4",
                             ranks=2)
        peaks = [line["peak_rss_bytes"] for line in lib.metrics(run_dir) if "event" not in line]
        self.assertLess(peaks[-1] - peaks[99], 1024 * (len(peaks) - 100), peaks[::20])


if __name__ == "__main__":
    lib.main()
