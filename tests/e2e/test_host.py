"""What the machine allows and refuses: files that cannot be opened, file systems without fsync, torn lines."""
import errno
import os

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


if __name__ == "__main__":
    lib.main()
