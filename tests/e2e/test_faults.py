"""Bad input, bad numbers and bad machines: all ranks end within 10 s with an error that says what is wrong, where,
and what to do; and what was saved before still loads."""
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import time
import unittest

import h5py

import lib


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def is_running(process):
    """False for a zombie too: in a container nobody may care for those whose parent has ended."""
    try:
        return pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Run(lib.Case):
    """Cases that start from a good run of 10 steps with checkpoints at 5 and 10, made once by 2 ranks."""

    @classmethod
    def setUpClass(cls):
        cls.folder = lib.temp_dir(cls.addClassCleanup)
        config, cls.good = lib.write_config(cls.folder, "good")
        result = lib.tatara(["train", config, "run.stop_at=10", "checkpoint.every=5"], ranks=2)
        assert result.status == 0, result

    def setUp(self):
        super().setUp()
        self.yaml, self.run_dir = self.config()
        shutil.copytree(self.good, self.run_dir)
        self.newest, self.before = self.run_dir / "step-00000010", self.run_dir / "step-00000005"

    def go_on(self, *words, ranks=2, **more):
        return lib.tatara(["train", self.yaml, *words], ranks, **more)

    def check_loads(self):
        """What was saved before verifies and resumes."""
        result = lib.tatara(["ckpt", "verify", self.before])
        self.assertEqual(result.status, 0, result)
        result = self.go_on("run.stop_at=12")
        self.assertEqual(result.status, 0, result)
        self.assertEqual(lib.events(self.run_dir, "resume")[-1]["step"], 10)


class Data(Run):
    def setUp(self):
        super().setUp()
        self.shards = self.dir / "shards"
        shutil.copytree(lib.train_shards(), self.shards)
        self.shard = sorted(self.shards.glob("*.h5"))[0]
        self.words = [f"data.train=[{{path: {self.shards}}}]"]

    def check(self, *texts):
        self.assertFails(self.go_on(*self.words), "data", *texts)
        self.check_loads()

    def test_flipped_bit_in_tokens(self):
        with h5py.File(self.shard, "r") as file:
            tokens = file["tokens"]
            offset, middle = tokens.id.get_offset(), tokens.dtype.itemsize * (len(tokens) // 2)
        lib.flip_bit(self.shard, offset + middle)
        self.check(self.shard, "checksum", "tatara prepare")

    def test_flipped_bit_in_header(self):
        with h5py.File(self.shard, "r") as file:
            sums = file["checksums/tokens"].id.get_offset()
        lib.flip_bit(self.shard, sums)
        self.check(self.shard, "tatara prepare")

    def test_truncated_shard(self):
        truncate(self.shard)
        self.check(self.shard, "tatara prepare")

    def test_missing_shards(self):
        shutil.rmtree(self.shards)
        self.check(self.shards, "No such file")

    def test_empty_folder(self):
        for shard in self.shards.glob("*.h5"):
            shard.unlink()
        self.check(self.shards)

    def test_not_a_shard(self):
        self.shard.write_bytes(b"no HDF5 file" * 100)
        self.check(self.shard)

    def test_shard_of_another_tokenizer(self):
        self.words.append(f"data.tokenizer={lib.other_tokenizer(self.dir)}")
        self.check("tokenizer", "data.tokenizer")

    def test_tokenizer_is_no_tokenizer(self):
        other = self.dir / "other.model"
        other.write_bytes(b"no tokenizer")
        self.words.append(f"data.tokenizer={other}")
        self.check(other)


class Checkpoint(Run):
    def check_falls_back(self, *texts):
        """The newest is damaged: a warning names it, and the run goes on from the one before."""
        result = self.go_on("run.stop_at=12")
        self.assertEqual(result.status, 0, result)
        self.assertEqual(lib.events(self.run_dir, "resume")[-1]["step"], 5)
        warnings = [line for line in result.warnings() if str(self.newest) in line]
        self.assertEqual(len(warnings), 1, result)
        for text in texts:
            self.assertIn(text, warnings[0])
        self.assertEqual(result.errors(), [])

    def check_refused(self, name):
        """Asked for by name it is refused, by training and by verification."""
        for result in (self.go_on(f"checkpoint.resume={self.newest}"), lib.tatara(["ckpt", "verify", self.newest])):
            self.assertFails(result, "data", self.newest, name, "earlier checkpoint")

    def test_flipped_bit(self):
        file = self.newest / "rank-00001.h5"
        lib.flip_bit(file, file.stat().st_size // 2)
        self.check_refused(file.name)
        self.check_falls_back(file.name, "checksum")

    def test_truncated_file(self):
        truncate(self.newest / "rank-00000.h5")
        self.check_refused("rank-00000.h5")
        self.check_falls_back("rank-00000.h5")

    def test_missing_file(self):
        (self.newest / "rank-00001.h5").unlink()
        self.check_refused("rank-00001.h5")
        self.check_falls_back("rank-00001.h5")

    def test_damaged_index(self):
        truncate(self.newest / "index.h5")
        self.check_refused("index.h5")
        self.check_falls_back("index.h5")

    def test_damaged_manifest(self):
        truncate(self.newest / "manifest.json")
        self.check_refused("manifest.json")
        self.check_falls_back("manifest.json")

    def test_none_is_whole(self):
        """With every checkpoint damaged a run must not begin anew as if there had been none."""
        truncate(self.newest / "rank-00000.h5")
        truncate(self.before / "rank-00000.h5")
        self.assertFails(self.go_on(), "data", self.run_dir)

    def test_another_model(self):
        self.assertFails(self.go_on("model.ffn_hidden=96"), "data", self.newest, "another model", "run.dir")
        self.check_loads()

    def test_not_there(self):
        self.assertFails(self.go_on("checkpoint.resume=nowhere"), "data", "nowhere")
        self.check_loads()


class Trouble(Run):
    def test_nan(self):
        """Weight decay of lr * weight_decay = 100 multiplies weights by -99 in every step, until they overflow."""
        for compute in ("bf16", "fp32"):
            with self.subTest(compute):
                words = ["optim.lr=10", "optim.min_lr=10", "optim.weight_decay=10", "optim.warmup_steps=0",
                         "optim.schedule=constant", "run.steps=100", f"precision.compute={compute}"]
                self.assertFails(self.go_on(*words), "numeric", "NaN", "optim.lr", "step ")
        self.check_loads()

    def test_killed_rank(self):
        """A rank that is killed takes the job with it, even while the others wait for its gradients."""
        with lib.Process(["train", self.yaml, "run.steps=1000000"], ranks=2) as process:
            before = lib.steps_done(self.run_dir)
            lib.wait_for("a step", lambda: lib.steps_done(self.run_dir) > before)
            ranks = process.ranks()
            self.assertEqual(len(ranks), 2)
            os.kill(ranks[1], signal.SIGKILL)
            result = process.wait(10)
        self.assertNotEqual(result.status, 0, result)
        lib.wait_for("the end of all ranks", lambda: not any(is_running(rank) for rank in ranks), timeout=5)
        self.check_loads()

    def test_stopped_rank(self):
        """A rank that stands still, whichever it is, is named by the others, and the job ends with the status that says:
        try again. What it was stopped in does not matter: the last one may have been inside a collective."""
        for victim in (0, 2):
            with self.subTest(victim=victim):
                words = ["train", self.yaml, "run.steps=1000000", "run.hang_timeout_s=2"]
                with lib.Process(words, ranks=3) as process:
                    before = lib.steps_done(self.run_dir)
                    lib.wait_for("a step", lambda: lib.steps_done(self.run_dir) > before)
                    ranks = process.ranks()
                    self.assertEqual(len(ranks), 3)
                    os.kill(ranks[victim], signal.SIGSTOP)
                    result = process.wait(2 + 10)
                self.assertEqual(result.status, lib.STATUS["comm"], result)
                errors = result.errors()
                self.assertEqual(len(errors), 1, result)
                self.assertIn("run.hang_timeout_s", errors[0])
                self.assertIn(f"1 of 3 ranks did not arrive: {victim}.", errors[0])
                lib.wait_for("the end of all ranks", lambda: not any(is_running(rank) for rank in ranks), timeout=5)
        self.check_loads()

    def test_slow_rank(self):
        """A rank that gets a quarter of its time is named in the progress line."""
        words = ["train", self.yaml, "run.steps=1000000", "log.every=10"]
        with lib.Process(words, ranks=3) as process:
            before = lib.steps_done(self.run_dir)
            lib.wait_for("a step", lambda: lib.steps_done(self.run_dir) > before)
            victim = process.ranks()[1]

            def is_named():
                os.kill(victim, signal.SIGSTOP)
                time.sleep(0.03)
                os.kill(victim, signal.SIGCONT)
                time.sleep(0.01)
                # On a busy machine another rank may be slow before this one has been for long enough.
                return re.search(r"rank 1 is slow: [0-9.e-]+ s a micro-batch on its own, the median",
                                 process.result().stdout)

            lib.wait_for("the slow rank's name", is_named, timeout=60)

    def test_run_dir_is_a_file(self):
        place = self.dir / "file"
        place.write_text("in the way")
        self.assertFails(self.go_on(f"run.dir={place}"), "system", place)
        self.assertFails(self.go_on(f"run.dir={place / 'below'}"), "system", place)

    def test_no_cuda(self):
        self.assertFails(self.go_on("device=cuda"), "device", "CUDA", "device=cpu")

    def test_too_little_memory(self):
        """Refused before anything is taken, with what would help."""
        result = self.go_on("model.layers=64", "model.hidden=65536", f"run.dir={self.dir / 'unused'}")
        self.assertFails(result, "config", "MiB", "batch.micro", "model.recompute")
        self.assertFalse((self.dir / "unused").exists())

    def check_full_disk(self, result):
        """The save of step 15, one of many, was a warning; that of the end, step 16, was an error."""
        self.assertFails(result, "system", self.run_dir, "free space")
        warnings = [line for line in result.warnings() if "no checkpoint at step 15" in line]
        self.assertEqual(len(warnings), 1, result)
        self.assertIn("step 16/", result.stdout)

    def test_full_disk(self):
        """A small disk of its own, in a mount namespace, with room for the good run and half a checkpoint more."""
        checkpoint = sum(file.stat().st_size for file in self.newest.iterdir())
        whole = sum(file.stat().st_size for file in self.run_dir.rglob("*") if file.is_file())
        copy, log = self.dir / "copy", self.dir / "verify.log"
        self.run_dir.rename(copy)
        self.run_dir.mkdir()
        script = 'mount -t tmpfs -o size="$1" none "$2" || exit 99\n' \
                 'cp -r "$3"/. "$2"\nlog=$4\nshift 4\n"$@"\nstatus=$?\n' \
                 f'"{lib.options.tatara}" ckpt ls "{self.run_dir}" >"$log"\n' \
                 f'"{lib.options.tatara}" ckpt verify "{self.newest}" >>"$log" && exit $status\nexit 98'
        size = str(whole + checkpoint // 2)
        result = self.go_on("run.stop_at=16", "checkpoint.every=5", prefix=[
            "unshare", "--mount", "bash", "-c", script, "bash", size, self.run_dir, copy, log])
        if result.status == 99 or (result.status == 1 and "unshare" in result.stderr):
            self.skipTest("mounting is not permitted here")
        self.check_full_disk(result)
        self.assertNotIn("step-00000015", log.read_text())

    def test_full_disk_with_space_again(self):
        """The disk is full for a while, and its space comes back while the run goes on: so do its checkpoints."""
        script = ('mount -t tmpfs -o size="$1" none "$2" || exit 99\n'
                  'cp -r "$3"/. "$2"; head -c "$4" /dev/zero >"$2/filler"; log=$5; shift 5\n'
                  '"$@" 2>"$log" & pid=$!\n'
                  'until grep -q "no checkpoint at step" "$log" || ! kill -0 $pid; do sleep 0.02; done\n'
                  f'rm "{self.run_dir}/filler"; wait $pid; status=$?; cat "$log" >&2; exit $status')
        checkpoint = sum(file.stat().st_size for file in self.newest.iterdir())
        whole = sum(file.stat().st_size for file in self.run_dir.rglob("*") if file.is_file())
        copy = self.dir / "copy"
        shutil.copytree(self.run_dir, copy)
        prefix = ["unshare", "--mount", "bash", "-c", script, "bash", str(whole + 6 * checkpoint), self.run_dir, copy,
                  str(5 * checkpoint + checkpoint // 2), self.dir / "log"]
        result = self.go_on("run.stop_at=600", "checkpoint.every=50", "checkpoint.keep=2", "checkpoint.async=true",
                            "run.steps=600", prefix=prefix)
        if result.status == 99 or (result.status == 1 and "unshare" in result.stderr):
            self.skipTest("mounting is not permitted here")
        self.assertEqual(result.status, 0, result)
        failed = result.stderr.index("no checkpoint at step")
        self.assertIn("free space", result.stderr[failed:])
        self.assertIn("checkpoint: ", result.stderr[failed:])

    def test_file_size_limit(self):
        """The same where a write fails for another reason. One rank, and no UCX: MPI's own files would break the limit."""
        limit = (self.newest / "rank-00000.h5").stat().st_size // 2
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        prefix = ["env", "UCX_TLS=self", "bash", "-c", 'ulimit -S -f "$1"; shift; exec "$@"', "bash", str(limit // 1024)]
        self.assertTrue(hard == resource.RLIM_INFINITY or hard > limit)
        result = self.go_on("run.stop_at=16", "checkpoint.every=5", ranks=0, prefix=prefix)
        self.check_full_disk(result)
        self.check_loads()


class Config(lib.Case):
    def check(self, words, *texts):
        self.assertFails(lib.tatara(["train", self.config()[0], *words], ranks=2), "config", *texts)

    def test_words(self):
        for words, texts in (
                (["optim.learning_rat=1"], ["optim.learning_rat"]),
                (["optim.warmup_step=1"], ["did you mean", "warmup_steps"]),
                (["modle.layers=2"], ["did you mean", "model"]),
                (["model.layers=two"], ["model.layers", "whole number"]),
                (["model.qk_norm=1"], ["model.qk_norm", "true"]),
                (["optim.lr=11"], ["optim.lr", "10"]),
                (["precision.compute=fp64"], ["precision.compute", "bf16", "fp32"]),
                (["model.kv_heads=3"], ["model.heads", "model.kv_heads", "multiple"]),
                (["batch.micro=3"], ["batch.global", "batch.micro", "multiple"]),
                (["optim.warmup_steps=19"], ["optim.warmup_steps", "run.steps"])):
            with self.subTest(words[0]):
                self.check(words, *texts)

    def test_file(self):
        """In the file the line is named too."""
        config, _ = self.config()
        text = config.read_text()
        for wrong, texts in (("layers: 2.5", ["whole number", "model.layers"]),
                             ("leyers: 2", ["did you mean", "layers"])):
            with self.subTest(wrong):
                bad = self.dir / "bad.yaml"
                bad.write_text(text.replace("layers: 2", wrong))
                line = 1 + text[:text.index("layers: 2")].count("\n")
                result = lib.tatara(["train", bad], ranks=2)
                self.assertFails(result, "config", f"{bad}:{line}:", *texts)

    def test_missing_file(self):
        self.assertFails(lib.tatara(["train", self.dir / "no.yaml"], ranks=2), "config", self.dir / "no.yaml")

    def test_command_line(self):
        for words in (["trian"], ["train"], ["train", "--nonsense"]):
            with self.subTest(words=words):
                self.assertFails(lib.tatara(words, ranks=2), "usage", "tatara")


class Corpus(lib.Case):
    """Text that `tatara prepare` cannot read."""

    def check(self, path, status, *texts, ranks=2):
        out = self.dir / "out"
        result = lib.tatara(["prepare", "--tokenizer", lib.tokenizer(), "--out", out, path], ranks)
        self.assertFails(result, status, path, *texts)
        self.assertEqual(list(out.glob("*.h5")) if out.exists() else [], [], "shards of a corpus that was not read")

    def test_missing(self):
        self.check(self.dir / "no.txt", "data")

    def test_truncated_gz(self):
        path = self.dir / "text.jsonl.gz"
        subprocess.run(["sh", "-c", 'seq 100000 | gzip >"$1"', "sh", path], check=True, timeout=10)
        truncate(path)
        self.check(path, "data")

    def test_garbage(self):
        path = self.dir / "text.gz"
        path.write_bytes(os.urandom(4096))
        self.check(path, "data")

    @unittest.skipIf(os.geteuid() == 0, "root may read everything")
    def test_no_permission(self):
        path = self.dir / "text.txt"
        path.write_text("text")
        path.chmod(0)
        self.check(path, "system")


if __name__ == "__main__":
    lib.main()
