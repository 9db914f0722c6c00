"""What the tests of scripts/submit.sh and the job scripts share: schedulers and launchers that only note what they are
called with.
"""
import os
import pathlib
import re
import signal
import subprocess
import sys

sys.dont_write_bytecode = True
HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "e2e"))

import lib  # noqa: E402

ROOT = HERE.parent.parent
SUFFIX = {"slurm": "sbatch", "pbs": "pbs", "pjm": "pjm", "sge": "sge"}
MORE = {"slurm": ["--option", "--partition=main"], "pbs": ["--option", "-q main"], "pjm": ["--option", "-L rscgrp=main"],
        "sge": ["--option", "-l node_f=2"]}
# Notes each call. A launcher's attempt ends as the next line of its list says: N, the ranks with that status, which
# they leave where the job script reads it; "bare N", the launcher with N, since no rank came to an end of its own;
# "N bare M", the ranks with N and the launcher with M; "hold", when the run is asked to stop, "stuck", not even then.
FAKE = r"""#!/bin/bash
name=${0##*/}
echo "$name $*" >>"$FAKE/calls"
case "$name $*" in
"srun --mpi=list") [[ ! -e $FAKE/no-pmix ]] && printf '%s\n' pmix pmi2 cray_shasta ;;
"mpirun --version" | "mpiexec.hydra --version") cat "$FAKE/version" ;;
srun* | mpirun* | mpiexec*)
    env | grep OMPI_MCA_ >>"$FAKE/environment"
    read -r status word launchers <"$FAKE/statuses" || status=0
    sed -i 1d "$FAKE/statuses"
    if [[ -e $FAKE/says ]]; then cat "$FAKE/says" >&2; fi
    if [[ $status == hold ]]; then
        trap 'status=11' USR1
        touch "$FAKE/holding"
        while [[ $status == hold ]]; do sleep 0.1; done
    fi
    if [[ $status == stuck ]]; then
        trap '' USR1
        trap 'exit 143' TERM
        touch "$FAKE/holding"
        while sleep 0.1; do :; done
    fi
    [[ $status != bare ]] || exit "$word"
    # The run of 20 steps is finished; "lost" is a launcher that knows nothing of its ranks any more.
    if [[ $status == 0 ]]; then mkdir -p "$RUN_DIR/step-00000020"; fi
    if [[ $status == lost ]]; then exit 0; fi
    for word in "$@"; do
        [[ $word != TATARA_STATUS_FILE=* ]] || echo "$status" >"${word#*=}"
    done
    exit "${launchers:-$status}"
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
STARTERS = ["srun", "mpirun", "mpiexec", "mpiexec.hydra"]
TOOLS = [*STARTERS, "scontrol", "sinfo", "squeue", "sbatch", "qsub", "pjsub", "pbsnodes", "qhost"]


class Batch(lib.Case):
    def setUp(self):
        super().setUp()
        self.fake = self.dir / "fake"
        self.fake.mkdir()
        for tool in TOOLS:
            (self.fake / tool).write_text(FAKE)
            (self.fake / tool).chmod(0o755)
        (self.fake / "version").write_text("mpirun (Open MPI) 4.1.4\n")
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
        return [line for line in lines if line.split()[0] in names and "--mpi=list" not in line and "--version" not in line]

    def started(self):
        return self.calls(*STARTERS)

    def submit(self, scheduler, *options, words=(), status=0):
        more = [] if "--option" in options else MORE.get(scheduler, [])
        done = subprocess.run([ROOT / "scripts/submit.sh", "--scheduler", scheduler, "--program", lib.options.tatara,
                               "--nodes", "2", "--ranks-per-node", "2", *more, *options, self.yaml, *words],
                              capture_output=True, text=True, check=False, timeout=60, env=self.environment(),
                              cwd=self.dir)
        self.assertEqual(done.returncode, status, done.stdout + done.stderr)
        return done.stdout + done.stderr

    def job(self, scheduler, script=None, ask=False, timeout=60, **more):
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
            said, _ = process.communicate(timeout=timeout)
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
