/* LayerNorm and RMSNorm with the residual addition before them, and the column sums of their backward pass.
 *
 * A block takes a row at a time; a thread has the same columns throughout, so what it leaves in shared memory for itself
 * needs no barrier. Forward, the row waits there between the passes over it. Backward, each block goes through a chunk
 * of rows, keeps the sums of the parameters' gradients there, and leaves them in the workspace as one row of partial
 * sums; a second kernel adds those rows in a fixed order. Rows too wide for shared memory go through global memory
 * instead, with the same sums in the same order. */
#include "cuda.cuh"

#define THREADS_MAX 256

/* Shared memory that a block of the backward pass may take: so little that an SM has room for two or more. */
#define SUMS_BYTES ((size_t)96 << 10)
#define DEFAULT_SHARED_BYTES ((size_t)48 << 10) /* what a launch may have without asking for more */

/* Threads for a row, whole warps, a piece for each or several. */
static unsigned row_threads(int64_t width)
{
    const int64_t warps = cuda_div_up(width, CUDA_WARP * CUDA_PIECE);
    return (unsigned)cuda_min(warps * CUDA_WARP, (int64_t)THREADS_MAX);
}

/* ---- forward ---- */

/* The tensors of the forward pass; those that were left out are null. */
template <class T> struct norm_fwd_args {
    T *y, *sum;
    float *stat;
    const T *x, *delta, *w, *b;
    int64_t rows, width;
};

/* The first pass over a row: sum = x + delta (if given), rounded to T; keeps the row in `kept` (if given). Returns the
 * thread's part of the row's Σ x (LayerNorm) or Σ x² (RMSNorm). */
template <class T> __device__ static float read_row(const norm_fwd_args<T> &k, T *kept, int64_t row, bool aligned)
{
    const int64_t begin = row * k.width;
    float total = 0;
    for (int64_t at = threadIdx.x * CUDA_PIECE; at < k.width; at += blockDim.x * CUDA_PIECE) {
        float values[CUDA_PIECE];
        cuda_load(values, k.x, begin + at, begin + k.width, aligned);
        if (k.delta) {
            float deltas[CUDA_PIECE];
            cuda_load(deltas, k.delta, begin + at, begin + k.width, aligned);
#pragma unroll
            for (int i = 0; i < CUDA_PIECE; i++)
                values[i] = cuda_to_f32(cuda_from_f32<T>(values[i] + deltas[i]));
            cuda_store(k.sum, values, begin + at, begin + k.width, aligned);
        }
        if (kept) cuda_store(kept, values, at, k.width, aligned);
#pragma unroll
        for (int i = 0; i < CUDA_PIECE; i++)
            total += k.b ? values[i] : values[i] * values[i];
    }
    return total;
}

/* The thread's part of Σ (x − mean)². */
template <class T> __device__ static float row_squares(const T *x, int64_t width, float mean, bool aligned)
{
    float total = 0;
    for (int64_t at = threadIdx.x * CUDA_PIECE; at < width; at += blockDim.x * CUDA_PIECE) {
        float values[CUDA_PIECE];
        cuda_load(values, x, at, width, aligned);
#pragma unroll
        for (int i = 0; i < CUDA_PIECE; i++)
            if (at + i < width) total += (values[i] - mean) * (values[i] - mean);
    }
    return total;
}

/* y = (x − mean)·rstd·w + b; no b is 0. */
template <class T>
__device__ static void write_row(const norm_fwd_args<T> &k, const T *x, int64_t row, float mean, float rstd,
                                 bool aligned)
{
    const int64_t begin = row * k.width;
    for (int64_t at = threadIdx.x * CUDA_PIECE; at < k.width; at += blockDim.x * CUDA_PIECE) {
        float values[CUDA_PIECE], weight[CUDA_PIECE], bias[CUDA_PIECE] = {};
        cuda_load(values, x, at, k.width, aligned);
        cuda_load(weight, k.w, at, k.width, aligned);
        if (k.b) cuda_load(bias, k.b, at, k.width, aligned);
#pragma unroll
        for (int i = 0; i < CUDA_PIECE; i++)
            values[i] = (values[i] - mean) * rstd * weight[i] + bias[i];
        cuda_store(k.y, values, begin + at, begin + k.width, aligned);
    }
}

/* Blocks take turns with the rows. The row is kept in shared memory when there is room for it. */
template <class T>
__global__ void __launch_bounds__(THREADS_MAX, 4) norm_rows(norm_fwd_args<T> k, float eps, bool keep, bool aligned)
{
    CUDA_SHARED_DYNAMIC(T, kept);
    for (int64_t row = blockIdx.x; row < k.rows; row += gridDim.x) {
        const float total = cuda_block_sum(read_row(k, keep ? kept : nullptr, row, aligned));
        const T *const again = keep ? kept : (k.delta ? k.sum : k.x) + row * k.width;
        const float mean = k.b ? total / (float)k.width : 0.0f;
        const float squares = k.b ? cuda_block_sum(row_squares(again, k.width, mean, aligned)) : total;
        const float rstd = 1.0f / sqrtf(squares / (float)k.width + eps);
        write_row(k, again, row, mean, rstd, aligned);
        if (threadIdx.x == 0) {
            k.stat[2 * row] = mean;
            k.stat[2 * row + 1] = rstd;
        }
    }
}

extern "C" int cuda_norm_fwd(struct device *dev, struct tensor y, struct tensor sum, struct tensor stat,
                             struct tensor x, struct tensor delta, struct tensor w, struct tensor b, double eps)
{
    const int64_t rows = x.shape[0], width = x.shape[1];
    if (rows == 0 || width == 0) return 0;
    const size_t row_bytes = (size_t)width * dtype_bytes(x.dtype);
    const bool keep = row_bytes <= DEFAULT_SHARED_BYTES;
    const bool aligned =
        width % CUDA_PIECE == 0 && cuda_aligned(y.data, sum.data, x.data, delta.data, w.data, b.data);
    CUDA_BY_TYPE(x.dtype, T,
                 const norm_fwd_args<T> args = {cuda_data<T>(y), cuda_data<T>(sum), cuda_data<float>(stat),
                                                cuda_data<T>(x), cuda_data<T>(delta), cuda_data<T>(w),
                                                cuda_data<T>(b), rows, width};
                 TRY(CUDA_LAUNCH(dev, norm_rows<T>, cuda_blocks(rows, 1), row_threads(width), keep ? row_bytes : 0,
                                 args, (float)eps, keep, aligned)));
    return 0;
}

/* ---- backward ---- */

/* The tensors of the backward pass; rows of partial sums for db are left out for RMSNorm. */
template <class T> struct norm_bwd_args {
    T *dx;
    float *dw_parts, *db_parts;
    const T *dy, *dres, *x, *w;
    const float *stat;
    int64_t rows, width, chunk_rows;
};

/* Two block sums at once, as cuda_block_sum. */
__device__ static void block_sums(float &a, float &b)
{
    CUDA_SHARED(float, parts, [2][CUDA_WARP]);
    const int warp = (int)threadIdx.x / CUDA_WARP, lane = (int)threadIdx.x % CUDA_WARP;
    const int warps = (int)blockDim.x / CUDA_WARP;
    a = cuda_warp_sum(a);
    b = cuda_warp_sum(b);
    if (lane == 0) parts[0][warp] = a, parts[1][warp] = b;
    __syncthreads();
    a = cuda_warp_sum(lane < warps ? parts[0][lane] : 0.0f);
    b = cuda_warp_sum(lane < warps ? parts[1][lane] : 0.0f);
    __syncthreads();
}

/* The first pass over a row: dw += dy·x̂ and db += dy (if given), and the thread's parts of Σ g and Σ g·x̂ of the row,
 * where g = dy·w. */
template <class T>
__device__ static void gradient_sums(const norm_bwd_args<T> &k, float *dw, float *db, int64_t row, float &sum_g,
                                     float &sum_gx, bool aligned)
{
    const float mean = k.stat[2 * row], rstd = k.stat[2 * row + 1];
    sum_g = sum_gx = 0;
    for (int64_t at = threadIdx.x * CUDA_PIECE; at < k.width; at += blockDim.x * CUDA_PIECE) {
        float dout[CUDA_PIECE], normed[CUDA_PIECE], other[CUDA_PIECE];
        cuda_load(dout, k.dy + row * k.width, at, k.width, aligned);
        cuda_load(normed, k.x + row * k.width, at, k.width, aligned);
        cuda_load(other, k.w, at, k.width, aligned);
#pragma unroll
        for (int i = 0; i < CUDA_PIECE; i++) {
            normed[i] = (normed[i] - mean) * rstd;
            sum_g += dout[i] * other[i];
            sum_gx += dout[i] * other[i] * normed[i];
        }
        cuda_load(other, dw, at, k.width, aligned);
#pragma unroll
        for (int i = 0; i < CUDA_PIECE; i++)
            other[i] += dout[i] * normed[i];
        cuda_store(dw, other, at, k.width, aligned);
        if (!db) continue;
        cuda_load(other, db, at, k.width, aligned);
#pragma unroll
        for (int i = 0; i < CUDA_PIECE; i++)
            other[i] += dout[i];
        cuda_store(db, other, at, k.width, aligned);
    }
}

/* dx of one row: dres + rstd·(g − offset − x̂·slope). dx may alias dres. */
template <class T>
__device__ static void write_gradient(const norm_bwd_args<T> &k, int64_t row, float offset, float slope, bool aligned)
{
    const float mean = k.stat[2 * row], rstd = k.stat[2 * row + 1];
    for (int64_t at = threadIdx.x * CUDA_PIECE; at < k.width; at += blockDim.x * CUDA_PIECE) {
        float dout[CUDA_PIECE], value[CUDA_PIECE], weight[CUDA_PIECE], residual[CUDA_PIECE] = {};
        if (k.dres) cuda_load(residual, k.dres + row * k.width, at, k.width, aligned);
        cuda_load(dout, k.dy + row * k.width, at, k.width, aligned);
        cuda_load(value, k.x + row * k.width, at, k.width, aligned);
        cuda_load(weight, k.w, at, k.width, aligned);
#pragma unroll
        for (int i = 0; i < CUDA_PIECE; i++)
            residual[i] += rstd * (dout[i] * weight[i] - offset - (value[i] - mean) * rstd * slope);
        cuda_store(k.dx + row * k.width, residual, at, k.width, aligned);
    }
}

/* One chunk of rows to a block. The mean of g counts for LayerNorm only: RMSNorm's mean is no function of x. */
template <class T>
__global__ void __launch_bounds__(THREADS_MAX) norm_rows_bwd(norm_bwd_args<T> k, bool keep, bool aligned)
{
    CUDA_SHARED_DYNAMIC(float, sums);
    const int64_t begin = blockIdx.x * k.chunk_rows, end = cuda_min(begin + k.chunk_rows, k.rows);
    float *const dw_part = k.dw_parts + blockIdx.x * k.width, *const dw = keep ? sums : dw_part;
    float *const db_part = k.db_parts ? k.db_parts + blockIdx.x * k.width : nullptr;
    float *const db = keep && db_part ? sums + k.width : db_part;
    float values[CUDA_PIECE] = {};
    for (int64_t at = threadIdx.x * CUDA_PIECE; at < k.width; at += blockDim.x * CUDA_PIECE) {
        cuda_store(dw, values, at, k.width, aligned);
        if (db) cuda_store(db, values, at, k.width, aligned);
    }
    for (int64_t row = begin; row < end; row++) {
        float sum_g, sum_gx;
        gradient_sums(k, dw, db, row, sum_g, sum_gx, aligned);
        block_sums(sum_g, sum_gx);
        write_gradient(k, row, db ? sum_g / (float)k.width : 0.0f, sum_gx / (float)k.width, aligned);
    }
    for (int64_t at = threadIdx.x * CUDA_PIECE; keep && at < k.width; at += blockDim.x * CUDA_PIECE) {
        cuda_load(values, dw, at, k.width, aligned);
        cuda_store(dw_part, values, at, k.width, aligned);
        if (!db) continue;
        cuda_load(values, db, at, k.width, aligned);
        cuda_store(db_part, values, at, k.width, aligned);
    }
}

template <class T>
static int launch_norm_bwd(struct device *dev, norm_bwd_args<T> args, unsigned chunks, bool aligned)
{
    const size_t bytes = (size_t)args.width * sizeof(float) * (args.db_parts ? 2 : 1);
    const bool keep = bytes <= SUMS_BYTES;
    if (keep && bytes > DEFAULT_SHARED_BYTES) TRY(cuda_allow_shared(norm_rows_bwd<T>, bytes));
    return CUDA_LAUNCH(dev, norm_rows_bwd<T>, chunks, row_threads(args.width), keep ? bytes : 0, args, keep, aligned);
}

/* Chunks of rows: enough warps to fill a GPU, but so many rows in each that partial sums are a small part of what is
 * read and written. */
static int64_t count_chunks(int64_t rows, int64_t width)
{
    const int64_t warps = 8192, rows_least = 8;
    return cuda_min(cuda_div_up(rows, rows_least), warps * CUDA_WARP / (int64_t)row_threads(width));
}

extern "C" int cuda_norm_bwd(struct device *dev, struct tensor dx, struct tensor dw, struct tensor db,
                             struct tensor dy, struct tensor dres, struct tensor x, struct tensor stat,
                             struct tensor w)
{
    const int64_t rows = x.shape[0], width = x.shape[1], outputs = tensor_given(db) ? 2 : 1;
    if (rows == 0 || width == 0) return 0;
    const int64_t room = (int64_t)(CUDA_SCRATCH_BYTES / sizeof(float)) / (outputs * width);
    if (room < 1) FAIL(ERR_BUG, "norm_bwd: %lld columns do not fit in the workspace", (long long)width);
    const int64_t chunk_rows = cuda_div_up(rows, cuda_min(room, count_chunks(rows, width)));
    const int64_t chunks = cuda_div_up(rows, chunk_rows);
    float *const dw_parts = static_cast<float *>(dev->workspace);
    float *const db_parts = tensor_given(db) ? dw_parts + chunks * width : nullptr;
    const bool aligned =
        width % CUDA_PIECE == 0 && cuda_aligned(dx.data, dy.data, dres.data, x.data, w.data, dev->workspace);
    CUDA_BY_TYPE(x.dtype, T,
                 const norm_bwd_args<T> args = {cuda_data<T>(dx), dw_parts, db_parts, cuda_data<T>(dy),
                                                cuda_data<T>(dres), cuda_data<T>(x), cuda_data<T>(w),
                                                cuda_data<float>(stat), rows, width, chunk_rows};
                 TRY(launch_norm_bwd(dev, args, (unsigned)chunks, aligned)));
    TRY(cuda_add_columns(dev, cuda_data<float>(dw), dw_parts, chunks, width));
    return db_parts ? cuda_add_columns(dev, cuda_data<float>(db), db_parts, chunks, width) : 0;
}

/* ---- sums of partial sums ---- */

#define SUM_WARPS_MAX 32

/* A block has a tile of CUDA_WARP columns; its warps take turns with the rows. */
__global__ void __launch_bounds__(SUM_WARPS_MAX *CUDA_WARP)
    add_columns(float *out, const float *parts, int64_t rows, int64_t width)
{
    CUDA_SHARED(float, sums, [SUM_WARPS_MAX][CUDA_WARP]);
    const int warp = (int)threadIdx.x / CUDA_WARP, lane = (int)threadIdx.x % CUDA_WARP;
    const int warps = (int)blockDim.x / CUDA_WARP;
    const int64_t column = (int64_t)blockIdx.x * CUDA_WARP + lane;
    float sum = 0;
#pragma unroll 8
    for (int64_t row = warp; row < (column < width ? rows : 0); row += warps)
        sum += parts[row * width + column];
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp != 0 || column >= width) return;
    for (int i = 1; i < warps; i++)
        sum += sums[i][lane];
    out[column] += sum;
}

int cuda_add_columns(struct device *dev, float *out, const float *parts, int64_t rows, int64_t width)
{
    const unsigned warps = (unsigned)cuda_min(rows, (int64_t)SUM_WARPS_MAX);
    return CUDA_LAUNCH(dev, add_columns, (unsigned)cuda_div_up(width, CUDA_WARP), warps * CUDA_WARP, 0, out, parts,
                       rows, width);
}
