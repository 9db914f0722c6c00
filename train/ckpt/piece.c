/* Cuts flat ranges of tensors into the rectangles in which they are stored, and counts what they take. Pure functions.
 *
 * What HDF5 takes around the data is not documented to the byte. The bounds were measured with 1.10 and names of up to 60
 * characters; tests/e2e/test_plan.py holds them against real checkpoints. */
#include "ckpt_internal.h"

#define DATASET_BYTES 640    /* a dataset's header and its share of its group, in a rank's file */
#define SOURCE_BYTES 192     /* of a piece, in the index and the manifest */
#define TENSOR_BYTES 896     /* of a tensor, in the index and the manifest */
#define FILE_BYTES 8192      /* a file's own header, its groups, its line of the manifest */
#define MANIFEST_BYTES 16384 /* the configuration and the rest of the manifest */

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

float *ckpt_slab_place(const struct ckpt_slab *slab, float *from)
{
    struct ckpt_piece piece[CKPT_PIECES_MAX], largest = {0, 0, {0}, {0}};
    const int n = ckpt_pieces(piece, slab->ndim, slab->shape, slab->begin, slab->end);
    for (int i = 0; i < n; i++)
        if (piece[i].end - piece[i].begin > largest.end - largest.begin) largest = piece[i];
    const int64_t bytes = (largest.end - largest.begin) * (int64_t)sizeof *from;
    if (bytes < CKPT_BULK_FROM) return from;
    const uintptr_t past = (uintptr_t)(from + (largest.begin - slab->begin)) % CKPT_ALIGN;
    return from + (past == 0 ? 0 : CKPT_ALIGN - past) / sizeof *from;
}

int64_t ckpt_slab_bytes(const struct ckpt_slab *slab)
{
    struct ckpt_piece piece[CKPT_PIECES_MAX];
    const int n = ckpt_pieces(piece, slab->ndim, slab->shape, slab->begin, slab->end);
    int64_t bytes = slab->begin == 0 && n > 0 ? TENSOR_BYTES : 0; /* once for the whole tensor */
    for (int i = 0; i < n; i++) {
        const int64_t data = (piece[i].end - piece[i].begin) * (int64_t)sizeof(float);
        bytes += data + DATASET_BYTES + SOURCE_BYTES + (data >= CKPT_ALIGN_FROM ? CKPT_ALIGN : 0);
    }
    return bytes;
}

int64_t ckpt_frame_bytes(int ranks)
{
    return (ranks + (int64_t)1) * FILE_BYTES + MANIFEST_BYTES;
}
