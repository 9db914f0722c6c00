/* Shards that a run must not read twice (see overlap.h): sorted by fingerprint, equal ones are neighbours. */
#include "data/overlap.h"

#include "data/shard.h"
#include "err.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

struct use {
    uint64_t fingerprint;
    bool held_out;
    size_t order; /* in which the shards were added */
    char *path;
};

static struct use *uses_of(const struct overlap *overlap, size_t *n)
{
    void *uses = overlap->uses.data;
    *n = overlap->uses.used / sizeof(struct use);
    return uses;
}

/* Of equal shards, those to train on come first. */
static int compare(const void *left, const void *right)
{
    const struct use *a = left, *b = right;
    if (a->fingerprint != b->fingerprint) return a->fingerprint < b->fingerprint ? -1 : 1;
    if (a->held_out != b->held_out) return a->held_out ? 1 : -1;
    return a->order < b->order ? -1 : a->order > b->order;
}

int overlap_add(struct overlap *overlap, const struct shard *shard, bool held_out)
{
    struct use use = {.fingerprint = shard_fingerprint(shard),
                      .held_out = held_out,
                      .order = overlap->uses.used,
                      .path = strdup(shard_path(shard))};
    if (!use.path) FAIL(ERR_SYSTEM, "out of memory for the list of shards");
    const int rc = buffer_add(&overlap->uses, &use, sizeof use);
    if (rc != 0) free(use.path);
    return rc;
}

int overlap_check(struct overlap *overlap)
{
    size_t n = 0;
    struct use *use = uses_of(overlap, &n);
    if (n > 0) qsort(use, n, sizeof *use, compare);
    for (size_t i = 1; i < n; i++) {
        const struct use *a = &use[i - 1], *b = &use[i];
        if (a->fingerprint != b->fingerprint || a->held_out) continue;
        if (b->held_out) {
            FAIL(ERR_CONFIG,
                 "%s of data.valid has the same contents as %s of data.train: held-out shards must not be trained on",
                 b->path, a->path);
        }
        FAIL(ERR_CONFIG,
             "%s and %s, both of data.train, have the same contents: a shard listed twice is read twice; "
             "list it once, and give its data set a weight instead",
             a->path, b->path);
    }
    return 0;
}

void overlap_free(struct overlap *overlap)
{
    size_t n = 0;
    struct use *use = uses_of(overlap, &n);
    for (size_t i = 0; i < n; i++)
        free(use[i].path);
    buffer_free(&overlap->uses);
}
