"""Ranks, some or all, that come to a standstill in the middle of a read, and before the run's folder is open: the job
ends within the time-out and 10 s, with the status that says: try again. (test_faults.py stops whole processes.)"""
import os
import re
import signal
import time

import lib

TIMEOUT_S = 2
WORDS = ["run.steps=1000000", f"run.hang_timeout_s={TIMEOUT_S}"]

# What a rank waits for.
DATA = "the tokenizer and the shards of data"
CHECKPOINT = "the checkpoint to go on from"


class Hang(lib.Case):
    def check(self, process, pattern):
        """It ends in time, and one rank says what the pattern describes."""
        result = process.wait(TIMEOUT_S + 10)
        self.assertEqual(result.status, lib.STATUS["comm"], result)
        self.assertEqual(len(result.errors()), 1, result)
        self.assertRegex(result.errors()[0], pattern)
        self.assertIn(f"run.hang_timeout_s={TIMEOUT_S}", result.errors()[0])


class Shard(Hang):
    """The thread that reads ahead does not come back from a token shard."""

    def check_stuck(self, ranks, stuck, pattern):
        config, run_dir = self.config()
        prefix = ["env", f"LD_PRELOAD={lib.options.stuck_read}"]
        with lib.Process(["train", config, *WORDS], ranks=ranks, prefix=prefix) as process:
            lib.wait_for("a step", lambda: lib.steps_done(run_dir) > 0)
            processes = dict(enumerate(process.ranks())) if ranks else {0: process.popen.pid}
            self.assertEqual(sorted(processes), list(range(max(ranks, 1))))
            for rank in stuck:
                os.kill(processes[rank], signal.SIGUSR2)
            self.check(process, pattern)

    def test_one_rank(self):
        """The others wait for its gradients."""
        self.check_stuck(3, [1], r"hung: rank [02] has waited \d s in sum over ranks of .*; 1 of 3 ranks did not arrive: "
                                 r"1 \(rank 1 has waited \d s for the next batch of data\)\.")

    def test_alone(self):
        """No rank is in a collective, as when the file server of all has gone."""
        self.check_stuck(0, [0], r"hung: rank 0 has waited \d s for the next batch of data, .* as have 1 of 1 ranks")


class Start(Hang):
    """A file is a pipe without a writer on one rank only, and so a rank stands in open(2): each rank starts in a folder of
    its own, with a link to the file or with the pipe."""

    def start(self, name, real, rank, *words):
        folder = self.dir / f"{name}-ranks"
        for other in range(3):
            place = folder / str(other) / real.name
            place.parent.mkdir(parents=True)
            if other == rank:
                os.mkfifo(place)
            else:
                place.symlink_to(real)
        config, run_dir = self.config(name)
        process = lib.Process(["train", config, *WORDS, *words], ranks=3,
                              wrap=["sh", "-c", 'cd "$0/${OMPI_COMM_WORLD_RANK:-$PMI_RANK}" && exec "$@"', folder])
        self.addCleanup(process.__exit__)
        return process, run_dir

    def test_stuck_open(self):
        """Of the tokenizer and of a shard, on a lower and on a higher rank than those in a collective; four runs at once.
        One's folder is made meanwhile, with words of an earlier attempt, which count for nothing, and of this one's rank
        there are none, because its process stands still as a whole; one's is not there; one's cannot be made, and one's
        does not answer, so that there each rank that waits says so itself."""
        shard = next(lib.train_shards().glob("*.h5"))
        late, late_dir = self.start("late", lib.tokenizer(), 1, "data.tokenizer=tok.model")
        none, none_dir = self.start("none", shard, 0, f"data.train=[{{path: {shard.name}}}]")
        never, _ = self.start("never", lib.tokenizer(), 2, "data.tokenizer=tok.model", "run.dir=/dev/null/run")
        mute, mute_dir = self.start("mute", lib.tokenizer(), 2, "data.tokenizer=tok.model")
        for process in (late, mute):
            lib.wait_for("the configuration", lambda process=process: "training, 3 ranks" in process.result().stderr)
        self.assertFalse(late_dir.exists())
        time.sleep(0.2)
        mute_dir.mkdir()
        for rank in range(3):
            os.mkfifo(mute_dir / f"hang-{rank:05}")
        late_dir.mkdir()
        (late_dir / "hang-00001").write_text("in collective 1000000, attempt 1: rank 1 has waited 9 s in a queue\n")
        os.kill(late.ranks()[1], signal.SIGSTOP)

        self.check(late, r"hung: .*; 1 of 3 ranks did not arrive: 1\.")
        self.check(none, rf"hung: .*; 1 of 3 ranks did not arrive: 0 \(rank 0 has waited \d s for {DATA}\)\.")
        said = sorted(none_dir.iterdir())
        self.assertEqual([path.name for path in said], ["hang-00000", "hang-00001", "hang-00002"])
        self.assertRegex(said[0].read_text(), rf"^after collective \d+, attempt [0-9a-f]+: rank 0 has waited \d s for "
                                              rf"{DATA}\n")
        for path in said[1:]:
            self.assertRegex(path.read_text(), r"^in collective \d+, attempt [0-9a-f]+: rank [12] has waited \d s in ")

        for process, text in ((never, "/dev/null/run cannot be written to"), (mute, f"{mute_dir} cannot be written to or "
                                                                                    "does not answer")):
            result = process.wait(TIMEOUT_S + 10)
            self.assertEqual(result.status, lib.STATUS["comm"], result)
            self.assertEqual(sorted(re.findall(r"hung: rank (\d)", result.stderr)), ["0", "1", "2"], result)
            self.assertIn(text, result.stderr)


class Everywhere(Hang):
    """A file that no rank gets to read: a pipe without a writer, as when the file server of all has gone."""

    def start(self, name, pipe, *words, ranks=0):
        config, run_dir = self.config(name)
        path = run_dir / pipe
        path.parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(path)
        process = lib.Process(["train", config, *WORDS, *words], ranks=ranks)
        self.addCleanup(process.__exit__)
        return process, run_dir

    def test_start(self):
        """Of a shard, and of a checkpoint that the run would resume from; four runs at once. One's folder does not take
        what the rank has to say."""
        shard, shard_dir = self.start("shard", "shard.h5", f"data.train=[{{path: {self.dir / 'shard/shard.h5'}}}]",
                                      ranks=2)
        resume, _ = self.start("resume", "step-00000001/manifest.json", ranks=2)
        alone, _ = self.start("alone", "step-00000001/manifest.json")
        (self.dir / "mute" / "hang-00000").mkdir(parents=True)
        mute, mute_dir = self.start("mute", "step-00000001/manifest.json")
        self.check(shard, rf"hung: rank 0 has waited \d s for {DATA}, longer than .*, as have 2 of 2 ranks\.")
        self.assertRegex((shard_dir / "hang-00001").read_text(), rf": rank 1 has waited \d s for {DATA}\n")
        self.check(resume, rf"hung: rank 0 has waited \d s for {CHECKPOINT}, longer than .*, as have 2 of 2 ranks\.")
        self.check(alone, rf"hung: rank 0 has waited \d s for {CHECKPOINT}, longer than .*, as have 1 of 1 ranks\.")
        self.check(mute, rf"hung: rank 0 has waited \d s for {CHECKPOINT}, longer than .*; {mute_dir} cannot be written "
                         r"to or does not answer\.")


if __name__ == "__main__":
    lib.main()
