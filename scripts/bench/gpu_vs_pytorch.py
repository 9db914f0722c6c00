#!/usr/bin/env python3
"""Training on one GPU: Tatara beside PyTorch, with the same model, batch, precision and data.

    scripts/bench/gpu_vs_pytorch.py [MODEL...] [options; see --help]

Needs a program built with CUDA, and a Python with PyTorch 2.5 or later and PyYAML. The data are made here
(synthetic.py). The two are run in turn, each in a process of its own; PyTorch has torch.compile, SDPA, bf16 autocast
over fp32 weights and fused AdamW (torch_model.py). Both read the loss after each step. A run's figure is the median of
its steps after the first few.

MFU is 6 N + attention FLOPs a token (model_flops_per_token in train/model/model.c; N without the embedding's lookup)
over the rate of an 8192^3 bf16 product by cuBLAS, measured beside each run of PyTorch. Memory is what each allocates:
Tatara's arena and buffers, PyTorch's peak of allocated tensors, which leaves out what its allocator keeps in reserve;
in brackets, what nvidia-smi shows at most, less what it showed before.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading

import synthetic
import versus

GOAL_SPEED, GOAL_MEMORY, GOAL_MFU = 1.15, 0.8, {"llama-1b": 0.60}
# What is compared: a configuration, changes to its model, sequences in a micro-batch, micro-batches in a step.
MODELS = {
    "gpt2-124m": ("gpt2-124m", dict(), 16, 4),
    "llama-1b": ("llama-1b", dict(seq_len=4096, recompute="elementwise"), 4, 2),
    "llm-jp-4-8b-slice": ("llm-jp-4-8b", dict(layers=1, recompute="none"), 4, 2),
}
TINY = dict(layers=1, hidden=64, heads=2, kv_heads=2, head_dim=32, ffn_hidden=96, seq_len=64, vocab_size=1000)
TINY_BATCH = 2, 2
DATA_TOKENS = 500_000


class GpuMemory:
    """The most memory that nvidia-smi shows as used while a block runs, less what it showed before, in bytes."""

    def __init__(self, device):
        self.on = device == "cuda"
        self.bytes = None

    def read(self):
        text = subprocess.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"],
                              capture_output=True, text=True, check=True).stdout
        return int(text.split()[0]) << 20

    def watch(self):
        while not self.done.wait(0.25):
            self.most = max(self.most, self.read())

    def __enter__(self):
        if self.on:
            self.before = self.most = self.read()
            self.done = threading.Event()
            self.thread = threading.Thread(target=self.watch)
            self.thread.start()
        return self

    def __exit__(self, *_):
        if self.on:
            self.done.set()
            self.thread.join()
            self.bytes = self.most - self.before


def flops_per_token(c):
    """As in model_flops_per_token of train/model/model.c."""
    q, kv = c["heads"] * c["head_dim"], c["kv_heads"] * c["head_dim"]
    ffn = c["ffn_hidden"] * (3 if c["arch"] == "llama" else 2)
    weights = c["layers"] * c["hidden"] * (2 * q + 2 * kv + ffn) + c["hidden"] * c["vocab_size"]
    return 6 * weights + 6 * c["layers"] * q * c["seq_len"]


def make_job(name, options, folder):
    config, changes, micro, accumulate = MODELS[name]
    if options.tiny:
        changes, (micro, accumulate) = changes | TINY, TINY_BATCH
    path = str(versus.ROOT / "configs" / f"{config}.yaml")
    model = versus.read_model(path, **changes)
    data = f"{folder}/{model['vocab_size']}"
    if not os.path.exists(data):
        synthetic.make(data, model["vocab_size"], 20_000 if options.tiny else DATA_TOKENS, options.tatara)
    return {"config": path, "model": model, "words": [f"model.{key}={value}" for key, value in changes.items()],
            "micro": micro, "accumulate": accumulate, "precision": "bf16", "reduce": options.reduce,
            "device": options.device, "compile": not options.no_compile, "steps": options.steps,
            "threads": len(os.sched_getaffinity(0)),
            "tokenizer": f"{data}/tok.model", "shards": f"{data}/shards", "tokens": f"{data}/tokens.i32"}


def measure(job, options):
    """Alternates the two; returns what was measured: by side, the medians of each run."""
    sides = {"Tatara": [], "PyTorch": []}
    for _ in range(options.rounds):
        for name in sides:
            with GpuMemory(job["device"]) as memory:
                run = versus.run_tatara(job, options.tatara) if name == "Tatara" else versus.run_pytorch(job)
            run["shown_bytes"] = memory.bytes
            run["median_s"] = statistics.median(run["step_s"][versus.WARMUP_STEPS:])
            run["allocated_bytes"] = run.get("planned_bytes", run.get("peak_bytes"))
            sides[name].append(run)
    tokens = job["accumulate"] * job["micro"] * job["model"]["seq_len"]
    peaks = [run["matmul_flops"] for run in sides["PyTorch"] if "matmul_flops" in run]
    result = {"batch": [job["accumulate"], job["micro"], job["model"]["seq_len"]],
              "matmul_flops": statistics.median(peaks) if peaks else None}
    for name, runs in sides.items():
        step_s = statistics.median(run["median_s"] for run in runs)
        flops = tokens / step_s * flops_per_token(job["model"])
        result[name] = {"step_s": step_s, "runs_step_s": [run["median_s"] for run in runs],
                        "tokens_per_s": tokens / step_s, "mfu": flops / result["matmul_flops"] if peaks else None,
                        "allocated_bytes": max(run["allocated_bytes"] or 0 for run in runs),
                        "shown_bytes": max(run["shown_bytes"] or 0 for run in runs)}
    result["speed"] = result["PyTorch"]["step_s"] / result["Tatara"]["step_s"]
    if peaks:
        result["memory"] = result["Tatara"]["allocated_bytes"] / result["PyTorch"]["allocated_bytes"]
    result["chosen"] = sides["Tatara"][-1]["chosen"]
    result["torch"] = sides["PyTorch"][0]["torch"]
    return result


def verdict(value, goal, reached):
    return f"{value:.2f} (goal {goal}: {'reached' if reached else 'missed'})"


def show(name, result):
    print(f"{name}, batch {'x'.join(map(str, result['batch']))}, PyTorch {result['torch']}")
    for side in ("Tatara", "PyTorch"):
        r = result[side]
        line = f"  {side:<8} {1e3 * r['step_s']:9.1f} ms/step ({min(r['runs_step_s']) * 1e3:.1f}-" \
               f"{max(r['runs_step_s']) * 1e3:.1f}) {r['tokens_per_s']:10.0f} tokens/s"
        if r["mfu"]:
            line += f"  MFU {r['mfu']:.1%}  {r['allocated_bytes'] / 2**30:.1f} GiB ({r['shown_bytes'] / 2**30:.1f})"
        print(line)
    for line in result["chosen"]:
        print(f"  Tatara's {line}")
    if "memory" in result:  # the goals are a GPU's
        print("  Tatara's speed over PyTorch's",
              verdict(result["speed"], f">= {GOAL_SPEED}", result["speed"] >= GOAL_SPEED))
        print("  Tatara's memory over PyTorch's",
              verdict(result["memory"], f"<= {GOAL_MEMORY}", result["memory"] <= GOAL_MEMORY))
        if name in GOAL_MFU:
            mfu = result["Tatara"]["mfu"]
            print("  Tatara's share of the matmul rate", verdict(mfu, f">= {GOAL_MFU[name]}", mfu >= GOAL_MFU[name]))
    sys.stdout.flush()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="*", default=list(MODELS), help=f"of {', '.join(MODELS)}; default all")
    parser.add_argument("--steps", type=int, default=20,
                        help=f"steps of a run; the first {versus.WARMUP_STEPS} are not counted")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each")
    parser.add_argument("--reduce", choices=["exact", "fast"], default="exact", help="Tatara's sum of gradients")
    parser.add_argument("--no-compile", action="store_true", help="PyTorch without torch.compile")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try this script out")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try this script out")
    parser.add_argument("--tatara", default=str(versus.ROOT / "build" / "tatara"))
    parser.add_argument("--json", help="file to write the results to")
    options = parser.parse_args()
    unknown = [name for name in options.model if name not in MODELS]
    if unknown or options.steps <= versus.WARMUP_STEPS:
        parser.error(f"no such model: {unknown[0]}" if unknown else f"--steps must be more than {versus.WARMUP_STEPS}")
    results, failed = {}, False
    with tempfile.TemporaryDirectory(prefix="tatara-bench-data-") as folder:
        for name in options.model:
            try:
                results[name] = measure(make_job(name, options, folder), options)
                show(name, results[name])
            except SystemExit as problem:  # one model that fails, for example for memory, leaves the others
                failed = True
                results[name] = {"failed": str(problem)}
                print(f"{name}: {problem}", flush=True)
            if options.json:
                with open(options.json, "w") as file:
                    json.dump(results, file, indent=1)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
