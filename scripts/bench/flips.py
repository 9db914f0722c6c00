#!/usr/bin/env python3
"""Damages a run's newest checkpoint at random places, again and again, and checks that it is always found out, by name,
and that the run then resumes from the checkpoint before.

    scripts/bench/flips.py [--tries 200] [--seed 1] [--tatara build/tatara]

A try flips a random bit of, or cuts short at a random place, a random file of the newest checkpoint (larger files are
not likelier than the manifest). `tatara ckpt verify` must name that file, and `tatara train` must pass over that
checkpoint and resume from the one before. Makes the small corpus of the tests (needs spm_train: scripts/install.sh
quickstart). Exit status 0 only when all tries went so.
"""
import argparse
import json
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = """
run:        {{dir: {run_dir}, seed: 7, steps: 20}}
model:      {{arch: llama, layers: 2, hidden: 64, heads: 4, kv_heads: 2, head_dim: 16, ffn_hidden: 160, seq_len: 64}}
data:       {{tokenizer: {corpus}/tok.model, train: [{{path: {corpus}/train}}]}}
batch:      {{global: 4, micro: 2}}
optim:      {{warmup_steps: 4, decay_steps: 4}}
checkpoint: {{every: 10, keep: 2, async: false}}
"""


def damage(rng, file):
    """Flips a bit or cuts the file; says what it did."""
    size = file.stat().st_size
    at = rng.randrange(size)
    if rng.random() < 0.5:
        with file.open("r+b") as data:
            data.truncate(at)
        return f"{file.name} cut to {at} of {size} bytes"
    bit = rng.randrange(8)
    with file.open("r+b") as data:
        data.seek(at)
        value = data.read(1)[0]
        data.seek(at)
        data.write(bytes([value ^ (1 << bit)]))
    return f"{file.name}, bit {bit} of byte {at} of {size} flipped"


def attempt(args, rng, config, run_dir, good):
    shutil.rmtree(run_dir)
    shutil.copytree(good, run_dir)
    newest = run_dir / "step-00000020"
    file = rng.choice(sorted(newest.iterdir()))
    what = damage(rng, file)
    verify = subprocess.run([args.tatara, "ckpt", "verify", newest], capture_output=True, text=True, timeout=60)
    if verify.returncode == 0 or file.name not in verify.stderr:
        return f"{what}: not found out by ckpt verify: {verify.stdout}{verify.stderr}"
    train = subprocess.run([args.tatara, "train", config, "run.stop_at=10"], capture_output=True, text=True, timeout=60)
    events = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    resumed = [event["step"] for event in events if event.get("event") == "resume"]
    if train.returncode != 0 or resumed[-1:] != [10]:
        return f"{what}: did not resume from the checkpoint before: {train.stderr}"
    if "passed over: " not in train.stderr or file.name not in train.stderr:
        return f"{what}: not named: {train.stderr}"
    print(what)
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tatara", type=pathlib.Path, default=ROOT / "build/tatara")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="tatara-flips-") as folder:
        folder = pathlib.Path(folder)
        run_dir, good, config = folder / "run", folder / "good", folder / "run.yaml"
        subprocess.run([ROOT / "tests/make_corpus.sh", folder, args.tatara], check=True, stdout=subprocess.DEVNULL)
        config.write_text(CONFIG.format(run_dir=run_dir, corpus=folder))
        subprocess.run([args.tatara, "train", config], check=True, capture_output=True)
        run_dir.rename(good)
        run_dir.mkdir()
        failures = [failure for _ in range(args.tries) if (failure := attempt(args, rng, config, run_dir, good))]
    for failure in failures:
        print("FAILED", failure)
    print(f"{args.tries} tries: {args.tries - len(failures)} found out, by name, and resumed from the checkpoint before")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
