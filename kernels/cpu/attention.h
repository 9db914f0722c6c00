/* Private to the attention kernels of the CPU: the geometry that forward, backward and cached attention share.
 *
 * All work on tiles of at most 256 queries × 256 keys of one head, whose products tile.h runs; scores exist for one tile
 * at a time in the thread's slice. */
#ifndef TATARA_CPU_ATTENTION_H
#define TATARA_CPU_ATTENTION_H

#include "tile.h"

enum { ATTENTION_TILE = 256, ATTENTION_HEAD_MAX = 256 };

/* Room in a slice for any tile of A, B or C. */
#define ATTENTION_AREA ((size_t)ATTENTION_TILE * ATTENTION_TILE * sizeof(float))

struct attention {
    enum dtype dtype;  /* of tiles */
    int64_t sequences; /* of `queries` rows of q each, against `keys` rows of k and v each */
    int64_t queries, keys;
    int64_t heads, kv_heads, head_dim;
    float scale;
    const int32_t *start; /* the first position each query sees, or NULL for 0 */
    const int32_t *pos;   /* the last position each query sees, negative: none; or NULL for its own */
};

/* The keys lo ≤ key < hi that each query of a tile sees, and that any of them sees; none for the padding. */
struct attention_span {
    int32_t lo[ATTENTION_TILE], hi[ATTENTION_TILE];
    int64_t first, last;
};

/* Geometry from the ops' arguments; fails when the head is larger than a tile. */
int attention_init(struct attention *at, const struct device *dev, struct tensor qkv, int64_t queries, int64_t keys,
                   int heads, int kv_heads);
/* Prepares every product that the tiles of this geometry need. */
int attention_prepare(struct device *dev, const struct attention *at);
/* The span of queries [begin, begin + n) of a sequence. */
struct attention_span attention_span(const struct attention *at, int64_t sequence, int64_t begin, int64_t n);

/* Rows from `row` on of a matrix of ld columns, head_dim columns from `col` on. As A, or as B against A's rows: k runs
 * along the head. With k_down: B whose k are the rows. */
static inline struct tile_source attention_source(struct tensor t, int64_t row, int64_t ld, int64_t col, bool k_down)
{
    const char *data = (const char *)t.data + (size_t)(row * ld + col) * dtype_bytes(t.dtype);
    return (struct tile_source){.data = data, .dtype = t.dtype, .ld = ld, .k_down = k_down};
}

/* C[rows, columns] = A·Bᵀ over a head, padded as its tiles are: scores, and gradients of probabilities. */
static inline struct tile_product attention_scores(const struct attention *at, int64_t rows, int64_t columns)
{
    return (struct tile_product){.dtype = at->dtype,
                                 .m = tile_pad(rows, TILE_PAD_ROWS),
                                 .n = tile_pad(columns, TILE_PAD_COLS),
                                 .k = tile_pad(at->head_dim, tile_k_pad(at->dtype))};
}

/* C[rows, head_dim] += A[rows, k]·B: outputs, and gradients of q, k and v. */
static inline struct tile_product attention_mix(const struct attention *at, int64_t rows, int64_t k)
{
    return (struct tile_product){.dtype = at->dtype,
                                 .adds = true,
                                 .m = tile_pad(rows, TILE_PAD_ROWS),
                                 .n = tile_pad(at->head_dim, TILE_PAD_COLS),
                                 .k = tile_pad(k, tile_k_pad(at->dtype))};
}

#endif
