/* Rotary position embedding (Su et al. 2021) and the norm of query and key heads before it.
 *
 * A group of lanes has one head, and goes through tokens with it; a lane has a piece of the head's first half and the one
 * that it is rotated with in the second half, or several such pairs. A block has as many heads as its threads allow: a
 * tile of the row. The gradients of the norm's weights are sums over tokens and heads: each group sums in shared memory,
 * each block over its groups into the workspace, and a last kernel over the blocks, all in fixed orders. */
#include "cuda.cuh"

#define TABLE_THREADS 256
#define THREADS_MAX 256
#define SHARED_BYTES ((size_t)48 << 10)
/* Blocks of the kernels that go through chunks of tokens: enough to fill a GPU. */
#define BLOCKS 1024

/* ---- the table ---- */

__global__ void __launch_bounds__(TABLE_THREADS)
    rope_angles(float2 *table, int64_t positions, int64_t pairs, double theta)
{
    const int64_t step = (int64_t)gridDim.x * TABLE_THREADS;
    for (int64_t i = (int64_t)blockIdx.x * TABLE_THREADS + threadIdx.x; i < positions * pairs; i += step) {
        const double angle = (double)(i / pairs) * pow(theta, -(double)(i % pairs) / (double)pairs);
        table[i] = make_float2((float)cos(angle), (float)sin(angle));
    }
}

extern "C" int cuda_rope_table(struct device *dev, struct tensor table, double theta)
{
    const int64_t positions = table.shape[0], pairs = table.shape[1];
    if (positions * pairs == 0) return 0;
    return CUDA_LAUNCH(dev, rope_angles, cuda_blocks(positions * pairs, TABLE_THREADS), TABLE_THREADS, 0,
                       cuda_data<float2>(table), positions, pairs, theta);
}

/* ---- the sizes and places that both directions share ---- */

struct qk {
    int64_t tokens, width, head; /* width of a row and of a head */
    int queries, rotated, heads; /* query heads; query and key heads; all heads */
    int lanes;                   /* of a head's group: a power of two up to a warp */
    int groups;                  /* heads of a block */
    int64_t chunk;               /* tokens of a block */
    const int32_t *pos;
    const float *table; /* null: no rotation */
    int64_t positions;
    bool aligned;
};

/* Tiles of heads × chunks of tokens. Each block has SHARED_BYTES at most for `floats` of each group. */
static dim3 qk_grid(struct qk &q, int64_t floats)
{
    const int64_t pieces = cuda_div_up(q.head - q.head / 2, CUDA_PIECE);
    q.lanes = 1;
    while (q.lanes < CUDA_WARP && q.lanes < pieces)
        q.lanes *= 2;
    const int64_t room = floats > 0 ? (int64_t)(SHARED_BYTES / sizeof(float)) / floats : THREADS_MAX;
    const int64_t most = cuda_min((int64_t)THREADS_MAX / q.lanes, room);
    const int64_t tiles = cuda_div_up(q.heads, most);
    q.groups = (int)cuda_div_up(q.heads, tiles);
    const int64_t chunks = cuda_min(q.tokens, cuda_max((int64_t)1, BLOCKS / tiles));
    q.chunk = cuda_div_up(q.tokens, chunks);
    return dim3((unsigned)tiles, (unsigned)cuda_div_up(q.tokens, q.chunk));
}

/* Whole warps for the groups; the lanes left over do nothing. */
static unsigned qk_threads(const struct qk &q)
{
    return (unsigned)cuda_div_up(q.groups * q.lanes, CUDA_WARP) * CUDA_WARP;
}

static struct qk qk_layout(struct tensor rows, struct tensor pos, struct tensor table, int heads, int kv_heads,
                           bool aligned)
{
    struct qk q;
    q.tokens = rows.shape[0];
    q.width = rows.shape[1];
    q.heads = heads + 2 * kv_heads;
    q.head = q.width / q.heads;
    q.queries = heads;
    q.rotated = heads + kv_heads;
    q.pos = cuda_data<int32_t>(pos);
    q.table = tensor_given(table) ? cuda_data<float>(table) : nullptr;
    q.positions = table.shape[0];
    q.aligned = aligned && q.head % (2 * CUDA_PIECE) == 0 && cuda_aligned(table.data);
    return q;
}

/* The head of the calling lane's group, the same for every token; q.heads or more: none. */
__device__ static inline int head_of_lane(const qk &q)
{
    const int group = (int)threadIdx.x / q.lanes;
    return group < q.groups ? (int)blockIdx.x * q.groups + group : q.heads;
}

__device__ static inline float group_sum(float x, int lanes)
{
    for (int distance = lanes / 2; distance > 0; distance /= 2)
        x += __shfl_xor_sync(CUDA_ALL_LANES, x, distance);
    return x;
}

/* A lane's two pieces of a head: [at, at + 8) of its first half and of its second half, whose odd last element belongs
 * to no pair. */
struct qk_pair {
    float low[CUDA_PIECE], high[CUDA_PIECE];
};

template <class T> __device__ static inline void load_pair(qk_pair &to, const qk &q, const T *head, int64_t at)
{
    const int64_t half = q.head / 2;
    cuda_load(to.low, head, at, half, q.aligned);
    cuda_load(to.high, head + half, at, q.head - half, q.aligned);
}

template <class T> __device__ static inline void store_pair(T *head, const qk &q, const qk_pair &from, int64_t at)
{
    const int64_t half = q.head / 2;
    cuda_store(head, from.low, at, half, q.aligned);
    cuda_store(head + half, from.high, at, q.head - half, q.aligned);
}

/* Rotates by the angles of the token's position, or back by them (direction −1). A position outside the table is clamped
 * into it. */
__device__ static inline void rotate(qk_pair &x, const qk &q, int64_t token, int64_t at, float direction)
{
    const int64_t half = q.head / 2;
    const int64_t position = cuda_max((int64_t)0, cuda_min((int64_t)q.pos[token], q.positions - 1));
#pragma unroll
    for (int part = 0; part < 2; part++) {
        float angles[CUDA_PIECE]; /* (cos, sin) of four pairs */
        cuda_load(angles, q.table + position * 2 * half, 2 * at + part * CUDA_PIECE, 2 * half, q.aligned);
#pragma unroll
        for (int i = 0; i < CUDA_PIECE / 2; i++) {
            const int pair = part * (CUDA_PIECE / 2) + i;
            const float cosine = angles[2 * i], sine = direction * angles[2 * i + 1];
            const float a = x.low[pair], b = x.high[pair];
            x.low[pair] = a * cosine - b * sine;
            x.high[pair] = b * cosine + a * sine;
        }
    }
}

/* ---- forward, and backward without the norm ---- */

/* The lane's part of Σ x² of a head. */
template <class T> __device__ static float head_squares(const qk &q, const T *head)
{
    float total = 0;
    for (int64_t at = threadIdx.x % q.lanes * CUDA_PIECE; at < q.head - q.head / 2; at += q.lanes * CUDA_PIECE) {
        qk_pair x;
        load_pair(x, q, head, at);
#pragma unroll
        for (int i = 0; i < CUDA_PIECE; i++)
            total += x.low[i] * x.low[i] + x.high[i] * x.high[i];
    }
    return total;
}

/* One head of one token: y = rotate(x·factor·w), without w when it is null, and without the rotation when not turned. */
template <class T>
__device__ static void write_head(const qk &q, T *y, const T *x, const T *w, float factor, int64_t token, bool turned,
                                  float direction)
{
    for (int64_t at = threadIdx.x % q.lanes * CUDA_PIECE; at < q.head - q.head / 2; at += q.lanes * CUDA_PIECE) {
        qk_pair values;
        load_pair(values, q, x, at);
        if (w) {
            qk_pair weight;
            load_pair(weight, q, w, at);
#pragma unroll
            for (int i = 0; i < CUDA_PIECE; i++) {
                values.low[i] *= factor * weight.low[i];
                values.high[i] *= factor * weight.high[i];
            }
        }
        if (turned) rotate(values, q, token, at, direction);
        store_pair(y, q, values, at);
    }
}

/* All heads, without what is not given; value heads are copied. y may alias x when rstd is not given. */
template <class T>
__global__ void __launch_bounds__(THREADS_MAX, 3)
    qk_rotate(qk q, T *y, float *rstd, const T *x, const T *qw, const T *kw, float eps, float direction)
{
    const int h = head_of_lane(q);
    const bool value = h >= q.rotated;
    const T *const w = value ? nullptr : h < q.queries ? qw : kw;
    const int64_t end = cuda_min((blockIdx.y + 1) * q.chunk, q.tokens);
    if (!rstd && (h >= q.heads || (value && y == x))) return; /* with rstd all lanes are needed for the sums */
    for (int64_t token = blockIdx.y * q.chunk; token < end; token++) {
        const int64_t begin = token * q.width + h * q.head;
        float factor = 1.0f;
        if (rstd) {
            const float squares = group_sum(w ? head_squares(q, x + begin) : 0.0f, q.lanes);
            factor = 1.0f / sqrtf(squares / (float)q.head + eps);
            if (w && threadIdx.x % q.lanes == 0) rstd[token * q.rotated + h] = factor;
        }
        if (h < q.heads) write_head(q, y + begin, x + begin, w, factor, token, q.table && !value, direction);
    }
}

extern "C" int cuda_qk_fwd(struct device *dev, struct tensor y, struct tensor rstd, struct tensor qkv,
                           struct tensor qw, struct tensor kw, struct tensor pos, struct tensor table, int heads,
                           int kv_heads, double eps)
{
    if (tensor_elems(qkv) == 0) return 0;
    struct qk q = qk_layout(qkv, pos, table, heads, kv_heads, cuda_aligned(y.data, qkv.data, qw.data, kw.data));
    const dim3 grid = qk_grid(q, 0);
    CUDA_BY_TYPE(
        qkv.dtype, T,
        TRY(CUDA_LAUNCH(dev, qk_rotate<T>, grid, qk_threads(q), 0, q, cuda_data<T>(y), cuda_data<float>(rstd),
                        cuda_data<T>(qkv), cuda_data<T>(qw), cuda_data<T>(kw), (float)eps, 1.0f)));
    return 0;
}

/* ---- backward with the norm ---- */

template <class T> struct qk_bwd_args {
    T *dx;
    float *parts; /* [query or key][block][head] */
    const T *dy, *x, *qw, *kw;
    const float *rstd;
};

/* dy of a lane's pair, rotated back. */
template <class T>
__device__ static inline void load_unrotated(qk_pair &d, const qk &q, const T *head, int64_t token, int64_t at)
{
    load_pair(d, q, head, at);
    if (q.table) rotate(d, q, token, at, -1.0f);
}

/* One head of one token, with d = dy rotated back, x̂ = x·rstd and g = d·w: dw += d·x̂ and dx = rstd·(g − x̂·mean(g·x̂)).
 * All lanes come here together, those without a head with active false. dx may alias dy. */
template <class T>
__device__ static void head_bwd(const qk &q, const qk_bwd_args<T> &k, float *dw, const T *w, int64_t token,
                                int64_t begin, float rstd, bool active)
{
    const int64_t first = threadIdx.x % q.lanes * CUDA_PIECE, step = q.lanes * CUDA_PIECE;
    const int64_t end = active ? q.head - q.head / 2 : 0;
    float total = 0;
    for (int64_t at = first; at < end; at += step) {
        qk_pair d, x, other;
        load_unrotated(d, q, k.dy + begin, token, at);
        load_pair(x, q, k.x + begin, at);
        load_pair(other, q, w, at);
#pragma unroll
        for (int i = 0; i < CUDA_PIECE; i++) {
            d.low[i] *= x.low[i] * rstd;
            d.high[i] *= x.high[i] * rstd;
            total += d.low[i] * other.low[i] + d.high[i] * other.high[i];
        }
        load_pair(other, q, dw, at);
#pragma unroll
        for (int i = 0; i < CUDA_PIECE; i++) {
            other.low[i] += d.low[i];
            other.high[i] += d.high[i];
        }
        store_pair(dw, q, other, at);
    }
    const float slope = group_sum(total, q.lanes) / (float)q.head;
    for (int64_t at = first; at < end; at += step) {
        qk_pair d, x, weight;
        load_unrotated(d, q, k.dy + begin, token, at);
        load_pair(x, q, k.x + begin, at);
        load_pair(weight, q, w, at);
#pragma unroll
        for (int i = 0; i < CUDA_PIECE; i++) {
            d.low[i] = rstd * (d.low[i] * weight.low[i] - x.low[i] * rstd * slope);
            d.high[i] = rstd * (d.high[i] * weight.high[i] - x.high[i] * rstd * slope);
        }
        store_pair(k.dx + begin, q, d, at);
    }
}

/* The groups' sums into the block's row of the parts for queries and of those for keys. */
__device__ static void store_parts(float *parts, const qk &q, const float *sums)
{
    const int64_t blocks = (int64_t)gridDim.x * gridDim.y, block = (int64_t)blockIdx.y * gridDim.x + blockIdx.x;
    for (int64_t i = threadIdx.x; i < 2 * q.head; i += blockDim.x) {
        const int64_t column = i % q.head;
        const bool keys = i >= q.head;
        float total = 0;
        for (int group = 0; group < q.groups; group++) {
            const int h = (int)blockIdx.x * q.groups + group;
            if (h < q.rotated && (h >= q.queries) == keys) total += sums[group * q.head + column];
        }
        parts[((keys ? blocks : 0) + block) * q.head + column] = total;
    }
}

/* A block has q.head floats for each group. */
template <class T> __global__ void __launch_bounds__(THREADS_MAX, 2) qk_norm_bwd(qk q, qk_bwd_args<T> k)
{
    CUDA_SHARED_DYNAMIC(float, sums);
    const int h = head_of_lane(q);
    const bool normed = h < q.rotated;
    const int64_t end = cuda_min((blockIdx.y + 1) * q.chunk, q.tokens);
    float *const dw = sums + (normed ? (int)threadIdx.x / q.lanes : 0) * q.head;
    for (int64_t i = threadIdx.x; i < q.groups * q.head; i += blockDim.x)
        sums[i] = 0;
    __syncthreads();
    for (int64_t token = blockIdx.y * q.chunk; token < end; token++) {
        const int64_t begin = token * q.width + h * q.head;
        const float rstd = normed ? k.rstd[token * q.rotated + h] : 0.0f;
        head_bwd(q, k, dw, h < q.queries ? k.qw : k.kw, token, begin, rstd, normed);
        if (!normed && h < q.heads && k.dx != k.dy)
            write_head<T>(q, k.dx + begin, k.dy + begin, nullptr, 1.0f, token, false, 1.0f);
    }
    __syncthreads();
    store_parts(k.parts, q, sums);
}

extern "C" int cuda_qk_bwd(struct device *dev, struct tensor dqkv, struct tensor dqw, struct tensor dkw,
                           struct tensor dy, struct tensor rstd, struct tensor qkv, struct tensor qw,
                           struct tensor kw, struct tensor pos, struct tensor table, int heads, int kv_heads)
{
    if (tensor_elems(dy) == 0) return 0;
    const bool normed = tensor_given(qw);
    struct qk q = qk_layout(dy, pos, table, heads, kv_heads,
                            cuda_aligned(dqkv.data, dy.data, normed ? qkv.data : nullptr, qw.data, kw.data));
    if (normed && (size_t)q.head * sizeof(float) > SHARED_BYTES)
        FAIL(ERR_UNSUPPORTED, "heads of %lld elements are larger than a GPU's shared memory", (long long)q.head);
    const dim3 grid = qk_grid(q, normed ? q.head : 0);
    const int64_t blocks = (int64_t)grid.x * grid.y;
    float *const parts = static_cast<float *>(dev->workspace);
    if (!normed) {
        CUDA_BY_TYPE(dy.dtype, T,
                     TRY(CUDA_LAUNCH(dev, qk_rotate<T>, grid, qk_threads(q), 0, q, cuda_data<T>(dqkv), nullptr,
                                     cuda_data<T>(dy), nullptr, nullptr, 0.0f, -1.0f)));
        return 0;
    }
    if (CUDA_SCRATCH_BYTES < (size_t)(2 * blocks * q.head) * sizeof(float))
        FAIL(ERR_BUG, "qk_bwd: the workspace is too small for heads of %lld elements", (long long)q.head);
    CUDA_BY_TYPE(dy.dtype, T,
                 const qk_bwd_args<T> args = {cuda_data<T>(dqkv), parts, cuda_data<T>(dy), cuda_data<T>(qkv),
                                              cuda_data<T>(qw), cuda_data<T>(kw), cuda_data<float>(rstd)};
                 TRY(CUDA_LAUNCH(dev, qk_norm_bwd<T>, grid, qk_threads(q),
                                 (size_t)(q.groups * q.head) * sizeof(float), q, args)));
    TRY(cuda_add_columns(dev, cuda_data<float>(dqw), parts, blocks, q.head));
    return cuda_add_columns(dev, cuda_data<float>(dkw), parts + blocks * q.head, blocks, q.head);
}
