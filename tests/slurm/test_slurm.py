"""Training jobs on a real Slurm, interrupted in every way that ends such jobs: each finishes without a hand on it, with
weights bit-identical with those of a run that nothing interrupted.

    test_slurm.py --tatara PROGRAM --mpirun "mpirun and its options" --data FOLDER [--all] [Jobs.test_X …]

FOLDER is what tests/make_corpus.sh made. Without --all only the cases that are marked quick are run. A requeued job is
let start at once, where a cluster waits two minutes; nothing else is done for it. Ends with status 77 where no Slurm can
be started.
"""
import os
import pathlib
import signal
import sys
import time
import unittest

sys.dont_write_bytecode = True
HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "e2e")]

import cluster  # noqa: E402
import lib  # noqa: E402

ROOT = HERE.parent.parent
SBATCH = ROOT / "scripts/slurm/train.sbatch"
SKIPPED = 77
ALL = "--all" in sys.argv
STEPS = 80
# The exact sum is the default, but the threads of a rank follow from the cores, which are not the same everywhere.
WORDS = ["batch.global=20", "checkpoint.every=10", "optim.decay_steps=20", "run.threads=1"]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")


def quick(test):
    """A case that scripts/test.sh runs."""
    return test


def slow(test):
    return unittest.skipUnless(ALL, "with scripts/test.sh --all only")(test)


class Jobs(lib.Case):
    """One cluster for all cases; nodes that a case lost are started again after it."""

    references = {}

    @classmethod
    def setUpClass(cls):
        cls.slurm = cluster.Cluster()
        cls.addClassCleanup(cls.slurm.stop)
        cls.slurm.start()
        cls.folder = lib.temp_dir(cls.addClassCleanup)

    def setUp(self):
        super().setUp()
        self.pending = {}  # since when a job waits to be started again
        self.addCleanup(self.restore)

    def restore(self):
        for job in self.slurm.queue():
            self.slurm.command("scancel", job, check=False)
        cluster.wait_for("an empty queue", lambda: not self.slurm.queue(), 60)
        for name, node in self.slurm.nodes.items():
            if node.slurmd.poll() is not None:
                self.slurm.power_cut(name)
                self.slurm.power_on(name)
        cluster.wait_for("idle nodes", lambda: set(self.slurm.states().values()) == {"idle"}, 60)

    # ---- what the cases are made of ----

    def reference(self, steps):
        """The last checkpoint of the same run, uninterrupted."""
        if steps not in self.references:
            config, run_dir = lib.write_config(self.folder, f"reference-{steps}")
            result = lib.tatara(["train", config, *WORDS, f"run.steps={steps}"], ranks=2, timeout=600)
            self.assertEqual(result.status, 0, result)
            self.references[steps] = run_dir / f"step-{steps:08}"
        return self.references[steps]

    def submit(self, *options, words=(), steps=STEPS, **environment):
        """Submits a job of two nodes; returns its id."""
        self.steps = steps
        self.config_path, self.run_dir = self.config()
        site = self.dir / "site.sh"
        site.write_text("".join(f"export {name}={value}\n" for name, value in cluster.MPI.items()))
        # As a user has it: settings of another machine in the shell that submits.
        stray = {"OMPI_MCA_btl": "self", "PMIX_MCA_ptl": "none"}
        given = {"TATARA_ROOT": ROOT, "TATARA_PROGRAM": lib.options.tatara, "TATARA_SITE": site, "TATARA_RETRY_S": 1,
                 "TATARA_MAX_REQUEUES": 3, **stray, **environment}
        job = self.slurm.command("sbatch", "--parsable", "--nodes=2", f"--output={self.dir}/job.out", *options, SBATCH,
                                 self.config_path, *WORDS, f"run.steps={steps}", *words,
                                 environment={name: str(value) for name, value in given.items()})
        return job.strip()

    def told(self):
        """What the job scripts said, and the ends of the attempts' logs: for messages."""
        texts = [path.read_text() if path.exists() else "" for path in [self.dir / "job.out"]]
        for path in sorted((self.run_dir / "logs").glob("*.log")):
            texts.append(f"--- {path.name}\n" + "\n".join(path.read_text().splitlines()[-12:]))
        for path in sorted((self.slurm.folder / "log").iterdir()):
            texts.append(f"--- {path.name}\n" + "\n".join(path.read_text().splitlines()[-12:]))
        return "\n".join(texts)

    def wait(self, what, condition, timeout=60):
        try:
            return cluster.wait_for(what, condition, timeout)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.told()}") from None

    def wait_step(self, step, timeout=60):
        self.wait(f"step {step}", lambda: lib.steps_done(self.run_dir) >= step, timeout)

    def ended(self, job):
        """Whether a job is over; one that waits to be started again is let start, once its first attempt is gone from the
        nodes that Slurm reaches, and 3 s later: a slurmd refuses a job that starts in the second in which it was ended."""
        state = self.slurm.job(job)
        if state.get("JobState") == "PENDING" and not self.slurm.steps(job):
            since = self.pending.setdefault((job, state.get("Restarts")), time.monotonic())
            if time.monotonic() > since + 3:
                self.slurm.hurry(job)
        return state if state.get("JobState") in ENDED else None

    def finish(self, job, timeout=120):
        """Waits for a job's end, which must be the run's, and compares the weights."""
        state = self.wait(f"the end of job {job}", lambda: self.ended(job), timeout)
        self.assertEqual((state["JobState"], state["ExitCode"]), ("COMPLETED", "0:0"), self.told())
        self.check()
        return state

    def check(self):
        self.assertSameWeights(self.run_dir / f"step-{self.steps:08}", self.reference(self.steps), self.told())

    def nodes_of(self, job):
        """Its nodes, that of the job script first."""
        nodes = self.slurm.job(job)["NodeList"]
        names = self.slurm.command("scontrol", "show", "hostnames", nodes).split()
        host = self.slurm.job(job)["BatchHost"]
        return [host] + [name for name in names if name != host]

    def ranks(self, *names):
        """Ids of the ranks on these nodes."""
        return [pid for name in names for pid in self.slurm.ranks(name, lib.options.tatara)]

    def signal_script(self, job):
        """What Slurm does when the time limit is near: --signal=B:USR1. (For a job of an array scancel of Slurm 22.05 ends
        with status 229, and has signalled it.)"""
        self.slurm.command("scancel", "--batch", "--signal=USR1", job, check=False)

    # ---- the cases ----

    @quick
    def test_asked_at_limit(self):
        """The signal that comes before the limit: saves, is queued again, goes on from there."""
        job = self.submit()
        self.wait_step(15)
        self.signal_script(job)
        state = self.finish(job)
        self.assertEqual(state["Restarts"], "1", self.told())
        self.assertIn("unset, as the submitting shell had them: OMPI_MCA_btl=self", self.told())
        # A log for each attempt. The second job may take two: step 0 finds the first job's sockets, and is repeated.
        self.assertLessEqual({f"{job}.0.0.log", f"{job}.1.0.log"}, set(os.listdir(self.run_dir / "logs")), self.told())
        # All that was done was saved: no step was taken twice.
        steps = [line["step"] for line in lib.metrics(self.run_dir) if "event" not in line]
        self.assertEqual(steps, list(range(1, STEPS + 1)))

    @slow
    def test_limit(self):
        """A real time limit of one minute."""
        job = self.submit("--time=1", "--signal=B:USR1@40", steps=1300, words=["checkpoint.every=1000"])
        state = self.finish(job, 600)
        self.assertGreaterEqual(int(state["Restarts"]), 1, self.told())

    def cut(self, which):
        job = self.submit()
        self.wait_step(25)
        self.slurm.power_cut(self.nodes_of(job)[which])
        return self.finish(job)

    @quick
    def test_power_cut(self):
        """A node is gone: its rank, its slurmd, all."""
        self.assertGreaterEqual(int(self.cut(1)["Restarts"]), 1, self.told())

    @slow
    def test_power_cut_of_script(self):
        """The node on which the job script ran."""
        self.assertGreaterEqual(int(self.cut(0)["Restarts"]), 1, self.told())

    @slow
    def test_spare(self):
        """With a node more than needed the same job goes on without the one that is gone."""
        job = self.submit("--nodes=3", "--no-kill", TATARA_NODES=2)
        self.wait_step(25)
        lost = next(name for name in self.nodes_of(job)[1:] if self.ranks(name))
        self.slurm.power_cut(lost)
        self.assertEqual(self.finish(job)["Restarts"], "0", self.told())
        self.assertIn(f"not {lost}", self.told())

    @slow
    def test_killed_rank(self):
        """A rank dies and its node does not: tried again in the job. By srun, and by mpirun."""
        for launcher in ["srun", "mpirun"]:
            with self.subTest(launcher=launcher):
                self.dir = lib.temp_dir(self.addCleanup)
                job = self.submit(TATARA_LAUNCHER=launcher)
                self.wait_step(25)
                os.kill(self.ranks(self.nodes_of(job)[1])[0], signal.SIGKILL)
                self.assertEqual(self.finish(job)["Restarts"], "0", self.told())

    @slow
    def test_limit_mpirun(self):
        job = self.submit(TATARA_LAUNCHER="mpirun")
        self.wait_step(15)
        self.signal_script(job)
        self.assertEqual(self.finish(job)["Restarts"], "1", self.told())

    @slow
    def test_hang(self):
        """A rank that stands still is ended by the watchdog of the others."""
        job = self.submit(words=["run.hang_timeout_s=10"])
        self.wait_step(25)
        os.kill(self.ranks(self.nodes_of(job)[1])[0], signal.SIGSTOP)
        began = time.monotonic()
        self.wait("a second attempt", lambda: len(list((self.run_dir / "logs").glob("*.log"))) == 2)
        self.assertLess(time.monotonic() - began, 10 + 10 + 5, self.told())
        self.finish(job)

    @quick
    def test_zombie(self):
        """Slurm loses sight of the nodes and starts the job elsewhere; the first attempt's ranks go on, and write."""
        job = self.submit()
        self.wait_step(25)
        names = self.nodes_of(job)
        zombies = self.ranks(*names)
        self.assertEqual(len(zombies), 2, self.told())
        for pid in zombies:  # they would be through before Slurm misses their nodes
            os.kill(pid, signal.SIGSTOP)
        for name in names:
            self.slurm.kill_slurmd(name)
        others = [name for name in self.slurm.nodes if name not in names]

        def restarted():
            self.ended(job)
            return len(self.ranks(*others)) == 2

        self.wait("the second attempt", restarted)
        self.wait("its first step", lambda: lib.events(self.run_dir, "resume"))
        written = {pid: bytes_written(pid) for pid in zombies}
        for pid in zombies:
            os.kill(pid, signal.SIGCONT)
        self.finish(job)
        for pid in zombies:
            self.assertNotEqual(bytes_written(pid), written[pid], "a zombie has written nothing: nothing is shown")

    @slow
    def test_array(self):
        """A job array, one job at a time: each goes on where the last stopped; when the run is finished they end."""
        job = self.submit("--array=1-4%1", f"--output={self.dir}/job.out", steps=300)
        for step in [15, 45]:
            self.wait_step(step)
            self.signal_script(self.slurm.queue_running()[0])
        self.wait("the end of the chain", lambda: not self.slurm.queue(), 120)
        self.check()
        self.assertIn("nothing to do: an earlier job of this chain has ended the run: the run is finished", self.told())
        self.assertEqual(len(list((self.run_dir / "logs").glob("*.log"))), 3, f"{job}\n{self.told()}")

    @slow
    def test_chain(self):
        """What scripts/submit.sh --chain submits: jobs of one name, of which Slurm runs one at a time."""
        self.steps = STEPS
        self.config_path, self.run_dir = self.config()
        site = self.dir / "site.sh"
        site.write_text("".join(f"export {name}={value}\n" for name, value in cluster.MPI.items()))
        self.slurm.command(ROOT / "scripts/submit.sh", "--scheduler", "slurm", "--nodes", 2, "--chain", 3, "--time",
                           "00:10:00", "--site", site, "--program", lib.options.tatara, self.config_path, *WORDS,
                           f"run.steps={STEPS}", cwd=self.dir)
        self.wait_step(15)
        self.assertEqual(len(self.slurm.queue()), 3)
        self.signal_script(self.slurm.queue_running()[0])
        self.wait("the end of the chain", lambda: not self.slurm.queue(), 120)
        self.check()
        said = "".join(path.read_text() for path in sorted((self.run_dir / "logs").glob("job-*.out")))
        self.assertIn("stopped before the time limit; the next job of the chain goes on", said)
        self.assertIn("nothing to do: an earlier job of this chain has ended the run: the run is finished", said)


def bytes_written(pid):
    """What a process has written so far; -1 when it has ended."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/io").read_text().split()
        return int(fields[fields.index("wchar:") + 1])
    except (OSError, ValueError):
        return -1


if __name__ == "__main__":
    why = cluster.missing()
    if why:
        print(f"skipped: {why}")
        sys.exit(SKIPPED)
    sys.argv = [word for word in sys.argv if word != "--all"]
    lib.main()
