/* A training run: from a configuration to its last step. */
#ifndef TATARA_RUN_H
#define TATARA_RUN_H

#include "comm.h"
#include "config.h"

struct loader;
struct tokenizer;

/* Rows of the embedding: model.vocab_size, or the tokenizer's size when it is 0. ERR_CONFIG when the two do not fit. */
int run_vocab(const struct config *cfg, const struct tokenizer *tokenizer, int64_t *vocab_size);
/* Opens a rank's loaders of what is trained on and evaluated on; an empty list has none. tokenizer_id 0: shards are not
 * compared with a tokenizer. What was opened is the caller's, also after a failure. Not collective. */
int run_open_loaders(const struct config *cfg, int rank, int ranks, int64_t vocab_size, uint64_t tokenizer_id,
                     struct loader **train, struct loader **valid);
/* "0.1.0 (1a2b3c4d5e6f)": with the commit that it was built from, as far as the build knows. */
extern const char run_version[];

/* `tatara train`: trains until the last step, run.stop_at or a request to stop, saving and resuming as configured. argv
 * after "train". Collective. */
int run_command(struct comm *comm, int argc, char **argv);
/* `tatara init`: writes a commented configuration for shards, tokenizer and machine. One rank. */
int init_command(struct comm *comm, int argc, char **argv);
/* `tatara plan`: prints parameters and bytes per rank. One rank. */
int plan_command(struct comm *comm, int argc, char **argv);
/* `tatara sample`: continues prompts with a checkpoint's model. One rank. */
int sample_command(struct comm *comm, int argc, char **argv);

#endif
