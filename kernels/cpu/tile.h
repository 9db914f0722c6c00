/* Private to the CPU matmul: the layout of the tiles that oneDNN multiplies, and how they are filled.
 *
 * A tile of A holds rows × K-block, row-major and contiguous. A tile of B holds K-block × columns in panels of `panel`
 * columns; inside a panel a bf16 tile keeps two neighbouring k of a column side by side, which is what AMX and VDPBF16PS
 * read (oneDNN calls it BA16a64b2a; for f32 tiles it is BA16a64b). Both are padded with zeros: rows to 16, columns to
 * 64, k to 64 bytes. */
#ifndef TATARA_CPU_TILE_H
#define TATARA_CPU_TILE_H

#include "tensor.h"

/* A matrix as a tile sees it: rows of A or columns of B ("lines" of the result) along `line`, and k. */
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

/* Copies source[line0 … +lines, k0 … +k] into the tile `to`, which has lines_pad·k_pad elements. */
void tile_fill(void *to, struct tile_layout layout, struct tile_source source, int64_t line0, int64_t k0);

#endif
