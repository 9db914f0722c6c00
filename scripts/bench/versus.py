"""What cpu_vs_pytorch.py and gpu_vs_pytorch.py share: one training job, run by Tatara and by PyTorch, in turn.

A job is a dictionary: config (file), model (its model section, with what the script changed), words (the same changes
as key=value, for Tatara), precision, micro, accumulate, steps, threads, reduce, device, compile, tokenizer, shards, and
tokens (a file of 32-bit token ids) where they need not be read from the shards. Imports neither torch nor h5py itself.
"""
import array
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
WARMUP_STEPS = 3
OPTIM = dict(lr=3e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, clip=1.0)


def read_model(config, **changes):
    """The model section of a configuration, with changes."""
    import yaml

    with open(config) as file:
        model = {"tie_embeddings": True} | yaml.safe_load(file)["model"] | changes
    # PyTorch's compiler chooses by itself which elementwise results it computes again.
    if model.get("qk_norm") or model.get("z_loss") or model.get("recompute", "none") not in ("none", "elementwise"):
        sys.exit(f"{config}: the PyTorch side here has no qk_norm, z_loss or recompute of products; turn them off")
    return model


def read_tokens(job, wanted):
    """The first tokens of the job's data, again from the start when they are fewer."""
    if "tokens" in job:
        tokens = array.array("i", pathlib.Path(job["tokens"]).read_bytes()).tolist()
        return (tokens * -(-wanted // len(tokens)))[:wanted]
    import h5py

    tokens = []
    for path in sorted(pathlib.Path(job["shards"]).rglob("*.h5")):
        with h5py.File(path) as file:
            tokens += file["tokens"][: wanted - len(tokens)].tolist()
        if len(tokens) == wanted:
            return tokens
    sys.exit(f"{job['shards']} holds {len(tokens)} tokens; this run needs {wanted}: use fewer --steps or more text")


def metrics(folder):
    """The lines of a run's metrics.jsonl that are whole, so far."""
    try:
        text = pathlib.Path(folder, "metrics.jsonl").read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text[:text.rfind("\n") + 1].splitlines()]


def run_tatara(job, tatara):
    """Seconds of each step, as Tatara itself reports them, the line that starts metrics.jsonl, and in "chosen" what the
    log says of choices by measurement."""
    with tempfile.TemporaryDirectory(prefix="tatara-bench-") as folder, tempfile.TemporaryFile() as log:
        # More steps than are measured: the run is ended in the midst of one, before it would save a large checkpoint.
        options = {
            "run.dir": folder, "run.steps": job["steps"] + 1000000, "run.stop_at": 0, "run.threads": job["threads"],
            "data.tokenizer": job["tokenizer"], "data.train": "[{path: %s}]" % job["shards"], "data.valid": "[]",
            "data.document_mask": "false",
            "batch.micro": job["micro"], "batch.global": job["micro"] * job["accumulate"],
            "optim.schedule": "constant", "optim.warmup_steps": 0, **{f"optim.{k}": v for k, v in OPTIM.items()},
            "precision.compute": job["precision"], "parallel.reduce": job["reduce"], "device": job["device"],
            "checkpoint.every": 0, "log.every": 1, "log.eval_every": 0,
        }
        words = [f"{k}={v}" for k, v in options.items()] + job.get("words", [])
        process = subprocess.Popen([tatara, "train", job["config"], *words], stdout=log, stderr=log)
        try:
            steps = []
            while len(steps) < job["steps"] and process.poll() is None:
                time.sleep(0.05)
                steps = [line["step_s"] for line in metrics(folder) if "step_s" in line]
            if process.poll() is not None:
                log.seek(0)
                sys.exit(f"{tatara} train ended with status {process.returncode}:\n{log.read().decode()}")
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        chosen = [line for line in log.read().decode().splitlines() if line.startswith(("attention: ", "graphs: "))]
        return {"step_s": steps[:job["steps"]], "chosen": chosen} | next(line for line in metrics(folder) if line.get("event") == "start")


def run_pytorch(job):
    """The same from torch_model.py, in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": str(job["threads"])}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(job | {"optim": OPTIM}, file)
        file.flush()
        done = subprocess.run([sys.executable, ROOT / "scripts" / "bench" / "torch_model.py", file.name],
                              capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        sys.exit(f"PyTorch's run failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
