"""The result of a run does not depend on where it was computed: ranks, threads, ZeRO stage, recomputation."""

import math

import lib

FP32 = "precision.compute=fp32"


def placement(threads, zero):
    return [f"run.threads={threads}", f"parallel.zero={zero}"]


class Placement(lib.Case):
    def compare(self, common, reference, *others):
        """Trains 20 steps with the words `common` in every placement (ranks, threads, ZeRO stage, further words) and
        compares with the first: final weights and optimizer state, and losses and gradient norms of all steps."""
        first = self.run_one(common, *reference)
        self.assertEqual(len(lib.losses(first)), 20)
        self.assertLess(lib.losses(first)[-1], lib.losses(first)[0], "it does not learn")
        for other in others:
            run_dir = self.run_one(common, *other)
            self.assertSameSteps(first, run_dir, f"{reference} and {other}")
            self.assertSameWeights(first / "step-00000020", run_dir / "step-00000020", f"{reference} and {other}")

    def run_one(self, common, ranks, threads, zero, *words):
        name = "-".join(map(str, (ranks, threads, zero, *words))).replace("=", "-")
        return self.train(name, *common, *placement(threads, zero), *words, ranks=ranks)

    def test_bf16(self):
        self.compare([], (1, 1, 0), (1, 2, 1), (2, 2, 1), (3, 1, 0), (4, 1, 1),
                     (1, 2, 0, "model.recompute=attention"), (2, 1, 1, "model.recompute=block"))

    def test_fp32(self):
        self.compare([FP32], (1, 2, 0), (2, 1, 0), (3, 1, 1))

    def test_gpt2(self):
        self.compare(lib.GPT2, (1, 2, 0), (2, 1, 1), (3, 1, 0, "model.recompute=block"))

    def test_options_of_llama(self):
        """What else changes the arithmetic of a step."""
        self.compare(["model.qk_norm=true", "model.tie_embeddings=false", "model.z_loss=1e-4", FP32,
                      "data.document_mask=false"], (1, 1, 1), (2, 2, 0))

    def test_more_ranks_than_micro_batches(self):
        self.compare(["batch.global=2", "batch.micro=1"], (1, 1, 0), (4, 1, 0), (4, 1, 1))

    def test_validation(self):
        """The validation loss, of the whole pass and of its first micro-batches, is that of one rank: also where ranks
        have no micro-batch, and where the last one is not full."""
        valid = f"data.valid=[{{path: {lib.valid_shards()}}}]"
        for batches, micro in ((0, 3), (1, 2), (3, 2), (5, 1)):
            found = {}
            for ranks in (1, 2, 3, 4):
                run_dir = self.run_one(["run.stop_at=2", "run.steps=2", "optim.warmup_steps=0", "optim.decay_steps=0",
                                        "batch.global=6", valid, "log.eval_every=1"], ranks, 1, 1,
                                       f"log.eval_batches={batches}", f"batch.micro={micro}")
                lines = (run_dir / "metrics.jsonl").read_text().splitlines()
                found[ranks] = [line for line in lines if '"evaluation"' in line]
            with self.subTest(batches=batches, micro=micro):
                self.assertEqual(len(found[1]), 2)
                self.assertEqual(found, {ranks: found[1] for ranks in found})

    def test_z_loss(self):
        """The loss of training and of validation is cross-entropy alone, and z-loss stands beside it."""
        words = ["run.steps=2", "optim.warmup_steps=0", "optim.decay_steps=0", "optim.lr=0", "optim.min_lr=0",
                 f"data.valid=[{{path: {lib.valid_shards()}}}]", "log.eval_batches=2"]
        runs = [self.run_one(words, ranks, 1, 1, f"model.z_loss={z_loss}")
                for ranks, z_loss in ((1, 0), (1, 0.01), (2, 0.01), (1, 0.02))]
        steps = [[line for line in lib.metrics(run_dir, str) if "event" not in line] for run_dir in runs]
        for run_dir, lines in zip(runs, steps, strict=True):
            self.assertEqual([line["loss"] for line in lines], [line["loss"] for line in steps[0]])
            self.assertEqual(lib.events(run_dir, "evaluation")[0]["loss"], lib.events(runs[0], "evaluation")[0]["loss"])
        self.assertNotIn("z_loss", steps[0][0])
        self.assertEqual([line["z_loss"] for line in steps[1]], [line["z_loss"] for line in steps[2]])
        # Logits are near 0 in the beginning: the log-partition is the logarithm of the vocabulary's size.
        for line, twice in zip(steps[1], steps[3], strict=True):
            self.assertAlmostEqual(float(line["z_loss"]), 0.01 * math.log(512) ** 2, delta=0.05)
            self.assertAlmostEqual(2 * float(line["z_loss"]), float(twice["z_loss"]), delta=1e-6)

    def test_fast(self):
        """Sums in fp32 depend on the number of ranks, but not on the ZeRO stage; and they are close to exact ones."""
        runs = [self.train(name, f"parallel.zero={zero}", f"parallel.reduce={reduce}", FP32, ranks=2)
                for name, zero, reduce in (("stage0", 0, "fast"), ("stage1", 1, "fast"), ("exact", 1, "exact"))]
        self.assertSameSteps(runs[0], runs[1])
        self.assertSameWeights(runs[0] / "step-00000020", runs[1] / "step-00000020")
        for fast, exact in lib.zip_equal(lib.losses(runs[0]), lib.losses(runs[2])):
            self.assertAlmostEqual(fast, exact, delta=1e-4 * exact)


if __name__ == "__main__":
    lib.main()
