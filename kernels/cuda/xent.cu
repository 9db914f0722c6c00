/* Softmax cross-entropy with its gradient, for one chunk of tokens over the whole vocabulary.
 *
 * A row is one block's. It is read once for its maximum and its sum of exponentials (each thread keeps the sum relative
 * to the largest logit it has seen, and rescales it when that grows: Milakov & Gimelshein 2018), and a second time, from
 * its end to its beginning, for the gradient: what was read last is likely to be in the cache still.
 *
 * A warp takes TILE columns at a time, 8 for each lane: a piece, or, where rows do not begin at 16-byte boundaries, every
 * 32nd, so that the lanes read side by side. Which of the two depends on the shape, never on the row. Columns that are no
 * classes are read as −∞, of which the softmax is 0. */
#include "cuda.cuh"

#include <float.h>

#define THREADS_MAX 1024
#define TILE (CUDA_WARP * CUDA_PIECE)

/* The column of a lane's element i in the tile that begins at `tile`. */
__device__ static inline int64_t column_of(int64_t tile, int i, bool aligned)
{
    const int lane = (int)threadIdx.x % CUDA_WARP;
    return aligned ? tile + lane * CUDA_PIECE + i : tile + i * CUDA_WARP + lane;
}

/* A lane's elements of the tile, and −∞ from column `classes` on. */
__device__ static inline void load_tile(float (&to)[CUDA_PIECE], const float *row, int64_t tile, int64_t classes,
                                        bool aligned)
{
    if (aligned && column_of(tile, 0, true) + CUDA_PIECE <= classes) {
        cuda_load_piece(to, row + column_of(tile, 0, true));
        return;
    }
#pragma unroll
    for (int i = 0; i < CUDA_PIECE; i++)
        to[i] = column_of(tile, i, aligned) < classes ? row[column_of(tile, i, aligned)] : -INFINITY;
}

template <class T>
__device__ static inline void store_tile(T *row, const float (&from)[CUDA_PIECE], int64_t tile, int64_t width,
                                         bool aligned)
{
    if (aligned && column_of(tile, 0, true) < width) {
        cuda_store_piece(row + column_of(tile, 0, true), from);
        return;
    }
#pragma unroll
    for (int i = 0; i < CUDA_PIECE; i++)
        if (column_of(tile, i, aligned) < width) row[column_of(tile, i, aligned)] = cuda_from_f32<T>(from[i]);
}

/* A row's largest logit and Σ exp(logit − max), the same in all threads. NaN in a row comes out as a sum of NaN, and
 * infinity too. */
__device__ static void row_softmax(const float *row, int64_t classes, bool aligned, float &max, float &sum)
{
    const int64_t first = (int64_t)(threadIdx.x / CUDA_WARP) * TILE, step = blockDim.x * CUDA_PIECE;
    float part = 0;
    max = -FLT_MAX; /* not −∞, of which the difference to itself is no number */
#pragma unroll 2
    for (int64_t tile = first; tile < classes; tile += step) {
        float x[CUDA_PIECE], larger = max;
        load_tile(x, row, tile, classes, aligned);
#pragma unroll
        for (int i = 0; i < CUDA_PIECE; i++)
            larger = fmaxf(larger, x[i]);
        part *= __expf(max - larger);
        max = larger;
#pragma unroll
        for (int i = 0; i < CUDA_PIECE; i++)
            part += __expf(x[i] - max);
    }
    const float own = max;
    max = cuda_block_max(own);
    sum = cuda_block_sum(part * __expf(own - max));
}

/* dlogits = factor·exp(logits − max) for a row, but at_target at its target. The rows may be the same. */
template <class T>
__device__ static void row_gradient(T *dlogits, const float *logits, int64_t width, int64_t classes, int64_t target,
                                    float max, float factor, float at_target, bool aligned)
{
    const int64_t first = (int64_t)(threadIdx.x / CUDA_WARP) * TILE, step = blockDim.x * CUDA_PIECE;
    for (int64_t tile = first + (width - 1) / step * step; tile >= 0; tile -= step) {
        float x[CUDA_PIECE];
        load_tile(x, logits, tile, classes, aligned);
#pragma unroll
        for (int i = 0; i < CUDA_PIECE; i++)
            x[i] = column_of(tile, i, aligned) == target ? at_target : factor * __expf(x[i] - max);
        store_tile(dlogits, x, tile, width, aligned);
    }
}

/* Blocks take turns with the rows. What a row needs once is computed by its first thread in double: the gradient at the
 * target is a difference of nearly equal numbers when the model is right. */
template <class T>
__global__ void __launch_bounds__(THREADS_MAX)
    xent_rows(float *loss, float *z, T *dlogits, const float *logits, const int32_t *targets, int64_t rows,
              int64_t width, int64_t classes, double grad_scale, double z_loss, bool aligned)
{
    CUDA_SHARED(float, shared, [2]); /* the factor of the row's gradient, and the gradient at its target */
    for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
        const float *const in = logits + row * width;
        T *const out = dlogits ? dlogits + row * width : nullptr;
        if (targets[row] < 0) {
            if (threadIdx.x == 0) loss[row] = 0;
            if (threadIdx.x == 0 && z) z[row] = 0;
            for (int64_t at = threadIdx.x; out && at < width; at += blockDim.x)
                out[at] = cuda_from_f32<T>(0.0f);
            continue;
        }
        const int64_t target =
            cuda_min((int64_t)targets[row], classes - 1); /* never out of bounds, whatever the data */
        float max, sum;
        row_softmax(in, classes, aligned, max, sum);
        if (threadIdx.x == 0) {
            const double log_sum = log((double)sum), below = (double)max - (double)in[target];
            const double lse = (double)max + log_sum;
            const double factor = grad_scale * (1.0 + 2.0 * z_loss * lse) / (double)sum;
            loss[row] = (float)(log_sum + below);
            if (z) z[row] = (float)(z_loss * lse * lse);
            shared[0] = (float)factor;
            shared[1] = (float)(factor * exp(-below) - grad_scale);
        }
        __syncthreads();
        if (out) row_gradient(out, in, width, classes, target, max, shared[0], shared[1], aligned);
    }
}

extern "C" int cuda_xent(struct device *dev, struct tensor loss, struct tensor z, struct tensor dlogits,
                         struct tensor logits, struct tensor target, int64_t classes, double grad_scale,
                         double z_loss)
{
    const int64_t rows = logits.shape[0], width = logits.shape[1];
    if (rows == 0 || width == 0) return 0;
    const int64_t warps = cuda_div_up(width, TILE);
    const bool aligned = width % CUDA_PIECE == 0 && cuda_aligned(dlogits.data, logits.data);
    const unsigned threads = (unsigned)cuda_min(warps * CUDA_WARP, (int64_t)THREADS_MAX);
    CUDA_BY_TYPE(dlogits.dtype, T,
                 TRY(CUDA_LAUNCH(dev, xent_rows<T>, cuda_blocks(rows, 1), threads, 0, cuda_data<float>(loss),
                                 cuda_data<float>(z), cuda_data<T>(dlogits), cuda_data<float>(logits),
                                 cuda_data<int32_t>(target), rows, width, classes, grad_scale, z_loss, aligned)));
    return 0;
}
