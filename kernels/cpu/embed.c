/* Token and position embeddings. The forward pass is parallel over rows; the backward pass over columns, so that rows of
 * the same token are added in their order by one thread and no two threads meet. */
#include "cpu.h"

#define COLUMN_BLOCK 64

static int64_t clamp_index(int32_t index, int64_t count)
{
    return index < 0 ? 0 : index >= count ? count - 1 : index;
}

int cpu_embed_fwd(struct device *dev, struct tensor y, struct tensor tok, struct tensor pos, struct tensor wte,
                  struct tensor wpe)
{
    const int64_t rows = y.shape[0], width = y.shape[1];
    const int32_t *tokens = tok.data, *positions = pos.data;
    const size_t row_bytes = (size_t)width * dtype_bytes(y.dtype);
#pragma omp parallel for num_threads(dev->threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const int64_t token = clamp_index(tokens[row], wte.shape[0]);
        if (!tensor_given(wpe)) {
            memcpy((char *)y.data + (size_t)row * row_bytes, (const char *)wte.data + (size_t)token * row_bytes,
                   row_bytes);
            continue;
        }
        const int64_t position = clamp_index(positions[row], wpe.shape[0]);
        float token_buffer[CPU_BLOCK], position_buffer[CPU_BLOCK], outs[CPU_BLOCK];
        for (int64_t at = 0; at < width; at += CPU_BLOCK) {
            const int64_t n = cpu_min(CPU_BLOCK, width - at);
            const float *a = cpu_view(wte, token * width + at, n, token_buffer);
            const float *b = cpu_view(wpe, position * width + at, n, position_buffer);
            float *out = cpu_target(y, row * width + at, outs);
#pragma omp simd
            for (int64_t i = 0; i < n; i++)
                out[i] = a[i] + b[i];
            cpu_commit(y, row * width + at, n, out);
        }
    }
    return 0;
}

/* table[index[t]] += dy[t] for all t in order, for the n ≤ COLUMN_BLOCK columns from `at` on. */
static void scatter_columns(struct tensor table, const int32_t *index, struct tensor dy, int64_t at, int64_t n)
{
    const int64_t rows = dy.shape[0], width = dy.shape[1];
    float dys[COLUMN_BLOCK];
    for (int64_t row = 0; row < rows; row++) {
        const float *dout = cpu_view(dy, row * width + at, n, dys);
        float *to = (float *)table.data + clamp_index(index[row], table.shape[0]) * width + at;
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            to[i] += dout[i];
    }
}

int cpu_embed_bwd(struct device *dev, struct tensor dwte, struct tensor dwpe, struct tensor dy, struct tensor tok,
                  struct tensor pos)
{
    const int64_t width = dy.shape[1];
#pragma omp parallel for num_threads(dev->threads) schedule(static)
    for (int64_t at = 0; at < width; at += COLUMN_BLOCK) {
        const int64_t n = cpu_min(COLUMN_BLOCK, width - at);
        scatter_columns(dwte, tok.data, dy, at, n);
        if (tensor_given(dwpe)) scatter_columns(dwpe, pos.data, dy, at, n);
    }
    return 0;
}
