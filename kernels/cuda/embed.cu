/* Token and position embeddings.
 *
 * Backward, rows of the same token must be added one after the other, in the order of t, and no two blocks may meet in a
 * row of the table. So the tokens are sorted with their places, CHUNK of them at a time, each chunk by one block, into
 * the workspace. Then, chunk after chunk, the block of each run of equal tokens adds their rows to the table's. The
 * additions to an element are those of a loop over t, in its order, wherever the chunks begin. */
#include "cuda.cuh"

#define THREADS 128
#define SORT_THREADS 1024
#define CHUNK 4096
/* Rows that are read at once, before they are added. */
#define BATCH 4

__device__ static inline int64_t clamp_index(int32_t index, int64_t count)
{
    return index < 0 ? 0 : index >= count ? count - 1 : index;
}

/* ---- forward ---- */

template <class T>
__global__ void __launch_bounds__(THREADS)
    embed_rows(T *y, const int32_t *tok, const int32_t *pos, const T *wte, const T *wpe, int64_t rows, int64_t width,
               int64_t tokens, int64_t positions, bool aligned)
{
    const int64_t at = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * CUDA_PIECE;
    for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
        float values[CUDA_PIECE];
        cuda_load(values, wte + clamp_index(tok[row], tokens) * width, at, width, aligned);
        if (wpe) {
            float others[CUDA_PIECE];
            cuda_load(others, wpe + clamp_index(pos[row], positions) * width, at, width, aligned);
#pragma unroll
            for (int i = 0; i < CUDA_PIECE; i++)
                values[i] += others[i];
        }
        cuda_store(y + row * width, values, at, width, aligned);
    }
}

extern "C" int cuda_embed_fwd(struct device *dev, struct tensor y, struct tensor tok, struct tensor pos,
                              struct tensor wte, struct tensor wpe)
{
    const int64_t rows = y.shape[0], width = y.shape[1];
    if (rows == 0 || width == 0) return 0;
    const bool aligned = width % CUDA_PIECE == 0 && cuda_aligned(y.data, wte.data, wpe.data);
    CUDA_BY_TYPE(y.dtype, T,
                 TRY(CUDA_LAUNCH(dev, embed_rows<T>, cuda_row_grid(rows, width, THREADS), THREADS, 0, cuda_data<T>(y),
                                 cuda_data<int32_t>(tok), cuda_data<int32_t>(pos), cuda_data<T>(wte),
                                 cuda_data<T>(wpe), rows, width, wte.shape[0], wpe.shape[0], aligned)));
    return 0;
}

/* ---- backward ---- */

/* A token and where in the chunk it stands: sorted by token, and then by place. */
typedef unsigned long long sort_key;

__device__ static inline int64_t key_token(sort_key key)
{
    return (int64_t)(key >> 32);
}

/* Sorts one chunk per block: Batcher's bitonic network (1968) over the next power of two. */
__global__ void __launch_bounds__(SORT_THREADS)
    sort_tokens(sort_key *sorted, const int32_t *tok, int64_t rows, int64_t tokens)
{
    CUDA_SHARED(sort_key, keys, [CHUNK]);
    const int64_t first = (int64_t)blockIdx.x * CHUNK;
    const unsigned count = (unsigned)cuda_min((int64_t)CHUNK, rows - first);
    unsigned padded = 2;
    while (padded < count)
        padded *= 2;
    for (unsigned i = threadIdx.x; i < padded; i += SORT_THREADS)
        keys[i] = i < count ? (sort_key)clamp_index(tok[first + i], tokens) << 32 | i : ~(sort_key)0;
    for (unsigned size = 2; size <= padded; size *= 2) {
        for (unsigned distance = size / 2; distance > 0; distance /= 2) {
            __syncthreads();
            for (unsigned i = threadIdx.x; i < padded / 2; i += SORT_THREADS) {
                const unsigned low = 2 * i - (i & (distance - 1)), high = low + distance;
                const sort_key a = keys[low], b = keys[high];
                if ((a > b) == ((low & size) == 0)) keys[low] = b, keys[high] = a;
            }
        }
    }
    __syncthreads();
    for (unsigned i = threadIdx.x; i < count; i += SORT_THREADS)
        sorted[first + i] = keys[i];
}

/* The end of the run of keys that begins at `begin`. */
__device__ static unsigned run_end(const sort_key *keys, unsigned begin, unsigned count)
{
    unsigned low = begin + 1, high = count;
    while (low < high) {
        const unsigned middle = (low + high) / 2;
        if (key_token(keys[middle]) == key_token(keys[begin]))
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* table[token] += dy of one chunk. Grid: tiles of columns × keys; the block of a run's first key does the run. */
template <class T>
__global__ void __launch_bounds__(THREADS)
    add_runs(float *table, const sort_key *keys, const T *dy, unsigned count, int64_t width, bool aligned)
{
    const unsigned begin = blockIdx.y;
    const int64_t at = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * CUDA_PIECE;
    if (begin > 0 && key_token(keys[begin - 1]) == key_token(keys[begin])) return;
    const unsigned end = run_end(keys, begin, count);
    float *const to = table + key_token(keys[begin]) * width;
    float sums[CUDA_PIECE];
    cuda_load(sums, to, at, width, aligned);
    for (unsigned run = begin; run < end; run += BATCH) {
        float rows[BATCH][CUDA_PIECE];
#pragma unroll
        for (unsigned j = 0; j < BATCH; j++)
            if (run + j < end) cuda_load(rows[j], dy + (unsigned)keys[run + j] * width, at, width, aligned);
#pragma unroll
        for (unsigned j = 0; j < BATCH; j++)
            for (int i = 0; i < CUDA_PIECE; i++)
                if (run + j < end) sums[i] += rows[j][i];
    }
    cuda_store(to, sums, at, width, aligned);
}

/* table[index[t]] += dy[t] for all t, in order. */
static int scatter_rows(struct device *dev, struct tensor table, struct tensor index, struct tensor dy)
{
    const int64_t rows = dy.shape[0], width = dy.shape[1];
    const int64_t room = (int64_t)(CUDA_SCRATCH_BYTES / sizeof(sort_key)) / CHUNK * CHUNK;
    const bool aligned = width % CUDA_PIECE == 0 && cuda_aligned(table.data, dy.data);
    sort_key *const sorted = static_cast<sort_key *>(dev->workspace);
    if (room < CHUNK) FAIL(ERR_BUG, "embed_bwd: the workspace has no room for the tokens");
    for (int64_t at = 0; at < rows; at += CHUNK) {
        if (at % room == 0) {
            const int64_t n = cuda_min(room, rows - at);
            TRY(CUDA_LAUNCH(dev, sort_tokens, (unsigned)cuda_div_up(n, CHUNK), SORT_THREADS, 0, sorted,
                            cuda_data<int32_t>(index) + at, n, table.shape[0]));
        }
        const unsigned count = (unsigned)cuda_min((int64_t)CHUNK, rows - at);
        const dim3 grid((unsigned)cuda_div_up(width, THREADS * CUDA_PIECE), count);
        CUDA_BY_TYPE(dy.dtype, T,
                     TRY(CUDA_LAUNCH(dev, add_runs<T>, grid, THREADS, 0, cuda_data<float>(table), sorted + at % room,
                                     cuda_data<T>(dy) + at * width, count, width, aligned)));
    }
    return 0;
}

extern "C" int cuda_embed_bwd(struct device *dev, struct tensor dwte, struct tensor dwpe, struct tensor dy,
                              struct tensor tok, struct tensor pos)
{
    if (dy.shape[1] == 0) return 0;
    TRY(scatter_rows(dev, dwte, tok, dy));
    return tensor_given(dwpe) ? scatter_rows(dev, dwpe, pos, dy) : 0;
}
