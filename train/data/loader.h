/* The loader: turns (seed, position) into micro-batches of tokens, in a thread of its own.
 *
 * Micro-batch i of a step holds the samples at positions i·micro … i·micro + micro − 1 of the global batch; rank r
 * computes the micro-batches with i mod ranks = r, in rising order. Which tokens a sample is, sampler.h says. */
#ifndef TATARA_LOADER_H
#define TATARA_LOADER_H

#include "config.h"

struct loader;
struct overlap;
struct shard_info;

struct loader_options {
    const struct dataset_list *sets; /* used during loader_open only */
    int64_t seq_len, micro, global;  /* tokens a sequence, sequences */
    uint64_t seed;
    int rank, ranks;
    int prefetch;       /* micro-batches read ahead */
    bool document_mask; /* false: start is 0 everywhere */
    /* Validation: sequences 0, 1, 2, … of all sets in order, the last micro-batch padded. One pass is what a step is in
     * training; every pass is the same. */
    bool sequential;
    uint64_t tokenizer_id; /* XXH3 of the tokenizer's file that made the shards; 0: do not check */
    int64_t vocab_size;    /* shards of a larger vocabulary are ERR_DATA */
    /* All shards must be of one tokenizer, and begin and end documents alike: as this one says, or the first of them. */
    const struct shard_info *like;
};

/* Arrays of sequences × seq_len, row-major, owned by the loader and valid until the next loader_next. */
struct batch {
    int64_t sequences, seq_len;
    const int32_t *tok;    /* inputs */
    const int32_t *target; /* the token that follows each; −1: not counted (padding of the last validation batch) */
    const int32_t *start;  /* position in the sequence where the token's document begins; 0 without document_mask */
    const int32_t *pos;    /* position in the sequence: 0 … seq_len − 1 */
};

/* Opens all shards (O(number of files)), checks them against tokenizer and vocabulary, starts the thread. ERR_DATA names
 * the file, the reason and the remedy. Not collective. */
int loader_open(struct loader **out, const struct loader_options *options);
/* From here on loader_next gives this rank's micro-batches of the global batch that begins at this sample of the run's order
 * (sampler.h; 0 for a pass), then of the one after it, … Allowed at any time, also after an error: what follows is what a
 * fresh loader would give. Invalidates the last batch. */
int loader_seek(struct loader *loader, int64_t position);
/* The next micro-batch of this rank; loader_micro_batches must not be 0. Damaged data found while reading is ERR_DATA
 * naming file and block. */
int loader_next(struct loader *loader, struct batch *batch);
/* Training: micro-batches of this rank in one step. Sequential: in the whole pass. */
int64_t loader_micro_batches(const struct loader *loader);
/* What the first shard says of the tokens. It lives as long as the loader. */
const struct shard_info *loader_shard_info(const struct loader *loader);
/* Tokens in all sets together, and whole sequences in them. */
int64_t loader_tokens(const struct loader *loader);
int64_t loader_sequences(const struct loader *loader);
/* A hash of all that is in the d-th set, wherever it lies: its shards' contents, in their order. */
uint64_t loader_fingerprint(const struct loader *loader, int d);
/* Adds the loader's shards to those of the run: held out where the loader is sequential. */
int loader_add_shards(const struct loader *loader, struct overlap *overlap);
/* Seconds that loader_next has waited since the last call. */
double loader_take_wait_s(struct loader *loader);
void loader_close(struct loader *loader);

#endif
