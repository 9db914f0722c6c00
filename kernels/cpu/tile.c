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

/* How a block is read from the source, by types and direction. */
enum reading {
    WORDS,   /* 16 lines of 16 f32 */
    WIDENED, /* 16 lines of 16 bf16, which become f32 */
    HALVES,  /* 16 lines of 32 bf16 */
    PAIRED,  /* 32 lines of 16 bf16, two of which become one of the block */
    READINGS
};

static const int64_t reading_lines[READINGS] = {16, 16, 16, 32};
static const int64_t reading_columns[READINGS] = {16, 16, 32, 16};

static enum reading reading_of(enum dtype tile, struct tile_source source)
{
    if (source.dtype == DT_F32) return WORDS;
    if (tile == DT_F32) return WIDENED;
    return source.k_down ? PAIRED : HALVES;
}

/* Reads a whole block from lines that are `stride` bytes apart. */
static void read_whole(uint32_t *restrict to, enum reading reading, const char *restrict from, int64_t stride)
{
    for (int64_t i = 0; i < BLOCK; i++) {
        uint32_t *line = to + i * BLOCK;
        uint16_t a[BLOCK], b[BLOCK];
        if (reading == WORDS || reading == HALVES) {
            memcpy(line, from + i * stride, BLOCK * sizeof *line);
        } else if (reading == WIDENED) {
            memcpy(a, from + i * stride, sizeof a);
            for (int j = 0; j < BLOCK; j++)
                line[j] = (uint32_t)a[j] << 16;
        } else {
            memcpy(a, from + 2 * i * stride, sizeof a);
            memcpy(b, from + (2 * i + 1) * stride, sizeof b);
            for (int j = 0; j < BLOCK; j++)
                line[j] = (uint32_t)a[j] | (uint32_t)b[j] << 16;
        }
    }
}

/* Reads a block of which the source holds only `lines` × `columns` (or none); the rest is zero. */
static void read_block(uint32_t *restrict to, enum reading reading, struct tile_source source, int64_t at,
                       int64_t lines, int64_t columns)
{
    const int64_t element = (int64_t)dtype_bytes(source.dtype), stride = source.ld * element;
    const char *from = (const char *)source.data + at * element;
    if (lines >= reading_lines[reading] && columns >= reading_columns[reading]) {
        read_whole(to, reading, from, stride);
        return;
    }
    char padded[sizeof(uint32_t[BLOCK * BLOCK])] = {0};
    const int64_t width = reading_columns[reading] * element;
    for (int64_t i = 0; i < cpu_min(lines, reading_lines[reading]) && columns > 0; i++)
        memcpy(padded + i * width, from + i * stride, (size_t)(cpu_min(columns, reading_columns[reading]) * element));
    read_whole(to, reading, padded, width);
}

void tile_fill(void *to, struct tile_layout layout, struct tile_source source, int64_t line0, int64_t k0)
{
    const enum reading reading = reading_of(layout.dtype, source);
    const int64_t k_of_word = layout.dtype == DT_BF16 ? 2 : 1;
    const int64_t words = layout.k_pad / k_of_word; /* of one line along k */
    const bool crossed = source.k_down != layout.is_b;
    const int64_t line_blocks = layout.lines_pad / BLOCK, word_blocks = words / BLOCK;
    uint32_t read[BLOCK * BLOCK], turned[BLOCK * BLOCK];
    for (int64_t n = 0; n < line_blocks * word_blocks;
         n++) { /* along the rows of the source, as they lie in memory */
        const int64_t line = BLOCK * (source.k_down ? n % line_blocks : n / word_blocks);
        const int64_t word = BLOCK * (source.k_down ? n / line_blocks : n % word_blocks), k = word * k_of_word;
        const int64_t k_left = layout.k - k, lines_left = layout.lines - line;
        const int64_t at = source.k_down ? (k0 + k) * source.ld + line0 + line : (line0 + line) * source.ld + k0 + k;
        read_block(read, reading, source, at, source.k_down ? k_left : lines_left,
                   source.k_down ? lines_left : k_left);
        if (crossed) transpose_block(turned, read);
        const uint32_t *block = crossed ? turned : read;
        const int64_t panel = layout.is_b ? line / layout.panel : 0;
        const int64_t begin =
            layout.is_b ? (panel * words + word) * layout.panel + line - panel * layout.panel : line * words + word;
        const int64_t stride = layout.is_b ? layout.panel : words;
        for (int64_t i = 0; i < BLOCK; i++)
            memcpy((uint32_t *)to + begin + i * stride, block + i * BLOCK, BLOCK * sizeof *block);
    }
}
