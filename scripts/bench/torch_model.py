"""The PyTorch side of cpu_vs_pytorch.py and gpu_vs_pytorch.py: the model of a configuration, and its training.

    torch_model.py JOB.json        trains, and prints what it measured as JSON on the last line

PyTorch gets what its users would give it: scaled_dot_product_attention, bf16 autocast over fp32 weights, fused AdamW,
foreach clipping and, where the job says so, torch.compile. A job has: model (the model section of a configuration),
device, precision, micro, accumulate, steps, threads, compile, optim (see versus.py), and where the tokens are.
"""
import json
import math
import statistics
import sys
import time

import torch
import torch.nn.functional as F
import versus
from torch import nn


def make_module(c):
    """The model as nn.Module, returning the mean cross-entropy."""
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
            if torch.is_autocast_enabled(tokens.device.type):
                cos, sin = cos.bfloat16(), sin.bfloat16()
            x = self.embed(tokens) + (0 if llama else self.positions.weight)
            for block in self.blocks:
                x = block(x, cos, sin)
            logits = F.linear(self.norm(x), (self.head or self.embed).weight)
            return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    return Model()


def matmul_flops():
    """The rate of an 8192^3 bf16 matrix product on the GPU (cuBLAS), in FLOP/s: the median of ten, after five."""
    n, seconds = 8192, []
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    for _ in range(15):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")
        begin.record()
        a @ b
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return 2 * n**3 / statistics.median(seconds[5:])


def train(job):
    """Seconds of each step and, on a GPU, the peak of allocated memory and the rate of matrix products."""
    cuda = job["device"] == "cuda"
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    result = {"matmul_flops": matmul_flops()} if cuda else {}
    c, micro, optim = job["model"], job["micro"], job["optim"]
    per_step = job["accumulate"] * micro * c["seq_len"]
    tokens = torch.tensor(versus.read_tokens(job, job["steps"] * per_step + 1), dtype=torch.int64, device=job["device"])
    with torch.device(job["device"]):
        model = make_module(c)
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": optim["weight_decay"]},
         {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}],
        lr=optim["lr"], betas=(optim["beta1"], optim["beta2"]), eps=optim["eps"], fused=True)
    loss_of = torch.compile(model) if job["compile"] else model
    seconds, losses = [], []
    for step in range(job["steps"]):
        begin = time.perf_counter()
        at = step * per_step
        inputs = tokens[at:at + per_step].view(job["accumulate"], micro, -1)
        targets = tokens[at + 1:at + 1 + per_step].view(job["accumulate"], micro, -1)
        total = torch.zeros((), device=job["device"])
        for i in range(job["accumulate"]):
            with torch.autocast(job["device"], torch.bfloat16, enabled=job["precision"] == "bf16"):
                loss = loss_of(inputs[i], targets[i]) / job["accumulate"]
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim["clip"], foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # Tatara reads the loss of each step too, as log.every=1 asks; on a GPU this waits for the whole step.
        losses.append(total.item())
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    if not all(map(math.isfinite, losses)) or losses[-1] >= losses[0]:
        sys.exit(f"PyTorch's model does not learn: {losses}")
    if cuda:
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
    return result | {"step_s": seconds, "torch": torch.__version__}


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        job_read = json.load(file)
    print(json.dumps(train(job_read)))
