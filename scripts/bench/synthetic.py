"""Training data of any vocabulary, without a corpus or a tokenizer's training: tokens whose ids are known beforehand.

The tokenizer is a SentencePiece model (sentencepiece_model.proto) whose pieces are pairs of Chinese characters, the
first and the second from sets of their own, so that a text can be cut in one way only. The text is drawn from Zipf's
distribution over the pieces, as the frequencies of words are.
"""
import array
import itertools
import json
import pathlib
import random
import struct
import subprocess
import sys

UNK, BOS, EOS = 0, 1, 2
NORMAL, UNKNOWN, CONTROL = 1, 2, 3  # types of a piece
SIDE = 450                          # characters in each set; SIDE^2 pairs
DOCUMENT_TOKENS = 2000


def varint(n):
    low, n = n & 0x7f, n >> 7
    return bytes([low | 0x80]) + varint(n) if n else bytes([low])


def field(number, value):
    """One field of a protobuf message: bytes, or a whole number."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def piece(text, score, kind):
    return field(1, field(1, text.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score) + field(3, kind))


def make(folder, vocab_size, tokens, tatara):
    """Writes tok.model, shards/ and tokens.i32 (the shards' tokens as 32-bit ids) into the folder."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True)
    characters = [chr(0x4e00 + i) for i in range(2 * SIDE)]
    pairs = map("".join, itertools.product(characters[:SIDE], characters[SIDE:]))
    texts = list(itertools.islice(pairs, vocab_size - 3))
    if len(texts) < vocab_size - 3:
        sys.exit(f"a vocabulary of {vocab_size} is more than the {SIDE * SIDE + 3} pieces that can be made")
    with open(folder / "tok.model", "wb") as file:
        file.write(piece("<unk>", 0, UNKNOWN) + piece("<s>", 0, CONTROL) + piece("</s>", 0, CONTROL))
        file.writelines(piece(text, -1.0, NORMAL) for text in texts)
        file.write(field(2, field(3, 1) + field(4, vocab_size)))                         # unigram
        file.write(field(3, field(1, b"identity") + field(3, 0) + field(4, 0)))          # as it is, no added spaces
    draw = random.Random(0)
    weights = list(itertools.accumulate(1 / rank for rank in range(1, len(texts) + 1)))
    order = draw.sample(range(len(texts)), len(texts))  # frequent pieces lie anywhere in the embedding
    ids = array.array("i")
    with open(folder / "text.jsonl", "w") as file:
        for _ in range(-(-tokens // DOCUMENT_TOKENS)):
            document = [order[i] for i in draw.choices(range(len(texts)), cum_weights=weights, k=DOCUMENT_TOKENS)]
            file.write(json.dumps({"text": "".join(texts[i] for i in document)}, ensure_ascii=False) + "\n")
            ids.extend([3 + i for i in document] + [EOS])
    (folder / "tokens.i32").write_bytes(ids.tobytes())
    done = subprocess.run([tatara, "prepare", "--tokenizer", folder / "tok.model", "--out", folder / "shards",
                           folder / "text.jsonl"], capture_output=True, text=True)
    if done.returncode != 0 or f"{len(ids)} tokens" not in done.stdout:
        said = done.stdout + done.stderr
        sys.exit(f"{tatara} prepare made something else of the text than {len(ids)} tokens:\n{said}")
