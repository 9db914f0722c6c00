#!/usr/bin/env python3
"""Training speed of Tatara on a CPU beside PyTorch's: the same model, batch, precision, tokens and threads.

    scripts/bench/cpu_vs_pytorch.py --shards DIR --tokenizer FILE CONFIG.yaml... [options; see --help]

Needs a built build/tatara, a folder of shards with the tokenizer they were made with (scripts/quickstart.sh leaves both
in quickstart/), and an environment with PyTorch 2.5 or later:
    python3 -m venv V && V/bin/pip install torch h5py pyyaml && V/bin/python scripts/bench/cpu_vs_pytorch.py ...

The model is the configuration's. The two are run in turn (Tatara, PyTorch, Tatara, PyTorch, ...), each in a process of
its own, so that a drift of the machine meets both. A run's figure is the median of its steps after the first few; the
table shows the median of the runs and, in brackets, their range. PyTorch gets what its users would give it:
scaled_dot_product_attention, bf16 autocast over fp32 weights, fused AdamW, foreach clipping; --compile adds
torch.compile. Tatara's own documents are not masked here, as PyTorch's fast attention would not mask them.
"""
import argparse
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
WARMUP_STEPS = 3
OPTIM = dict(lr=3e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, clip=1.0)


def run_tatara(job, tatara):
    """Seconds of each step, as Tatara itself reports them."""
    with tempfile.TemporaryDirectory(prefix="tatara-bench-") as folder:
        options = {
            "run.dir": folder, "run.steps": job["steps"], "run.stop_at": 0, "run.threads": job["threads"],
            "data.tokenizer": job["tokenizer"], "data.train": "[{path: %s}]" % job["shards"], "data.valid": "[]",
            "data.document_mask": "false",
            "batch.micro": job["micro"], "batch.global": job["micro"] * job["accumulate"],
            "optim.schedule": "constant", "optim.warmup_steps": 0, **{f"optim.{k}": v for k, v in OPTIM.items()},
            "precision.compute": job["precision"], "parallel.reduce": job["reduce"], "device": "cpu",
            "checkpoint.every": 0, "log.every": 1, "log.eval_every": 0,
        }
        done = subprocess.run([tatara, "train", job["config"], *(f"{k}={v}" for k, v in options.items())],
                              capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{tatara} train ended with status {done.returncode}:\n{done.stderr}")
        lines = pathlib.Path(folder, "metrics.jsonl").read_text().splitlines()
        return [record["step_s"] for record in map(json.loads, lines) if "step_s" in record]


def run_pytorch(job):
    """The same from a process of this script's own (see pytorch_steps)."""
    environment = os.environ | {"OMP_NUM_THREADS": str(job["threads"])}
    done = subprocess.run([sys.executable, __file__, "--pytorch-job", json.dumps(job)], capture_output=True,
                          text=True, env=environment)
    if done.returncode != 0:
        sys.exit(f"PyTorch's run failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def read_tokens(shards, wanted):
    """The first tokens of the folder's shards."""
    import h5py
    import numpy as np

    parts, have = [], 0
    for path in sorted(pathlib.Path(shards).rglob("*.h5")):
        with h5py.File(path) as file:
            parts.append(np.asarray(file["tokens"][: wanted - have], dtype=np.int64))
        have += len(parts[-1])
        if have == wanted:
            return np.concatenate(parts)
    sys.exit(f"{shards} holds {have} tokens; this run needs {wanted}: use fewer --steps or more text")


def make_module(c):
    """The model as nn.Module, returning the mean cross-entropy."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    llama = c["arch"] == "llama"
    C, D, H, K, S = c["hidden"], c["head_dim"], c["heads"], c["kv_heads"], c["seq_len"]

    def norm():
        return nn.RMSNorm(C, eps=c.get("norm_eps", 1e-5)) if llama else nn.LayerNorm(C, eps=c.get("norm_eps", 1e-5))

    def linear(n_in, n_out):
        return nn.Linear(n_in, n_out, bias=not llama)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = norm(), norm()
            self.qkv, self.out = linear(C, (H + 2 * K) * D), linear(H * D, C)
            self.up, self.down = linear(C, c["ffn_hidden"] * (2 if llama else 1)), linear(c["ffn_hidden"], C)

        def forward(self, x, cos, sin):
            qkv = self.qkv(self.norm1(x)).unflatten(-1, (H + 2 * K, D)).transpose(1, 2)
            q, k, v = qkv.split((H, K, K), 1)
            if llama:
                q, k = (y * cos + torch.cat((-y[..., D // 2:], y[..., :D // 2]), -1) * sin for y in (q, k))
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=K != H)
            x = x + self.out(o.transpose(1, 2).flatten(2))
            up = self.up(self.norm2(x))
            if llama:
                gate, up = up.chunk(2, -1)
                return x + self.down(F.silu(gate) * up)
            return x + self.down(F.gelu(up, approximate="tanh"))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(c["vocab_size"], C)
            self.positions = None if llama else nn.Embedding(S, C)
            self.blocks = nn.ModuleList(Block() for _ in range(c["layers"]))
            self.norm = norm()
            self.head = None if c["tie_embeddings"] else nn.Linear(C, c["vocab_size"], bias=False)
            theta = c.get("rope_theta", 500000.0)
            angle = torch.outer(torch.arange(S), theta ** (-torch.arange(0, D, 2) / D)).repeat(1, 2)
            self.register_buffer("cos", angle.cos().to(torch.get_default_dtype()))
            self.register_buffer("sin", angle.sin().to(torch.get_default_dtype()))
            for p in self.parameters():
                if p.ndim == 2:
                    nn.init.normal_(p, std=0.02)

        def forward(self, tokens, targets):
            cos, sin = self.cos, self.sin
            if torch.is_autocast_enabled("cpu"):
                cos, sin = cos.bfloat16(), sin.bfloat16()
            x = self.embed(tokens) + (0 if llama else self.positions.weight)
            for block in self.blocks:
                x = block(x, cos, sin)
            logits = F.linear(self.norm(x), (self.head or self.embed).weight)
            return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    return Model()


def pytorch_steps(job):
    """Trains job["steps"] steps and prints the seconds of each as the last line."""
    import torch

    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    c, micro = job["model"], job["micro"]
    per_step = job["accumulate"] * micro * c["seq_len"]
    tokens = torch.from_numpy(read_tokens(job["shards"], job["steps"] * per_step + 1))
    model = make_module(c)
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": OPTIM["weight_decay"]},
         {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}],
        lr=OPTIM["lr"], betas=(OPTIM["beta1"], OPTIM["beta2"]), eps=OPTIM["eps"], fused=True)
    loss_of = torch.compile(model) if job["compile"] else model
    seconds, losses = [], []
    for step in range(job["steps"]):
        begin = time.perf_counter()
        at = step * per_step
        inputs = tokens[at:at + per_step].view(job["accumulate"], micro, -1)
        targets = tokens[at + 1:at + 1 + per_step].view(job["accumulate"], micro, -1)
        total = 0.0
        for i in range(job["accumulate"]):
            with torch.autocast("cpu", torch.bfloat16, enabled=job["precision"] == "bf16"):
                loss = loss_of(inputs[i], targets[i]) / job["accumulate"]
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM["clip"], foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - begin)
        losses.append(total)
    if not all(map(math.isfinite, losses)) or losses[-1] >= losses[0]:
        sys.exit(f"PyTorch's model does not learn: {losses}")
    print(json.dumps(seconds))


def read_model(config):
    """The model section of a configuration."""
    import yaml

    with open(config) as file:
        model = {"tie_embeddings": True} | yaml.safe_load(file)["model"]
    if model.get("qk_norm") or model.get("z_loss") or model.get("recompute", "none") != "none":
        sys.exit(f"{config}: the PyTorch side here has no qk_norm, z_loss or recompute; turn them off")
    return model


def compare(job, rounds, tatara):
    """Alternates the two; prints one line of the table."""
    tokens = job["accumulate"] * job["micro"] * job["model"]["seq_len"]
    rates = {"Tatara": [], "PyTorch": []}
    for _ in range(rounds):
        for name, run in (("Tatara", lambda: run_tatara(job, tatara)), ("PyTorch", lambda: run_pytorch(job))):
            rates[name].append(tokens / statistics.median(run()[WARMUP_STEPS:]))
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
                        help=f"steps of a run; the first {WARMUP_STEPS} are not counted")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--reduce", choices=["exact", "fast"], default="exact", help="Tatara's sum of gradients")
    parser.add_argument("--compile", action="store_true", help="give PyTorch torch.compile")
    parser.add_argument("--tatara", default=str(ROOT / "build" / "tatara"))
    parser.add_argument("--pytorch-job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.pytorch_job:
        pytorch_steps(json.loads(options.pytorch_job))
        return
    if not (options.config and options.shards and options.tokenizer):
        parser.error("a configuration, --shards and --tokenizer are needed; scripts/quickstart.sh makes the last two")
    if options.steps <= WARMUP_STEPS:
        parser.error(f"--steps must be more than {WARMUP_STEPS}")

    import torch

    print(f"PyTorch {torch.__version__}{', compiled' if options.compile else ''}; Tatara, reduce: {options.reduce}; "
          f"{options.threads} threads; {options.rounds} alternating runs of {options.steps} steps; tokens/s")
    print(f"{'configuration':<16} {'type':<5} {'batch':<11} {'Tatara':<22} {'PyTorch':<22} ratio")
    for config in options.config:
        for precision in options.precision:
            job = {"config": config, "model": read_model(config), "precision": precision,
                   "shards": os.path.abspath(options.shards), "tokenizer": os.path.abspath(options.tokenizer)}
            for key in ("micro", "accumulate", "steps", "threads", "reduce", "compile"):
                job[key] = getattr(options, key)
            compare(job, options.rounds, options.tatara)


if __name__ == "__main__":
    main()
