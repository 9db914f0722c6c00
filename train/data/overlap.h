/* Shards that a run must not read twice: those held out are not trained on, and what is trained on is listed once. They
 * are told by their contents, so neither another spelling of a path nor a copy hides them. */
#ifndef TATARA_OVERLAP_H
#define TATARA_OVERLAP_H

#include "data/buffer.h"

#include <stdbool.h>

struct shard;

/* The shards of a run. Zero-initialised is empty; overlap_free takes what it holds. */
struct overlap {
    struct buffer uses;
};

/* Takes note of a shard, which may be closed afterwards. */
int overlap_add(struct overlap *overlap, const struct shard *shard, bool held_out);
/* ERR_CONFIG, naming both files, when two of the shards have the same contents and not both are held out. */
int overlap_check(struct overlap *overlap);
void overlap_free(struct overlap *overlap);

#endif
