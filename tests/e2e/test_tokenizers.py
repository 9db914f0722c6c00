"""Tokenizers: what is refused in their place, and what prepare says of what they do to the text."""
import lib


class Kinds(lib.Case):
    """What people give in place of a SentencePiece model or a shard is named."""

    LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 4241003\n"

    def test_in_place_of_tokenizer(self):
        for name, content, wanted in (
                ("pointer.model", self.LFS, ("Git-LFS pointer", "git lfs pull")),
                ("tokenizer.json", '{"version": "1.0", "model": {"type": "BPE"}}', ("is JSON", "tokenizer.model")),
                ("vocab.json", '\n {"<unk>": 0}', ("is JSON", "tokenizer.model")),
                ("tok.vocab", "<unk>\t0\n<s>\t0\n", ("not a SentencePiece model", "spm_train")),
                ("empty.model", "", ("is empty",))):
            with self.subTest(name=name):
                path = self.dir / name
                path.write_text(content)
                result = lib.tatara(["prepare", "--tokenizer", path, "--out", self.dir / "out", lib.corpus()])
                self.assertFails(result, "data", path, *wanted)
                config, _ = self.config()
                self.assertFails(lib.tatara(["train", config, f"data.tokenizer={path}"]), "data", path, *wanted)

    def test_in_place_of_shard(self):
        path = self.dir / "shard.h5"
        path.write_text(self.LFS)
        self.assertFails(lib.tatara(["data", "show", path]), "data", path, "Git-LFS pointer", "git lfs pull")


if __name__ == "__main__":
    lib.main()
