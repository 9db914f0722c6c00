/* Shards: files of tokens with their documents, written once by `tatara prepare` and mapped into memory by the loader.
 *
 * A shard is an HDF5 file of plain contiguous datasets, to be read as easily with h5py or h5dump as with Tatara:
 *
 *   /tokens               u16 or u32 [tokens]      all documents one after the other, each ended by EOS, and begun
 *                                                  with BOS if the attribute bos says so
 *   /documents/offset     u64 [documents + 1]      where in /tokens each document begins
 *   /documents/id         text [documents]
 *   /documents/source     u32 [documents]          row of /sources; likewise licence and language
 *   /sources /licences /languages   text [·]
 *   /checksums/…          u64 [blocks]             XXH3 of each MiB of tokens, offset, id, source, licence, language
 *
 * The root's attributes are the counts of SHARD_COUNTS, format = "tatara-shard" and `checksum`, XXH3 over everything
 * that the block checksums do not cover, themselves included. Opening reads only that, so it costs the same for any size;
 * each block is checked when it is first touched, so that no flipped bit is trained on unseen.
 *
 * The file must not shrink while it is open: a read past its new end would kill the process (SIGBUS). The size is checked
 * at opening, and Tatara itself never changes a shard in place.
 *
 * Threads: a shard, and a builder, belong to one thread at a time. */
#ifndef TATARA_SHARD_H
#define TATARA_SHARD_H

#include <stdbool.h>
#include <stdint.h>

/* The counts of a shard: name of the field and of the attribute. */
#define SHARD_COUNTS(X)                                          \
    X(format_version)                                            \
    X(tokens)                                                    \
    X(documents)                                                 \
    X(text_bytes) /* of the UTF-8 text that became the tokens */ \
    X(vocab_size)                                                \
    X(eos)                                                       \
    X(tokenizer_id) /* XXH3 of the tokenizer's file */

struct shard_info {
#define X(name) uint64_t name;
    SHARD_COUNTS(X)
#undef X
    int64_t bos; /* the token before each document; −1: none, and no attribute */
};

/* What is known of a document. */
struct shard_label {
    const char *id, *source, *licence, *language;
};

/* Longer texts of a label are cut by shard_builder_add, which puts a hash of the whole at their end. */
#define SHARD_TEXT_MAX_BYTES 255

struct shard;

/* Opens a shard and checks its header, its structure and its size. ERR_DATA names the file, the reason and the remedy. */
int shard_open(struct shard **out, const char *path);
void shard_close(struct shard *shard);
const char *shard_path(const struct shard *shard);
const struct shard_info *shard_get_info(const struct shard *shard);
/* A checksum of the whole contents: tokens, documents and their labels, wherever the file lies. */
uint64_t shard_fingerprint(const struct shard *shard);
uint64_t shard_file_bytes(const struct shard *shard);
int shard_token_bytes(const struct shard *shard); /* 2 or 4 */
/* Tokens begin … begin + n − 1, each checked to be below the shard's vocabulary. The range must lie in the shard.
 * ERR_DATA when a block that it touches is damaged. */
int shard_read(struct shard *shard, uint64_t begin, uint64_t n, int32_t *tokens);
/* The documents + 1 offsets, checked: the first is 0, each is larger than the one before, the last is the number of
 * tokens. They live as long as the shard. */
int shard_offsets(struct shard *shard, const int64_t **offsets);
/* The label of a document; its texts live as long as the shard. */
int shard_get_label(struct shard *shard, uint64_t document, struct shard_label *label);
/* Checks every checksum, token and offset. */
int shard_verify(struct shard *shard);

struct shard_builder;

/* An empty shard in memory, for tokens of a tokenizer with this vocabulary. */
int shard_builder_open(struct shard_builder **out, uint64_t vocab_size, int64_t bos, uint64_t eos,
                       uint64_t tokenizer_id);
void shard_builder_close(struct shard_builder *builder);
/* Appends a document of n ≥ 1 tokens (BOS, if any, and EOS included), made from text_bytes of text. */
int shard_builder_add(struct shard_builder *builder, const int32_t *tokens, uint64_t n, uint64_t text_bytes,
                      const struct shard_label *label);
uint64_t shard_builder_tokens(const struct shard_builder *builder);
/* Writes the shard to path and empties the builder. The file appears whole under its name or not at all: it is written
 * under a temporary name, synced, opened again, verified and renamed. ERR_SYSTEM when the disk is full. */
int shard_builder_write(struct shard_builder *builder, const char *path);

#endif
