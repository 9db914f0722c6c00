"""What the end-to-end tests share: starting tatara alone or under mpirun, and reading what it leaves behind.

A test is started as  test_X.py --tatara PROGRAM --mpirun "mpirun and its options" --data FOLDER [unittest's options];
tests/CMakeLists.txt does so. FOLDER is what tests/make_corpus.sh made. Every process has a time-out and is ended by
its id; every test has a temporary folder of its own, which is removed.
"""
import argparse
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import unittest

import h5py
import numpy

STATUS = {"usage": 2, "config": 3, "data": 4, "numeric": 5, "system": 6, "comm": 7, "device": 8, "unsupported": 9,
          "stopped": 11, "taken": 12}
MIB = 1 << 20
ERROR_MARK = "tatara: error: "
WARNING_MARK = "warning: "
options = None

# A model that does 20 steps in about a second. Five micro-batches a step: not a multiple of 2, 3 or 4 ranks.
CONFIG = """
run:        {{dir: {run_dir}, seed: 7, steps: 20}}
model:      {{arch: llama, layers: 2, hidden: 64, heads: 4, kv_heads: 2, head_dim: 16, ffn_hidden: 160, seq_len: 64}}
data:       {{tokenizer: {tokenizer}, train: [{{path: {train}}}], document_mask: true}}
batch:      {{global: 10, micro: 2}}
optim:      {{lr: 3.0e-3, min_lr: 3.0e-4, schedule: wsd, warmup_steps: 4, decay_steps: 6}}
checkpoint: {{every: 0, keep: 3, async: false, resume: auto}}
log:        {{every: 1}}
"""
# The same as GPT-2: as many key/value heads as heads, and heads * head_dim = hidden.
GPT2 = ["model.arch=gpt2", "model.kv_heads=4"]


def zip_equal(*lists):
    """zip of lists of one length: zip(strict=True), which Python 3.9 has not."""
    if len({len(one) for one in lists}) > 1:
        raise ValueError(f"lists of {[len(one) for one in lists]} entries")
    return zip(*lists)


class Result:
    """A process that has ended."""

    def __init__(self, status, stdout, stderr, seconds):
        self.status, self.stdout, self.stderr, self.seconds = status, stdout, stderr, seconds

    def errors(self):
        return [line for line in self.stderr.splitlines() if ERROR_MARK in line]

    def warnings(self):
        return [line for line in self.stderr.splitlines() if WARNING_MARK in line]

    def __str__(self):
        head = f"status {self.status} after {self.seconds:.1f} s"
        return f"{head}\n--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}"


class Process:
    """A running tatara: alone (ranks 0), or that many ranks under mpirun. To be used in `with`, which ends it."""

    def __init__(self, words, ranks=0, prefix=(), wrap=()):
        """prefix: a command that starts the launcher; wrap: one that each rank is started by."""
        self.folder = tempfile.TemporaryDirectory(prefix="tatara-e2e-")
        self.left = pathlib.Path(self.folder.name) / "status"
        leave = ["env", f"TATARA_STATUS_FILE={self.left}"] if ranks and options.hydra else []
        command = [*prefix, *launcher(ranks), *leave, *map(str, wrap), str(options.tatara), *map(str, words)]
        self.began = time.monotonic()
        # Files rather than pipes: a full pipe would stop a process that nobody reads from.
        self.files = [tempfile.TemporaryFile(), tempfile.TemporaryFile()]
        # restore_signals=False: SIGXFSZ stays ignored, so that a file-size limit is an error of write().
        # On cores that others use too, threads that spin while they wait make a step 10 times slower.
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
        self.popen = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self.files[0], stderr=self.files[1],
                                      start_new_session=True, restore_signals=False, env=environment)

    def wait(self, timeout):
        try:
            self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            self.stop()
            raise AssertionError(f"still running after {timeout} s\n{self.result()}") from None
        return self.result()

    def running(self):
        return self.popen.poll() is None

    def result(self):
        texts = []
        for file in self.files:
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
        status = self.popen.returncode
        if status is not None and self.left.exists():  # Hydra mixes the statuses of all ranks into one, or loses them
            status = int(self.left.read_text())
        return Result(status, *texts, time.monotonic() - self.began)

    def stop(self):
        """Ends it, if need be: mpirun passes SIGTERM on; its session is killed only when that does not help."""
        if self.running():
            self.popen.terminate()
            try:
                self.popen.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(self.popen.pid, signal.SIGKILL)
                self.popen.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()
        for file in self.files:
            file.close()
        self.folder.cleanup()

    def ranks(self):
        """Ids of the ranks' processes by rank, when this is a launcher. Some have helpers between the ranks and them."""
        ranks, below = {}, [self.popen.pid]
        while below:
            folder = pathlib.Path(f"/proc/{below.pop()}")
            below += [int(child) for task in folder.glob("task/*/children") for child in task.read_text().split()]
            rank = re.search(rb"\0(?:OMPI_COMM_WORLD_RANK|PMI_RANK)=(\d+)\0", (folder / "environ").read_bytes())
            if rank and (folder / "cmdline").read_bytes().split(b"\0")[0] == bytes(options.tatara):
                ranks[int(rank.group(1))] = int(folder.name)
        return [pid for _, pid in sorted(ranks.items())]


def launcher(ranks):
    return [*options.mpirun, "-n", str(ranks)] if ranks else []


def tatara(words, ranks=0, timeout=60, **more):
    """Runs tatara to its end."""
    with Process(words, ranks, **more) as process:
        return process.wait(timeout)


class Case(unittest.TestCase):
    """A test with a folder of its own, self.dir."""

    maxDiff = None

    def setUp(self):
        self.dir = temp_dir(self.addCleanup)

    def config(self, name="run", folder=None):
        """Writes the small configuration for the run folder of that name; returns its path and the run's folder."""
        return write_config(folder or self.dir, name)

    def train(self, name, *words, ranks=0, timeout=60, **more):
        """Trains in self.dir/name to the end, which must be a success; returns the run's folder."""
        config, run_dir = self.config(name)
        result = tatara(["train", config, *words], ranks, timeout, **more)
        self.assertEqual(result.status, 0, result)
        return run_dir

    def assertFails(self, result, status, *texts, within=10):
        """It ended soon with this status, and exactly one rank said why, in words that hold all of `texts`."""
        self.assertEqual(result.status, STATUS[status], result)
        self.assertLess(result.seconds, within, result)
        self.assertEqual(len(result.errors()), 1, result)
        for text in texts:
            self.assertIn(str(text), result.errors()[0])

    def assertSameWeights(self, a, b, message=""):
        """Two checkpoints hold the same tensors bit for bit, weights and optimizer state."""
        one, other = read_checkpoint(a), read_checkpoint(b)
        self.assertEqual(sorted(one), sorted(other), message)
        self.assertTrue(any(name.startswith("optim/") for name in one), f"{a} has no optimizer state")
        differing = [name for name in one if not same_bits(one[name], other[name])]
        self.assertEqual(differing, [], f"{message}: {a} and {b} differ")

    def assertSameSteps(self, a, b, message=""):
        """Loss, gradient norm and learning rate of every step are equal, as text."""
        self.assertEqual(step_values(a), step_values(b), message)


def temp_dir(cleanup):
    folder = tempfile.TemporaryDirectory(prefix="tatara-e2e-", ignore_cleanup_errors=True)
    cleanup(folder.cleanup)
    return pathlib.Path(folder.name)


def write_config(folder, name="run"):
    path, run_dir = folder / f"{name}.yaml", folder / name
    path.write_text(CONFIG.format(run_dir=run_dir, tokenizer=tokenizer(), train=train_shards()))
    return path, run_dir


def tokenizer():
    return options.data / "tok.model"


def corpus():
    return options.data / "corpus.jsonl"


def train_shards():
    return options.data / "train"


def valid_shards():
    return options.data / "valid"


def other_tokenizer(folder):
    """A file that SentencePiece reads alike but that is another: an unknown field, 1000, is at its end, and empty."""
    path = folder / "other.model"
    path.write_bytes(tokenizer().read_bytes() + b"\xc2\x3e\x00")
    return path


def flip_bit(path, at):
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


def same_bits(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def checkpoints(run_dir):
    """The folders of a run's checkpoints, oldest first."""
    return sorted(run_dir.glob("step-*"))


def read_checkpoint(folder):
    """All tensors of a checkpoint, by name, as its index shows them."""
    tensors = {}
    with h5py.File(folder / "index.h5", "r") as file:
        file.visititems(lambda name, item: tensors.update({name: item[()]} if isinstance(item, h5py.Dataset) else {}))
    # A virtual dataset whose source is missing reads as zeros; then two checkpoints would compare equal for nothing.
    weights = [value for name, value in tensors.items() if name.endswith("weight") and not name.startswith("optim/")]
    assert weights and all(numpy.any(value) for value in weights), f"{folder} reads as zeros"
    return tensors


def metrics(run_dir, parse_float=float):
    """metrics.jsonl; with parse_float=str the numbers as they are written."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_float=parse_float) for line in lines]


def step_values(run_dir):
    """By step: what must not depend on where it was computed, as written."""
    steps = [line for line in metrics(run_dir, str) if "event" not in line]
    return {line["step"]: (line["loss"], line["grad_norm"], line["lr"]) for line in steps}


def events(run_dir, event):
    """The events of that name, without the time at which they were written."""
    lines = [line for line in metrics(run_dir) if line.get("event") == event]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def losses(run_dir):
    return [line["loss"] for line in metrics(run_dir) if "event" not in line]


def plan(case, config, *words):
    """Runs `tatara plan`; returns the number of parameters and the bytes of each kind of memory."""
    result = tatara(["plan", config, *words])
    case.assertEqual(result.status, 0, result)
    parameters = re.search(r"^parameters +(\d+) ", result.stdout, re.MULTILINE)
    memory = re.findall(r"^  ([a-z]+) +([\d.]+)$", result.stdout, re.MULTILINE)
    case.assertTrue(parameters and memory, result)
    return int(parameters.group(1)), {kind: float(mib) * MIB for kind, mib in memory}


def plan_values(case, config, *words):
    """What `tatara plan` prints for scripts, by name."""
    result = tatara(["plan", config, *words])
    case.assertEqual(result.status, 0, result)
    return dict(re.findall(r"^([a-z_.]+)=(.*)$", result.stdout, re.MULTILINE))


def measured_bytes(run_dir):
    """Peak memory of the rank that took most, less what the program has before it takes any for the model."""
    steps = [line for line in metrics(run_dir) if "event" not in line]
    return max(line["peak_rss_bytes"] for line in steps) - events(run_dir, "start")[0]["base_rss_bytes"]


def wait_for(what, condition, timeout=20):
    """Polls until the condition holds."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {timeout} s")
        time.sleep(0.01)


def steps_done(run_dir):
    """Steps in metrics.jsonl so far; its last line may be half written."""
    try:
        return len(step_values(run_dir))
    except (OSError, ValueError):
        return 0


def main():
    global options
    parser = argparse.ArgumentParser()
    parser.add_argument("--tatara", type=lambda path: pathlib.Path(path).resolve(), required=True)
    parser.add_argument("--mpirun", type=shlex.split, required=True)
    parser.add_argument("--data", type=lambda path: pathlib.Path(path).resolve(), required=True)
    parser.add_argument("--stuck-read", type=lambda path: pathlib.Path(path).resolve(), help="for test_hang")
    parser.add_argument("--refuse", type=lambda path: pathlib.Path(path).resolve(), help="for test_host")
    parser.add_argument("--slow", type=lambda path: pathlib.Path(path).resolve(), help="for test_stop")
    options, rest = parser.parse_known_args()
    version = subprocess.run([options.mpirun[0], "--version"], capture_output=True, text=True, check=False, timeout=60)
    options.hydra = "HYDRA" in version.stdout or "Intel(R) MPI" in version.stdout
    unittest.main(argv=[sys.argv[0], *rest], verbosity=2)
