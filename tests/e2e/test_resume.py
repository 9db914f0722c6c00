"""Stopping and going on changes nothing: bit for bit the weights, optimizer state and losses of a run in one go."""
import os
import shutil
import signal

import lib


class Resume(lib.Case):
    def assertSameRun(self, a, b, step):
        self.assertSameSteps(a, b)
        self.assertSameWeights(a / f"step-{step:08d}", b / f"step-{step:08d}")

    def test_stop_at(self):
        """20 steps = 10 + 10, on the same ranks and on others, at the same ZeRO stage and at another."""
        straight = self.train("straight", "parallel.zero=0")
        for name, before, after in (("alone", (0, 0), (0, 0)), ("more", (1, 0), (3, 1)), ("fewer", (4, 1), (2, 0))):
            with self.subTest(name):
                ranks, zero = before
                half = self.train(name, "run.stop_at=10", f"parallel.zero={zero}", ranks=ranks)
                self.assertEqual([folder.name for folder in lib.checkpoints(half)], ["step-00000010"])
                ranks, zero = after
                self.train(name, f"parallel.zero={zero}", ranks=ranks)
                self.assertEqual(lib.events(half, "resume")[0]["step"], 10)
                self.assertSameRun(straight, half, 20)

    def test_keep(self):
        """The newest are kept, and a run can go on from one of them by name, in another folder."""
        run_dir = self.train("run", "checkpoint.every=3", "checkpoint.keep=2")
        self.assertEqual([folder.name for folder in lib.checkpoints(run_dir)], ["step-00000018", "step-00000020"])
        branch = self.train("branch", f"checkpoint.resume={run_dir / 'step-00000018'}")
        self.assertSameWeights(run_dir / "step-00000020", branch / "step-00000020")

    def test_keep_every(self):
        run_dir = self.train("run", "checkpoint.every=3", "checkpoint.keep=1", "checkpoint.keep_every=6")
        self.assertEqual([folder.name for folder in lib.checkpoints(run_dir)],
                         ["step-00000006", "step-00000012", "step-00000018", "step-00000020"])

    def test_init_from(self):
        """A new run takes another's weights, on any number of ranks, and nothing else: without a learning rate they stay
        what they were, and the moments are those of one step. ckpt diff says so."""
        first = self.train("first", "run.stop_at=4") / "step-00000004"
        words = [f"checkpoint.init_from={first}", "optim.lr=0", "optim.min_lr=0", "run.stop_at=1"]
        second = self.train("second", *words, ranks=2) / "step-00000001"
        result = lib.tatara(["ckpt", "diff", first, second])
        self.assertEqual(result.status, 1, result)
        names = [line.split()[0] for line in result.stdout.splitlines() if line.startswith("  ")]
        self.assertTrue(names and all(name.startswith("optim/exp_avg") for name in names), result)
        same = lib.tatara(["ckpt", "diff", first, first])
        self.assertRegex(same.stdout, r"all \d+ tensors are the same, bit for bit")
        self.assertEqual(same.status, 0, same)
        other = lib.tatara(["train", self.config()[0], f"checkpoint.init_from={first}", "model.layers=3",
                            f"run.dir={self.dir / 'other'}"])
        self.assertFails(other, "data", first, "another model")

    def test_init_optimizer(self):
        """A branch that decays the learning rate from a checkpoint on, with its moments too: one command, on any number of
        ranks, and resumed within. With fresh moments it is another run."""
        first = self.train("first", "run.stop_at=10") / "step-00000010"
        decay = ["optim.warmup_steps=0", "optim.decay_steps=6", "run.steps=6", f"checkpoint.init_from={first}"]
        words = [*decay, "checkpoint.init_optimizer=true"]
        alone = self.train("alone", *words)
        self.train("half", *words, "run.stop_at=2", ranks=2)
        self.assertSameRun(alone, self.train("half", *words, "parallel.zero=0", ranks=3), 6)
        self.assertRegex(lib.tatara(["ckpt", "show", alone / "step-00000006"]).stdout, r"\noptim steps +16 ")
        fresh = lib.losses(self.train("fresh", *decay))
        self.assertEqual(fresh[0], lib.losses(alone)[0])
        self.assertNotEqual(fresh[1], lib.losses(alone)[1])

    def test_async(self):
        """Saving in the background writes the same bytes, and what is trained meanwhile is the same, whether or not a
        save that is due is skipped as the last one is still being written."""
        waited = self.train("waited", "checkpoint.every=5", "checkpoint.keep=9", ranks=2)
        for zero in (0, 1):
            with self.subTest(zero=zero):
                words = ["checkpoint.async=true", "checkpoint.keep=30", "log.every=20", f"parallel.zero={zero}"]
                often = self.train(f"often{zero}", "checkpoint.every=1", *words, ranks=2)
                self.assertGreater(len(lib.checkpoints(often)), 1)
                for folder in lib.checkpoints(often):
                    self.assertEqual(lib.tatara(["ckpt", "verify", folder]).status, 0)
                    if (waited / folder.name).exists():
                        self.assertSameWeights(waited / folder.name, folder)
                self.assertFalse([entry for entry in os.listdir(often) if entry.startswith(".tmp")])

    def test_async_resume(self):
        """A run that is stopped while a save is under way loses nothing, and goes on from its end."""
        straight = self.train("straight")
        words = ["checkpoint.async=true", "checkpoint.every=3"]
        self.train("half", *words, "run.stop_at=10", ranks=3)
        self.assertSameRun(straight, self.train("half", *words), 20)

    def test_never(self):
        """A run that must not resume does not start beside another's checkpoints."""
        run_dir = self.train("run", "run.stop_at=2")
        result = lib.tatara(["train", self.config()[0], "checkpoint.resume=never"], ranks=2)
        self.assertFails(result, "config", "checkpoint.resume is never", run_dir / "step-00000002")
        self.assertFalse((run_dir / "step-00000020").exists())

    def test_redo(self):
        """Weights that are nearly nothing, and a learning rate that makes them large at once: the second step's
        gradient is far more than 2^12 times the first's, so that its integers overflow and the step is done again
        with a coarser scale. All ranks decide that alike, and a run that resumes there decides the same."""
        words = ["model.init_std=1e-6", "model.norm_eps=0.1", "optim.lr=10", "optim.min_lr=10",
                 "optim.warmup_steps=0", "optim.weight_decay=0", "precision.compute=fp32", "run.steps=6"]
        straight = self.train("straight", *words)
        redone = [line["redone"] for line in lib.metrics(straight) if "event" not in line]
        self.assertGreater(redone[1], 0, redone)
        ranks = self.train("ranks", *words, ranks=3)
        self.assertSameRun(straight, ranks, 6)
        self.train("resumed", *words, "run.stop_at=1", ranks=2)
        self.assertSameRun(straight, self.train("resumed", *words), 6)


class Faults(lib.Case):
    """Losses that go up by chance are taken for spikes here: with a small optim.spike_sigma there are some in any run."""

    # Without a learning rate, so that the loss does not fall away from its own mean; what tells runs apart are the
    # optimizer's moments.
    WORDS = ["run.steps=120", "optim.lr=0", "optim.min_lr=0", "optim.decay_steps=20", "optim.spike_sigma=1.5",
             "run.faults_max=100", "batch.global=4", "checkpoint.every=10", "checkpoint.keep=100"]

    def check(self, action, event):
        words = [*self.WORDS, f"run.on_spike={action}"]
        straight = self.train("straight", *words)
        faults = lib.events(straight, event)
        self.assertGreater(len(faults), 1)
        self.assertSameWeights(straight / "step-00000120", self.train("ranks", *words, ranks=2) / "step-00000120")
        # Stopped right after the first fault: the same decisions.
        self.train("half", *words, f"run.stop_at={faults[0]['step'] + 1}", ranks=2)
        resumed = self.train("half", *words)
        self.assertSameWeights(straight / "step-00000120", resumed / "step-00000120")
        return straight

    def test_skip(self):
        self.check("skip", "skip")

    def test_rewind(self):
        straight = self.check("rewind", "rewind")
        event = lib.events(straight, "rewind")[0]
        self.assertEqual(event["step"], (event["fault_step"] - 1) // 10 * 10)
        self.assertEqual(event["batches_skipped"], event["fault_step"] - event["step"])
        self.check_requests(straight, event)

    def check_requests(self, straight, event):
        """A request that is seen after the very step which is to be rewound is met: STOP where the rewind leads, SAVE
        after the next step that can be saved."""
        config, run_dir = self.config("asked")
        words = [*self.WORDS, "run.on_spike=rewind"]
        shutil.copytree(straight / f"step-{event['step']:08d}", run_dir / f"step-{event['step']:08d}")
        self.train("asked", *words, f"run.stop_at={event['fault_step'] - 1}")
        before = set(lib.checkpoints(run_dir))
        (run_dir / "SAVE").touch()
        self.train("asked", *words, f"run.stop_at={event['fault_step'] + 1}")
        self.assertEqual(lib.events(run_dir, "rewind"), [event])
        saved = {event["step"] + 1, event["fault_step"] + 1}
        self.assertEqual({path.name for path in set(lib.checkpoints(run_dir)) - before},
                         {f"step-{step:08d}" for step in saved})
        for folder in set(lib.checkpoints(run_dir)) - before:
            shutil.rmtree(folder)
        (run_dir / "STOP").touch()
        result = lib.tatara(["train", config, *words])
        self.assertEqual(result.status, lib.STATUS["stopped"], result)
        self.assertEqual(lib.events(run_dir, "rewind"), [event, event])
        self.assertEqual(lib.events(run_dir, "end")[-1]["step"], event["step"])

    # With fewer faults, of which the first is in the middle of an interval.
    FEWER = [*WORDS, "run.on_spike=rewind", "optim.spike_sigma=1.4", "run.steps=96"]

    def test_rewind_with_few_checkpoints(self):
        """Which checkpoints there are does not matter: when one that was asked for pushes out older ones, that to go back
        to stays; when it is missing, the steps from an older one on are done again."""
        straight = self.train("straight", *self.FEWER)
        faults = lib.events(straight, "rewind")
        newest, asked = faults[0]["step"], faults[0]["fault_step"] - 1
        self.assertTrue(10 < newest < asked - 3 < faults[1]["step"], faults)
        for keep in (1, 100):
            with self.subTest(keep=keep):
                words = [*self.FEWER, f"checkpoint.keep={keep}"]
                run_dir = self.train(f"keep{keep}", *words, f"run.stop_at={asked}")
                self.assertEqual([path.name for path in lib.checkpoints(run_dir)][-2:],
                                 [f"step-{newest:08d}", f"step-{asked:08d}"])
                if keep > 1:
                    shutil.rmtree(run_dir / f"step-{newest:08d}")
                self.train(run_dir.name, *words, ranks=2)
                self.assertEqual(lib.events(run_dir, "rewind"), faults)
                self.assertSameWeights(straight / "step-00000096", run_dir / "step-00000096")
        self.check_beginnings(asked)

    def check_beginnings(self, asked):
        """A run that begins with another one's checkpoint, or takes up another interval, goes back to there, and does so
        when it has been resumed since."""
        words = [*self.FEWER, "checkpoint.keep=1"]
        begin = self.train("begin", *words, f"run.stop_at={asked - 2}")
        words.append("checkpoint.every=1000")
        end = f"run.stop_at={asked + 2}"
        branch = self.train("branch", *words, end, f"checkpoint.resume={begin / f'step-{asked - 2:08d}'}")
        self.assertEqual(lib.events(branch, "rewind")[0]["step"], asked - 2)
        self.train("begin", *words, f"run.stop_at={asked}")
        self.train("begin", *words, end)
        self.assertEqual(lib.events(begin, "rewind"), lib.events(branch, "rewind"))
        self.assertSameWeights(begin / f"step-{asked + 2:08d}", branch / f"step-{asked + 2:08d}")

    def test_rewind_to_the_beginning(self):
        """A run without checkpoints goes back to the weights that it began with, checkpoint.init_from's: its next loss is
        what they have on the batch after the one that was left out."""
        first = self.train("first", "run.stop_at=4") / "step-00000004"
        config, run_dir = self.config("rewound")
        words = [f"checkpoint.init_from={first}", "optim.warmup_steps=0", "optim.schedule=constant", "run.steps=100"]
        # As in test_faults: weights grow until they overflow.
        result = lib.tatara(["train", config, *words, "optim.lr=10", "optim.min_lr=10", "optim.weight_decay=10",
                             "run.on_nan=rewind", "run.faults_max=1"])
        self.assertFails(result, "numeric", "NaN", "1 such step")
        event, = lib.events(run_dir, "rewind")
        self.assertEqual((event["step"], event["batches_skipped"]), (0, event["fault_step"]))
        lines = lib.metrics(run_dir)
        after = lines[[line.get("event") for line in lines].index("rewind") + 1]
        self.assertEqual(after["step"], 1)
        still = self.train("still", *words, "optim.lr=0", "optim.min_lr=0", f"run.stop_at={event['fault_step'] + 1}")
        self.assertEqual(after["loss"], lib.losses(still)[-1])

    def test_too_many(self):
        result = lib.tatara(["train", self.config()[0], *self.WORDS, "run.faults_max=1"])
        self.assertFails(result, "numeric", "spike", "run.faults_max", "1 such step")


class Requests(lib.Case):
    """Signals, and files in the run's folder, act at the next step boundary on all ranks."""

    # Enough that no run ends by itself: it is always stopped.
    STEPS = ["run.steps=1000000"]

    def until_asked(self, config, run_dir, ask, ranks=0):
        """Starts or resumes the run, asks it to stop after a few steps, and returns the step at which it did."""
        before = lib.steps_done(run_dir)
        with lib.Process(["train", config, *self.STEPS], ranks) as process:
            lib.wait_for("some steps", lambda: lib.steps_done(run_dir) >= before + 3 or not process.running())
            seen = lib.steps_done(run_dir)
            ask(process)
            result = process.wait(20)
        self.assertEqual(result.status, lib.STATUS["stopped"], result)
        self.assertIn("on request; the same command goes on from here", result.stderr)
        done = lib.steps_done(run_dir)
        self.assertGreaterEqual(done, seen)
        self.assertEqual(lib.checkpoints(run_dir)[-1].name, f"step-{done:08d}")
        self.assertEqual(lib.events(run_dir, "end")[-1]["step"], done)
        return done

    def test_requests(self):
        """One run, stopped in every way that there is and resumed each time, equals the run in one piece."""
        config, run_dir = self.config()

        def send(number):
            return lambda process: os.kill(process.popen.pid, number)

        def touch(name):
            return lambda process: (run_dir / name).touch()

        ways = (("SIGUSR1", send(signal.SIGUSR1), 0), ("SIGTERM", send(signal.SIGTERM), 0),
                ("SIGINT", send(signal.SIGINT), 0), ("STOP", touch("STOP"), 0), ("STOP on 2 ranks", touch("STOP"), 2),
                ("SIGUSR1 to mpirun", send(signal.SIGUSR1), 2))
        for name, ask, ranks in ways:
            with self.subTest(name):
                done = self.until_asked(config, run_dir, ask, ranks)
                self.assertFalse((run_dir / "STOP").exists(), "the request must not stop the next attempt too")
        straight = self.train("straight", *self.STEPS, f"run.stop_at={done}")
        self.assertSameSteps(straight, run_dir)
        self.assertSameWeights(straight / f"step-{done:08d}", run_dir / f"step-{done:08d}")

    def test_save(self):
        """SAVE saves and goes on."""
        config, run_dir = self.config()

        def save_then_stop(process):
            (run_dir / "SAVE").touch()
            lib.wait_for("a checkpoint", lambda: lib.checkpoints(run_dir))
            self.assertFalse((run_dir / "SAVE").exists())
            saved = lib.steps_done(run_dir)
            lib.wait_for("more steps", lambda: lib.steps_done(run_dir) > saved + 1)
            (run_dir / "STOP").touch()

        done = self.until_asked(config, run_dir, save_then_stop, ranks=2)
        saved, last = lib.checkpoints(run_dir)
        self.assertLess(int(saved.name.removeprefix("step-")), done)
        for folder in (saved, last):
            self.assertEqual(lib.tatara(["ckpt", "verify", folder]).status, 0)


if __name__ == "__main__":
    lib.main()
