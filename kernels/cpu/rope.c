/* Rotary position embedding (Su et al. 2021) and the norm of query and key heads before it.
 *
 * Parallel over tokens. The gradients of the norm's weights are sums over tokens and heads: fixed blocks of tokens sum
 * into a buffer of their own in the workspace, and the blocks are added in their order, whatever thread did them. */
#include <omp.h>

#include "cpu.h"
#include "err.h"

/* Pairs of elements per step, and tokens per block of the weights' gradients. */
#define PAIRS (CPU_BLOCK / 2)
#define TOKEN_BLOCK 64

int cpu_rope_table(struct device *dev, struct tensor table, double theta)
{
    const int64_t positions = table.shape[0], pairs = table.shape[1];
    float *out = table.data;
#pragma omp parallel for num_threads(dev->threads) schedule(static)
    for (int64_t pair = 0; pair < pairs; pair++) {
        const double frequency = pow(theta, -(double)pair / (double)pairs);
        for (int64_t s = 0; s < positions; s++) {
            const double angle = (double)s * frequency;
            out[2 * (s * pairs + pair)] = (float)cos(angle);
            out[2 * (s * pairs + pair) + 1] = (float)sin(angle);
        }
    }
    return 0;
}

/* The sizes and places that both directions share. */
struct qk {
    int64_t width, head; /* of a row, of one head */
    int rotated, heads;  /* query and key heads; all heads */
    int queries;
    const int32_t *pos;
    struct tensor table;
};

static struct qk qk_layout(struct tensor rows, struct tensor pos, struct tensor table, int heads, int kv_heads)
{
    return (struct qk){.width = rows.shape[1],
                       .head = rows.shape[1] / (heads + 2 * kv_heads),
                       .rotated = heads + kv_heads,
                       .heads = heads + 2 * kv_heads,
                       .queries = heads,
                       .pos = pos.data,
                       .table = table};
}

/* The (cos, sin) pairs of a token's position; NULL for no rotation. A position outside the table is clamped into it. */
static const float *angles_of(const struct qk *q, int64_t token)
{
    if (!tensor_given(q->table)) return NULL;
    const int64_t last = q->table.shape[0] - 1;
    const int64_t position = q->pos[token] < 0 ? 0 : cpu_min(q->pos[token], last);
    return (const float *)q->table.data + position * q->head;
}

/* Rotates n pairs in place by the angles, or back by them. */
static void rotate(float *low, float *high, const float *angles, int64_t n, float direction)
{
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        const float cosine = angles[2 * i], sine = direction * angles[2 * i + 1];
        const float a = low[i], b = high[i];
        low[i] = a * cosine - b * sine;
        high[i] = b * cosine + a * sine;
    }
}

/* x[i] ·= factor·weight[begin + i] for n elements. */
static void scale(float *x, struct tensor weight, int64_t begin, int64_t n, float factor)
{
    float weights[CPU_BLOCK];
    const float *w = cpu_view(weight, begin, n, weights);
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
        x[i] *= factor * w[i];
}

/* 1/rms of one head. */
static float head_rstd(struct tensor x, int64_t begin, int64_t head, double eps)
{
    float xs[CPU_BLOCK], squares[CPU_BLOCK];
    double total = 0;
    for (int64_t at = 0; at < head; at += CPU_BLOCK) {
        const int64_t n = cpu_min(CPU_BLOCK, head - at);
        const float *in = cpu_view(x, begin + at, n, xs);
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            squares[i] = in[i] * in[i];
        total += (double)cpu_sum(squares, n);
    }
    return (float)(1.0 / sqrt(total / (double)head + eps));
}

/* One head of the forward pass: y = rotate(x·rstd·w), where w may be none and angles NULL. An odd last element belongs
 * to the second half; only heads that are not rotated have one. */
static void head_fwd(struct tensor y, struct tensor x, int64_t begin, int64_t head, struct tensor w, float rstd,
                     const float *angles)
{
    const int64_t half = head / 2, rest = head - half;
    float low[PAIRS], high[PAIRS];
    for (int64_t at = 0; at < rest; at += PAIRS) {
        const int64_t n_high = cpu_min(PAIRS, rest - at), n_low = cpu_min(PAIRS, half - at);
        cpu_load(low, x.data, x.dtype, begin + at, n_low);
        cpu_load(high, x.data, x.dtype, begin + half + at, n_high);
        if (tensor_given(w)) {
            scale(low, w, at, n_low, rstd);
            scale(high, w, half + at, n_high, rstd);
        }
        if (angles) rotate(low, high, angles + 2 * at, n_low, 1.0f);
        cpu_store(y.data, y.dtype, begin + at, low, n_low);
        cpu_store(y.data, y.dtype, begin + half + at, high, n_high);
    }
}

/* Copies the value heads of a token. */
static void copy_values(const struct qk *q, struct tensor y, struct tensor x, int64_t token)
{
    if (y.data == x.data) return;
    const size_t element = dtype_bytes(x.dtype);
    const size_t begin = (size_t)(token * q->width + q->rotated * q->head) * element;
    const size_t bytes = (size_t)(q->heads - q->rotated) * (size_t)q->head * element;
    memcpy((char *)y.data + begin, (const char *)x.data + begin, bytes);
}

int cpu_qk_fwd(struct device *dev, struct tensor y, struct tensor rstd, struct tensor qkv, struct tensor qw,
               struct tensor kw, struct tensor pos, struct tensor table, int heads, int kv_heads, double eps)
{
    const struct qk q = qk_layout(qkv, pos, table, heads, kv_heads);
    float *rstds = rstd.data;
#pragma omp parallel for num_threads(dev->threads) schedule(static)
    for (int64_t token = 0; token < qkv.shape[0]; token++) {
        const float *angles = angles_of(&q, token);
        for (int h = 0; h < q.rotated; h++) {
            const int64_t begin = token * q.width + h * q.head;
            float factor = 1.0f;
            if (tensor_given(qw)) {
                factor = head_rstd(qkv, begin, q.head, eps);
                rstds[token * q.rotated + h] = factor;
            }
            head_fwd(y, qkv, begin, q.head, h < q.queries ? qw : kw, factor, angles);
        }
        copy_values(&q, y, qkv, token);
    }
    return 0;
}

/* One head of the backward pass without the norm: dx = rotate back(dy). dx may alias dy. */
static void head_unrotate(struct tensor dx, struct tensor dy, int64_t begin, int64_t head, const float *angles)
{
    const int64_t half = head / 2;
    float low[PAIRS], high[PAIRS];
    for (int64_t at = 0; at < half; at += PAIRS) {
        const int64_t n = cpu_min(PAIRS, half - at);
        cpu_load(low, dy.data, dy.dtype, begin + at, n);
        cpu_load(high, dy.data, dy.dtype, begin + half + at, n);
        rotate(low, high, angles + 2 * at, n, -1.0f);
        cpu_store(dx.data, dx.dtype, begin + at, low, n);
        cpu_store(dx.data, dx.dtype, begin + half + at, high, n);
    }
}

/* One head of the backward pass with the norm. d (scratch, one head) becomes dy rotated back; with x̂ = x·rstd and
 * g = d·w: dw += d·x̂ and dx = rstd·(g − x̂·mean(g·x̂)). dx may alias dy. */
static void head_norm_bwd(struct tensor dx, float *dw, float *d, struct tensor dy, struct tensor x, int64_t begin,
                          int64_t head, struct tensor w, float rstd, const float *angles)
{
    float xs[CPU_BLOCK], ws[CPU_BLOCK], dxs[CPU_BLOCK], terms[CPU_BLOCK];
    double total = 0;
    cpu_load(d, dy.data, dy.dtype, begin, head);
    if (angles) rotate(d, d + head / 2, angles, head / 2, -1.0f);
    for (int64_t at = 0; at < head; at += CPU_BLOCK) {
        const int64_t n = cpu_min(CPU_BLOCK, head - at);
        const float *value = cpu_view(x, begin + at, n, xs);
        const float *weight = cpu_view(w, at, n, ws);
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            const float along = d[at + i] * (value[i] * rstd);
            dw[at + i] += along;
            terms[i] = along * weight[i];
        }
        total += (double)cpu_sum(terms, n);
    }
    const float slope = (float)(total / (double)head);
    for (int64_t at = 0; at < head; at += CPU_BLOCK) {
        const int64_t n = cpu_min(CPU_BLOCK, head - at);
        const float *value = cpu_view(x, begin + at, n, xs);
        const float *weight = cpu_view(w, at, n, ws);
        float *din = cpu_target(dx, begin + at, dxs);
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            din[i] = rstd * (d[at + i] * weight[i] - value[i] * rstd * slope);
        cpu_commit(dx, begin + at, n, din);
    }
}

/* sum[i] += part[i]. */
static void add_to(float *sum, const float *part, int64_t n)
{
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
        sum[i] += part[i];
}

int cpu_qk_bwd(struct device *dev, struct tensor dqkv, struct tensor dqw, struct tensor dkw, struct tensor dy,
               struct tensor rstd, struct tensor qkv, struct tensor qw, struct tensor kw, struct tensor pos,
               struct tensor table, int heads, int kv_heads)
{
    const struct qk q = qk_layout(dy, pos, table, heads, kv_heads);
    const bool normed = tensor_given(qw);
    const float *rstds = rstd.data;
    const int64_t tokens = dy.shape[0];
    if (3 * (size_t)q.head * sizeof(float) > CPU_SLICE_BYTES) {
        FAIL(ERR_UNSUPPORTED, "heads of %lld elements are larger than the workspace", (long long)q.head);
    }
#pragma omp parallel for num_threads(dev->threads) ordered schedule(static, 1)
    for (int64_t begin = 0; begin < tokens; begin += TOKEN_BLOCK) {
        float *dqw_part = cpu_slice(dev, omp_get_thread_num()), *dkw_part = dqw_part + q.head, *d = dkw_part + q.head;
        if (normed) memset(dqw_part, 0, 2 * (size_t)q.head * sizeof(float));
        for (int64_t token = begin; token < cpu_min(begin + TOKEN_BLOCK, tokens); token++) {
            const float *angles = angles_of(&q, token);
            for (int h = 0; h < q.rotated; h++) {
                const int64_t at = token * q.width + h * q.head;
                const bool query = h < q.queries;
                if (normed)
                    head_norm_bwd(dqkv, query ? dqw_part : dkw_part, d, dy, qkv, at, q.head, query ? qw : kw,
                                  rstds[token * q.rotated + h], angles);
                else
                    head_unrotate(dqkv, dy, at, q.head, angles);
            }
            copy_values(&q, dqkv, dy, token);
        }
#pragma omp ordered
        if (normed) {
            add_to(dqw.data, dqw_part, q.head);
            add_to(dkw.data, dkw_part, q.head);
        }
    }
    return 0;
}
