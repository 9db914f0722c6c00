"""Whoever asks a run to stop, and however: what whole steps have made is saved, and nothing else changes."""
import os
import signal
import time

import lib

# Ten micro-batches of a rank in a step on one rank or two.
WORDS = {0: ["batch.global=20"], 2: ["batch.global=40"]}
# mpirun kills its ranks after twice so many seconds: enough for half a second and a save on a machine that is busy.
GRACE_S = 3


def slow(step_s):
    """What a rank is started by, for steps of so many seconds: a micro-batch has some 75 parallel regions."""
    return ["env", f"LD_PRELOAD={lib.options.slow}", f"SLOW_US={int(step_s / 10 / 75 * 1e6)}"]


def at_once(number, times=1):
    """Sends a signal so often, 10 ms apart."""
    def send(process):
        for i in range(times):
            time.sleep(0.01 * (i > 0))
            process.popen.send_signal(number)
    return send


def to_group(process):
    """What Ctrl-C does: SIGINT to all processes of the terminal's foreground group."""
    os.killpg(process.popen.pid, signal.SIGINT)


class Stop(lib.Case):
    def stop(self, name, ask, status, ranks=0, step_s=1, **more):
        """A run that is asked in the middle of its second step; then the same command goes on to step 4."""
        config, run_dir = self.config(name)
        words = ["train", config, *WORDS[ranks]]
        with lib.Process(words, ranks, wrap=slow(step_s), **more) as process:
            lib.wait_for("the first step", lambda: lib.steps_done(run_dir) >= 1 or not process.running(), 60)
            time.sleep(step_s / 4)
            ask(process)
            result = process.wait(60)
        self.assertEqual(result.status, status, result)
        self.assertStopped(run_dir, result)
        self.train(name, *WORDS[ranks], "run.stop_at=4", ranks=ranks)
        self.assertSameSteps(self.straight(ranks), run_dir)
        self.assertSameWeights(self.straight(ranks) / "step-00000004", run_dir / "step-00000004")
        return result

    def assertStopped(self, run_dir, result):
        """It saved its last whole step: the first, on a machine that is not too busy, and gave the next one up."""
        done = lib.steps_done(run_dir)
        self.assertIn(done, (1, 2, 3), result)
        self.assertEqual([path.name for path in lib.checkpoints(run_dir)], [f"step-{done:08d}"], result)
        self.assertIn(f"step {done + 1}: given up half-way on request", result.stderr)
        self.assertIn(f"stopped at step {done} of 20 on request; the same command goes on from here", result.stderr)
        self.assertEqual(lib.events(run_dir, "end")[-1]["step"], done)

    def straight(self, ranks):
        """The run that nobody stopped."""
        run_dir = self.dir / f"straight-{ranks}"
        if not run_dir.exists():
            self.train(run_dir.name, *WORDS[ranks], "run.stop_at=4", ranks=ranks)
        return run_dir

    def test_signals(self):
        """One process: all that asks, and asks again, is one request."""
        for name, ask in (("TERM", at_once(signal.SIGTERM)), ("TERM thrice", at_once(signal.SIGTERM, 3)),
                          ("INT twice", at_once(signal.SIGINT, 2)), ("HUP", at_once(signal.SIGHUP)),
                          ("XCPU", at_once(signal.SIGXCPU)), ("USR1", at_once(signal.SIGUSR1)), ("group", to_group)):
            with self.subTest(name):
                self.stop(name.replace(" ", "-"), ask, lib.STATUS["stopped"])

    def test_mpirun(self):
        """mpirun passes SIGUSR1 on; of Ctrl-C and SIGTERM it tells the ranks, who save before it kills them, though a step
        takes 5 s."""
        grace = ["env", f"OMPI_MCA_odls_base_sigkill_timeout={GRACE_S}"]
        result = self.stop("USR1", at_once(signal.SIGUSR1), lib.STATUS["stopped"], ranks=2, step_s=2)
        self.assertNotIn("odls_base_sigkill_timeout", result.stderr)
        self.stop("group", to_group, 1, ranks=2, step_s=5, prefix=grace)
        self.stop("TERM", at_once(signal.SIGTERM), 1, ranks=2, step_s=2, prefix=grace)

    def test_hint(self):
        """What mpirun's time is too short for is said at the start."""
        config, _ = self.config()
        words = ["train", config, *WORDS[2], "run.stop_at=1"]
        result = lib.tatara(words, 2, wrap=slow(1), prefix=["env", "OMPI_MCA_odls_base_sigkill_timeout=0"])
        self.assertEqual(result.status, 0, result)
        self.assertIn("to stop, send SIGUSR1 to mpirun", result.stderr)
        self.assertIn("--mca odls_base_sigkill_timeout", result.stderr)

    def test_suspended(self):
        """SIGCONT, mpirun's first word to ranks that it ends, stops nothing after a suspension."""
        config, run_dir = self.config()
        with lib.Process(["train", config, "run.steps=12", *WORDS[2]], 2, wrap=slow(0.5)) as process:
            lib.wait_for("the first step", lambda: lib.steps_done(run_dir) >= 1 or not process.running(), 60)
            process.popen.send_signal(signal.SIGTSTP)
            time.sleep(1.5)
            process.popen.send_signal(signal.SIGCONT)
            result = process.wait(60)
        self.assertEqual(result.status, 0, result)

    def test_interrupted_again(self):
        """A second Ctrl-C, a second later, ends the run in the middle of a micro-batch of 4 s."""
        config, run_dir = self.config()
        with lib.Process(["train", config, *WORDS[0]], wrap=slow(40)) as process:
            lib.wait_for("the start", lambda: "matmul: " in process.result().stderr or not process.running(), 60)
            time.sleep(0.5)
            at_once(signal.SIGINT)(process)
            time.sleep(1.1)
            at_once(signal.SIGINT)(process)
            result = process.wait(2)
        self.assertEqual(result.status, -signal.SIGINT, result)
        self.assertEqual(lib.checkpoints(run_dir), [])

    def test_start(self):
        """Before the first step there is nothing to save, and the next start begins as if there had been none."""
        config, run_dir = self.config()
        with lib.Process(["train", config, *WORDS[0]], wrap=slow(40)) as process:
            lib.wait_for("the start", lambda: "data: " in process.result().stderr or not process.running(), 60)
            at_once(signal.SIGTERM)(process)
            result = process.wait(20)
        self.assertEqual(result.status, lib.STATUS["stopped"], result)
        self.assertRegex(result.stderr, "on request before the first step|stopped at step 0 of 20 on request")
        self.assertEqual((lib.checkpoints(run_dir), result.errors()), ([], []))
        self.train("run", *WORDS[0], "run.stop_at=4")
        self.assertSameWeights(self.straight(0) / "step-00000004", run_dir / "step-00000004")

    def test_evaluation(self):
        """An evaluation is left out, too."""
        config, run_dir = self.config()
        words = [*WORDS[0], f"data.valid=[{{path: {lib.valid_shards()}}}]", "log.eval_every=1"]
        with lib.Process(["train", config, *words], wrap=slow(2)) as process:
            lib.wait_for("the first step", lambda: lib.steps_done(run_dir) >= 1 or not process.running(), 60)
            time.sleep(0.1)
            at_once(signal.SIGTERM)(process)
            result = process.wait(20)
        self.assertEqual(result.status, lib.STATUS["stopped"], result)
        self.assertIn("no validation loss at step 1: asked to stop meanwhile", result.stderr)
        self.assertEqual([path.name for path in lib.checkpoints(run_dir)], ["step-00000001"])
        self.assertEqual(lib.events(run_dir, "evaluation"), [])

    def test_ignored_hangup(self):
        """Under nohup a run goes on."""
        config, run_dir = self.config()
        with lib.Process(["train", config, "run.steps=12"], prefix=["nohup"], wrap=slow(1)) as process:
            lib.wait_for("the first step", lambda: lib.steps_done(run_dir) >= 1 or not process.running(), 60)
            at_once(signal.SIGHUP)(process)
            self.assertEqual(process.wait(60).status, 0)

    def test_reader_gone(self):
        """A run goes on without those who watch it; files that it opens do not get what is printed."""
        for name, words, said in (("head", '"$@" | head -n 1', 1), ("closed", '"$@" >&-', 0),
                                  ("all closed", '"$@" >&- 2>&- <&-', 0)):
            with self.subTest(name):
                config, run_dir = self.config(name.replace(" ", "-"))
                result = lib.tatara(["train", config, *WORDS[0], "run.steps=12"],
                                    prefix=["bash", "-o", "pipefail", "-c", words, "bash"])
                self.assertEqual(result.status, 0, result)
                self.assertEqual(result.stderr.count("standard output cannot be written: Broken pipe"), said, result)
                self.assertEqual(lib.steps_done(run_dir), 12)
                self.assertEqual(lib.tatara(["ckpt", "verify", run_dir / "step-00000012"]).status, 0)


if __name__ == "__main__":
    lib.main()
