/* Fill, copy with conversion, and the column sums of a bias gradient. */
#include "cpu.h"

/* Elements per thread's piece: large enough to hide the start of a piece, small enough to share evenly. */
#define PIECE 16384
#define PATTERN_BYTES 4096
#define ROW_BLOCK 128
#define COLUMN_BLOCK 128

int cpu_fill(struct device *dev, struct tensor y, double value)
{
    const size_t width = dtype_bytes(y.dtype), bytes = tensor_bytes(y);
    char pattern[PATTERN_BYTES];
    for (size_t at = 0; at < sizeof pattern; at += width) {
        const float f32 = (float)value;
        const uint16_t bf16 = cpu_bf16_from_f32(f32);
        const int32_t i32 = y.dtype == DT_I32 ? (int32_t)value : 0;
        const int64_t i64 = y.dtype == DT_I64 ? (int64_t)value : 0;
        const void *const one[DT_COUNT] = {[DT_F32] = &f32, [DT_BF16] = &bf16, [DT_I32] = &i32, [DT_I64] = &i64};
        memcpy(pattern + at, one[y.dtype], width);
    }
#pragma omp parallel for num_threads(dev->threads) schedule(static)
    for (size_t at = 0; at < bytes; at += sizeof pattern)
        memcpy((char *)y.data + at, pattern, bytes - at < sizeof pattern ? bytes - at : sizeof pattern);
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
