"""A vocabulary of 196,608 at 8,192 tokens a micro-batch: the logits of all tokens never exist at once."""
import lib

TOKENS, VOCAB = 8192, 196608
# The shards' tokens are of a small tokenizer, which is as good: what is computed and taken does not depend on which
# tokens occur.
WORDS = ["data.tokenizer=''", f"model.vocab_size={VOCAB}", "model.hidden=512", "model.heads=8", "model.kv_heads=4",
         "model.head_dim=64", "model.layers=1", "model.ffn_hidden=1408", "model.seq_len=1024", "batch.micro=8",
         "batch.global=8", "run.steps=1000", "optim.warmup_steps=0", "parallel.reduce=fast"]


class Vocabulary(lib.Case):
    def test_no_logits_of_all_tokens(self):
        config, run_dir = self.config()
        _, memory = lib.plan(self, config, *WORDS)
        logits_bytes = 2 * TOKENS * VOCAB  # in bf16; twice as much in fp32
        self.assertLess(memory["activations"] + memory["workspace"], logits_bytes / 5)
        with lib.Process(["train", config, *WORDS]) as process:
            lib.wait_for("two steps", lambda: lib.steps_done(run_dir) >= 2 or not process.running(), 400)
            process.popen.kill()  # its last checkpoint would be of 1.2 GB
            result = process.wait(10)
        self.assertEqual(lib.steps_done(run_dir), 2, result)
        measured = lib.measured_bytes(run_dir)
        self.assertLess(abs(measured - memory["total"]), logits_bytes / 8, f"measured {measured}, planned {memory}")
        self.assertAlmostEqual(lib.losses(run_dir)[0], 12.2, delta=0.3)  # ln 196,608 and a little: untrained


if __name__ == "__main__":
    lib.main()
