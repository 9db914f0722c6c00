/* Fill, copy with conversion, and the column sums of a bias gradient, with the sums of partial rows that other families
 * end with, too. */
#include "cuda.cuh"

#define THREADS 256

/* ---- fill ---- */

/* Writes the element's bytes; `pattern` holds as many of them as 16 bytes do. */
template <class T> __global__ void fill(T *y, T value, uint4 pattern, int64_t elems, bool aligned)
{
    constexpr int piece = (int)(sizeof pattern / sizeof(T));
    const int64_t step = (int64_t)gridDim.x * THREADS * piece;
    for (int64_t at = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * piece; at < elems; at += step) {
        if (aligned && at + piece <= elems) {
            *reinterpret_cast<uint4 *>(y + at) = pattern;
            continue;
        }
        for (int i = 0; i < piece; i++)
            if (at + i < elems) y[at + i] = value;
    }
}

template <class T> static int launch_fill(struct device *dev, struct tensor y, T value)
{
    constexpr size_t piece = sizeof(uint4) / sizeof(T);
    const int64_t elems = tensor_elems(y);
    uint4 pattern;
    for (size_t i = 0; i < piece; i++)
        memcpy(reinterpret_cast<char *>(&pattern) + i * sizeof(T), &value, sizeof(T));
    return CUDA_LAUNCH(dev, fill<T>, cuda_blocks(elems, THREADS * (int64_t)piece), THREADS, 0, cuda_data<T>(y), value,
                       pattern, elems, cuda_aligned(y.data));
}

extern "C" int cuda_fill(struct device *dev, struct tensor y, double value)
{
    if (tensor_elems(y) == 0) return 0;
    switch (y.dtype) {
    case DT_F32:
        return launch_fill(dev, y, (float)value);
    case DT_BF16:
        return launch_fill(dev, y, __bfloat16_as_ushort(__float2bfloat16_rn((float)value)));
    case DT_I32:
        return launch_fill(dev, y, (int32_t)value);
    default:
        return launch_fill(dev, y, (int64_t)value);
    }
}

/* ---- copy ---- */

template <class To, class From> __global__ void convert(To *y, const From *x, int64_t elems, bool aligned)
{
    const int64_t step = (int64_t)gridDim.x * THREADS * CUDA_PIECE;
    for (int64_t at = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * CUDA_PIECE; at < elems; at += step) {
        float values[CUDA_PIECE];
        cuda_load(values, x, at, elems, aligned);
        cuda_store(y, values, at, elems, aligned);
    }
}

template <class To, class From> static int launch_convert(struct device *dev, struct tensor y, struct tensor x)
{
    const int64_t elems = tensor_elems(x);
    return CUDA_LAUNCH(dev, (convert<To, From>), cuda_blocks(elems, THREADS * CUDA_PIECE), THREADS, 0,
                       cuda_data<To>(y), cuda_data<From>(x), elems, cuda_aligned(y.data, x.data));
}

extern "C" int cuda_copy(struct device *dev, struct tensor y, struct tensor x)
{
    if (tensor_elems(x) == 0 || y.data == x.data) return 0;
    if (y.dtype == x.dtype) {
        CHECK_CUDA(
            cudaMemcpyAsync(y.data, x.data, tensor_bytes(x), cudaMemcpyDeviceToDevice, cuda_state_of(dev)->stream));
        return 0;
    }
    return y.dtype == DT_F32 ? launch_convert<float, bf16>(dev, y, x) : launch_convert<bf16, float>(dev, y, x);
}

/* ---- sums over rows ---- */

/* Columns of a block, a piece for each lane; its warps take turns with the rows. */
#define TILE (CUDA_WARP * CUDA_PIECE)
#define WARPS (THREADS / CUDA_WARP)
/* Rows of one partial sum at least, and how many of them at most: enough blocks to fill a GPU even when all columns fit
 * in one tile. */
#define CHUNK_ROWS 64
#define CHUNKS_MAX 256

static_assert(TILE == THREADS, "each thread finishes one column");

/* parts[chunk, column] = Σ of x[row, column] over the chunk's rows. Grid: tiles of columns × chunks. */
template <class T>
__global__ void __launch_bounds__(THREADS)
    sum_chunk(float *parts, const T *x, int64_t rows, int64_t width, int64_t chunk_rows, bool aligned)
{
    CUDA_SHARED(float, tile, [WARPS][TILE]);
    const int warp = (int)threadIdx.x / CUDA_WARP, lane = (int)threadIdx.x % CUDA_WARP;
    const int64_t first = (int64_t)blockIdx.x * TILE, at = first + lane * CUDA_PIECE;
    const int64_t end = cuda_min(rows, (int64_t)(blockIdx.y + 1) * chunk_rows);
    float sums[CUDA_PIECE] = {};
    for (int64_t row = (int64_t)blockIdx.y * chunk_rows + warp; row < end; row += WARPS) {
        float values[CUDA_PIECE];
        cuda_load(values, x + row * width, at, width, aligned);
#pragma unroll
        for (int i = 0; i < CUDA_PIECE; i++)
            sums[i] += values[i];
    }
#pragma unroll
    for (int i = 0; i < CUDA_PIECE; i++)
        tile[warp][lane * CUDA_PIECE + i] = sums[i];
    __syncthreads();
    const int64_t column = first + threadIdx.x;
    float sum = 0;
    for (int i = 0; i < WARPS; i++)
        sum += tile[i][threadIdx.x];
    if (column < width) parts[blockIdx.y * width + column] = sum;
}

__global__ void add_rows(float *out, const float *parts, int64_t rows, int64_t width)
{
    const int64_t column = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (column >= width) return;
    float sum = 0;
    for (int64_t row = 0; row < rows; row++)
        sum += parts[row * width + column];
    out[column] += sum;
}

int cuda_add_rows(struct device *dev, float *out, const float *parts, int64_t rows, int64_t width)
{
    return CUDA_LAUNCH(dev, add_rows, (unsigned)cuda_div_up(width, THREADS), THREADS, 0, out, parts, rows, width);
}

extern "C" int cuda_bias_bwd(struct device *dev, struct tensor db, struct tensor dy)
{
    const int64_t rows = dy.shape[0], width = dy.shape[1];
    if (rows == 0 || width == 0) return 0;
    const int64_t room = (int64_t)(CUDA_SCRATCH_BYTES / sizeof(float)) / width;
    if (room < 1) FAIL(ERR_BUG, "bias_bwd: %lld columns do not fit in the workspace", (long long)width);
    const int64_t chunks = cuda_min(cuda_min(room, (int64_t)CHUNKS_MAX), cuda_div_up(rows, CHUNK_ROWS));
    const int64_t chunk_rows = cuda_div_up(rows, chunks);
    const dim3 grid((unsigned)cuda_div_up(width, TILE), (unsigned)cuda_div_up(rows, chunk_rows));
    const bool aligned = width % CUDA_PIECE == 0 && cuda_aligned(dy.data);
    float *const parts = static_cast<float *>(dev->workspace);
    CUDA_BY_TYPE(dy.dtype, T,
                 TRY(CUDA_LAUNCH(dev, sum_chunk<T>, grid, THREADS, 0, parts, cuda_data<T>(dy), rows, width,
                                 chunk_rows, aligned)));
    return cuda_add_rows(dev, cuda_data<float>(db), parts, grid.y, width);
}
