/* Private to the CPU matmul and attention: products of tiles, the tiles' layout, and how they are filled.
 *
 * A tile of A holds lines × k, row-major and contiguous. A tile of B holds k × columns in panels of `panel` columns;
 * inside a panel a bf16 tile keeps two neighbouring k of a column side by side, which is what AMX and VDPBF16PS read. Both are padded with zeros: lines of A to 16, columns to
 * 64, k to 64 bytes. A tile of C is f32, row-major, of the padded size. */
#ifndef TATARA_CPU_TILE_H
#define TATARA_CPU_TILE_H

#include "cpu.h"

enum {
    TILE_ROWS = 256, /* the largest tile: rows, columns, and bytes of one line along k */
    TILE_COLS = 256,
    TILE_K_BYTES = 2048,
    TILE_PAD_ROWS = 16,
    TILE_PAD_COLS = 64,
    TILE_PAD_K_BYTES = 64
};

/* A product's own scratch memory: the last bytes of each thread's slice. The rest is the caller's. */
#define TILE_SCRATCH_BYTES ((size_t)512 << 10)
#define TILE_SLICE_BYTES (CPU_SLICE_BYTES - TILE_SCRATCH_BYTES)

/* A matrix as a tile sees it: rows of A or columns of B ("lines" of the result), and k. */
struct tile_source {
    const void *data;
    enum dtype dtype;
    int64_t ld;
    bool k_down; /* element (line, k) is data[k·ld + line]; otherwise data[line·ld + k] */
};

struct tile_layout {
    enum dtype dtype;
    bool is_b;
    int64_t panel;            /* columns of a panel (B only) */
    int64_t lines, k;         /* taken from the source */
    int64_t lines_pad, k_pad; /* of the tile */
};

/* A product C[m,n] = A[m,k]·B[k,n] of padded tiles, or C += A·B. */
struct tile_product {
    enum dtype dtype;
    bool adds;
    int64_t m, n, k;
};

/* The type of the tiles of f32 or bf16 matrices on this CPU: their own, or f32 where there is no fast bf16 kernel. */
enum dtype tile_dtype(const struct device *dev, enum dtype act);
int64_t tile_pad(int64_t n, int64_t to);
/* How many k a tile of this type holds at most, and to what multiple its k are padded. */
int64_t tile_k_max(enum dtype dtype);
int64_t tile_k_pad(enum dtype dtype);
struct tile_layout tile_layout_a(enum dtype dtype, int64_t lines, int64_t k);
struct tile_layout tile_layout_b(const struct device *dev, enum dtype dtype, int64_t lines, int64_t k);

/* Copies source[line0 … +lines, k0 … +k] into the tile `to`, which has lines_pad·k_pad elements. */
void tile_fill(void *to, struct tile_layout layout, struct tile_source source, int64_t line0, int64_t k0);

/* Makes what is needed for this product, at its first use; by the caller's thread, outside parallel regions. */
int tile_product_prepare(struct device *dev, struct tile_product product);
/* Runs a prepared product on one thread. Returns oneDNN's status, 0 without it. Only reads a and b. */
int tile_product_run(const struct device *dev, int thread, struct tile_product product, const void *a, const void *b,
                     float *c);

/* One piece of work, computed whole by this thread with TILE_SLICE_BYTES of its slice. Returns oneDNN's status. */
typedef int tile_task(const struct device *dev, int thread, const void *ctx, int64_t index);
/* Runs tasks 0 … n − 1 over the device's threads. ERR_DEVICE when oneDNN fails in one of them. */
int tile_run_tasks(struct device *dev, const char *op, tile_task *task, const void *ctx, int64_t n);

#endif
