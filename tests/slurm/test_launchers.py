"""The launchers of several MPI libraries under the job scripts: how each is told its nodes, and what a job does after
each way in which an attempt can end. What the faked ones answer was measured with Open MPI 4.1.4 and 5.0.11, MPICH 4.0.2
and 5.0.2 (Hydra), Intel MPI 2021.19; Real runs the MPI that the program was built with.

    test_launchers.py --tatara PROGRAM --mpirun … --data FOLDER
"""
import os
import shutil
import signal
import sys
import threading

sys.dont_write_bytecode = True

import batch  # noqa: E402
from batch import lib  # noqa: E402

# By kind: what it says of itself; the words that name its nodes; its status when a rank was killed by signal 9 or 11,
# and when it is asked to end itself, by signal 15, and the ranks stop with status 11; what it says of a rank lost on n2.
KINDS = {
    "openmpi4": ("mpirun (Open MPI) 4.1.4\n\nReport bugs to …", "mpirun --bind-to none -n 4 --host {0}:2,{1}:2 env ",
                 (137, 139, 1), "mpirun noticed that process rank 1 with PID 0 on node n2 exited on signal 9.\n"),
    "openmpi5": ("mpirun (Open MPI) 5.0.11\n\nReport bugs to …", "mpirun --bind-to none -n 4 --host {0}:2,{1}:2 env ",
                 (137, 139, 1), "prterun noticed that process rank 1 with PID 1 on node\nn2 exited on signal 9.\n"),
    "mpich": ("HYDRA build details:\n    Version:      4.0.2", "mpirun -n 4 -hosts {0},{1} -ppn 2 env ", (9, 11, 11),
              "=   BAD TERMINATION OF ONE OF YOUR APPLICATION PROCESSES\n=   PID 1 RUNNING AT n2\n=   EXIT CODE: 9\n"),
    "intelmpi": ("Intel(R) MPI Library for Linux* OS, Version 2021.19.0 Build 20260929",
                 "mpiexec.hydra -n 4 -hosts {0},{1} -ppn 2 env ", (137, 139, 11),
                 "=   RANK 0 PID 1 RUNNING AT n1\n=   KILLED BY SIGNAL: 9 (Killed)\n"),
    "pals": ("mpirun version 1.2.12 (PALS)", "mpirun -n 4 --hosts {0},{1} --ppn 2 env ", (137, 139, 143), ""),
    "srun": ("", "srun --mpi=pmix --nodes=2 --ntasks=4 --ntasks-per-node=2 --kill-on-bad-exit=1 --exclude={2} env ",
             (137, 139, 143), "srun: error: n2: task 1: Killed\n"),
}
NAMES_NO_NODE = ["intelmpi", "pals"]  # of a rank that was killed


class Launchers(batch.Batch):
    def setUp(self):
        super().setUp()
        (self.fake / "tatara").write_text(f'#!/bin/sh\necho "run.dir={self.run_dir}\nrun.last_step=20"\n')
        (self.fake / "tatara").chmod(0o755)
        self.scripts = {}
        for scheduler in batch.SUFFIX:
            self.scripts[scheduler] = self.dir / f"{scheduler}.sh"
            self.scripts[scheduler].write_text(f"TATARA_JOB_SCRIPT=$0 exec bash {batch.ROOT}/scripts/{scheduler}/train."
                                               f"{batch.SUFFIX[scheduler]} {self.yaml}\n")

    def kinds(self):
        """Every kind: (kind, scheduler). A job has two nodes and a spare."""
        for kind, (version, *_) in KINDS.items():
            with self.subTest(kind=kind):
                (self.fake / "version").write_text(version)
                yield kind, "slurm" if kind == "srun" else "pbs"

    def attempts(self, scheduler, *statuses, saved=False, **more):
        """Runs a job whose attempts end so, of a run that has a checkpoint or none; returns its status, how often ranks
        were started, and what it said."""
        shutil.rmtree(self.run_dir, ignore_errors=True)
        if saved:
            (self.run_dir / "step-00000010").mkdir(parents=True)
        self.forget(*statuses)
        given = {"TATARA_ROOT": batch.ROOT, "TATARA_PROGRAM": self.fake / "tatara", "TATARA_NODES": 2,
                 "TATARA_RANKS_PER_NODE": 2}
        status, said = self.job(scheduler, self.scripts[scheduler], **{**given, **more})
        return status, len(self.started()), said

    def test_nodes(self):
        """Each is told its nodes in its own words; after a rank was killed, not the node that its launcher names."""
        for kind, scheduler in self.kinds():
            words, (killed, _, _), says = KINDS[kind][1:]
            (self.fake / "says").write_text(says)
            status, count, said = self.attempts(scheduler, f"bare {killed}", 0)
            self.assertEqual((status, count), (0, 2), said)
            other = ["n1", "n2", "n3"] if kind in NAMES_NO_NODE else ["n1", "n3", "n2"]
            for call, nodes in zip(self.started(), [["n1", "n2", "n3"], other]):
                self.assertTrue(call.startswith(words.format(*nodes)), call)

    def test_endings(self):
        for kind, scheduler in self.kinds():
            killed, fault, ended = KINDS[kind][2]
            # A rank is killed, by signal 9 and 11: again.
            for launchers in [killed, fault]:
                status, count, said = self.attempts(scheduler, f"bare {launchers}", 0)
                self.assertEqual((status, count), (0, 2), said)
                self.assertIn(f"no rank has left its status (the launcher's: {launchers})", said)
            # A hang: again. Each of several times: queued again, with a status that says why.
            self.assertEqual(self.attempts(scheduler, "7 bare 9", 0)[:2], (0, 2))
            status, count, said = self.attempts(scheduler, 7, 7, 7)
            self.assertEqual((status, count, len(self.requeues())), (7, 3, 1), said)
            # Asked to stop, whatever the launcher makes of it; finished; a wrong configuration: once.
            for attempt, expected in [(f"11 bare {ended}", 11), ("0", 0), ("0 bare 1", 0), ("3", 3), ("3 bare 11", 3)]:
                status, count, said = self.attempts(scheduler, attempt)
                self.assertEqual((status, count, self.requeues()), (expected, 1, []), said)
            # Of a lost rank the job's status never says that the program ended so.
            self.assertEqual(self.attempts(scheduler, *[f"bare {fault}"] * 3)[:2], (fault if fault > 128 else 1, 3))

    def test_not_started(self):
        """A launcher that starts nothing: at first the set-up is wrong, later a node may be."""
        for kind, scheduler in self.kinds():
            for code in [126, 127]:
                status, count, said = self.attempts(scheduler, f"bare {code}")
                self.assertEqual((status, count, self.requeues()), (code, 1, []), said)
                self.assertIn("nothing was ever saved: not tried again", said)
            status, count, said = self.attempts(scheduler, *["bare 127"] * 3, saved=True)
            self.assertEqual((status, count, len(self.requeues())), (127, 3, 1), said)

    def test_missing(self):
        """No launcher is there: the job ends at once, and says which and what sets it."""
        path = self.dir / "bin"
        path.mkdir()
        for entry in os.scandir("/usr/bin"):
            if not entry.name.startswith(("mpi", "srun", "orte", "prte")):
                (path / entry.name).symlink_to(entry.path)
        hidden = self.dir / "hidden"
        for kind, scheduler in self.kinds():
            given = {"PATH": f"{self.fake}:{path}"}
            name, setting = KINDS[kind][1].split()[0], "TATARA_MPIRUN"
            own = {setting: f"{self.dir}/no/mpirun -v"}
            if kind == "srun":
                setting, own = "TATARA_LAUNCHER", {}
                given["TATARA_LAUNCHER"] = "srun"
            (self.fake / name).rename(hidden)
            for more in [{}, own]:
                status, count, said = self.attempts(scheduler, **given, **more)
                self.assertEqual((status, count, self.requeues()), (2, 0, []), said)
                self.assertIn(f"error: there is no launcher {more.get('TATARA_MPIRUN', name).split()[0]} on ", said)
                self.assertIn(f"TATARA_SITE (submit.sh --site), or name another launcher in {setting}", said)
            hidden.rename(self.fake / name)

    def test_chosen(self):
        """Kinds that the site file names, and those that cannot be told."""
        (self.fake / "version").write_text("mpirun 1.0")
        for given, spare, expected in [
                ({}, True, "error: mpirun --version does not say how it is told its nodes: set TATARA_LAUNCHER_KIND"),
                ({"TATARA_LAUNCHER_KIND": "lam"}, True, "none, not 'lam'"),
                ({"TATARA_LAUNCHER_KIND": "none"}, True, "leave out --spare"),
                ({"TATARA_LAUNCHER_KIND": "none"}, False, "mpirun -n 4 env "),
                ({"TATARA_LAUNCHER_KIND": "pals", "TATARA_MPIRUN": "mpirun --line-buffer"}, True,
                 "mpirun --line-buffer -n 4 --hosts n1,n2 --ppn 2 env ")]:
            (self.fake / "nodes").write_text("n1\nn2\nn3\n" if spare else "n1\nn2\n")
            started = expected.startswith("mpirun")
            status, count, said = self.attempts("pbs", 0, **given)
            self.assertEqual((status, count), (0, 1) if started else (2, 0), said)
            self.assertIn(expected, self.started()[0] if started else said)

    def test_srun(self):
        """What srun starts the ranks with."""
        for given, expected in [({"TATARA_SRUN_MPI": "none"}, "srun --nodes=2 "),
                                ({"TATARA_SRUN_MPI": "pmi2"}, "srun --mpi=pmi2 --nodes=2 "),
                                ({"TATARA_SRUN_MPI": "cray"}, "srun has no --mpi=cray on "),
                                ({"TATARA_LAUNCHER": "mpirun"}, "mpirun --bind-to none -n 4 --host n1:2,n2:2 "),
                                ({"TATARA_LAUNCHER": "mpiexec"}, "another launcher is named by TATARA_MPIRUN")]:
            started = expected.split()[1].startswith("-")
            status, count, said = self.attempts("slurm", 0, **given)
            self.assertEqual((status, count), (0, 1) if started else (2, 0), said)
            self.assertIn(expected, self.started()[0] if started else said)


    def test_sites(self):
        """The examples for kinds of site give what they say, and stumble over nothing that a site's scripts do."""
        sites = {"slurm-pmix-gpu": ("slurm", "srun --mpi=pmix --nodes=2 "),
                 "slurm-cray": ("slurm", "srun --mpi=cray_shasta --nodes=2 "),
                 "pbs-openmpi": ("pbs", "mpirun --map-by ppr:1:socket --bind-to socket -n 4 --host n1:2,n2:2 "),
                 "pjm-arm": ("pjm", "mpiexec -n 4 env "), "sge": ("sge", "mpirun --bind-to none -n 4 --host n1:2,n2:2 ")}
        folder = batch.ROOT / "configs/sites"
        self.assertEqual(sorted(path.stem for path in folder.iterdir()), sorted(sites))
        for name, (scheduler, started) in sites.items():
            with self.subTest(site=name):
                status, count, said = self.attempts(
                    scheduler, 0, TATARA_SITE=folder / f"{name}.sh",
                    **{"BASH_FUNC_module%%": '() { echo "module $1 $never_set" >>"$FAKE/calls"; }'})
                self.assertEqual((status, count), (0, 1), said)
                self.assertTrue(self.started()[0].startswith(started), self.started())
                self.assertIn("module load", (self.fake / "calls").read_text())
                self.assertNotIn("line ", said)


class Real(batch.Batch):
    """The MPI that the program was built with, on this machine alone."""

    def train(self, *words, act=None):
        """A job of two ranks under Grid Engine's script; `act` is called with its ranks once step 5 is done."""
        script = self.dir / "job.sh"
        script.write_text(f"exec bash {batch.ROOT}/scripts/sge/train.sge {self.yaml} {' '.join(words)}\n")
        (self.fake / "slots").write_text("localhost 2 q\n")
        for name in batch.STARTERS:
            (self.fake / name).unlink()
        threads = [threading.Thread(target=act)] if act else []
        for thread in threads:
            thread.start()
        given = {"TATARA_ROOT": batch.ROOT, "TATARA_PROGRAM": lib.options.tatara, "TATARA_RANKS_PER_NODE": 2,
                 "TATARA_MPIRUN": " ".join(lib.options.mpirun)}
        status, said = self.job("sge", script, timeout=120, **given)
        for thread in threads:
            thread.join()
        logs = [path.read_text(errors="replace") for path in sorted((self.run_dir / "logs").glob("*.log"))]
        return status, logs, said + "".join(logs)

    def kill_rank(self, number):
        lib.wait_for("step 5", lambda: lib.steps_done(self.run_dir) >= 5)
        os.kill(self.ranks()[1], number)

    def ranks(self):
        """Ids of the processes of this run."""
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{pid}/cmdline", "rb") as file:
                    words = file.read().split(b"\0")
            except OSError:
                continue
            if words[:2] == [str(lib.options.tatara).encode(), b"train"] and str(self.yaml).encode() in words:
                found.append(int(pid))
        return sorted(found)

    def test_killed(self):
        for number in [signal.SIGKILL, signal.SIGSEGV]:
            with self.subTest(signal=number):
                self.setUp()
                words = ["run.steps=60", "checkpoint.every=20"]
                status, logs, said = self.train(*words, act=lambda: self.kill_rank(number))
                self.assertEqual((status, len(logs)), (0, 2), said)

    def test_hang(self):
        status, logs, said = self.train("run.steps=60", "checkpoint.every=20", "run.hang_timeout_s=3",
                                        act=lambda: self.kill_rank(signal.SIGSTOP))
        self.assertEqual((status, len(logs)), (0, 2), said)
        self.assertIn("attempt 0 ended with status 7", said)

    def test_stop(self):
        def stop():
            lib.wait_for("step 5", lambda: lib.steps_done(self.run_dir) >= 5)
            (self.run_dir / "STOP").touch()

        status, logs, said = self.train("run.steps=100000", act=stop)
        self.assertEqual((status, len(logs)), (11, 1), said)

    def test_refused(self):
        self.yaml.write_text(self.yaml.read_text().replace(str(lib.train_shards()), str(self.dir / "nothing")))
        status, logs, said = self.train()
        self.assertEqual((status, len(logs)), (4, 1), said)


if __name__ == "__main__":
    lib.main()
