/* Fills matmul tiles from matrices of any orientation, in square blocks of 16 × 16 words of 32 bits: one f32, or two
 * bf16 that are neighbours along k. A block is read line by line, transposed when the matrix and the tile run across
 * each other, and written in lines of 64 bytes. gcc turns the transposition into vector permutations (53 ns a block).
 *
 * Pure functions on the caller's memory; any thread. */
#include "tile.h"

enum { BLOCK = 16 };

int64_t tile_pad(int64_t n, int64_t to)
{
    return cpu_div_up(n, to) * to;
}

int64_t tile_k_max(enum dtype dtype)
{
    return TILE_K_BYTES / (int64_t)dtype_bytes(dtype);
}

int64_t tile_k_pad(enum dtype dtype)
{
    return TILE_PAD_K_BYTES / (int64_t)dtype_bytes(dtype);
}

struct tile_layout tile_layout_a(enum dtype dtype, int64_t lines, int64_t k)
{
    return (struct tile_layout){.dtype = dtype,
                                .lines = lines,
                                .k = k,
                                .lines_pad = tile_pad(lines, TILE_PAD_ROWS),
                                .k_pad = tile_pad(k, tile_k_pad(dtype))};
}

static void transpose_block(uint32_t *restrict to, const uint32_t *restrict from)
{
    for (int j = 0; j < BLOCK; j++)
        for (int i = 0; i < BLOCK; i++)
            to[j * BLOCK + i] = from[i * BLOCK + j];
}

/* The n ≤ 16 words of one line, the rest zero. */
static void load_words(uint32_t *restrict to, const void *restrict from, int64_t n)
{
    if (n >= BLOCK) {
        memcpy(to, from, BLOCK * sizeof *to);
    } else {
        memset(to, 0, BLOCK * sizeof *to);
        if (n > 0) memcpy(to, from, (size_t)n * sizeof *to);
    }
}

/* The same, for n ≤ 32 bf16 values that stay bf16. */
static void load_halves(uint32_t *restrict to, const uint16_t *restrict from, int64_t n)
{
    if (n >= 2 * BLOCK) {
        memcpy(to, from, BLOCK * sizeof *to);
    } else {
        memset(to, 0, BLOCK * sizeof *to);
        if (n > 0) memcpy(to, from, (size_t)n * sizeof *from);
    }
}

/* The same, for n ≤ 16 bf16 values that become f32. */
static void load_widened(uint32_t *restrict to, const uint16_t *restrict from, int64_t n)
{
    uint16_t line[BLOCK] = {0};
    if (n > 0) memcpy(line, from, (size_t)cpu_min(n, BLOCK) * sizeof *from);
    for (int i = 0; i < BLOCK; i++)
        to[i] = (uint32_t)line[i] << 16;
}

/* The same, for n ≤ 16 columns of two lines of bf16, paired; `second` may be NULL. */
static void load_pairs(uint32_t *restrict to, const uint16_t *restrict first, const uint16_t *restrict second,
                       int64_t n)
{
    uint16_t a[BLOCK] = {0}, b[BLOCK] = {0};
    const size_t bytes = (size_t)cpu_min(n, BLOCK) * sizeof *a;
    if (n > 0) memcpy(a, first, bytes);
    if (n > 0 && second) memcpy(b, second, bytes);
    for (int i = 0; i < BLOCK; i++)
        to[i] = (uint32_t)a[i] | (uint32_t)b[i] << 16;
}

/* One block whose outer lines are k or lines of the source, whichever it stores one below the other. `outer` and
 * `inner` are how many elements there are still in each direction. */
static void load_block(uint32_t *restrict to, struct tile_source source, bool paired, int64_t at, int64_t outer,
                       int64_t inner)
{
    for (int64_t i = 0; i < BLOCK; i++) {
        uint32_t *line = to + i * BLOCK;
        if (source.dtype == DT_F32) {
            load_words(line, (const float *)source.data + at + i * source.ld, i < outer ? inner : 0);
            continue;
        }
        const uint16_t *half = (const uint16_t *)source.data + at;
        if (paired && source.k_down) {
            const uint16_t *first = half + 2 * i * source.ld;
            load_pairs(line, first, 2 * i + 1 < outer ? first + source.ld : NULL, 2 * i < outer ? inner : 0);
        } else if (paired) {
            load_halves(line, half + i * source.ld, i < outer ? inner : 0);
        } else {
            load_widened(line, half + i * source.ld, i < outer ? inner : 0);
        }
    }
}

void tile_fill(void *to, struct tile_layout layout, struct tile_source source, int64_t line0, int64_t k0)
{
    const bool paired = layout.dtype == DT_BF16;
    const int64_t k_of_word = paired ? 2 : 1;
    const int64_t words = layout.k_pad / k_of_word; /* of one line along k */
    const bool crossed = source.k_down != layout.is_b;
    uint32_t read[BLOCK * BLOCK], turned[BLOCK * BLOCK];
    for (int64_t word = 0; word < words; word += BLOCK) {
        const int64_t k = word * k_of_word;
        for (int64_t line = 0; line < layout.lines_pad; line += BLOCK) {
            const int64_t k_left = layout.k - k, lines_left = layout.lines - line;
            const int64_t at =
                source.k_down ? (k0 + k) * source.ld + line0 + line : (line0 + line) * source.ld + k0 + k;
            load_block(read, source, paired, at, source.k_down ? k_left : lines_left,
                       source.k_down ? lines_left : k_left);
            if (crossed) transpose_block(turned, read);
            const uint32_t *block = crossed ? turned : read;
            const int64_t panel = layout.is_b ? line / layout.panel : 0;
            const int64_t begin = layout.is_b ? (panel * words + word) * layout.panel + line - panel * layout.panel
                                              : line * words + word;
            const int64_t stride = layout.is_b ? layout.panel : words;
            for (int64_t i = 0; i < BLOCK; i++)
                memcpy((uint32_t *)to + begin + i * stride, block + i * BLOCK, BLOCK * sizeof *block);
        }
    }
}
