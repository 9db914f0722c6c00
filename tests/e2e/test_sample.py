"""Sampling from a checkpoint, and the help of every command."""
import json
import pathlib
import re
import shutil

import h5py

import lib

OPTIONS = pathlib.Path(__file__).resolve().parents[2] / "include" / "options.def"
PROMPTS = ["猫は", "東京の", "毎日鉄を"]


class Sample(lib.Case):
    """From a small model that knows its corpus's grammar, so that it has something to say."""

    TOKENS = 24

    @classmethod
    def setUpClass(cls):
        cls.folder = lib.temp_dir(cls.addClassCleanup)
        config, run_dir = lib.write_config(cls.folder)
        result = lib.tatara(["train", config, "run.steps=120"], ranks=2)
        assert result.status == 0, result
        cls.checkpoint = run_dir / "step-00000120"

    def run_sample(self, *words, checkpoint=None):
        return lib.tatara(["sample", "--ckpt", checkpoint or self.checkpoint, *words])

    def sample(self, *prompts, tokens=TOKENS, words=("--temperature", 0)):
        """The text of each prompt and what follows it."""
        prompts_words = [word for prompt in prompts for word in ("--prompt", prompt)]
        result = self.run_sample("--tokens", tokens, *words, *prompts_words)
        self.assertEqual(result.status, 0, result)
        texts = ["", result.stdout]
        if len(prompts) > 1:
            texts = re.split(r"^--- \d+ ---\n", result.stdout, flags=re.MULTILINE)
        self.assertEqual(len(texts), 1 + len(prompts), result)
        # An empty line stands between one text and the next heading.
        ends = ["\n\n"] * (len(prompts) - 1) + ["\n"]
        return [text.removesuffix(end) for text, end in lib.zip_equal(texts[1:], ends)]

    def count_tokens(self, texts):
        """How many tokens the tokenizer makes of each text."""
        path, out = self.dir / "texts.jsonl", self.dir / "texts"
        path.write_text("".join(json.dumps({"id": f"{i:04d}", "text": text}) + "\n" for i, text in enumerate(texts)))
        result = lib.tatara(["prepare", "--tokenizer", lib.tokenizer(), "--out", out, path])
        self.assertEqual(result.status, 0, result)
        (shard,) = out.glob("*.h5")
        with h5py.File(shard, "r") as file:
            ids, offsets = file["documents/id"].asstr()[()], file["documents/offset"][()]
        self.assertEqual(list(ids), [f"{i:04d}" for i in range(len(texts))])
        return [int(end - begin) - 1 for begin, end in zip(offsets, offsets[1:])]  # one is EOS

    def test_cache(self):
        """What follows a prompt is what follows the prompt and a part of that: keys and values that were kept for
        each new token are those that come from reading all tokens at once."""
        prompt = PROMPTS[0]
        (whole,) = self.sample(prompt)
        self.assertTrue(whole.startswith(prompt) and len(whole) > len(prompt) + 8, whole)
        parts = {made: self.sample(prompt, tokens=made)[0] for made in (1, 3, 6, 10, 15, 20)}
        counts = self.count_tokens([prompt, *parts.values()])
        compared = 0
        for (made, part), count in lib.zip_equal(parts.items(), counts[1:]):
            self.assertTrue(whole.startswith(part), f"{made} tokens: {part}")
            if count != counts[0] + made:
                continue  # the tokenizer divides this text in another way than the model did
            self.assertEqual(self.sample(part, tokens=self.TOKENS - made), [whole], f"after {made} tokens")
            compared += 1
        self.assertGreaterEqual(compared, 3, counts)

    def test_several_prompts(self):
        """Each gets the text that it gets alone, whatever the others' lengths."""
        prompts = [*PROMPTS, PROMPTS[0] * 8]
        together = self.sample(*prompts)
        self.assertGreater(len(set(together)), 2, together)
        self.assertEqual(together, [self.sample(prompt)[0] for prompt in prompts])

    def test_seed(self):
        def drawn(seed, *words):
            return self.sample(PROMPTS[0], words=("--temperature", 1.5, "--seed", seed, *words))

        self.assertEqual(drawn(1), drawn(1))
        self.assertGreater(len({drawn(seed)[0] for seed in range(1, 5)}), 1)
        # The likeliest only, by either limit.
        self.assertEqual(drawn(1, "--top-k", 1), self.sample(PROMPTS[0]))
        self.assertEqual(drawn(2, "--top-k", 0, "--top-p", 1e-6), self.sample(PROMPTS[0]))

    def test_end_of_sequence(self):
        """A sequence is never longer than the model's; a prompt that leaves no room is refused."""
        (text,) = self.sample(PROMPTS[0], tokens=100000)
        self.assertLess(self.count_tokens([text])[0], 64 + 8)
        self.assertFails(self.run_sample("--prompt", PROMPTS[0] * 40), "usage", "prompt 1", "64")

    def test_bad_options(self):
        for words in (["--bogus"], ["--temperature", "warm"], ["--temperature", "-1"], ["--top-p", "2"], ["stray"],
                      ["--tokens", "0"], ["--tokens"]):
            with self.subTest(words=words):
                self.assertFails(self.run_sample(*words), "usage")
        self.assertFails(lib.tatara(["sample"]), "usage", "--ckpt")

    def test_bad_checkpoints(self):
        self.assertFails(self.run_sample(checkpoint=self.dir / "none"), "data", self.dir / "none")
        copy = self.dir / "copy"
        shutil.copytree(self.checkpoint, copy)
        lib.flip_bit(copy / "rank-00001.h5", (copy / "rank-00001.h5").stat().st_size // 2)
        self.assertFails(self.run_sample(checkpoint=copy), "data", copy / "rank-00001.h5", "checksum")

    def test_padded_vocabulary(self):
        """Rows of the embedding beyond the tokenizer, <unk> and control pieces are never drawn, however likely they are:
        at this temperature every row is as likely as any other, and seven of eight are beyond."""
        run = self.train("padded", "model.vocab_size=4096", "run.steps=1", "optim.warmup_steps=0",
                         "optim.decay_steps=1")
        flat = ["--temperature", 100, "--top-p", 1]
        for words in (["--temperature", 0], [*flat, "--top-k", 0], [*flat, "--top-k", 600],
                      ["--temperature", 100, "--top-k", 0, "--top-p", 0.9]):
            with self.subTest(words=words):
                prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
                result = self.run_sample("--tokens", 60, *words, *prompts, checkpoint=run)
                self.assertEqual(result.status, 0, result)
                self.assertNotIn("\u2047", result.stdout)  # what <unk> is printed as
                self.assertGreater(len(result.stdout), 60)

    def test_folder_of_run(self):
        """A run's folder stands for its newest complete checkpoint; one that is not complete is passed over by name."""
        run = self.dir / "run"
        shutil.copytree(self.checkpoint, run / "step-00000120")
        shutil.copytree(self.checkpoint, run / "step-00000130")
        (run / "step-00000130/rank-00000.h5").unlink()
        result = self.run_sample("--temperature", 0, "--tokens", self.TOKENS, "--prompt", PROMPTS[0], checkpoint=run)
        self.assertEqual([result.stdout], [text + "\n" for text in self.sample(PROMPTS[0])], result)
        self.assertIn(f"warning: {run}/step-00000130: passed over", result.stderr)
        self.assertIn(f"{run}/step-00000120: the newest checkpoint", result.stderr)
        shutil.rmtree(run / "step-00000120")
        self.assertFails(self.run_sample(checkpoint=run), "data", run, "none of its 1 checkpoints")
        shutil.rmtree(run / "step-00000130")
        self.assertFails(self.run_sample(checkpoint=run), "data", run, "neither a checkpoint")

    def test_another_tokenizer(self):
        other = lib.other_tokenizer(self.dir)
        self.assertFails(self.run_sample("--tokenizer", other), "data", other, "--tokenizer")


class Help(lib.Case):
    def test_help(self):
        """Every command explains itself, on stdout, with success."""
        for command, texts in (
                ([], ["prepare", "train", "sample", "plan", "data", "ckpt", "Exit status"]),
                (["prepare"], ["--tokenizer", "--out", "--valid-fraction", "INPUT"]),
                (["train"], ["CONFIG.yaml", "--help-config", "key=value", "SIGUSR1", "STOP", "SAVE"]),
                (["sample"], ["--ckpt", "--prompt", "--temperature", "--top-k", "--top-p", "--seed"]),
                (["plan"], ["CONFIG.yaml", "ranks=N"]),
                (["plan", "x.yaml", "optim.lr=1"], ["CONFIG.yaml", "ranks=N"]),
                (["train", "x.yaml", "optim.lr=1"], ["CONFIG.yaml", "--help-config"]),
                (["data"], ["show", "--verify", "--sample"]),
                (["ckpt"], ["ls", "show", "verify"]),
                (["ckpt", "verify"], ["FOLDER"])):
            with self.subTest(command=command):
                result = lib.tatara([*command, "-h" if len(command) < 2 else "--help"])
                self.assertEqual((result.status, result.stderr), (0, ""), result)
                for text in texts:
                    self.assertIn(text, result.stdout)

    def test_help_config(self):
        """The reference has every option of the table."""
        result = lib.tatara(["train", "--help-config"])
        self.assertEqual(result.status, 0, result)
        row = r"^(?:INT|NUM|BOOL|STR|CHOICE|DATASETS)\((\w+), (\w+), "
        table = re.findall(row, OPTIONS.read_text(), re.MULTILINE)
        self.assertGreater(len(table), 45)
        for section, key in table:
            self.assertRegex(result.stdout, rf"(?m)^ +{key if section == 'top' else section + '.' + key} ")

    def test_one_rank_only(self):
        self.assertFails(lib.tatara(["plan", "x.yaml"], ranks=2), "usage", "tatara plan", "without mpirun")


if __name__ == "__main__":
    lib.main()
