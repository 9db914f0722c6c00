"""What a person reads and writes: streams, paths, names of checkpoints, the lines of metrics.jsonl."""
import calendar
import json
import re
import shutil
import time

import lib


class Streams(lib.Case):
    """Each stream makes sense alone: progress and losses on stdout; all that describes the run on stderr."""

    def test_train(self):
        began = time.time()
        config, run_dir = self.config()
        result = lib.tatara(["train", config, f"data.valid=[{{path: {lib.valid_shards()}}}]", "optim.eps=1e-12"])
        self.assertEqual(result.status, 0, result)
        for line in result.stdout.splitlines():
            self.assertRegex(line, r"^step \d+/20  (loss|validation loss) ", result)
        self.assertEqual(len(result.stdout.splitlines()), 21, result)
        words = ["training, 1 rank", "run         dir=", "warning: optim.eps", "device: ", "data: ", "model: ", "done: "]
        places = [result.stderr.find(word) for word in words]
        self.assertNotIn(-1, places, result)
        self.assertEqual(places, sorted(places), result)
        self.assertNotIn("flash", result.stderr.split("device: ")[1], "said of a CPU")
        times = [line["time"] for line in lib.metrics(run_dir) if line.get("event") != "evaluation"]
        self.assertEqual(times, sorted(times))
        first, last = (calendar.timegm(time.strptime(at[:19], "%Y-%m-%dT%H:%M:%S")) for at in (times[0], times[-1]))
        self.assertTrue(began - 1 <= first and last <= time.time() and re.fullmatch(r".{19}\.\d{3}Z", times[0]), times)


    def test_quiet(self):
        """TATARA_LOG leaves progress alone."""
        result = lib.tatara(["train", self.config()[0], "run.stop_at=2"], prefix=["env", "TATARA_LOG=warn"])
        self.assertEqual((result.status, result.stderr, len(result.stdout.splitlines())), (0, "", 2), result)

    def test_stop_at(self):
        result = lib.tatara(["train", self.config()[0], "run.stop_at=2"])
        self.assertIn("as run.stop_at says; the command without it goes on from here", result.stderr)


class Peak(lib.Case):
    """What the share of the matmul peak refers to is measured once and kept with the run."""

    WORDS = ["precision.compute=fp32", "run.threads=1"]

    def shares(self, result):
        return [int(share) for share in re.findall(r"  (\d+)% of matmul peak", result.stdout)]

    def test_kept(self):
        config, run_dir = self.config()
        said = []
        for stop_at in (5, 10):
            result = lib.tatara(["train", config, *self.WORDS, f"run.stop_at={stop_at}"])
            self.assertEqual(result.status, 0, result)
            self.assertEqual(len(self.shares(result)), 5, result)
            self.assertLessEqual(max(self.shares(result)), 100)
            said.append(re.search(r"matmul: .* measured (.*)", result.stderr).group(1))
        self.assertEqual(said, ["with the model's largest product", "by an earlier start of this run"])
        (kind, rate), = json.loads((run_dir / "matmul.json").read_text()).items()
        self.assertIn("1 ranks, 1 on a node", kind)
        self.assertEqual([event["matmul_flops"] for event in lib.events(run_dir, "resume")], [rate])
        # Another number of ranks is another machine; bits do not depend on who measured.
        result = lib.tatara(["train", config, *self.WORDS], ranks=2)
        self.assertEqual(result.status, 0, result)
        self.assertEqual(len(json.loads((run_dir / "matmul.json").read_text())), 2)
        self.assertSameWeights(self.train("straight", *self.WORDS) / "step-00000020", run_dir / "step-00000020")

    def test_too_slow(self):
        """A rate that steps surpass, as of a machine that was busy then, is said once, and raised; no share is above 100%."""
        config, run_dir = self.config()
        self.assertEqual(lib.tatara(["train", config, *self.WORDS, "run.stop_at=1"]).status, 0)
        path = run_dir / "matmul.json"
        kind, = json.loads(path.read_text())
        for text in (json.dumps({kind: 1000.0}), "{", "[]"):
            path.write_text(text)
            result = lib.tatara(["train", config, *self.WORDS, "run.stop_at=4"])
            self.assertEqual(result.status, 0, result)
            shutil.rmtree(run_dir / "step-00000004")
            slow = text.startswith('{"')
            self.assertEqual(result.stderr.count("busy then, or slower"), slow, result)
            self.assertEqual(max(self.shares(result)) == 100, slow, result)
            self.assertGreater(json.loads(path.read_text())[kind], 1e6)


class Paths(lib.Case):
    """Relative ones are relative to the working directory, wherever the file lies; what is not found is named whole."""

    def tatara(self, *words):
        # A shell that only changes the folder.
        return lib.tatara(words, prefix=["sh", "-c", 'cd "$0" && exec "$@"', self.dir])

    def test_relative(self):
        inner = self.dir / "configs"
        inner.mkdir()
        self.config(folder=inner)
        (self.dir / "shards").symlink_to(lib.train_shards())
        (self.dir / "tok").symlink_to(lib.tokenizer())
        words = ["train", "configs/run.yaml", "run.dir=runs/x", "run.steps=10", "data.tokenizer=tok"]
        result = self.tatara(*words, "data.train=[{path: ./shards}]")
        self.assertEqual(result.status, 0, result)
        self.assertTrue((self.dir / "runs/x/step-00000010").is_dir())
        for more, status, missing in (
            (["data.train=[{path: ./none}]"], "data", "dataset {}/none: "),
            (["data.train=[{path: tok/x}]"], "data", "dataset {}/tok/x: "),
            (["data.tokenizer=none.model"], "data", "tokenizer {}/none.model: "),
            (["data.train=[{path: shards}]", "run.dir=runs/y", "checkpoint.resume=runs/none/step-00000011"], "data",
             "{}/runs/none/step-00000011"),
            (["data.train=[{path: shards}]", "run.dir=tok/y"], "system", "folder {}/tok/y cannot be created"),
        ):
            with self.subTest(more):
                self.assertFails(self.tatara(*words, *more), status, missing.format(self.dir))
        self.assertFails(self.tatara("train", "none.yaml"), "config", f"cannot open {self.dir}/none.yaml: No such file")
        self.assertFails(self.tatara("ckpt", "show", "runs/y"), "data", f"{self.dir}/runs/y is neither a checkpoint")

    def test_home(self):
        """A folder called ~ is never made."""
        home = self.dir / "home"
        home.mkdir()
        config, _ = self.config()
        result = lib.tatara(["train", config, "run.dir=~/run", "run.stop_at=1"],
                            prefix=["sh", "-c", 'cd "$0" && HOME="$0/home" && export HOME && exec "$@"', self.dir])
        self.assertEqual(result.status, 0, result)
        self.assertTrue((home / "run/step-00000001").is_dir())
        self.assertFalse((self.dir / "~").exists())
        for words in (["prepare", "--tokenizer", lib.tokenizer(), "--out=~/shards", config], ["init", "--out=~/a.yaml"],
                      ["data", "show", "--tokenizer=~/tok", lib.train_shards()], ["sample", "--ckpt=~/run"],
                      ["prepare", "--tokenizer", lib.tokenizer(), "--out", "shards", "~/c/*.jsonl"], ["init", "~/shards"],
                      ["plan", "~/x.yaml"], ["train", "~other/x.yaml"], ["ckpt", "show", "~/x"], ["ckpt", "diff", config, "~"],
                      ["data", "show", "~/x"]):
            self.assertFails(self.tatara(*words), "usage", "the shell leaves ~ as it is")
        self.assertFalse((self.dir / "~").exists())


class Checkpoints(lib.Case):
    def test_folder_of_run(self):
        """In place of a checkpoint its run's folder may be named, whose newest complete one is meant; ckpt diff ends as
        diff(1) does."""
        run_dir = self.train("run", "checkpoint.every=10", "run.steps=20")
        old, new = run_dir / "step-00000010", run_dir / "step-00000020"
        shutil.copytree(new, run_dir / "step-00000030")
        (run_dir / "step-00000030/rank-00000.h5").unlink()
        self.assertIn(f"OK: {new}, ", lib.tatara(["ckpt", "verify", run_dir]).stdout)
        self.assertRegex(lib.tatara(["ckpt", "show", run_dir]).stdout, rf"^checkpoint +{new}\nstep +20\n")
        for words, status, text in (
            ([run_dir, new], 0, "are the same, bit for bit"),
            ([old, run_dir], 1, "tensors differ"),
            ([run_dir, self.dir / "none"], lib.STATUS["data"], ""),
            ([run_dir], lib.STATUS["usage"], ""),
        ):
            result = lib.tatara(["ckpt", "diff", *words])
            self.assertEqual(result.status, status, result)
            self.assertIn(text, result.stdout)
            self.assertEqual(bool(result.errors()), status > 1, result)


if __name__ == "__main__":
    lib.main()
