/* Private to attention.cu and attention_bwd.cu: where things lie, and warps' work on tiles.
 *
 * There are two kinds of kernels. For bf16 with heads of 64 or 128 elements at 16-byte boundaries, tiles lie in shared
 * memory as bf16, are filled by asynchronous copies, and are multiplied on the tensor cores. All else goes through
 * plain kernels with tiles of floats.
 *
 * A bf16 tile has rows of D elements, in pieces of 8 (16 bytes). Piece c of row r lies at place c ^ (r mod 8) of the
 * row, so that the 8 rows that a matrix load reads lie in different banks. A warp owns 16·M rows of the block's own
 * tile; no other warp reads them. */
#ifndef TATARA_ATTENTION_CUH
#define TATARA_ATTENTION_CUH

#include "cuda.cuh"
#include "ptx.cuh"

#include <limits.h>

#define ATTENTION_WARPS 4
#define ATTENTION_THREADS (ATTENTION_WARPS * CUDA_WARP)
#define ATTENTION_HEAD_MAX 256
#define ATTENTION_LOG2E 1.44269504f
#define ATTENTION_LN2 0.69314718f

/* ---- geometry ---- */

struct attention_shape {
    int64_t sequences;
    int seq_len, heads, kv_heads, head_dim;
    int64_t width; /* of a row of qkv */
    float scale;
    const int32_t *start; /* the first position each token sees, or NULL for 0 */
};

static inline int attention_shape_of(struct attention_shape *shape, struct tensor qkv, int seq_len, int heads,
                                     int kv_heads)
{
    const int64_t head_dim = qkv.shape[1] / (heads + 2 * (int64_t)kv_heads);
    if (head_dim > ATTENTION_HEAD_MAX)
        FAIL(ERR_UNSUPPORTED, "heads of %lld elements: attention on CUDA takes up to %d", (long long)head_dim,
             ATTENTION_HEAD_MAX);
    *shape = {qkv.shape[0] / seq_len,        seq_len, heads, kv_heads, (int)head_dim, qkv.shape[1],
              1.0f / sqrtf((float)head_dim), NULL};
    return 0;
}

/* True where the kernels on tensor cores can take these heads. */
template <class... Pointers>
static inline bool attention_is_fast(const struct attention_shape *shape, enum dtype dtype, const Pointers *...data)
{
    return dtype == DT_BF16 && (shape->head_dim == 64 || shape->head_dim == 128) && cuda_aligned(data...);
}

/* Rows of one head of one sequence, `stride` elements apart. */
template <class T> struct attention_rows {
    T *data;
    int64_t stride;
};

/* Head `head` of a sequence's rows of qkv: query heads, then key heads, then value heads. */
template <class T>
__device__ inline attention_rows<T> attention_head(T *qkv, const attention_shape &shape, int64_t sequence, int head)
{
    return {qkv + sequence * shape.seq_len * shape.width + (int64_t)head * shape.head_dim, shape.width};
}

/* The same of o or dout, which have query heads only. */
template <class T>
__device__ inline attention_rows<T> attention_out(T *o, const attention_shape &shape, int64_t sequence, int head)
{
    const int64_t width = (int64_t)shape.heads * shape.head_dim;
    return {o + sequence * shape.seq_len * width + (int64_t)head * shape.head_dim, width};
}

/* What a block works on. Blocks of the same tile lie together, so that those with most to do all start early. */
struct attention_task {
    int64_t sequence;
    int head, tile;
};

__device__ inline attention_task attention_task_of(const attention_shape &shape, int heads)
{
    const int64_t each = heads * shape.sequences, within = blockIdx.x % each;
    return {within / heads, (int)(within % heads), (int)(blockIdx.x / each)};
}

/* Blocks for tiles of `rows` rows of every head. */
static inline unsigned attention_blocks(const struct attention_shape *shape, int heads, int rows)
{
    return (unsigned)(cuda_div_up(shape->seq_len, rows) * heads * shape->sequences);
}

/* The first position that token t of a sequence sees; the padding after the sequence sees all. */
__device__ inline int attention_first(const attention_shape &shape, int64_t sequence, int t)
{
    if (!shape.start || t >= shape.seq_len) return 0;
    return cuda_max(0, cuda_min(shape.start[sequence * shape.seq_len + t], t));
}

__device__ inline int attention_warp_max(int x)
{
#pragma unroll
    for (int distance = CUDA_WARP / 2; distance > 0; distance /= 2)
        x = cuda_max(x, __shfl_xor_sync(CUDA_ALL_LANES, x, distance));
    return x;
}

/* The first position that any of the tokens [begin, end) sees. Each warp finds it for itself. */
__device__ inline int attention_first_of(const attention_shape &shape, int64_t sequence, int begin, int end)
{
    if (!shape.start) return 0;
    int first = end;
    for (int t = begin + (int)threadIdx.x % CUDA_WARP; t < end; t += CUDA_WARP)
        first = cuda_min(first, attention_first(shape, sequence, t));
    return -attention_warp_max(-first);
}

/* ---- bf16 tiles ---- */

/* Where piece `piece` of row `row` begins in a tile. Pieces 2c and 2c + 1 lie at place ^ 16c from those of 0 and 1, and
 * every eighth row alike. */
template <int D> __device__ inline int attention_place(int row, int piece)
{
    return row * D + (piece ^ (row & 7)) * CUDA_PIECE;
}

/* The whole block starts copying rows [begin, begin + rows) into a tile; those from `end` on become zeros. */
template <int D, int rows>
__device__ inline void attention_copy(bf16 *tile, attention_rows<const bf16> from, int begin, int end)
{
    constexpr int pieces = D / CUDA_PIECE, step = ATTENTION_THREADS / pieces;
    static_assert(step % 8 == 0 && rows % step == 0, "each thread copies the same place of every step-th row");
    const int row = (int)threadIdx.x / pieces, piece = (int)threadIdx.x % pieces;
    const bf16 *source = from.data + (begin + row) * from.stride + piece * CUDA_PIECE;
    bf16 *const to = tile + attention_place<D>(row, piece);
#pragma unroll
    for (int i = 0; i < rows; i += step) {
        ptx_copy(to + i * D, source, begin + row + i < end);
        source += step * from.stride;
    }
}

/* out[m][n] += A·Bᵀ, where A are the warp's 16·M rows from `a` on, and B are 8·N rows; both D wide. */
template <int D, int M, int N>
__device__ inline void attention_scores(float (&out)[M][N][4], const bf16 *a, const bf16 *b)
{
    const int lane = (int)threadIdx.x % CUDA_WARP;
    const int a_place = attention_place<D>(lane % 16, lane / 16);
    const int b_place = attention_place<D>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        unsigned left[M][4];
#pragma unroll
        for (int m = 0; m < M; m++)
            ptx_load_matrices(left[m], a + (a_place ^ 2 * k * CUDA_PIECE) + 16 * m * D);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            unsigned four[4];
            ptx_load_matrices(four, b + (b_place ^ 2 * k * CUDA_PIECE) + 8 * n * D);
            const unsigned low[2] = {four[0], four[1]}, high[2] = {four[2], four[3]};
#pragma unroll
            for (int m = 0; m < M; m++) {
                ptx_mma(out[m][n], left[m], low);
                ptx_mma(out[m][n + 1], left[m], high);
            }
        }
    }
}

/* Products rounded to bf16, as the left side of the next product: the fragments fit as they are. */
template <int M, int N>
__device__ inline void attention_round(unsigned (&to)[M][N / 2][4], const float (&from)[M][N][4])
{
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++) {
            to[m][n / 2][n % 2 * 2] = cuda_pack_bf16(from[m][n][0], from[m][n][1]);
            to[m][n / 2][n % 2 * 2 + 1] = cuda_pack_bf16(from[m][n][2], from[m][n][3]);
        }
}

/* out[m][d] += P·B, where B are the 16·K rows of a tile, D wide. */
template <int D, int M, int K>
__device__ inline void attention_mix(float (&out)[M][D / 8][4], const unsigned (&p)[M][K][4], const bf16 *b)
{
    const int lane = (int)threadIdx.x % CUDA_WARP, place = attention_place<D>(lane % 16, lane / 16);
#pragma unroll
    for (int k = 0; k < K; k++)
#pragma unroll
        for (int d = 0; d < D / 8; d += 2) {
            unsigned four[4];
            ptx_load_matrices_transposed(four, b + (place ^ d * CUDA_PIECE) + 16 * k * D);
            const unsigned low[2] = {four[0], four[1]}, high[2] = {four[2], four[3]};
#pragma unroll
            for (int m = 0; m < M; m++) {
                ptx_mma(out[m][d], p[m][k], low);
                ptx_mma(out[m][d + 1], p[m][k], high);
            }
        }
}

/* Writes the warp's rows, times factors, to rows begin … end − 1 of `to`, by way of its own rows of a tile. */
template <int D, int M>
__device__ inline void attention_write(attention_rows<bf16> to, int begin, int end, bf16 *tile,
                                       const float (&out)[M][D / 8][4], const float (&factor)[M][2])
{
    constexpr int pieces = D / CUDA_PIECE;
    const int lane = (int)threadIdx.x % CUDA_WARP, g = lane / 4, t = lane % 4;
    __syncwarp();
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int d = 0; d < D / 8; d++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                *reinterpret_cast<unsigned *>(tile + attention_place<D>(16 * m + 8 * half + g, d) + 2 * t) =
                    cuda_pack_bf16(out[m][d][2 * half] * factor[m][half], out[m][d][2 * half + 1] * factor[m][half]);
    __syncwarp();
#pragma unroll
    for (int i = lane; i < 16 * M * pieces; i += CUDA_WARP) {
        const int row = i / pieces, piece = i % pieces;
        if (begin + row < end)
            *reinterpret_cast<uint4 *>(to.data + (begin + row) * to.stride + piece * CUDA_PIECE) =
                *reinterpret_cast<const uint4 *>(tile + attention_place<D>(row, piece));
    }
}

/* ---- tiles of floats: 16 rows, and 16 × 16 threads ---- */

#define ATTENTION_PLAIN 16
#define ATTENTION_PLAIN_THREADS (ATTENTION_PLAIN * ATTENTION_PLAIN)
/* Elements of a row that each thread sums. */
#define ATTENTION_PLAIN_COLUMNS (ATTENTION_HEAD_MAX / ATTENTION_PLAIN)

/* Elements between rows of a tile: odd for even heads, so that a column lies in different banks. */
__host__ __device__ inline int attention_plain_stride(int head_dim)
{
    return head_dim + 1;
}

/* Shared memory for `tiles` of them and `squares` of 16 × 17 floats. */
static inline size_t attention_plain_bytes(int head_dim, int tiles, int squares)
{
    const int row = tiles * attention_plain_stride(head_dim) + squares * (ATTENTION_PLAIN + 1);
    return (size_t)(ATTENTION_PLAIN * row) * sizeof(float);
}

/* The whole block reads rows [begin, begin + 16) into a tile, zeros from `end` on. */
template <class T>
__device__ inline void attention_plain_read(float *tile, attention_rows<const T> from, int begin, int end,
                                            int head_dim)
{
    for (int i = (int)threadIdx.x; i < ATTENTION_PLAIN * head_dim; i += ATTENTION_PLAIN_THREADS) {
        const int row = i / head_dim, column = i % head_dim;
        tile[row * attention_plain_stride(head_dim) + column] =
            begin + row < end ? cuda_to_f32(from.data[(begin + row) * from.stride + column]) : 0.0f;
    }
}

/* In four sums, each of which rounds less. */
__device__ inline float attention_plain_dot(const float *a, const float *b, int head_dim)
{
    float sums[4] = {};
    int d = 0;
    for (; d + 4 <= head_dim; d += 4)
#pragma unroll
        for (int i = 0; i < 4; i++)
            sums[i] += a[d + i] * b[d + i];
    for (; d < head_dim; d++)
        sums[0] += a[d] * b[d];
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

/* out += Σ_j p[j]·row j of the tile, in the columns of this thread: its number in the row, and every 16th from there. */
__device__ inline void attention_plain_mix(float (&out)[ATTENTION_PLAIN_COLUMNS], const float *p, const float *tile,
                                           int head_dim)
{
    const int column = (int)threadIdx.x % ATTENTION_PLAIN;
    for (int j = 0; j < ATTENTION_PLAIN; j++) {
        const float *const row = tile + j * attention_plain_stride(head_dim);
#pragma unroll
        for (int c = 0; c < ATTENTION_PLAIN_COLUMNS; c++)
            if (column + c * ATTENTION_PLAIN < head_dim) out[c] += p[j] * row[column + c * ATTENTION_PLAIN];
    }
}

/* Writes them, times the factor, to row `row` if that lies before `end`. */
template <class T>
__device__ inline void attention_plain_write(attention_rows<T> to, int row, int end,
                                             const float (&out)[ATTENTION_PLAIN_COLUMNS], float factor, int head_dim)
{
    const int column = (int)threadIdx.x % ATTENTION_PLAIN;
    if (row >= end) return;
#pragma unroll
    for (int c = 0; c < ATTENTION_PLAIN_COLUMNS; c++)
        if (column + c * ATTENTION_PLAIN < head_dim)
            to.data[row * to.stride + column + c * ATTENTION_PLAIN] = cuda_from_f32<T>(out[c] * factor);
}

#endif
