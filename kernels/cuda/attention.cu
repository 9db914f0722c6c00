/* Attention forward over whole sequences, as in FlashAttention-2 (Dao 2023), and over a cache, for sampling.
 *
 * A block takes one tile of queries of one head and walks over the tiles of keys that any of them sees. Scores exist for
 * one tile at a time, in registers; each row keeps its running maximum and sum, and its output so far is scaled when the
 * maximum rises. The next tile of keys and values is copied while this one is worked on. */
#include "attention.cuh"

/* ---- forward on the tensor cores ---- */

/* The rows of a thread: 16·m + 8·half + its number among the lanes of its column. Maxima are of scores in units of
 * log 2; sums are over the columns of this thread alone. */
template <int M> struct softmax_rows {
    float max[M][2], sum[M][2];
};

/* Scores that the mask hides become −∞. Element e of fragment (m, n) is row row0 + 16m + 8(e/2), key key0 + 8n + e%2. */
template <int M, int N>
__device__ inline void hide_scores(float (&s)[M][N][4], int row0, int key0, const int (&first)[M][2])
{
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int row = row0 + 16 * m + e / 2 * 8, key = key0 + 8 * n + e % 2;
                if (key > row || key < first[m][e / 2]) s[m][n][e] = -INFINITY;
            }
}

/* Turns one row's scores into probabilities relative to its new maximum; returns the factor for what was summed before. */
template <int N> __device__ inline float softmax_row(float (&s)[N][4], int half, float scale, float &max, float &sum)
{
    float top = -INFINITY, total = 0;
#pragma unroll
    for (int n = 0; n < N; n++)
        top = fmaxf(top, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
    top = fmaxf(top, __shfl_xor_sync(CUDA_ALL_LANES, top, 1));
    top = fmaxf(top, __shfl_xor_sync(CUDA_ALL_LANES, top, 2));
    const float now = fmaxf(max, top * scale),
                base = now == -INFINITY ? 0.0f : now; /* a row may have seen nothing yet */
    const float factor = ptx_exp2(max - base);
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; e++) {
            s[n][e] = ptx_exp2(s[n][e] * scale - base);
            total += s[n][e];
        }
    max = now;
    sum = sum * factor + total;
    return factor;
}

/* The same for all rows of the warp; scales the output so far, unless no maximum has risen. */
template <int D, int M, int N>
__device__ inline void softmax_tile(float (&s)[M][N][4], float (&out)[M][D / 8][4], softmax_rows<M> &rows,
                                    float scale)
{
    float factor[M][2];
    bool risen = false;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            factor[m][half] = softmax_row(s[m], half, scale, rows.max[m][half], rows.sum[m][half]);
            risen |= factor[m][half] != 1.0f;
        }
    if (!__any_sync(CUDA_ALL_LANES, risen)) return;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int d = 0; d < D / 8; d++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                out[m][d][e] *= factor[m][e / 2];
}

/* Completes the sums, writes lse, and leaves in `factor` what the outputs are to be multiplied with. */
template <int M>
__device__ inline void finish_rows(float (&factor)[M][2], float *lse, int row0, int end, const softmax_rows<M> &rows)
{
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = row0 + 16 * m + 8 * half;
            float sum = rows.sum[m][half];
            sum += __shfl_xor_sync(CUDA_ALL_LANES, sum, 1);
            sum += __shfl_xor_sync(CUDA_ALL_LANES, sum, 2);
            factor[m][half] = 1.0f / sum;
            if (threadIdx.x % 4 == 0 && row < end) lse[row] = rows.max[m][half] * ATTENTION_LN2 + logf(sum);
        }
}

template <int D, int M, int keys> constexpr size_t forward_bytes()
{
    return (size_t)(ATTENTION_WARPS * 16 * M + 2 * 2 * keys) * D * sizeof(bf16);
}

/* Tiles of 64·M queries against `keys` keys. Shared memory: the queries, and two stages of keys and values. */
template <int D, int M, int keys>
__global__ void __launch_bounds__(ATTENTION_THREADS)
    flash_fwd(bf16 *o, float *lse, const bf16 *qkv, attention_shape shape)
{
    constexpr int queries = ATTENTION_WARPS * 16 * M, stage = 2 * keys * D;
    CUDA_SHARED_DYNAMIC(bf16, q_tile);
    bf16 *const stages = q_tile + queries * D;
    const attention_task task = attention_task_of(shape, shape.heads);
    const int tiles = (shape.seq_len + queries - 1) / queries;
    const int begin = (tiles - 1 - task.tile) * queries, end = cuda_min(begin + queries, shape.seq_len);
    const int kv_head = shape.heads + task.head / (shape.heads / shape.kv_heads);
    const attention_rows<const bf16> q = attention_head(qkv, shape, task.sequence, task.head);
    const attention_rows<const bf16> k = attention_head(qkv, shape, task.sequence, kv_head);
    const attention_rows<const bf16> v = attention_head(qkv, shape, task.sequence, kv_head + shape.kv_heads);
    const int lane = (int)threadIdx.x % CUDA_WARP, warp_row = (int)threadIdx.x / CUDA_WARP * 16 * M;
    const int row0 = begin + warp_row + lane / 4; /* the first of this thread's */
    const float scale = shape.scale * ATTENTION_LOG2E;

    int first[M][2], first_last = 0; /* the last one in the warp */
    softmax_rows<M> rows;
    float out[M][D / 8][4] = {};
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            rows.max[m][half] = -INFINITY;
            rows.sum[m][half] = 0;
            first[m][half] = attention_first(shape, task.sequence, row0 + 16 * m + 8 * half);
            first_last = cuda_max(first_last, first[m][half]);
        }
    first_last = attention_warp_max(first_last);

    const int first_tile = attention_first_of(shape, task.sequence, begin, end) / keys, last_tile = (end - 1) / keys;
    attention_copy<D, queries>(q_tile, q, begin, end);
    attention_copy<D, keys>(stages, k, first_tile * keys, shape.seq_len);
    attention_copy<D, keys>(stages + keys * D, v, first_tile * keys, shape.seq_len);
    ptx_copy_commit();
    for (int tile = first_tile; tile <= last_tile; tile++) {
        const bf16 *const k_tile = stages + (tile - first_tile) % 2 * stage;
        bf16 *const next = stages + (tile + 1 - first_tile) % 2 * stage;
        ptx_copy_wait<0>();
        __syncthreads(); /* this stage is there, and nobody reads the other one any more */
        if (tile < last_tile) {
            attention_copy<D, keys>(next, k, (tile + 1) * keys, shape.seq_len);
            attention_copy<D, keys>(next + keys * D, v, (tile + 1) * keys, shape.seq_len);
            ptx_copy_commit();
        }
        float s[M][keys / 8][4] = {};
        unsigned p[M][keys / 16][4];
        attention_scores<D, M, keys / 8>(s, q_tile + warp_row * D, k_tile);
        if ((tile + 1) * keys - 1 > begin + warp_row || tile * keys < first_last)
            hide_scores(s, row0, tile * keys + lane % 4 * 2, first);
        softmax_tile<D, M, keys / 8>(s, out, rows, scale);
        attention_round<M, keys / 8>(p, s);
        attention_mix<D, M, keys / 16>(out, p, k_tile + keys * D);
    }
    float factor[M][2];
    finish_rows(factor, lse + (task.sequence * shape.heads + task.head) * shape.seq_len, row0, end, rows);
    attention_write<D, M>(attention_out(o, shape, task.sequence, task.head), begin + warp_row, end,
                          q_tile + warp_row * D, out, factor);
}

template <int D, int M, int keys>
static int launch_flash(struct device *dev, const struct attention_shape *shape, struct tensor o, struct tensor lse,
                        struct tensor qkv)
{
    const unsigned blocks = attention_blocks(shape, shape->heads, ATTENTION_WARPS * 16 * M);
    constexpr size_t bytes = forward_bytes<D, M, keys>();
    TRY(cuda_allow_shared(flash_fwd<D, M, keys>, bytes));
    return CUDA_LAUNCH(dev, (flash_fwd<D, M, keys>), blocks, ATTENTION_THREADS, bytes, cuda_data<bf16>(o),
                       cuda_data<float>(lse), cuda_data<bf16>(qkv), *shape);
}

/* ---- forward for every other type and head ---- */

/* Tiles of 16 × 16: thread (i, j) computes the score of query i and key j, and sums columns j, j + 16, … of query i. */
template <class T>
__global__ void __launch_bounds__(ATTENTION_PLAIN_THREADS)
    plain_fwd(T *o, float *lse, const T *qkv, attention_shape shape)
{
    CUDA_SHARED_DYNAMIC(float, q_tile);
    const int d = shape.head_dim, stride = attention_plain_stride(d);
    const int i = (int)threadIdx.x / ATTENTION_PLAIN, j = (int)threadIdx.x % ATTENTION_PLAIN;
    float *const k_tile = q_tile + ATTENTION_PLAIN * stride, *const v_tile = k_tile + ATTENTION_PLAIN * stride;
    float *const p = v_tile + ATTENTION_PLAIN * stride + i * (ATTENTION_PLAIN + 1);
    const attention_task task = attention_task_of(shape, shape.heads);
    const int tiles = (shape.seq_len + ATTENTION_PLAIN - 1) / ATTENTION_PLAIN;
    const int begin = (tiles - 1 - task.tile) * ATTENTION_PLAIN;
    const int end = cuda_min(begin + ATTENTION_PLAIN, shape.seq_len), row = begin + i;
    const int kv_head = shape.heads + task.head / (shape.heads / shape.kv_heads);
    const attention_rows<const T> k = attention_head(qkv, shape, task.sequence, kv_head);
    const attention_rows<const T> v = attention_head(qkv, shape, task.sequence, kv_head + shape.kv_heads);
    const int first = attention_first(shape, task.sequence, row);
    const int first_tile = attention_first_of(shape, task.sequence, begin, end) / ATTENTION_PLAIN;
    float out[ATTENTION_PLAIN_COLUMNS] = {}, max = -INFINITY, sum = 0;
    attention_plain_read<T>(q_tile, attention_head(qkv, shape, task.sequence, task.head), begin, end, d);
    for (int key0 = first_tile * ATTENTION_PLAIN; key0 < end; key0 += ATTENTION_PLAIN) {
        __syncthreads(); /* nobody reads the last tiles any more */
        attention_plain_read<T>(k_tile, k, key0, shape.seq_len, d);
        attention_plain_read<T>(v_tile, v, key0, shape.seq_len, d);
        __syncthreads();
        const bool visible = key0 + j <= row && key0 + j >= first;
        const float s = attention_plain_dot(q_tile + i * stride, k_tile + j * stride, d) * shape.scale;
        float top = visible ? s : -INFINITY;
#pragma unroll
        for (int distance = ATTENTION_PLAIN / 2; distance > 0; distance /= 2)
            top = fmaxf(top, __shfl_xor_sync(CUDA_ALL_LANES, top, distance));
        const float now = fmaxf(max, top), base = now == -INFINITY ? 0.0f : now;
        const float factor = expf(max - base), probability = visible ? expf(s - base) : 0.0f;
        p[j] = probability;
        sum = sum * factor + probability; /* over this thread's keys */
        max = now;
#pragma unroll
        for (int c = 0; c < ATTENTION_PLAIN_COLUMNS; c++)
            out[c] *= factor;
        __syncwarp(); /* a row's threads are in one warp */
        attention_plain_mix(out, p, v_tile, d);
    }
#pragma unroll
    for (int distance = ATTENTION_PLAIN / 2; distance > 0; distance /= 2)
        sum += __shfl_xor_sync(CUDA_ALL_LANES, sum, distance);
    if (j == 0 && row < end) lse[(task.sequence * shape.heads + task.head) * shape.seq_len + row] = max + logf(sum);
    attention_plain_write(attention_out(o, shape, task.sequence, task.head), row, end, out, 1.0f / sum, d);
}

template <class T>
static int launch_plain(struct device *dev, const struct attention_shape *shape, struct tensor o, struct tensor lse,
                        struct tensor qkv)
{
    const size_t bytes = attention_plain_bytes(shape->head_dim, 3, 1);
    TRY(cuda_allow_shared(plain_fwd<T>, bytes));
    return CUDA_LAUNCH(dev, plain_fwd<T>, attention_blocks(shape, shape->heads, ATTENTION_PLAIN),
                       ATTENTION_PLAIN_THREADS, bytes, cuda_data<T>(o), cuda_data<float>(lse), cuda_data<T>(qkv),
                       *shape);
}

extern "C" int cuda_attention_fwd(struct device *dev, struct tensor o, struct tensor lse, struct tensor qkv,
                                  struct tensor start, int seq_len, int heads, int kv_heads)
{
    struct attention_shape shape = {};
    TRY(attention_shape_of(&shape, qkv, seq_len, heads, kv_heads));
    shape.start = cuda_data<int32_t>(start);
    if (shape.sequences == 0 || shape.head_dim == 0) return 0;
    if (cuda_attention_taken(dev, qkv, seq_len, heads, kv_heads)) return cuda_attention_taken_fwd(dev, o, lse, qkv);
    if (attention_is_fast(&shape, qkv.dtype, qkv.data, o.data))
        return shape.head_dim == 64 ? launch_flash<64, 2, 64>(dev, &shape, o, lse, qkv)
                                    : launch_flash<128, 2, 32>(dev, &shape, o, lse, qkv);
    CUDA_BY_TYPE(qkv.dtype, T, TRY(launch_plain<T>(dev, &shape, o, lse, qkv)));
    return 0;
}

/* ---- attention to a cache ---- */

#define CACHED_THREADS 128

/* Keys and values of new tokens go to their positions. One block for each token. */
template <class T>
__global__ void store_cache(T *k_cache, T *v_cache, const T *qkv, const int32_t *pos, attention_shape shape,
                            int64_t cache_len)
{
    const int64_t token = blockIdx.x, kv_width = (int64_t)shape.kv_heads * shape.head_dim;
    const int32_t at = pos[token];
    if (at < 0 || at >= cache_len) return;
    const T *const from = qkv + token * shape.width + (int64_t)shape.heads * shape.head_dim;
    const int64_t to = (token / shape.seq_len * cache_len + at) * kv_width;
    for (int64_t i = threadIdx.x; i < kv_width; i += CACHED_THREADS) {
        k_cache[to + i] = from[i];
        v_cache[to + i] = from[kv_width + i];
    }
}

/* One block for each head of each new token. It takes as many keys at a time as it has threads: each thread computes one
 * key's score, then each sums over all of them, in their order, in columns of its own. */
template <class T>
__global__ void __launch_bounds__(CACHED_THREADS)
    attend_cache(T *o, const T *k_cache, const T *v_cache, const T *qkv, const int32_t *pos, attention_shape shape,
                 int64_t cache_len, bool aligned)
{
    CUDA_SHARED(float, q, [ATTENTION_HEAD_MAX]);
    CUDA_SHARED(float, scores, [CACHED_THREADS]);
    CUDA_SHARED(float, p, [CACHED_THREADS]);
    const int64_t token = blockIdx.x / shape.heads, kv_width = (int64_t)shape.kv_heads * shape.head_dim;
    const int head = (int)(blockIdx.x % shape.heads), thread = (int)threadIdx.x, d = shape.head_dim;
    const int64_t base = token / shape.seq_len * cache_len * kv_width + head / (shape.heads / shape.kv_heads) * d;
    const int seen = (int)cuda_min((int64_t)pos[token] + 1, cache_len);
    float out[ATTENTION_HEAD_MAX / CACHED_THREADS] = {}, max = -INFINITY, sum = 0;
    for (int i = thread; i < ATTENTION_HEAD_MAX; i += CACHED_THREADS)
        q[i] = i < d ? cuda_to_f32(qkv[token * shape.width + (int64_t)head * d + i]) * shape.scale : 0.0f;
    __syncthreads();
    for (int key0 = 0; key0 < seen; key0 += CACHED_THREADS) {
        const int keys = cuda_min(CACHED_THREADS, seen - key0);
        const T *const k = k_cache + base + (key0 + cuda_min(thread, keys - 1)) * kv_width;
        const T *const v = v_cache + base + key0 * kv_width;
        float s = 0, piece[CUDA_PIECE];
        for (int at = 0; at < d; at += CUDA_PIECE) {
            cuda_load(piece, k, at, d, aligned);
#pragma unroll
            for (int i = 0; i < CUDA_PIECE; i++)
                s += q[at + i] * piece[i];
        }
        scores[thread] = s;
        __syncthreads();
        float now = max;
        for (int j = 0; j < keys; j++)
            now = fmaxf(now, scores[j]);
        const float factor = expf(max - now);
        p[thread] = expf(s - now);
        __syncthreads(); /* and the scores have been read */
        max = now;
        sum *= factor;
        for (int j = 0; j < keys; j++)
            sum += p[j];
#pragma unroll
        for (int c = 0; c < ATTENTION_HEAD_MAX / CACHED_THREADS; c++) {
            const int column = thread + c * CACHED_THREADS;
            if (column >= d) continue;
            out[c] *= factor;
            for (int j = 0; j < keys; j++)
                out[c] += p[j] * cuda_to_f32(v[j * kv_width + column]);
        }
    }
#pragma unroll
    for (int c = 0; c < ATTENTION_HEAD_MAX / CACHED_THREADS; c++) {
        const int column = thread + c * CACHED_THREADS;
        if (column < d)
            o[(token * shape.heads + head) * d + column] = cuda_from_f32<T>(seen > 0 ? out[c] / sum : 0.0f);
    }
}

template <class T>
static int launch_cached(struct device *dev, const struct attention_shape *shape, struct tensor o,
                         struct tensor k_cache, struct tensor v_cache, struct tensor qkv, struct tensor pos)
{
    const int64_t tokens = qkv.shape[0], cache_len = k_cache.shape[1];
    const bool aligned = shape->head_dim % CUDA_PIECE == 0 && cuda_aligned(k_cache.data);
    TRY(CUDA_LAUNCH(dev, store_cache<T>, (unsigned)tokens, CACHED_THREADS, 0, cuda_data<T>(k_cache),
                    cuda_data<T>(v_cache), cuda_data<T>(qkv), cuda_data<int32_t>(pos), *shape, cache_len));
    return CUDA_LAUNCH(dev, attend_cache<T>, (unsigned)(tokens * shape->heads), CACHED_THREADS, 0, cuda_data<T>(o),
                       cuda_data<T>(k_cache), cuda_data<T>(v_cache), cuda_data<T>(qkv), cuda_data<int32_t>(pos),
                       *shape, cache_len, aligned);
}

extern "C" int cuda_attention_cached(struct device *dev, struct tensor o, struct tensor k_cache,
                                     struct tensor v_cache, struct tensor qkv, struct tensor pos, int heads,
                                     int kv_heads)
{
    struct attention_shape shape = {};
    const int64_t tokens_each = qkv.shape[0] / k_cache.shape[0];
    if (tokens_each == 0 || qkv.shape[1] == 0) return 0;
    TRY(attention_shape_of(&shape, qkv, (int)tokens_each, heads, kv_heads));
    CUDA_BY_TYPE(qkv.dtype, T, TRY(launch_cached<T>(dev, &shape, o, k_cache, v_cache, qkv, pos)));
    return 0;
}
