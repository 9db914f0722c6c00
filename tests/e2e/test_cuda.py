"""Training on GPUs, emulated on the CPU: the program is tatara_emu (tests/cuda_emu), whose device=cuda is the emulation.

What it computes is what the CPU backend computes, and does not depend on where or in how many pieces. The emulated NCCL
compares every collective of every rank, so a run on several ranks that ends well has shown that all ranks made the same
calls in the same order. It does a few hundred tokens a second: models are tiny.
"""
import os
import shutil
import signal

import lib

FP32 = "precision.compute=fp32"
# Six steps of five micro-batches: not a multiple of 2, 3 or 4 ranks. head_dim 64 takes the tensor cores' attention in
# bf16, and 40 positions are no multiple of its tiles. The learning rate is small enough that rounding errors grow little.
TINY = ["model.hidden=32", "model.heads=2", "model.kv_heads=1", "model.head_dim=64", "model.ffn_hidden=48",
        "model.seq_len=40", "batch.global=5", "batch.micro=1", "run.steps=6", "optim.warmup_steps=1",
        "optim.decay_steps=2", "optim.lr=1e-3", "optim.min_lr=1e-4"]
GPT2 = ["model.arch=gpt2", "model.kv_heads=2", "model.head_dim=16"]
# Any size of head takes the other attention kernels.
ODD = ["model.heads=3", "model.head_dim=10", "model.qk_norm=true", "model.tie_embeddings=false", "model.z_loss=1e-4"]


def devices(count):
    """Runs under so many emulated GPUs."""
    return ["env", f"CUDA_EMU_DEVICES={count}"]


class Emulated(lib.Case):
    def run_one(self, name, *words, device="cuda", ranks=0):
        return self.train(name, *TINY, f"device={device}", *words, ranks=ranks, timeout=120)

    def refused(self, status, words, *texts, ranks=2, **more):
        config, run_dir = self.config("refused")
        result = lib.tatara(["train", config, *TINY, *words], ranks, **more)
        self.assertFails(result, status, *texts)
        self.assertFalse(run_dir.exists(), "it began")


class Losses(Emulated):
    """20 steps on either device. Their losses differ by less than r of what training has taken off the loss when
    gradients differ by less than r, since an update takes off Σ gradient·update."""

    STEPS = ["run.steps=20", "batch.global=2"]

    def losses(self, device, compute, *words):
        name = f"{device}-{compute}"
        losses = lib.losses(self.run_one(name, *self.STEPS, *words, f"precision.compute={compute}", device=device))
        self.assertEqual(len(losses), 20)
        self.assertLess(losses[-1], losses[0] - 0.3, "it does not learn")
        return losses

    def assertNear(self, losses, others, tolerance):
        for step, (one, other) in enumerate(lib.zip_equal(losses, others), 1):
            self.assertAlmostEqual(one, other, delta=tolerance, msg=f"step {step}")

    def check(self, *words, computes=("fp32", "bf16")):
        exact, rounded = self.losses("cpu", "fp32", *words), self.losses("cpu", "bf16", *words)
        taken = exact[0] - exact[-1]
        if "fp32" in computes:
            # Gradients are within 1e-5 (test_torch); a loss near 6 is itself a sum of numbers rounded to 2.4e-7.
            self.assertNear(self.losses("cuda", "fp32", *words), exact, 1e-5 * taken + 2.4e-7)
        # Both devices round to bf16, at nearly the same places: neither is further from fp32 than rounding takes it, so
        # they are at most twice as far from each other. Rounding itself takes it less far than gradients within 2e-2
        # (test_torch) would.
        tolerance = 2 * max(abs(one - other) for one, other in lib.zip_equal(exact, rounded))
        self.assertLess(tolerance, 2e-2 * taken, "training amplifies rounding errors: choose a smaller optim.lr")
        self.assertNear(self.losses("cuda", "bf16", *words), rounded, tolerance)

    def test_llama(self):
        """More than one tile of attention, and documents that end within tiles. In fp32 a head of 64 is like any."""
        self.check("model.seq_len=72", computes=["bf16"])

    def test_llama_odd(self):
        self.check(*ODD)

    def test_gpt2(self):
        self.check(*GPT2)


class Bits(Emulated):
    """Cases that compare with the same run on one rank in one piece, bit for bit. That issues each launch by itself, and
    waits for its saves."""

    # A save beside the third step, and the last one.
    HALF = ["run.stop_at=3", "checkpoint.every=2", "checkpoint.async=true"]

    @classmethod
    def setUpClass(cls):
        folder = lib.temp_dir(cls.addClassCleanup)
        config, cls.straight = lib.write_config(folder, "straight")
        result = lib.tatara(["train", config, *TINY, "device=cuda", "graphs=off", "checkpoint.every=2"], timeout=120)
        assert result.status == 0, result

    def assertSameRun(self, run_dir, straight=None, losses=6):
        straight = straight or self.straight
        self.assertEqual(len(lib.losses(straight)), losses)
        self.assertSameSteps(straight, run_dir)
        self.assertSameWeights(straight / "step-00000006", run_dir / "step-00000006")

    def check_placement(self, ranks, zero, carrier, *words, graphs="graphs: on: a micro-batch is launched", **more):
        """Trains on several ranks, with graphs; they must say how they communicate and what they do with graphs."""
        config, run_dir = self.config(f"ranks-{ranks}-zero-{zero}")
        words = ["train", config, *TINY, "device=cuda", "graphs=on", f"parallel.zero={zero}", *words]
        result = lib.tatara(words, ranks, timeout=120, **more)
        self.assertEqual(result.status, 0, result)
        self.assertIn(f"communication: {carrier}", result.stderr)
        self.assertIn(graphs, result.stderr)
        self.assertSameRun(run_dir)

    def test_placement_briefly(self):
        """In no more than shows it, for sanitizers: an odd number of micro-batches, and a step after an update."""
        words = ["batch.global=3", "run.stop_at=2", "parallel.zero=0"]
        one, two = (self.run_one(f"ranks-{ranks}", *words, ranks=ranks) for ranks in (0, 2))
        self.assertEqual(len(lib.losses(one)), 2)
        self.assertSameSteps(one, two)
        self.assertSameWeights(one / "step-00000002", two / "step-00000002")

    def test_nccl(self):
        """Graphs are of micro-batches that do not communicate: gathers are in the first, and only with ZeRO 1; sums are in
        the last. Rank 0 has three of the five on two ranks, and two on four."""
        for ranks, zero, recompute in ((2, 0, "none"), (2, 1, "attention"), (4, 0, "block")):
            with self.subTest(ranks=ranks, zero=zero, recompute=recompute):
                self.check_placement(ranks, zero, "NCCL", f"model.recompute={recompute}")
        with self.subTest("none"):
            self.check_placement(4, 1, "NCCL", graphs="graphs: off: a step has 2 micro-batches of this rank, and both")

    def test_shared_gpu(self):
        """Ranks that share one GPU, by MPI."""
        for ranks, zero in ((2, 1), (3, 0)):
            with self.subTest(ranks=ranks, zero=zero):
                self.check_placement(ranks, zero, "MPI through host memory", "comm=mpi", prefix=devices(1))

    def test_gpt2(self):
        """Most steps begin while the weights of the one before are still gathered: only those that are logged end before."""
        words = [*GPT2, FP32, "log.every=3"]
        self.assertSameRun(self.run_one("two", *words, "graphs=on", ranks=2), self.run_one("one", *words), losses=2)

    def assertSameHalves(self, half):
        self.assertEqual(lib.events(half, "resume")[0]["step"], 3)
        self.assertSameWeights(self.straight / "step-00000002", half / "step-00000002")
        self.assertSameRun(half)

    def check_resume(self, before, after):
        """6 steps = 3 + 3, each half on so many ranks and at such a ZeRO stage."""
        for (ranks, zero), words in ((before, self.HALF), (after, [])):
            half = self.run_one("half", *words, f"parallel.zero={zero}", ranks=ranks)
        self.assertSameHalves(half)

    def test_resume(self):
        """In the first half micro-batches are tried as graphs, in the second they are graphs."""
        config, half = self.config("half")
        for graphs, words, text in (
                ("auto", self.HALF, r"graphs: o(n|ff): a micro-batch takes \d+\.\d{3} ms as a graph, \d+\.\d{3} ms "),
                ("on", [], "graphs: on: a micro-batch is launched as a graph")):
            result = lib.tatara(["train", config, *TINY, "device=cuda", f"graphs={graphs}", *words], timeout=120)
            self.assertEqual(result.status, 0, result)
            self.assertRegex(result.stderr, text)
        self.assertSameHalves(half)

    def test_done_again(self):
        """Steps issued ahead and then done again, for an overflow and for a NaN, with and without graphs. An update makes
        the weights 49 times as large, which multiplies gradients by more than the scale has room for, and then all."""
        runs = []
        for graphs in ("off", "on"):
            config, run_dir = self.config(graphs)
            result = lib.tatara(["train", config, *TINY, "device=cuda", f"graphs={graphs}", "run.stop_at=3",
                                 "log.every=3", "batch.global=2", "optim.lr=10", "optim.min_lr=10",
                                 "optim.weight_decay=5", "optim.clip=0", "run.on_nan=skip"], timeout=120)
            self.assertEqual(result.status, 0, result)
            self.assertIn("step 2: a gradient is more than 4096 times the last norm", result.stderr)
            self.assertIn("step 3: the loss or a gradient is NaN or infinite; skipped", result.stderr)
            self.assertEqual("graphs: on" in result.stderr, graphs == "on", result)
            runs.append(run_dir)
        self.assertSameSteps(*runs)
        self.assertSameWeights(*(run_dir / "step-00000003" for run_dir in runs))

    def test_resume_on_more_ranks(self):
        self.check_resume((1, 0), (2, 1))

    def test_resume_on_fewer_ranks(self):
        self.check_resume((4, 1), (2, 0))

    def test_other_device(self):
        """A checkpoint does not know what device made it: begun on one and ended on the other, a run is nearly the same."""
        words = [*ODD, FP32]
        half = self.run_one("half", *words, "run.stop_at=3", device="cpu")
        runs = []
        for device in ("cpu", "cuda"):
            shutil.copytree(half, self.dir / device)
            runs.append(self.run_one(device, *words, device=device))
        self.run_one("back", *words, "run.stop_at=3")
        runs.append(self.run_one("back", *words, device="cpu"))
        for run_dir in runs:
            self.assertEqual(lib.events(run_dir, "resume")[0]["step"], 3)
            for one, other in lib.zip_equal(lib.losses(runs[0]), lib.losses(run_dir)):
                self.assertAlmostEqual(one, other, delta=1e-5)


class Refusals(Emulated):
    def test_no_gpu(self):
        self.refused("device", ["device=cuda"], "no GPU", "nvidia-smi", "device=cpu", prefix=devices(0))

    def test_auto(self):
        """It takes the GPU where there is one, and else says why it does not."""
        for count, texts in ((0, ["device: auto takes the CPU: no GPU", "device: CPU"]), (1, ["device: CUDA device 0"])):
            with self.subTest(count):
                config, _ = self.config(f"auto-{count}")
                result = lib.tatara(["train", config, *TINY, "device=auto", "run.stop_at=1"], timeout=120,
                                    prefix=devices(count))
                self.assertEqual(result.status, 0, result)
                for text in texts:
                    self.assertIn(text, result.stderr)

    def test_too_few_gpus(self):
        self.refused("config", ["device=cuda"], "ranks 0 and 1", "share GPU", "comm=mpi", prefix=devices(1))

    def test_nccl_on_the_cpu(self):
        self.refused("config", ["device=cpu", "comm=nccl"], "comm=nccl", "device=cpu")

    def test_too_little_memory(self):
        """Refused before anything is taken, with what would help."""
        self.refused("config", ["device=cuda", "model.layers=64", "model.hidden=65536"], "GPU", "MiB", "batch.micro",
                     "model.recompute")


class Graphs(Emulated):
    """A micro-batch that cannot be captured, because of a library that does what CUDA does not permit then."""

    INVALID = ["env", "CUDA_EMU_INVALIDATE=1"]
    SHORT = [*TINY, "device=cuda", "batch.global=2", "run.stop_at=2"]

    def test_auto_goes_on(self):
        config, _ = self.config()
        result = lib.tatara(["train", config, *self.SHORT], timeout=120, prefix=self.INVALID)
        self.assertEqual(result.status, 0, result)
        lines = [line for line in result.warnings() if "graphs: off: a micro-batch cannot be captured" in line]
        self.assertEqual(len(lines), 1, result)
        self.assertIn("cudaErrorStreamCaptureInvalidated", lines[0])

    def test_on_fails(self):
        config, _ = self.config()
        result = lib.tatara(["train", config, *self.SHORT, "graphs=on"], timeout=120, prefix=self.INVALID)
        self.assertFails(result, "unsupported", "graphs=on", "cudaErrorStreamCaptureInvalidated", "graphs=auto")

    def test_on_without_gpu(self):
        self.refused("unsupported", ["device=cpu", "graphs=on"], "graphs=on needs a GPU")


class Run(Emulated):
    def test_killed_rank(self):
        """A rank that is killed takes the job with it, even while the others wait for its gradients."""
        config, run_dir = self.config()
        with lib.Process(["train", config, *TINY, "device=cuda", "run.steps=1000000"], ranks=2) as process:
            lib.wait_for("a step", lambda: lib.steps_done(run_dir) > 0, timeout=60)
            ranks = process.ranks()
            self.assertEqual(len(ranks), 2)
            os.kill(ranks[1], signal.SIGKILL)
            result = process.wait(10)
        self.assertNotEqual(result.status, 0, result)

    def test_plan(self):
        """`tatara plan` says what training takes. Wide enough that its rounding to 0.1 MiB hides little of any kind."""
        for ranks, words in ((1, []), (2, ["parallel.zero=1", "model.recompute=block"])):
            with self.subTest(ranks=ranks):
                words = [*TINY, *words, "device=cuda", "model.hidden=256", "model.ffn_hidden=512", "batch.global=4",
                         "batch.micro=2", "run.stop_at=1"]
                run_dir = self.train(f"ranks-{ranks}", *words, ranks=ranks, timeout=120)
                _, memory = lib.plan(self, self.config("plan")[0], *words, f"ranks={ranks}")
                total = memory.pop("total")
                self.assertGreater(min(filter(None, memory.values())), 0.5 * lib.MIB, memory)
                self.assertAlmostEqual(total, sum(memory.values()), delta=0.3 * lib.MIB)
                self.assertAlmostEqual(total, lib.events(run_dir, "start")[0]["arena_bytes"], delta=0.051 * lib.MIB)


if __name__ == "__main__":
    lib.main()
