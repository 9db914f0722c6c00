"""What the machine allows and refuses: processors, memory, files that cannot be opened, file systems without fsync."""
import errno
import os
import pathlib
import unittest

import lib

DAMAGE = ("damaged", "truncated", "restore", "make it again", "from a copy")


class Refused(lib.Case):
    """What the system refuses to open is not called damaged: the system's reason, and status 6."""

    def refuse(self, words, number, part, *texts, call="open", skip=0, environment=()):
        prefix = ["env", f"REFUSE={call}:{part}:{number}:{skip}", *environment,
                  f"LD_PRELOAD={lib.options.refuse}"]
        with self.subTest(part=part, errno=errno.errorcode[number], call=call, skip=skip):
            result = lib.tatara(words, prefix=prefix)
            self.assertFails(result, "system", part, os.strerror(number), *texts)
            for text in DAMAGE:
                self.assertNotIn(text, result.errors()[0])

    def test_training(self):
        """Every file that a start reads; then a shard with every errno, and HDF5's own opening of it, and its lock."""
        config, run_dir = self.config()
        self.train("run", "run.stop_at=2")
        words = ["train", config, "run.stop_at=3"]
        for part in ("run.yaml", "tok.model", "train/dataset.json", "train/shard-000000", "step-00000002/manifest.json",
                     "step-00000002/rank-00000.h5"):
            self.refuse(words, errno.EMFILE, part, "ulimit -n")
        for number, text in ((errno.ENFILE, "fs.file-max"), (errno.EACCES, "rights"), (errno.EIO, "file system"),
                             (errno.ESTALE, "file system")):
            self.refuse(words, number, "train/shard-000000", text)
        for skip in (1, 2):
            self.refuse(words, errno.EMFILE, "train/shard-000000", "ulimit -n", skip=skip)
        self.refuse(words, errno.EMFILE, "step-00000002/rank-00000.h5", "ulimit -n", skip=1)
        self.refuse(words, errno.ENOLCK, "train/shard-000000", "unset HDF5_USE_FILE_LOCKING", call="flock",
                    environment=["HDF5_USE_FILE_LOCKING=TRUE"])
        self.assertEqual([folder.name for folder in lib.checkpoints(run_dir)], ["step-00000002"])

    def test_text(self):
        text = self.dir / "text.txt"
        text.write_text("text")
        self.refuse(["prepare", "--tokenizer", lib.tokenizer(), "--out", self.dir / "out", text], errno.EMFILE,
                    "text.txt", "ulimit -n")

    def test_folder_without_fsync(self):
        """A file system whose folders have no fsync is warned of once; any other failure of it is an error."""
        for number in (errno.EINVAL, errno.ENOTSUP, errno.EIO):
            with self.subTest(errno.errorcode[number]):
                prefix = ["env", f"REFUSE=fsync:tatara-e2e:{number}:0", f"LD_PRELOAD={lib.options.refuse}"]
                config, _ = self.config(errno.errorcode[number])
                result = lib.tatara(["train", config, "run.stop_at=2"], prefix=prefix)
                if number == errno.EIO:
                    self.assertFails(result, "system", os.strerror(number))
                else:
                    self.assertEqual(result.status, 0, result)
                    self.assertEqual(len([line for line in result.warnings() if "fsync" in line]), 1, result)


class Torn(lib.Case):
    def test_metrics(self):
        """A line without its end, as a power failure leaves it, spoils no other."""
        run_dir = self.train("run", "run.stop_at=2")
        path = run_dir / "metrics.jsonl"
        torn = path.read_text()[:-20]
        path.write_text(torn)
        self.train("run", "run.stop_at=3")
        lines = path.read_text().splitlines()
        self.assertEqual(lines[:torn.count("\n") + 1], torn.splitlines())
        self.assertIn('"event":"resume"', lines[torn.count("\n") + 1])


class Limits(lib.Case):
    """What the processors, control groups and the environment leave a rank is kept to, and said."""

    def control_group(self, controller, files):
        """A new control group, of version 1 or 2, with values of its files by version; the prefix that starts in it."""
        mount = pathlib.Path("/sys/fs/cgroup")
        version = 1 if (mount / controller).is_dir() else 2
        folder = (mount / controller if version == 1 else mount) / f"tatara-test-{os.getpid()}"
        try:
            folder.mkdir()
            self.addCleanup(folder.rmdir)
            for name, value in files[version].items():
                (folder / name).write_text(value)
        except OSError as why:
            self.skipTest(f"no control group can be made here: {why}")
        return folder, ["bash", "-c", 'echo $$ >"$0/cgroup.procs" && exec "$@"', folder]

    def start(self, *words, ranks=0, **more):
        result = lib.tatara(["train", self.config()[0], "run.stop_at=1", "checkpoint.resume=auto", *words], ranks, **more)
        self.assertEqual(result.status, 0, result)
        return result

    def test_quota(self):
        folder, prefix = self.control_group("cpu", {1: {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "100000"},
                                                    2: {"cpu.max": "100000 100000"}})
        said = f"1 CPUs that the quota of {folder} leaves it"
        result = self.start(prefix=prefix)
        self.assertIn("threads: 1 a rank, of the ", result.stderr)
        self.assertIn(said, result.stderr)
        self.assertNotIn("more threads only wait", result.stderr)
        result = self.start("run.threads=2", prefix=prefix)
        self.assertIn("threads: 2 a rank, as run.threads says", result.stderr)
        self.assertIn("run.threads is 2, but the processor quota", result.stderr)
        result = self.start(ranks=2, prefix=prefix)
        self.assertIn("0.5 CPUs that the quota", result.stderr)
        self.assertIn("2 ranks of this node share 1 core and take turns", result.stderr)

    def test_memory(self):
        """A limit below what is free on the node counts, and what the group has taken already counts against it."""
        limit = str(512 * lib.MIB)
        folder, prefix = self.control_group("memory", {1: {"memory.limit_in_bytes": limit}, 2: {"memory.max": limit}})
        result = self.start(prefix=prefix)
        self.assertRegex(result.stderr, rf"memory: \d+ MiB are left to a rank by {folder}/memory.*, which is 512 MiB")
        words = ["model.layers=8", "model.hidden=1024", "model.ffn_hidden=4096", "run.dir=" + str(self.dir / "large")]
        result = lib.tatara(["train", self.config()[0], *words], prefix=prefix)
        self.assertFails(result, "config", f"under the limit of {folder}/memory", "of its 512 MiB", "batch.micro")

    def test_environment(self):
        result = self.start(prefix=["env", "OMP_NUM_THREADS=1"])
        self.assertIn("threads: 1 a rank, as OMP_NUM_THREADS says", result.stderr)
        result = self.start("run.threads=2", prefix=["env", "OMP_NUM_THREADS=1"])
        self.assertIn("threads: 2 a rank, as run.threads says", result.stderr)

    @unittest.skipIf(len(os.sched_getaffinity(0)) < 2, "needs two cores")
    def test_bound(self):
        """Cores that stay idle because a launcher binds ranks to others are named, with the words that mend it."""
        core, cores = min(os.sched_getaffinity(0)), len(os.sched_getaffinity(0))
        for ranks in (0, 1, 2, 3):
            with self.subTest(ranks=ranks):
                result = self.start(ranks=ranks, wrap=["taskset", "-c", core])
                self.assertIn(f"{cores - 1} of this node's {cores} cores stay idle", result.stderr)
                self.assertIn(f"--map-by slot:PE={max(1, cores // max(1, ranks))}`", result.stderr)
                self.assertIn("--bind-to none", result.stderr)
                turns = f"{ranks} ranks of this node share 1 core and take turns"
                (self.assertIn if ranks > 1 else self.assertNotIn)(turns, result.stderr)
        self.assertNotIn("stay idle", self.start(ranks=2).stderr)

    def test_no_work(self):
        words = ["batch.global=4", "batch.micro=2"]
        result = self.start(*words, ranks=3)
        self.assertIn("1 of the 3 ranks have nothing to do: a step has 2 micro-batches", result.stderr)
        self.assertIn("4 / 2", result.stderr)
        self.assertNotIn("nothing to do", self.start(*words, ranks=2).stderr)


if __name__ == "__main__":
    lib.main()
