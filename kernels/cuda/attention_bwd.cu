/* Attention backward, as in FlashAttention-2 (Dao 2023), without atomics.
 *
 * With P = exp(scale·q·k − lse), dP = dout·v and dS = P·(dP − delta): dv = Pᵀ·dout, dk = scale·dSᵀ·q, dq = scale·dS·k.
 * One pass makes dk and dv: a block keeps a tile of keys and values of one key head, and walks over the query heads of
 * its group and their tiles. Another makes dq: a block keeps a tile of queries of one head and walks over the tiles of
 * keys. P and dS are so computed twice, which buys a fixed order of every sum.
 *
 * Both passes are one kernel, since they differ in what is kept and what passes by: "rows" are kept (keys, or queries),
 * "columns" pass by (queries, or keys), first and second are k and v, or q and dout. Scores are held rows × columns, so
 * that P and dS are, as they leave the registers of one product, the left side of the next. */
#include "attention.cuh"

/* ---- what a block keeps, and what passes by ---- */

/* The two matrices of one side: k and v, or q and dout. */
template <class T> struct side {
    attention_rows<const T> first, second;
};

template <class T>
__device__ inline side<T> keys_side(const T *qkv, const attention_shape &shape, int64_t sequence, int kv_head)
{
    return {attention_head(qkv, shape, sequence, shape.heads + kv_head),
            attention_head(qkv, shape, sequence, shape.heads + shape.kv_heads + kv_head)};
}

template <class T>
__device__ inline side<T> queries_side(const T *qkv, const T *dout, const attention_shape &shape, int64_t sequence,
                                       int head)
{
    return {attention_head(qkv, shape, sequence, head), attention_out(dout, shape, sequence, head)};
}

/* A block's part of a pass: its own rows, and the tiles of columns that pass by, for one query head after the other. */
struct walk {
    int sequence;
    int head;        /* kept: a key head, or a query head */
    int begin, end;  /* of the rows kept, in the sequence */
    int first, last; /* columns pass by from the first on, and before the last, for each head */
    int heads;       /* that pass by */
};

/* A tile that passes by. */
struct passing {
    int head, begin;
};

/* One past the last query that sees any key before `key_end`; queries from `begin` on. Each warp finds it for itself. */
__device__ inline int last_query(const attention_shape &shape, int64_t sequence, int begin, int key_end)
{
    if (!shape.start) return shape.seq_len;
    int last = begin;
#pragma unroll 4
    for (int t = begin + (int)threadIdx.x % CUDA_WARP; t < shape.seq_len; t += CUDA_WARP)
        if (attention_first(shape, sequence, t) < key_end) last = t + 1;
    return attention_warp_max(last);
}

template <bool keys_kept> __device__ inline walk walk_of(const attention_shape &shape, int rows, int columns)
{
    const attention_task task = attention_task_of(shape, keys_kept ? shape.kv_heads : shape.heads);
    const int tiles = (shape.seq_len + rows - 1) / rows;
    /* The first keys are seen by most queries, and the last queries see most keys. */
    const int begin = (keys_kept ? task.tile : tiles - 1 - task.tile) * rows;
    const int end = cuda_min(begin + rows, shape.seq_len);
    const int from = keys_kept ? begin : attention_first_of(shape, task.sequence, begin, end);
    const int to = keys_kept ? last_query(shape, task.sequence, begin, end) : end;
    const int heads = keys_kept ? shape.heads / shape.kv_heads : 1;
    return {(int)task.sequence, task.head, begin, end, from / columns * columns, to, heads};
}

template <bool keys_kept> __device__ inline passing passing_first(const attention_shape &shape, const walk &w)
{
    const int group = shape.heads / shape.kv_heads;
    return {keys_kept ? w.head * group : w.head / group, w.first};
}

/* The next tile; false when there is none. */
__device__ inline bool passing_next(passing &at, const walk &w, int columns, int &heads_left)
{
    at.begin += columns;
    if (at.begin < w.last) return true;
    at.begin = w.first;
    at.head++;
    return --heads_left > 0;
}

/* Where the values of a head's queries lie in lse and delta. */
__device__ inline int64_t values_of(const attention_shape &shape, int64_t sequence, int head)
{
    return (sequence * shape.heads + head) * shape.seq_len;
}

/* ---- on the tensor cores ---- */

/* What is known of n queries, as it lies in memory. Those after the sequence are given zeros, and with a dout of 0 add
 * nothing: P is 1 and dS is 0. */
template <int n> struct query_values {
    float lse[n], delta[n];
    int first[n];
};

template <int D, int M, int columns, bool keys_kept> constexpr size_t flash_bytes()
{
    constexpr int rows = ATTENTION_WARPS * 16 * M;
    return (size_t)(2 * rows + 2 * 2 * columns) * D * sizeof(bf16) +
           (keys_kept ? 2 * sizeof(query_values<columns>) : sizeof(query_values<rows>));
}

/* Starts copying what is known of the queries from `begin` on. */
template <int n>
__device__ inline void copy_values(query_values<n> *to, const attention_shape &shape, int sequence, int head,
                                   int begin, const float *lse, const float *delta)
{
    static_assert(n <= ATTENTION_THREADS, "a thread for each query");
    const int i = (int)threadIdx.x, t = begin + i;
    if (i >= n) return;
    const bool valid = t < shape.seq_len;
    const int64_t at = values_of(shape, sequence, head) + t;
    ptx_copy_word(&to->lse[i], lse + at, valid);
    ptx_copy_word(&to->delta[i], delta + at, valid);
    if (shape.start) ptx_copy_word(&to->first[i], shape.start + (int64_t)sequence * shape.seq_len + t, valid);
}

/* Starts copying a tile of what passes by. */
template <int D, int columns, bool keys_kept, int n_values>
__device__ inline void copy_columns(bf16 *stage, query_values<n_values> *values, const attention_shape &shape,
                                    int sequence, passing at, const bf16 *qkv, const bf16 *dout, const float *lse,
                                    const float *delta)
{
    const side<bf16> from =
        keys_kept ? queries_side(qkv, dout, shape, sequence, at.head) : keys_side(qkv, shape, sequence, at.head);
    attention_copy<D, columns>(stage, from.first, at.begin, shape.seq_len);
    attention_copy<D, columns>(stage + columns * D, from.second, at.begin, shape.seq_len);
    if (keys_kept) copy_values(values, shape, sequence, at.head, at.begin, lse, delta);
    ptx_copy_commit();
}

/* What one thread's scores lie on: its first row and column, in the sequence and in its tile of values. */
struct patch {
    int row, column; /* in the sequence */
    int row_value, column_value;
    bool masks, documents;
};

/* Turns a tile of scores s and of dP into P, and P·(dP − delta). Queries are the rows, or the columns. */
template <int M, int N, bool keys_kept, int n_values>
__device__ inline void differentiate(float (&s)[M][N][4], float (&dp)[M][N][4], const patch &at,
                                     const query_values<n_values> *values, float scale)
{
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int down = 16 * m + e / 2 * 8, right = 8 * n + e % 2;
                const int i = keys_kept ? at.column_value + right : at.row_value + down;
                const int token = keys_kept ? at.column + right : at.row + down;
                const int key = keys_kept ? at.row + down : at.column + right;
                const bool visible = !at.masks || (key <= token && (!at.documents || key >= values->first[i]));
                const float p = visible ? ptx_exp2(s[m][n][e] * scale - values->lse[i] * ATTENTION_LOG2E) : 0.0f;
                s[m][n][e] = p;
                dp[m][n][e] = p * (dp[m][n][e] - values->delta[i]);
            }
}

template <int M> __device__ inline void fill_factors(float (&factors)[M][2], float value)
{
#pragma unroll
    for (int m = 0; m < M; m++)
        factors[m][0] = factors[m][1] = value;
}

/* One pass, with 64·M rows kept and `columns` passing by, of which `step` at a time are worked on: as many as there are
 * registers for. Shared memory: what is kept, and two stages. */
template <int D, int M, int columns, int step, bool keys_kept>
__global__ void __launch_bounds__(ATTENTION_THREADS)
    flash_bwd(bf16 *dqkv, const bf16 *dout, const float *lse, const float *delta, const bf16 *qkv,
              attention_shape shape)
{
    constexpr int rows = ATTENTION_WARPS * 16 * M, stage = 2 * columns * D, N = step / 8;
    CUDA_SHARED_DYNAMIC(bf16, first_tile);
    bf16 *const second_tile = first_tile + rows * D, *const stages = second_tile + rows * D;
    typedef query_values<keys_kept ? columns : rows> known;
    known *const values = reinterpret_cast<known *>(stages + 2 * stage); /* two of columns, or one of rows */
    const walk w = walk_of<keys_kept>(shape, rows, columns);
    const int lane = (int)threadIdx.x % CUDA_WARP, warp_row = (int)threadIdx.x / CUDA_WARP * 16 * M;
    const int row = warp_row + lane / 4; /* the first of this thread's */
    const side<bf16> kept =
        keys_kept ? keys_side(qkv, shape, w.sequence, w.head) : queries_side(qkv, dout, shape, w.sequence, w.head);
    float d_first[M][D / 8][4] = {}, d_second[M][D / 8][4] = {}; /* the latter of keys only */

    attention_copy<D, rows>(first_tile, kept.first, w.begin, w.end);
    attention_copy<D, rows>(second_tile, kept.second, w.begin, w.end);
    if (!keys_kept) copy_values(values, shape, w.sequence, w.head, w.begin, lse, delta);
    passing next = passing_first<keys_kept>(shape, w);
    int heads_left = w.heads, parity = 0;
    copy_columns<D, columns, keys_kept>(stages, values, shape, w.sequence, next, qkv, dout, lse, delta);
    for (bool more = true; more; parity ^= 1) {
        const bf16 *const first = stages + parity * stage, *const second = first + columns * D;
        const int column0 = next.begin, other = parity ^ 1;
        more = passing_next(next, w, columns, heads_left);
        ptx_copy_wait<0>();
        __syncthreads(); /* this stage is there, and nobody reads the other one any more */
        if (more)
            copy_columns<D, columns, keys_kept>(stages + other * stage, values + other, shape, w.sequence, next, qkv,
                                                dout, lse, delta);
        const bool diagonal = keys_kept ? column0 < w.end : column0 + columns > w.begin;
        patch at = {w.begin + row, column0 + lane % 4 * 2,  row,
                    lane % 4 * 2,  diagonal || shape.start, shape.start != NULL};
#pragma unroll 1
        for (int c = 0; c < columns; c += step) {
            float s[M][N][4] = {}, dp[M][N][4] = {};
            unsigned p_left[M][N / 2][4], ds_left[M][N / 2][4];
            attention_scores<D, M, N>(s, first_tile + warp_row * D, first + c * D);
            attention_scores<D, M, N>(dp, second_tile + warp_row * D, second + c * D);
            differentiate<M, N, keys_kept>(s, dp, at, values + (keys_kept ? parity : 0),
                                           shape.scale * ATTENTION_LOG2E);
            attention_round<M, N>(ds_left, dp);
            attention_mix<D, M, N / 2>(d_first, ds_left, first + c * D);
            if (keys_kept) {
                attention_round<M, N>(p_left, s);
                attention_mix<D, M, N / 2>(d_second, p_left, second + c * D);
            }
            at.column += step;
            at.column_value += step;
        }
    }
    float factors[M][2];
    const int head = keys_kept ? shape.heads + w.head : w.head;
    fill_factors<M>(factors, shape.scale);
    attention_write<D, M>(attention_head(dqkv, shape, w.sequence, head), w.begin + warp_row, w.end,
                          first_tile + warp_row * D, d_first, factors);
    if (!keys_kept) return;
    fill_factors<M>(factors, 1.0f);
    attention_write<D, M>(attention_head(dqkv, shape, w.sequence, head + shape.kv_heads), w.begin + warp_row, w.end,
                          second_tile + warp_row * D, d_second, factors);
}

/* ---- every other type and head ---- */

/* The same pass over tiles of 16 × 16: thread (i, j) computes the score of row i and column j, and sums columns j,
 * j + 16, … of the head for row i. */
template <class T, bool keys_kept>
__global__ void __launch_bounds__(ATTENTION_PLAIN_THREADS, 2)
    plain_bwd(T *dqkv, const T *dout, const float *lse, const float *delta, const T *qkv, attention_shape shape)
{
    CUDA_SHARED_DYNAMIC(float, kept_first);
    const int d = shape.head_dim, stride = attention_plain_stride(d), tile = ATTENTION_PLAIN * stride;
    const int i = (int)threadIdx.x / ATTENTION_PLAIN, j = (int)threadIdx.x % ATTENTION_PLAIN;
    float *const kept_second = kept_first + tile, *const first = kept_second + tile, *const second = first + tile;
    float *const p = second + tile + i * (ATTENTION_PLAIN + 1);
    float *const ds = p + ATTENTION_PLAIN * (ATTENTION_PLAIN + 1);
    const walk w = walk_of<keys_kept>(shape, ATTENTION_PLAIN, ATTENTION_PLAIN);
    const side<T> kept =
        keys_kept ? keys_side(qkv, shape, w.sequence, w.head) : queries_side(qkv, dout, shape, w.sequence, w.head);
    float d_first[ATTENTION_PLAIN_COLUMNS] = {}, d_second[ATTENTION_PLAIN_COLUMNS] = {};
    attention_plain_read<T>(kept_first, kept.first, w.begin, w.end, d);
    attention_plain_read<T>(kept_second, kept.second, w.begin, w.end, d);
    passing next = passing_first<keys_kept>(shape, w);
    int heads_left = w.heads;
    for (bool more = true; more;) {
        const int head = next.head, begin = next.begin;
        more = passing_next(next, w, ATTENTION_PLAIN, heads_left);
        const side<T> from =
            keys_kept ? queries_side(qkv, dout, shape, w.sequence, head) : keys_side(qkv, shape, w.sequence, head);
        const int key = keys_kept ? w.begin + i : begin + j, token = keys_kept ? begin + j : w.begin + i;
        const int64_t value = values_of(shape, w.sequence, keys_kept ? head : w.head) + token;
        __syncthreads(); /* nobody reads the last tiles any more */
        attention_plain_read<T>(first, from.first, begin, shape.seq_len, d);
        attention_plain_read<T>(second, from.second, begin, shape.seq_len, d);
        __syncthreads();
        const bool visible =
            token < shape.seq_len && key <= token && key >= attention_first(shape, w.sequence, token);
        const float s = attention_plain_dot(kept_first + i * stride, first + j * stride, d) * shape.scale;
        const float dp = attention_plain_dot(kept_second + i * stride, second + j * stride, d);
        p[j] = visible ? expf(s - lse[value]) : 0.0f;
        ds[j] = visible ? p[j] * (dp - delta[value]) : 0.0f;
        __syncwarp(); /* a row's threads are in one warp */
        attention_plain_mix(d_first, ds, first, d);
        if (keys_kept) attention_plain_mix(d_second, p, second, d);
    }
    const int head = keys_kept ? shape.heads + w.head : w.head;
    attention_plain_write(attention_head(dqkv, shape, w.sequence, head), w.begin + i, w.end, d_first, shape.scale, d);
    if (keys_kept)
        attention_plain_write(attention_head(dqkv, shape, w.sequence, head + shape.kv_heads), w.begin + i, w.end,
                              d_second, 1.0f, d);
}

/* ---- the op ---- */

#define DELTA_THREADS 256

/* delta = sums of dout·o over each head of each token; a warp for each. */
template <class T>
__global__ void __launch_bounds__(DELTA_THREADS)
    sum_delta(float *delta, const T *dout, const T *o, attention_shape shape, int64_t rows, bool aligned)
{
    const int64_t row = ((int64_t)blockIdx.x * DELTA_THREADS + threadIdx.x) / CUDA_WARP;
    const int lane = (int)threadIdx.x % CUDA_WARP;
    float a[CUDA_PIECE], b[CUDA_PIECE], sum = 0;
    if (row < rows) {
        cuda_load(a, dout + row * shape.head_dim, lane * CUDA_PIECE, shape.head_dim, aligned);
        cuda_load(b, o + row * shape.head_dim, lane * CUDA_PIECE, shape.head_dim, aligned);
#pragma unroll
        for (int i = 0; i < CUDA_PIECE; i++)
            sum += a[i] * b[i];
    }
    sum = cuda_warp_sum(sum);
    const int64_t token = row / shape.heads, sequence = token / shape.seq_len;
    if (lane == 0 && row < rows)
        delta[values_of(shape, sequence, (int)(row % shape.heads)) + token % shape.seq_len] = sum;
}

static_assert(CUDA_WARP * CUDA_PIECE >= ATTENTION_HEAD_MAX, "a warp takes a head at once");

template <class T>
static int launch_delta(struct device *dev, const struct attention_shape *shape, struct tensor delta,
                        struct tensor dout, struct tensor o)
{
    const int64_t rows = tensor_elems(delta);
    const bool aligned = shape->head_dim % CUDA_PIECE == 0 && cuda_aligned(dout.data, o.data);
    return CUDA_LAUNCH(dev, sum_delta<T>, (unsigned)cuda_div_up(rows, DELTA_THREADS / CUDA_WARP), DELTA_THREADS, 0,
                       cuda_data<float>(delta), cuda_data<T>(dout), cuda_data<T>(o), *shape, rows, aligned);
}

/* The tensors of the op. */
struct backward {
    struct tensor dqkv, dout, lse, delta, qkv;
};

template <int D, int M, int columns, int step, bool keys_kept>
static int launch_flash(struct device *dev, const struct attention_shape *shape, const struct backward *t)
{
    const unsigned blocks =
        attention_blocks(shape, keys_kept ? shape->kv_heads : shape->heads, ATTENTION_WARPS * 16 * M);
    constexpr size_t bytes = flash_bytes<D, M, columns, keys_kept>();
    TRY(cuda_allow_shared(flash_bwd<D, M, columns, step, keys_kept>, bytes));
    return CUDA_LAUNCH(dev, (flash_bwd<D, M, columns, step, keys_kept>), blocks, ATTENTION_THREADS, bytes,
                       cuda_data<bf16>(t->dqkv), cuda_data<bf16>(t->dout), cuda_data<float>(t->lse),
                       cuda_data<float>(t->delta), cuda_data<bf16>(t->qkv), *shape);
}

template <class T, bool keys_kept>
static int launch_plain(struct device *dev, const struct attention_shape *shape, const struct backward *t)
{
    const unsigned blocks = attention_blocks(shape, keys_kept ? shape->kv_heads : shape->heads, ATTENTION_PLAIN);
    const size_t bytes = attention_plain_bytes(shape->head_dim, 4, 2);
    TRY(cuda_allow_shared(plain_bwd<T, keys_kept>, bytes));
    return CUDA_LAUNCH(dev, (plain_bwd<T, keys_kept>), blocks, ATTENTION_PLAIN_THREADS, bytes, cuda_data<T>(t->dqkv),
                       cuda_data<T>(t->dout), cuda_data<float>(t->lse), cuda_data<float>(t->delta),
                       cuda_data<T>(t->qkv), *shape);
}

extern "C" int cuda_attention_bwd(struct device *dev, struct tensor dqkv, struct tensor dout, struct tensor o,
                                  struct tensor lse, struct tensor delta, struct tensor qkv, struct tensor start,
                                  int seq_len, int heads, int kv_heads)
{
    struct attention_shape shape = {};
    const struct backward t = {dqkv, dout, lse, delta, qkv};
    TRY(attention_shape_of(&shape, qkv, seq_len, heads, kv_heads));
    shape.start = cuda_data<int32_t>(start);
    if (shape.sequences == 0 || shape.head_dim == 0) return 0;
    if (cuda_attention_taken(dev, qkv, seq_len, heads, kv_heads))
        return cuda_attention_taken_bwd(dev, dqkv, dout, o, lse, delta, qkv);
    CUDA_BY_TYPE(qkv.dtype, T, TRY(launch_delta<T>(dev, &shape, delta, dout, o)));
    if (!attention_is_fast(&shape, qkv.dtype, qkv.data, dqkv.data, dout.data)) {
        CUDA_BY_TYPE(qkv.dtype, T, TRY((launch_plain<T, true>(dev, &shape, &t))));
        CUDA_BY_TYPE(qkv.dtype, T, TRY((launch_plain<T, false>(dev, &shape, &t))));
        return 0;
    }
    if (shape.head_dim == 64) {
        TRY((launch_flash<64, 2, 32, 16, true>(dev, &shape, &t)));
        return launch_flash<64, 2, 32, 32, false>(dev, &shape, &t);
    }
    TRY((launch_flash<128, 1, 32, 32, true>(dev, &shape, &t)));
    return launch_flash<128, 2, 32, 16, false>(dev, &shape, &t);
}
