/* Products of tiles in plain C, the same bits everywhere: each element of C is one chain of fused multiply-adds along k,
 * in order, beginning with what C held (0, where the product does not add). Which vectors the compiler makes of the
 * columns, how k and the output are cut into tiles, and which thread computes a tile, change nothing of that. bf16
 * matrices are multiplied as f32, exactly.
 *
 * A block of C of BLOCK_ROWS × BLOCK_COLS stays in registers while k goes by: as many chains as keep the units for
 * fused multiply-adds busy. Where the CPU has none, the C library computes them: right, and slow.
 *
 * Pure functions on the caller's memory; any thread. */
#include "product.h"

#include <stdio.h>

/* Of C, in registers. They divide a tile's padding. */
#ifdef __AVX512F__
enum { BLOCK_ROWS = 8, BLOCK_COLS = 32 };
#else
enum { BLOCK_ROWS = 4, BLOCK_COLS = 16 };
#endif
_Static_assert(TILE_PAD_ROWS % BLOCK_ROWS == 0 && TILE_PAD_COLS % BLOCK_COLS == 0, "blocks must divide tiles");

/* C[BLOCK_ROWS, BLOCK_COLS] += A·B; rows of C are n apart, those of A k. */
static void multiply_block(const float *restrict a, const float *restrict b, float *restrict c, int64_t n, int64_t k)
{
    float sum[BLOCK_ROWS][BLOCK_COLS];
    for (int i = 0; i < BLOCK_ROWS; i++)
        memcpy(sum[i], c + i * n, sizeof sum[i]);
    for (int64_t l = 0; l < k; l++) {
        for (int i = 0; i < BLOCK_ROWS; i++) {
            const float left = a[i * k + l];
#pragma omp simd
            for (int j = 0; j < BLOCK_COLS; j++)
                sum[i][j] = fmaf(left, b[l * BLOCK_COLS + j], sum[i][j]);
        }
    }
    for (int i = 0; i < BLOCK_ROWS; i++)
        memcpy(c + i * n, sum[i], sizeof sum[i]);
}

static int portable_run(const struct product_table *table, int thread, void *scratch, struct tile_product p,
                        const void *a, const void *b, float *c)
{
    (void)table, (void)thread, (void)scratch;
    if (!p.adds) memset(c, 0, (size_t)(p.m * p.n) * sizeof *c);
    for (int64_t col = 0; col < p.n; col += BLOCK_COLS) /* a panel of B is read again for each block of rows */
        for (int64_t row = 0; row < p.m; row += BLOCK_ROWS)
            multiply_block((const float *)a + row * p.k, (const float *)b + col * p.k, c + row * p.n + col, p.n, p.k);
    return 0;
}

int product_portable_open(struct product_table *table)
{
    snprintf(table->name, sizeof table->name, "portable product");
    table->tile_dtype[DT_F32] = table->tile_dtype[DT_BF16] = DT_F32;
    table->panel[DT_F32] = BLOCK_COLS;
    table->run = portable_run;
    return 0;
}
