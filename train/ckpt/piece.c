/* Cuts flat ranges of tensors into the rectangles in which they are stored. Pure functions. */
#include "ckpt_internal.h"

int ckpt_pieces(struct ckpt_piece piece[CKPT_PIECES_MAX], int ndim, const int64_t *shape, int64_t begin, int64_t end)
{
    ASSERT(ndim >= 1 && ndim <= CKPT_DIMS_MAX);
    if (ndim == 1) {
        piece[0] = (struct ckpt_piece){begin, end, {(hsize_t)begin, 0}, {(hsize_t)(end - begin), 1}};
        return begin < end ? 1 : 0;
    }
    const int64_t cols = shape[1];
    int n = 0;
    for (int64_t at = begin; at < end; at = piece[n - 1].end) {
        const int64_t row = at / cols, col = at % cols;
        const bool whole_rows = col == 0 && end - at >= cols;
        const int64_t rest_of_row = cols - col < end - at ? cols - col : end - at;
        const int64_t rows = whole_rows ? (end - at) / cols : 1;
        const int64_t width = whole_rows ? cols : rest_of_row;
        ASSERT(n < CKPT_PIECES_MAX);
        piece[n++] =
            (struct ckpt_piece){at, at + rows * width, {(hsize_t)row, (hsize_t)col}, {(hsize_t)rows, (hsize_t)width}};
    }
    return n;
}

void ckpt_piece_name(char name[CKPT_DATASET_MAX], const char *tensor, const struct ckpt_piece *piece)
{
    snprintf(name, CKPT_DATASET_MAX, "%s@%lld", tensor, (long long)piece->begin);
}
