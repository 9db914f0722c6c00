#!/usr/bin/env python3
"""Training speed of Tatara on a CPU beside PyTorch's: the same model, batch, precision, tokens and threads.

    scripts/bench/cpu_vs_pytorch.py --shards DIR --tokenizer FILE CONFIG.yaml... [options; see --help]

Needs a built build/tatara, a folder of shards with the tokenizer they were made with (scripts/quickstart.sh leaves both
in quickstart/), and an environment with PyTorch 2.5 or later:
    python3 -m venv V && V/bin/pip install torch h5py pyyaml && V/bin/python scripts/bench/cpu_vs_pytorch.py ...

The model is the configuration's. The two are run in turn (Tatara, PyTorch, Tatara, PyTorch, ...), each in a process of
its own, so that a drift of the machine meets both. A run's figure is the median of its steps after the first few; the
table shows the median of the runs and, in brackets, their range. PyTorch gets what its users would give it (see
torch_model.py); --compile adds torch.compile. Tatara's own documents are not masked here, as PyTorch's fast attention
would not mask them.
"""
import argparse
import os
import pathlib
import statistics

import versus


def compare(job, rounds, tatara):
    """Alternates the two; prints one line of the table."""
    tokens = job["accumulate"] * job["micro"] * job["model"]["seq_len"]
    rates = {"Tatara": [], "PyTorch": []}
    for _ in range(rounds):
        for name in rates:
            run = versus.run_tatara(job, tatara) if name == "Tatara" else versus.run_pytorch(job)
            rates[name].append(tokens / statistics.median(run["step_s"][versus.WARMUP_STEPS:]))
    cells = [f"{statistics.median(r):.0f} ({min(r):.0f}-{max(r):.0f})" for r in rates.values()]
    ratio = statistics.median(rates["Tatara"]) / statistics.median(rates["PyTorch"])
    batch = f"{job['accumulate']}x{job['micro']}x{job['model']['seq_len']}"
    print(f"{pathlib.Path(job['config']).stem:<16} {job['precision']:<5} {batch:<11} {cells[0]:<22} {cells[1]:<22} "
          f"{ratio:5.2f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", nargs="*", help="whose models are compared, for example configs/quickstart.yaml")
    parser.add_argument("--shards", help="folder of shards")
    parser.add_argument("--tokenizer", help="the tokenizer they were made with")
    parser.add_argument("--precision", nargs="+", choices=["bf16", "fp32"], default=["bf16"])
    parser.add_argument("--micro", type=int, default=4, help="sequences in a micro-batch")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches in a step")
    parser.add_argument("--steps", type=int, default=15,
                        help=f"steps of a run; the first {versus.WARMUP_STEPS} are not counted")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--reduce", choices=["exact", "fast"], default="exact", help="Tatara's sum of gradients")
    parser.add_argument("--compile", action="store_true", help="give PyTorch torch.compile")
    parser.add_argument("--tatara", default=str(versus.ROOT / "build" / "tatara"))
    options = parser.parse_args()
    if not (options.config and options.shards and options.tokenizer):
        parser.error("a configuration, --shards and --tokenizer are needed; scripts/quickstart.sh makes the last two")
    if options.steps <= versus.WARMUP_STEPS:
        parser.error(f"--steps must be more than {versus.WARMUP_STEPS}")

    import torch

    print(f"PyTorch {torch.__version__}{', compiled' if options.compile else ''}; Tatara, reduce: {options.reduce}; "
          f"{options.threads} threads; {options.rounds} alternating runs of {options.steps} steps; tokens/s")
    print(f"{'configuration':<16} {'type':<5} {'batch':<11} {'Tatara':<22} {'PyTorch':<22} ratio")
    for config in options.config:
        for precision in options.precision:
            job = {"config": config, "model": versus.read_model(config), "precision": precision, "device": "cpu",
                   "shards": os.path.abspath(options.shards), "tokenizer": os.path.abspath(options.tokenizer)}
            for key in ("micro", "accumulate", "steps", "threads", "reduce", "compile"):
                job[key] = getattr(options, key)
            compare(job, options.rounds, options.tatara)


if __name__ == "__main__":
    main()
