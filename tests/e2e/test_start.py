"""Where a start begins, and whose the run's folder is: the table at the head of train/start.c, row by row."""
import os
import pathlib
import shutil
import signal
import time

import lib

WORDS = ["run.steps=4", "optim.warmup_steps=1", "optim.decay_steps=2", "checkpoint.every=2", "checkpoint.keep=9"]


class Rule(lib.Case):
    """Each row twice: checkpoint.resume in the YAML file, and on the command line."""

    # Name, what run.dir holds (none, the run's steps 2 and 4, or those made with the same checkpoint.resume, or only step 2 of
    # those), checkpoint.resume, and where the start begins: a step, or the words of the refusal; then a warning.
    ROWS = [
        ("auto, nothing there", "none", "auto", 0, ""),
        ("auto, checkpoints", "both", "auto", 4, ""),
        ("never, nothing there", "none", "never", 0, ""),
        ("never, checkpoints", "both", "never", ["checkpoint.resume is never", "step-00000004 exists"], ""),
        ("never, of this word too", "same", "never", ["checkpoint.resume is never"], ""),
        ("folder elsewhere, nothing there", "none", "{other}/step-00000002", 2, ""),
        ("run elsewhere, nothing there", "none", "{other}", 4, ""),
        ("folder elsewhere, of this word", "same", "{other}/step-00000002", 4, ""),
        ("folder elsewhere, other checkpoints", "both", "{other}/step-00000002", 4, "is passed over"),
        ("folder gone, of this word", "same", "{other}/gone", 4, ""),
        ("folder gone, other checkpoints", "both", "{other}/gone", ["gone"], ""),
        ("folder gone, nothing there", "none", "{other}/gone", ["gone"], ""),
        ("folder inside, the newest", "both", "{run}/step-00000004", 4, ""),
        ("the run itself", "both", "{run}", 4, ""),
        ("folder inside, newer ones", "both", "{run}/step-00000002", ["later checkpoints", "step-00000004"], ""),
        ("folder inside, not there", "both", "{run}/step-00000005", ["step-00000005 is neither a checkpoint"], ""),
        ("folder inside, newer ones moved away", "first", "{run}/step-00000002", 2, ""),
        ("folder inside, newer ones of this word", "same", "{run}/step-00000002", 4, ""),
        ("folder inside, another spelling", "both", "{run}/step-00000002/.", ["later checkpoints", "step-00000004"], ""),
        ("folder inside, a copy of it", "both", "{run}/before-the-spike", ["later checkpoints", "step-00000004"], ""),
        ("folder inside, by a link", "both", "{run}-link", ["later checkpoints", "step-00000004"], ""),
        ("folder inside, itself damaged", "damaged", "{run}/step-00000004", ["step-00000004/rank-00000.h5", "damaged"], ""),
        ("folder inside, newer ones damaged", "damaged", "{run}/step-00000002", 2, "passed over"),
    ]

    @classmethod
    def setUpClass(cls):
        cls.folder = lib.temp_dir(cls.addClassCleanup)
        config, cls.other = lib.write_config(cls.folder, "other")
        result = lib.tatara(["train", config, *WORDS])
        assert result.status == 0, result

    def hold(self, run_dir, what, resume):
        """Makes run.dir hold that."""
        if what == "same":  # made by a run that began with that word
            gone = resume.endswith("gone")
            if gone:
                shutil.copytree(self.other / "step-00000002", resume)
            if resume.startswith(str(run_dir)):
                shutil.copytree(self.other / "step-00000002", run_dir / "step-00000002")
            config = self.dir / "before.yaml"
            config.write_text(lib.CONFIG.format(run_dir=run_dir, tokenizer=lib.tokenizer(), train=lib.train_shards()))
            result = lib.tatara(["train", config, *WORDS, f"checkpoint.resume={resume}"])
            self.assertEqual(result.status, 0, result)
            if gone:
                shutil.rmtree(resume)
        elif what != "none":
            shutil.copytree(self.other, run_dir)
            shutil.copytree(self.other / "step-00000002", run_dir / "before-the-spike")
            (run_dir.parent / "run-link").symlink_to(run_dir / "step-00000002")
            if what == "first":
                shutil.rmtree(run_dir / "step-00000004")
            if what == "damaged":
                lib.flip_bit(run_dir / "step-00000004" / "rank-00000.h5", 5000)

    def check(self, place, what, resume, begins, warning):
        run_dir = self.dir / place / "run"
        run_dir.parent.mkdir()
        resume = resume.format(other=self.other, run=run_dir)
        config = run_dir.parent / "run.yaml"
        text = lib.CONFIG.format(run_dir=run_dir, tokenizer=lib.tokenizer(), train=lib.train_shards())
        config.write_text(text.replace("resume: auto", f"resume: {resume}") if place.endswith("yaml") else text)
        self.hold(run_dir, what, resume)
        words = [] if place.endswith("yaml") else [f"checkpoint.resume={resume}"]
        (run_dir / "metrics.jsonl").unlink(missing_ok=True)
        result = lib.tatara(["train", config, *WORDS, *words, "run.steps=6"])
        if isinstance(begins, list):
            self.assertNotEqual(result.status, 0, result)
            for words in begins:
                self.assertIn(words, result.errors()[0])
            self.assertFalse((run_dir / "metrics.jsonl").exists())
            self.assertFalse((run_dir / "step-00000006").exists())
            return
        self.assertEqual(result.status, 0, result)
        event = next(line for line in lib.metrics(run_dir) if line.get("event") in ("start", "resume"))
        self.assertEqual((event["event"], event["step"]), ("resume" if begins else "start", begins), result)
        warned = [line for line in result.warnings() if "passed over" in line]
        self.assertEqual([warning in line for line in warned], [True] if warning else [], result)
        self.assertTrue((run_dir / "step-00000006" / "manifest.json").exists())
        # The same command again goes on from the end, wherever the first began.
        again = lib.tatara(["train", config, *WORDS, *words, "run.steps=6"])
        if resume != "never":
            self.assertEqual(again.status, 0, again)
            self.assertIn("step-00000006, step 6 of 6", again.stderr)

    def test_table(self):
        for i, (name, what, resume, begins, warning) in enumerate(self.ROWS):
            for way in ("yaml", "word"):
                with self.subTest(name, way=way):
                    self.check(f"{i}-{way}", what, resume, begins, warning)

    def test_never_under_a_scheduler(self):
        """The attempts of one job, or of one chain of jobs, are one start."""
        for job, chain, later in (("SLURM_JOB_ID", "", "71"), ("PBS_JOBID", "", "71"), ("PJM_JOBID", "", "71"),
                                  ("JOB_ID", "", "71"), ("SLURM_JOB_ID", "c7", "72")):
            with self.subTest(job, chain=chain):
                config, run_dir = self.config(f"{job}{chain}")
                words = ["train", config, *WORDS, "checkpoint.resume=never"]
                for stop, number in (("run.stop_at=2", "71"), ("run.steps=4", later)):
                    environment = [f"{job}={number}", *([f"TATARA_CHAIN={chain}"] if chain else [])]
                    result = lib.tatara([*words, stop], prefix=["env", *environment])
                    self.assertEqual(result.status, 0, result)
                self.assertEqual([event["step"] for event in lib.events(run_dir, "resume")], [2])
                other = lib.tatara(words, prefix=["env", f"{job}=99"])
                self.assertFails(other, "config", "checkpoint.resume is never")


class Owner(lib.Case):
    """One attempt at a time."""

    SLOW = ["run.steps=100000", "optim.decay_steps=10", "checkpoint.every=0"]

    def start(self, *words, **more):
        process = lib.Process(["train", self.config()[0], *self.SLOW, *words], **more)
        self.addCleanup(process.__exit__)
        lib.wait_for("steps", lambda: lib.steps_done(self.dir / "run") > 1)
        return process

    def assertLast(self, process):
        """The attempt that lost the folder ends soon, and writes nothing more."""
        result = process.wait(10)
        self.assertFails(result, "taken", "belongs to a newer attempt", within=60)
        return result

    def test_alive(self):
        first = self.start()
        second = lib.tatara(["train", self.config()[0], *self.SLOW])
        self.assertFails(second, "taken", "is alive", f"process {first.popen.pid},", "run.takeover=true", within=20)
        self.assertTrue(first.running())
        third = lib.tatara(["train", self.config()[0], *self.SLOW, "run.takeover=true", "run.stop_at=3"], ranks=2)
        self.assertEqual(third.status, 0, third)
        self.assertIn("run.takeover says so", third.stderr)
        self.assertLast(first)
        # Its lines end where the third's begin; the third's are whole, with nothing in between.
        lines = lib.metrics(self.dir / "run")
        begin = max(i for i, line in enumerate(lines) if line.get("event") == "start")
        steps = [line["step"] for line in lines[begin:] if "event" not in line]
        self.assertEqual(steps[:3], [1, 2, 3])
        self.assertLessEqual(len(steps), 4)  # one that was being written

    def test_ended(self):
        """Nothing to ask: the first was stopped, or killed on this machine."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with self.subTest(number):
                first = self.start()
                first.popen.send_signal(number)
                if number == signal.SIGTERM:
                    first.popen.wait(20)
                else:  # nobody sees to the dead process: it stays as one that has ended
                    state = pathlib.Path(f"/proc/{first.popen.pid}/stat")
                    lib.wait_for("its end", lambda: state.read_text().rpartition(")")[2].split()[0] == "Z")
                self.assertEqual((self.dir / "run" / "HEARTBEAT").exists(), number == signal.SIGKILL)
                (self.dir / "run" / "metrics.jsonl").unlink()
                began = time.monotonic()
                with self.start():
                    pass
                self.assertLess(time.monotonic() - began, 30)
                shutil.rmtree(self.dir / "run")

    def test_same_job(self):
        first = self.start(prefix=["env", "JOB_ID=7"])
        second = lib.tatara(["train", self.config()[0], *self.SLOW, "run.stop_at=3"], prefix=["env", "JOB_ID=7"])
        self.assertIn("an earlier attempt of this job", second.stderr)
        self.assertLast(first)

    def test_stopped_while_waiting(self):
        run_dir = self.train("run", *WORDS, "run.stop_at=2")
        (run_dir / "OWNER").write_text((run_dir / "OWNER").read_text().replace("\nplace ", "\nplace elsewhere-"))
        (run_dir / "HEARTBEAT").touch()
        with lib.Process(["train", self.config()[0], *WORDS], ranks=2) as process:
            lib.wait_for("the wait", lambda: "looking for a sign of life" in process.result().stderr)
            process.popen.send_signal(signal.SIGUSR1)
            result = process.wait(20)
        self.assertEqual(result.status, lib.STATUS["stopped"], result)
        self.assertLess(result.seconds, 20)

    def test_another_machine(self):
        """Killed elsewhere: its last sign of life is waited for, and a minute without one is enough."""
        run_dir = self.train("run", *WORDS, "run.stop_at=2")
        owner = (run_dir / "OWNER").read_text()
        for age in (57, 600):
            with self.subTest(age=age):
                (run_dir / "OWNER").write_text(owner.replace("\nplace ", "\nplace elsewhere-"))
                (run_dir / "HEARTBEAT").touch()
                then = time.time() - age
                os.utime(run_dir / "HEARTBEAT", (then, then))
                result = lib.tatara(["train", self.config()[0], *WORDS, "run.stop_at=3", "checkpoint.every=0"], ranks=2)
                self.assertEqual(result.status, 0, result)
                self.assertIn("no sign of life for a minute", result.stderr)
                self.assertEqual("looking for a sign of life" in result.stderr, age < 60)


if __name__ == "__main__":
    lib.main()
