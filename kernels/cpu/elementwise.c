/* Fill, copy with conversion, and the column sums of a bias gradient. */
#include "cpu.h"

/* Elements per thread's piece: large enough to hide the start of a piece, small enough to share evenly. */
#define PIECE 16384
#define ROW_BLOCK 128
#define COLUMN_BLOCK 128

int cpu_fill(struct device *dev, struct tensor y, double value)
{
    const int64_t elems = tensor_elems(y);
    const size_t width = dtype_bytes(y.dtype);
    union {
        float f32;
        uint16_t bf16;
        int32_t i32;
        int64_t i64;
    } one = {0};
    if (y.dtype == DT_F32) one.f32 = (float)value;
    if (y.dtype == DT_BF16) one.bf16 = cpu_bf16_from_f32((float)value);
    if (y.dtype == DT_I32) one.i32 = (int32_t)value;
    if (y.dtype == DT_I64) one.i64 = (int64_t)value;
#pragma omp parallel for num_threads(dev->threads) schedule(static)
    for (int64_t at = 0; at < elems; at += PIECE) {
        const int64_t n = cpu_min(PIECE, elems - at);
        char *to = (char *)y.data + (size_t)at * width;
        if (one.i64 == 0) {
            memset(to, 0, (size_t)n * width);
            continue;
        }
        for (int64_t i = 0; i < n; i++)
            memcpy(to + (size_t)i * width, &one, width);
    }
    return 0;
}

int cpu_copy(struct device *dev, struct tensor y, struct tensor x)
{
    const int64_t elems = tensor_elems(x);
    const size_t width = dtype_bytes(x.dtype);
#pragma omp parallel for num_threads(dev->threads) schedule(static)
    for (int64_t at = 0; at < elems; at += PIECE) {
        const int64_t n = cpu_min(PIECE, elems - at);
        if (y.dtype == x.dtype)
            memmove((char *)y.data + (size_t)at * width, (const char *)x.data + (size_t)at * width,
                    (size_t)n * width);
        else if (y.dtype == DT_F32)
            cpu_load((float *)y.data + at, x.data, x.dtype, at, n);
        else
            cpu_store(y.data, y.dtype, at, (const float *)x.data + at, n);
    }
    return 0;
}

int cpu_bias_bwd(struct device *dev, struct tensor db, struct tensor dy)
{
    const int64_t rows = dy.shape[0], width = dy.shape[1];
    float *sums = db.data;
#pragma omp parallel for num_threads(dev->threads) schedule(static)
    for (int64_t at = 0; at < width; at += COLUMN_BLOCK) {
        const int64_t n = cpu_min(COLUMN_BLOCK, width - at);
        for (int64_t begin = 0; begin < rows; begin += ROW_BLOCK) {
            float part[COLUMN_BLOCK] = {0}, dys[COLUMN_BLOCK];
            for (int64_t row = begin; row < cpu_min(begin + ROW_BLOCK, rows); row++) {
                const float *dout = cpu_view(dy, row * width + at, n, dys);
#pragma omp simd
                for (int64_t i = 0; i < n; i++)
                    part[i] += dout[i];
            }
            for (int64_t i = 0; i < n; i++)
                sums[at + i] += part[i];
        }
    }
    return 0;
}
