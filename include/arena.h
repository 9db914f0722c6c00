/* The arena: all large memory of a rank, taken once at start and never given back piecemeal.
 *
 * The same layout code runs twice: over an arena that only measures (base NULL; every take returns NULL and is counted),
 * then over the real one of exactly that size. `tatara plan` prints the first pass, so what it says is what is taken. */
#ifndef TATARA_ARENA_H
#define TATARA_ARENA_H

#include "tensor.h"

/* What the memory is for; name as `tatara plan` prints it. */
#define ARENA_LIST(X)             \
    X(ARENA_PARAMS, "parameters") \
    X(ARENA_GRADS, "gradients")   \
    X(ARENA_OPTIM, "optimizer")   \
    X(ARENA_ACTS, "activations")  \
    X(ARENA_CKPT, "checkpoint")   \
    X(ARENA_WORK, "workspace")

enum arena_kind {
#define X(name, text) name,
    ARENA_LIST(X)
#undef X
        ARENA_KINDS
};

struct arena {
    struct device *dev;
    char *base; /* NULL: measuring */
    size_t size, used;
    size_t by_kind[ARENA_KINDS]; /* bytes, padding included */
};

/* An arena that measures. */
struct arena arena_measure(struct device *dev);
/* Takes `bytes` of device memory, zeroed. Fails with ERR_SYSTEM when there is not enough. */
int arena_open(struct arena *arena, struct device *dev, size_t bytes);
void arena_close(struct arena *arena);
/* `bytes` at a 128-byte boundary; NULL while measuring. Running past the end is a bug: the measure pass sized it. */
void *arena_take(struct arena *arena, enum arena_kind kind, size_t bytes);
/* The same, as a tensor of the given type and up to three dimensions (cols and depth 0: absent). */
struct tensor arena_tensor(struct arena *arena, enum arena_kind kind, enum dtype dtype, int64_t rows, int64_t cols,
                           int64_t depth);
const char *arena_kind_name(enum arena_kind kind);

#endif
