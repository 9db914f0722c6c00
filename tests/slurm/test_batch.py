"""scripts/submit.sh and the job scripts of every scheduler, with schedulers and launchers that only note what they are
called with: what is submitted, and what a job does after each way in which an attempt can end.

    test_batch.py --tatara PROGRAM --mpirun … --data FOLDER
"""
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

sys.dont_write_bytecode = True
HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "e2e"))

import lib  # noqa: E402

ROOT = HERE.parent.parent
SUFFIX = {"slurm": "sbatch", "pbs": "pbs", "pjm": "pjm", "sge": "sge"}
MORE = {"slurm": ["--option", "--partition=main"], "pbs": ["--option", "-q main"], "pjm": ["--option", "-L rscgrp=main"],
        "sge": ["--option", "-l node_f=2"]}
# Notes each call. A launcher ends with the next status of its list; "hold" is a run that goes on until it is asked to
# stop, "stuck" one that does so then, too.
FAKE = r"""#!/bin/bash
name=${0##*/}
echo "$name $*" >>"$FAKE/calls"
case "$name $*" in
"srun --mpi=list") [[ ! -e $FAKE/no-pmix ]] && echo "pmix" ;;
srun* | mpirun*)
    env | grep OMPI_MCA_ >>"$FAKE/environment"
    read -r status <"$FAKE/statuses" || status=0
    sed -i 1d "$FAKE/statuses"
    if [[ -e $FAKE/says ]]; then cat "$FAKE/says" >&2; fi
    if [[ $status == hold ]]; then
        trap 'exit 11' USR1
        touch "$FAKE/holding"
        while sleep 0.1; do :; done
    fi
    if [[ $status == stuck ]]; then
        trap '' USR1
        trap 'exit 143' TERM
        touch "$FAKE/holding"
        while sleep 0.1; do :; done
    fi
    # The run of 20 steps is finished; "lost" is a launcher that knows nothing of its ranks any more.
    if [[ $status == 0 ]]; then mkdir -p "$RUN_DIR/step-00000020"; fi
    if [[ $status == lost ]]; then exit 0; fi
    exit "$status"
    ;;
"scontrol show hostnames"*) printf '%s\n' n1 n2 n3 ;;
"scontrol --oneliner show job"*) echo "JobId=$SLURM_JOB_ID JobState=RUNNING Restarts=$(cat "$FAKE/restarts") Requeue=1" ;;
sinfo*) cat "$FAKE/lost" 2>/dev/null ;;
squeue*) cat "$FAKE/left" ;;
pjsub*) echo "[INFO] PJM 0000 pjsub Job 77_$(wc -l <"$FAKE/calls") submitted." ;;
sbatch* | qsub*) wc -l <"$FAKE/calls" ;;
esac
exit 0
"""
TOOLS = ["srun", "mpirun", "scontrol", "sinfo", "squeue", "sbatch", "qsub", "pjsub", "pbsnodes", "qhost"]


class Batch(lib.Case):
    def setUp(self):
        super().setUp()
        self.fake = self.dir / "fake"
        self.fake.mkdir()
        for tool in TOOLS:
            (self.fake / tool).write_text(FAKE)
            (self.fake / tool).chmod(0o755)
        (self.fake / "restarts").write_text("0")
        (self.fake / "left").write_text("1-02:03:04")
        (self.fake / "nodes").write_text("n1\nn1\nn2\nn2\nn3\nn3\n")
        (self.fake / "slots").write_text("n1 2 q\nn2 2 q\nn3 2 q\n")
        self.yaml, self.run_dir = self.config()
        self.forget()

    def forget(self, *statuses):
        """Attempts will end with these; calls so far are forgotten."""
        (self.fake / "statuses").write_text("".join(f"{status}\n" for status in statuses))
        for name in ["calls", "environment"]:
            (self.fake / name).write_text("")

    def environment(self):
        clean = {name: value for name, value in os.environ.items()
                 if not name.startswith(("SLURM_", "OMPI_MCA_", "PMIX_MCA_", "TATARA_"))}
        return {**clean, "PATH": f"{self.fake}:{os.environ['PATH']}", "FAKE": str(self.fake), "RUN_DIR": str(self.run_dir),
                "TATARA_RETRY_S": "0"}

    def calls(self, *names):
        lines = (self.fake / "calls").read_text().splitlines()
        return [line for line in lines if line.split()[0] in names and "--mpi=list" not in line]

    def submit(self, scheduler, *options, words=(), status=0):
        more = [] if "--option" in options else MORE.get(scheduler, [])
        done = subprocess.run([ROOT / "scripts/submit.sh", "--scheduler", scheduler, "--program", lib.options.tatara,
                               "--nodes", "2", "--ranks-per-node", "2", *more, *options, self.yaml, *words],
                              capture_output=True, text=True, check=False, timeout=60, env=self.environment(),
                              cwd=self.dir)
        self.assertEqual(done.returncode, status, done.stdout + done.stderr)
        return done.stdout + done.stderr

    def job(self, scheduler, script=None, ask=False, **more):
        """Runs a job script that was submitted, as its scheduler would; returns its status and what it said."""
        script = script or self.last_script()
        given = {"slurm": {"SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_SUBMIT_DIR": ROOT},
                 "pbs": {"PBS_JOBID": "5.server", "PBS_NODEFILE": self.fake / "nodes", "PBS_O_WORKDIR": self.dir},
                 "pjm": {"PJM_JOBID": "5", "PJM_NODE": "2", "PJM_O_WORKDIR": self.dir},
                 "sge": {"JOB_ID": "5", "PE_HOSTFILE": self.fake / "slots", "SGE_O_WORKDIR": self.dir}}[scheduler]
        environment = {**self.environment(), **given, **more}
        process = subprocess.Popen(["bash", script], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, text=True, start_new_session=True,
                                   env={name: str(value) for name, value in environment.items()})
        try:
            if ask:
                lib.wait_for("a run", (self.fake / "holding").exists)
                process.send_signal(signal.SIGUSR1)
            said, _ = process.communicate(timeout=60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return process.returncode, said

    def last_script(self):
        scripts = (self.run_dir / "logs").glob("submit-*.sh")
        return max(scripts, key=lambda path: path.stat().st_mtime_ns)

    def with_clock(self, limit, save):
        """The last job script, with another time limit for its own clock."""
        script = self.last_script()
        script.write_text(re.sub(r"TATARA_TIME_S=\d+ TATARA_SAVE_S=\d+", f"TATARA_TIME_S={limit} TATARA_SAVE_S={save}",
                                 script.read_text()))
        return script

    def requeues(self):
        return [call for call in self.calls("scontrol", "qsub", "pjsub") if "show" not in call]

    def each(self):
        """Every scheduler, with a job submitted, spares where they are possible."""
        for scheduler in SUFFIX:
            with self.subTest(scheduler=scheduler):
                self.setUp()
                self.submit(scheduler, *([] if scheduler == "pjm" else ["--spare", "1"]))
                self.forget()
                yield scheduler

    # ---- submission ----

    def test_submission(self):
        for scheduler in SUFFIX:
            with self.subTest(scheduler=scheduler):
                self.forget()
                said = self.submit(scheduler, "--chain", "3", "--time", "1-01:00:00", words=["optim.lr=1e-3"])
                self.assertRegex(said, r"parameters +119104 ")
                sent = self.calls("sbatch", "qsub", "pjsub")
                self.assertEqual([re.search(r"TATARA_CHAIN_LAST=(\d)", line) is not None for line in sent],
                                 [scheduler != "slurm"] * 3, sent)
                self.assertEqual(said.count("submit          "), 3, said)
                script = pathlib.Path(sent[-1].split()[-1])
                text = script.read_text()
                self.assertIn(f"scripts/{scheduler}/train.{SUFFIX[scheduler]} {self.yaml} optim.lr=1e-3", text)
                self.assertIn("main" if scheduler != "sge" else "node_f", text)
                subprocess.run(["bash", "-n", script], check=True)
                later = {"slurm": "--dependency=singleton", "pbs": "depend=afterany:", "pjm": "jid=77,sn=3",
                         "sge": "-hold_jid"}[scheduler]
                self.assertIn(later, text if scheduler == "slurm" else sent[-1])
                self.assertIn("1-01:00:00" if scheduler == "slurm" else "25:00:00", text)

    def test_dry_run(self):
        said = self.submit("slurm", "--dry-run")
        self.assertIn("#SBATCH --signal=B:USR1@180", said)
        self.assertEqual(self.calls("sbatch"), [])
        self.assertFalse(self.run_dir.exists())

    def test_refusals(self):
        """Nothing is submitted that would not run."""
        for options, words, text in [
                ([], ["model.layers=none"], "tatara plan refuses the configuration"),
                ([], ["checkpoint.keep=1000000", "model.hidden=4096", "model.heads=256", "model.ffn_hidden=8192"],
                 "lower checkpoint.keep"),
                ([], [f"run.dir={self.yaml}/x"], "cannot be written to"),
                (["--time", "24"], [], "--time is [D-]HH:MM:SS"),
                (["--nodes", "0"], [], "whole numbers from 1")]:
            self.assertIn(text, self.submit("slurm", *options, words=words, status=1))
        self.assertIn("PJM ends a job that loses a node", self.submit("pjm", "--spare", "1", status=1))
        self.assertEqual(self.calls("sbatch", "pjsub"), [])

    def test_run_dir(self):
        """However the configuration is written, the run's folder is the one that training would take."""
        text = self.yaml.read_text()
        for change, words, expected in [
                (("{dir: " + str(self.run_dir), "{dir: '" + str(self.dir / "a,b") + "'"), [], "a,b"),
                (("run:        {dir: " + str(self.run_dir) + ", seed: 7, steps: 20}",
                  f'run: # dir: no\n  steps: 20\n  "dir": |-\n    {self.dir}/block\n'), [], "block"),
                (("", ""), [f"run.dir={self.dir}/no", f"run.dir={self.dir}/c=d"], "c=d")]:
            self.yaml.write_text(text.replace(*change))
            said = self.submit("slurm", "--dry-run", words=words)
            self.assertIn(f"metrics in {self.dir / expected}/metrics.jsonl", said)

    def test_stop_at(self):
        """A part of a run is finished with its last step."""
        self.submit("slurm", words=["run.stop_at=15"])
        (self.run_dir / "step-00000015").mkdir()
        self.forget("lost")
        status, said = self.job("slurm")
        self.assertEqual((status, self.requeues(), len(self.calls("srun", "mpirun"))), (0, [], 1), said)

    # ---- jobs ----

    def test_finished(self):
        for scheduler in self.each():
            self.forget(0)
            status, said = self.job(scheduler, OMPI_MCA_btl="self")
            self.assertEqual((status, self.requeues()), (0, []), said)
            self.assertIn("unset, as the submitting shell had them: OMPI_MCA_btl=self", said)
            self.assertEqual((self.fake / "environment").read_text(), "")
            started = self.calls("srun", "mpirun")
            self.assertEqual(len(started), 1, said)
            self.assertIn(f"{lib.options.tatara} train {self.yaml} checkpoint.resume=auto", started[0])
            self.assertIn({"slurm": "--nodes=2 --ntasks=4 --ntasks-per-node=2 --kill-on-bad-exit=1 --exclude=n3",
                           "pjm": "-n 4 "}.get(scheduler, "-n 4 --host n1:2,n2:2"), started[0])

    def test_tried_again(self):
        """A lost rank: again in the job, and not on the node that lost it when there is a spare."""
        for scheduler in self.each():
            self.forget(7, "lost", 0)
            blame = "srun: error: n2: task 1: Killed\n" if scheduler == "slurm" else "… on node n2 exited on signal 9\n"
            (self.fake / "says").write_text(blame)
            status, said = self.job(scheduler)
            started = self.calls("srun", "mpirun")
            self.assertEqual((status, self.requeues(), len(started)), (0, [], 3), said)
            if scheduler != "pjm":
                self.assertIn("--exclude=n2" if scheduler == "slurm" else "--host n1:2,n3:2", started[1])
            self.assertEqual(len(list((self.run_dir / "logs").glob("5*.0.[012].log"))), 3, said)

    def test_given_up(self):
        """Errors that would come again end the job; the others do when nothing is ever saved."""
        for scheduler in self.each():
            for code in [2, 3, 4, 5, 6, 9, 10, 11] if scheduler == "slurm" else [3, 11]:
                self.forget(code)
                status, said = self.job(scheduler)
                self.assertEqual((status, self.requeues(), len(self.calls("srun", "mpirun"))), (code, [], 1), said)
            for turn in range(3):
                self.forget(8, 8, 8)
                status, said = self.job(scheduler, TATARA_MAX_REQUEUES=2)
                self.assertEqual(status, 99 if scheduler == "sge" and turn < 2 else 8, said)
                self.assertEqual(len(self.requeues()), int(turn < 2 and scheduler != "sge"), said)
            self.assertIn("2 jobs in a row brought no checkpoint", said)
            (self.run_dir / "step-00000010").mkdir()
            self.forget(6, 0)
            self.assertEqual(self.job(scheduler)[0], 0)

    def test_limit(self):
        """Asked to stop by the scheduler, or by the script's own clock: saved, and queued again."""
        for scheduler in self.each():
            self.forget("hold")
            status, said = self.job(scheduler, ask=True)
            self.assertEqual(status, 99 if scheduler == "sge" else 11, said)
            self.assertEqual(len(self.requeues()), int(scheduler != "sge"), said)
            if scheduler == "slurm":
                self.assertEqual(self.requeues(), ["scontrol requeue 5"])
                continue
            self.forget("hold")
            began = time.monotonic()
            status, said = self.job(scheduler, self.with_clock(2, 1))
            self.assertIn("the time limit is near", said)
            self.assertLess(time.monotonic() - began, 15)

    def test_overdue(self):
        """Ranks that do not stop when they are asked to: the job is queued again before the limit ends it."""
        for scheduler in self.each():
            self.forget("stuck")
            (self.fake / "left").write_text("0:02")
            began = time.monotonic()
            status, said = self.job(scheduler, self.with_clock(4, 2), ask=scheduler == "slurm")
            self.assertLess(time.monotonic() - began, 15)
            self.assertEqual(status, 99 if scheduler == "sge" else 137, said)
            self.assertIn("the ranks have not stopped in time", said)
            self.assertEqual(len(self.requeues()), int(scheduler != "sge"), said)

    def test_left(self):
        """The time that Slurm says is left, in its several forms."""
        function = re.search(r"^batch_left\(\) \{.*?^\}", (ROOT / "scripts/slurm/train.sbatch").read_text(), re.M | re.S)
        for text, seconds in [("1-02:03:04", "93784"), ("02:03:04", "7384"), ("3:04", "184"), ("0:59", "59"),
                              ("UNLIMITED", ""), ("INVALID", "")]:
            (self.fake / "left").write_text(text + "\n")
            done = subprocess.run(["bash", "-c", f"{function.group(0)}\nbatch_job=5\nbatch_left"], capture_output=True,
                                  text=True, check=True, timeout=20, env=self.environment())
            self.assertEqual(done.stdout.strip(), seconds, text)

    def test_chain(self):
        """A link that reaches its limit leaves the run to the next; when the run is over, the next end at once."""
        for scheduler in SUFFIX:
            with self.subTest(scheduler=scheduler):
                self.setUp()
                self.submit(scheduler, "--chain", "3")
                self.forget("hold")
                status, said = self.job(scheduler, ask=True, TATARA_CHAIN_LAST=0)
                self.assertEqual((status, self.requeues()), (11, []), said)
                self.forget(0)
                self.assertEqual(self.job(scheduler, TATARA_CHAIN_LAST=0)[0], 0)
                self.forget()
                status, said = self.job(scheduler, TATARA_CHAIN_LAST=1)
                self.assertEqual((status, self.calls("srun", "mpirun")), (0, []), said)
                self.assertIn("nothing to do: an earlier job of this chain has ended the run", said)
                # The next submission is another chain.
                self.submit(scheduler, "--chain", "2")
                self.forget(0)
                self.job(scheduler, TATARA_CHAIN_LAST=0)
                self.assertEqual(len(self.calls("srun", "mpirun")), 1)

    def test_slurm_only(self):
        script = self.dir / "direct.sh"
        script.write_text(f"exec bash {ROOT}/scripts/slurm/train.sbatch {self.yaml}\n")
        program = {"TATARA_PROGRAM": lib.options.tatara}
        # mpirun where srun has no PMIx.
        (self.fake / "no-pmix").touch()
        self.forget(0)
        self.assertEqual(self.job("slurm", script, **program)[0], 0)
        self.assertEqual(len(self.calls("mpirun")), 1)
        self.assertIn("--host n1:1,n2:1,n3:1", self.calls("mpirun")[0])
        # A script whose job Slurm has started anew elsewhere does not have it queued again.
        (self.fake / "no-pmix").unlink()
        (self.fake / "restarts").write_text("1")
        self.forget(137)
        status, said = self.job("slurm", script, **program)
        self.assertEqual((status, self.requeues()), (137, []), said)
        self.assertIn("taken this job elsewhere", said)
        # Too few nodes are left: queued again, without an attempt.
        (self.fake / "restarts").write_text("0")
        (self.fake / "lost").write_text("n1 idle\nn2 down*\nn3 allocated\n")
        self.forget()
        status, said = self.job("slurm", script, **program)
        self.assertEqual((self.requeues(), self.calls("srun")), (["scontrol requeue 5"], []), said)


if __name__ == "__main__":
    lib.main()
