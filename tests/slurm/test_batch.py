"""scripts/submit.sh and the job scripts of every scheduler, with schedulers and launchers that only note what they are
called with: what is submitted, and what a job does after each way in which an attempt can end.

    test_batch.py --tatara PROGRAM --mpirun … --data FOLDER
"""
import pathlib
import re
import subprocess
import sys
import time

sys.dont_write_bytecode = True

import batch  # noqa: E402
from batch import ROOT, SUFFIX, lib  # noqa: E402


class Submission(batch.Batch):
    """What scripts/submit.sh submits."""

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
        for words in (["model.layers=none"], ["data.train=[]"], ["model.vocab_size=256"]): # as training refuses it
            for options in ([], ["--dry-run"]):
                said = self.submit("slurm", *options, words=words, status=lib.STATUS["config"])
                self.assertIn("tatara plan refuses the configuration", said)
                self.assertEqual(said.count(lib.ERROR_MARK), 1, said)
        for options, words, text in [
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
        self.assertEqual((status, self.requeues(), len(self.started())), (0, [], 1), said)


class Jobs(batch.Batch):
    """What a job does."""

    def test_finished(self):
        for scheduler in self.each():
            self.forget(0)
            status, said = self.job(scheduler, OMPI_MCA_btl="self")
            self.assertEqual((status, self.requeues()), (0, []), said)
            self.assertIn("unset, as the submitting shell had them: OMPI_MCA_btl=self", said)
            self.assertEqual((self.fake / "environment").read_text(), "")
            started = self.started()
            self.assertEqual(len(started), 1, said)
            self.assertIn(f"{lib.options.tatara} train {self.yaml}", started[0])
            self.assertIn({"slurm": "--nodes=2 --ntasks=4 --ntasks-per-node=2 --kill-on-bad-exit=1 --exclude=n3",
                           "pjm": "-n 4 "}.get(scheduler, "-n 4 --host n1:2,n2:2"), started[0])

    def test_tried_again(self):
        """A lost rank: again in the job, and not on the node that lost it when there is a spare."""
        for scheduler in self.each():
            self.forget(7, "lost", 0)
            blame = "srun: error: n2: task 1: Killed\n" if scheduler == "slurm" else "… on node n2 exited on signal 9\n"
            (self.fake / "says").write_text(blame)
            status, said = self.job(scheduler)
            started = self.started()
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
                self.assertEqual((status, self.requeues(), len(self.started())), (code, [], 1), said)
            for turn in range(3):
                self.forget(8, 8, 8)
                status, said = self.job(scheduler, TATARA_MAX_REQUEUES=2)
                self.assertEqual(status, 99 if scheduler == "sge" and turn < 2 else 8, said)
                self.assertEqual(len(self.requeues()), int(turn < 2 and scheduler != "sge"), said)
            self.assertIn("2 jobs in a row brought no checkpoint", said)
            (self.run_dir / "step-00000010").mkdir()
            self.forget(6, 0)
            self.assertEqual(self.job(scheduler)[0], 0)

    def test_plan_again(self):
        """Shards or a tokenizer that are out of reach for a while do not end the job before its first attempt."""
        self.submit("slurm")
        flaky = self.dir / "flaky"
        flaky.write_text(f"""#!/bin/bash
            if [[ $1 == plan ]] && read -r status <"{flaky}.statuses"; then
                sed -i 1d "{flaky}.statuses"
                exit "$status"
            fi
            exec {lib.options.tatara} "$@"
            """)
        flaky.chmod(0o755)
        script = self.last_script()
        script.write_text(script.read_text().replace(str(lib.options.tatara), str(flaky)))
        for statuses, ended, started in (("6\n6\n", 0, 1), ("6\n6\n6\n", 2, 0), ("3\n", 2, 0)):
            pathlib.Path(f"{flaky}.statuses").write_text(statuses)
            self.forget(0)
            status, said = self.job("slurm", script)
            self.assertEqual((status, len(self.started())), (ended, started), said)

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
                self.assertEqual((status, self.started()), (0, []), said)
                self.assertIn("nothing to do: an earlier job of this chain has ended the run", said)
                # The next submission is another chain.
                self.submit(scheduler, "--chain", "2")
                self.forget(0)
                self.job(scheduler, TATARA_CHAIN_LAST=0)
                self.assertEqual(len(self.started()), 1)

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
        self.forget("bare 137")
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
