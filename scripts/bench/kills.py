#!/usr/bin/env python3
"""Kills a training run again and again, and checks that nothing is lost: the final weights are bit for bit those of a run
that nobody disturbed.

    scripts/bench/kills.py [--kills 50] [--ranks 2] [--seed 1] [--tatara build/tatara] [config words]

Makes the small corpus of the tests (needs spm_train: scripts/install.sh quickstart), trains once in peace, and then the
same run with frequent background saves, of which a random rank is killed with SIGKILL at a random time; the same command
is started again each time and resumes by itself. Prints a line for each kill, and at the end the checkpoints' verdict:
`tatara ckpt diff` of the two final checkpoints. Exit status 0 only when they are the same.
"""
import argparse
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
# The matrices of the MLP are large enough to be written past the page cache, also by two ranks.
CONFIG = """
run:        {{dir: {run_dir}, seed: 7, steps: {steps}}}
model:      {{arch: llama, layers: 2, hidden: 64, heads: 4, kv_heads: 2, head_dim: 16, ffn_hidden: 9216, seq_len: 64}}
data:       {{tokenizer: {corpus}/tok.model, train: [{{path: {corpus}/train}}]}}
batch:      {{global: 8, micro: 2}}
optim:      {{lr: 3.0e-3, min_lr: 3.0e-4, schedule: wsd, warmup_steps: 10, decay_steps: 50}}
checkpoint: {{every: 3, keep: 2}}
log:        {{every: 1000}}
"""


def command(args, config):
    mpirun = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", str(args.ranks)]
    return [*mpirun, str(args.tatara), "train", str(config), *args.words]


def children(pid):
    tasks = pathlib.Path(f"/proc/{pid}/task")
    return [int(child) for task in tasks.iterdir() for child in (task / "children").read_text().split()]


def newest(run_dir):
    steps = sorted(run_dir.glob("step-*"))
    return int(steps[-1].name[5:]) if steps else 0


def kill_one(args, config, run_dir, rng):
    """Starts the run, kills a rank after a random time; False when it had finished before."""
    longest = rng.choice((0.5, 2.0, 6.0))
    process = subprocess.Popen(command(args, config), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(children(process.pid)) < args.ranks:
        time.sleep(0.01)
    time.sleep(rng.random() * longest)
    try:
        os.kill(rng.choice(children(process.pid)), signal.SIGKILL)
    except (FileNotFoundError, IndexError, ProcessLookupError):
        pass  # it has ended
    return process.wait(timeout=60) != 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--tatara", type=pathlib.Path, default=ROOT / "build/tatara")
    parser.add_argument("words", nargs="*", help="key=value words for both runs")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    with tempfile.TemporaryDirectory(prefix="tatara-kills-") as folder:
        folder = pathlib.Path(folder)
        subprocess.run([ROOT / "tests/make_corpus.sh", folder, args.tatara], check=True, stdout=subprocess.DEVNULL)
        runs = {}
        for name in ("peace", "kills"):
            runs[name] = folder / f"{name}.yaml"
            runs[name].write_text(CONFIG.format(run_dir=folder / name, corpus=folder, steps=args.steps))
        began = time.monotonic()
        subprocess.run(command(args, runs["peace"]), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        print(f"in peace: {args.steps} steps in {time.monotonic() - began:.1f} s")
        killed = 0
        while killed < args.kills:
            before = newest(folder / "kills")
            if not kill_one(args, runs["kills"], folder / "kills", rng):
                sys.exit(f"the run ended after {killed} kills; take more --steps")
            killed += 1
            print(f"kill {killed:3d}: step {before} to {newest(folder / 'kills')}", flush=True)
        subprocess.run(command(args, runs["kills"]), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        final = [folder / name / f"step-{args.steps:08d}" for name in ("peace", "kills")]
        result = subprocess.run([args.tatara, "ckpt", "diff", *final], stdout=subprocess.PIPE, text=True)
        print(result.stdout, end="")
        same = result.returncode == 0
        leftovers = [entry.name for entry in (folder / "kills").glob(".tmp*")]
        print(f"{killed} kills: {'nothing was lost' if same and not leftovers else f'FAILED {leftovers}'}")
        sys.exit(0 if same and not leftovers else 1)


if __name__ == "__main__":
    main()
