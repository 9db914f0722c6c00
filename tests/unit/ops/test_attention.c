/* Attention forward, backward and cached, against softmax over all keys in double. */
#include <math.h>

#include "op_test.h"

/* How many roundings of the type's size stand between the inputs and a result. bf16 tiles round the probabilities before
 * they meet v. The backward pass sums three times in a row, in either type: scores and the gradients of probabilities,
 * their product, and (rounded in bf16) that product with q, k or dout; its lse and o were rounded by the forward. */
#define FORWARD_ROUNDINGS 2
#define BACKWARD_ROUNDINGS 3

struct shape {
    int batch, seq_len, heads, kv_heads, head_dim;
    bool documents; /* mask across documents */
};

/* Odd sizes, grouped heads, more than one tile (256) of queries and keys, the heads that GPUs have kernels of their own for
 * (64, 128), and the largest. */
static const struct shape shapes[] = {
    {1, 1, 1, 1, 2, false},   {2, 3, 4, 2, 6, false},   {2, 17, 4, 1, 16, true},
    {1, 65, 3, 3, 34, true},  {1, 130, 2, 1, 64, true}, {1, 20, 1, 1, 256, true},
    {1, 270, 2, 1, 6, false}, {1, 600, 1, 1, 4, true},  {1, 135, 2, 1, 128, true},
};
#define SHAPES ((int)(sizeof shapes / sizeof shapes[0]))

/* One case: the tensors of the ops and the same in double. */
struct attention {
    struct shape shape;
    struct tensor o, lse, qkv, start, dout, dqkv, delta;
    double *qkv_v;
    const double *dout_v, *start_v;
    double *scratch; /* of the reference: o of one token and head, and scores */
};

static int64_t width(struct shape s)
{
    return (s.heads + 2 * (int64_t)s.kv_heads) * s.head_dim;
}

/* o[head_dim] of a query over keys lo … hi − 1, whose k and v rows are `stride` apart; returns the lse. */
static double attend(const double *q, const double *k, const double *v, int64_t stride, int64_t lo, int64_t hi,
                     int head_dim, double *o, double *score)
{
    double max = -INFINITY, sum = 0;
    for (int64_t j = lo; j < hi; j++) {
        score[j] = 0;
        for (int d = 0; d < head_dim; d++)
            score[j] += q[d] * k[j * stride + d];
        score[j] /= sqrt(head_dim);
        max = fmax(max, score[j]);
    }
    for (int d = 0; d < head_dim; d++)
        o[d] = 0;
    for (int64_t j = lo; j < hi; j++) {
        const double p = exp(score[j] - max);
        sum += p;
        for (int d = 0; d < head_dim; d++)
            o[d] += p * v[j * stride + d];
    }
    for (int d = 0; d < head_dim; d++)
        o[d] /= sum;
    return max + log(sum);
}

/* The reference's o and lse of one head of one token. */
static double attend_token(const struct attention *a, int64_t token, int head, double *o)
{
    const struct shape s = a->shape;
    const int64_t t = token % s.seq_len;
    const double *sequence = a->qkv_v + (token - t) * width(s);
    const double *q = sequence + t * width(s) + (int64_t)head * s.head_dim;
    const double *k = sequence + (s.heads + (int64_t)head / (s.heads / s.kv_heads)) * s.head_dim;
    const int64_t lo = a->start_v ? (int64_t)a->start_v[token] : 0;
    return attend(q, k, k + (int64_t)s.kv_heads * s.head_dim, width(s), lo, t + 1, s.head_dim, o,
                  a->scratch + s.head_dim);
}

static struct attention make(struct op_test *test, struct shape s, enum dtype dtype)
{
    const int64_t tokens = (int64_t)s.batch * s.seq_len;
    const struct tensor lse = tensor_3d(NULL, DT_F32, s.batch, s.heads, s.seq_len);
    const struct op_tensor qkv = op_random(test, tensor_2d(NULL, dtype, tokens, width(s)), -2, 2);
    const struct op_tensor dout =
        op_random(test, tensor_2d(NULL, dtype, tokens, (int64_t)s.heads * s.head_dim), -1, 1);
    struct attention a = {
        .shape = s, .qkv = qkv.t, .qkv_v = qkv.v, .dout = dout.t, .dout_v = dout.v, .start = TENSOR_NONE};
    if (s.documents) {
        double *start = op_doubles(test, tokens);
        for (int64_t i = 0; i < tokens; i++)
            start[i] = i % s.seq_len == 0              ? 0
                       : op_uniform(test, 0, 1) < 0.03 ? (double)(i % s.seq_len)
                                                       : start[i - 1];
        const struct op_tensor t = op_values(test, tensor_1d(NULL, DT_I32, tokens), start);
        a.start = t.t;
        a.start_v = t.v;
    }
    a.o = op_values(test, tensor_2d(NULL, dtype, tokens, (int64_t)s.heads * s.head_dim), NULL).t;
    a.dqkv = op_values(test, tensor_2d(NULL, dtype, tokens, width(s)), NULL).t;
    a.lse = op_values(test, lse, NULL).t;
    a.delta = op_values(test, lse, NULL).t;
    a.scratch = op_doubles(test, s.head_dim + s.seq_len);
    return a;
}

static int run_forward(struct device *dev, const void *ctx)
{
    const struct attention *a = ctx;
    return op_attention_fwd(dev, a->o, a->lse, a->qkv, a->start, a->shape.seq_len, a->shape.heads, a->shape.kv_heads);
}

static int run_backward(struct device *dev, const void *ctx)
{
    const struct attention *a = ctx;
    return op_attention_bwd(dev, a->dqkv, a->dout, a->o, a->lse, a->delta, a->qkv, a->start, a->shape.seq_len,
                            a->shape.heads, a->shape.kv_heads);
}

/* In f32 a score is a sum of head_dim products, divided by the root of head_dim: its error, and with it the relative error
 * of its exponential, grows with that root, as in test_matmul.c, beyond the heads for which op_bound holds. */
static double forward_bound(struct shape s, enum dtype dtype)
{
    return op_bound(dtype) * (dtype == DT_BF16 ? FORWARD_ROUNDINGS : sqrt(fmax(1, s.head_dim / 64.0)));
}

void test_op_attention_fwd(struct device *dev)
{
    for (int i = 0; i < SHAPES * OP_ACT_TYPES; i++) {
        const struct shape s = shapes[i / OP_ACT_TYPES];
        const enum dtype dtype = op_act_types[i % OP_ACT_TYPES];
        struct op_test test = op_test_begin(dev, (uint64_t)i + 20);
        const struct attention a = make(&test, s, dtype);
        double *o = op_doubles(&test, tensor_elems(a.o)), *lse = op_doubles(&test, tensor_elems(a.lse));
        for (int64_t token = 0; token < (int64_t)s.batch * s.seq_len; token++)
            for (int head = 0; head < s.heads; head++)
                lse[(token / s.seq_len * s.heads + head) * s.seq_len + token % s.seq_len] =
                    attend_token(&a, token, head, o + (token * s.heads + head) * s.head_dim);
        const struct tensor outputs[2] = {a.o, a.lse};
        op_run_on_threads(&test, "attention_fwd", run_forward, &a, outputs, 2);
        op_expect(&test, "attention_fwd o", a.o, o, forward_bound(s, dtype));
        op_expect(&test, "attention_fwd lse", a.lse, lse, op_bound(DT_F32));
        op_test_end(&test);
    }
}

static double loss(const void *ctx)
{
    const struct attention *a = ctx;
    const struct shape s = a->shape;
    double sum = 0;
    for (int64_t token = 0; token < (int64_t)s.batch * s.seq_len; token++)
        for (int head = 0; head < s.heads; head++) {
            attend_token(a, token, head, a->scratch);
            for (int d = 0; d < s.head_dim; d++)
                sum += a->scratch[d] * a->dout_v[(token * s.heads + head) * s.head_dim + d];
        }
    return sum;
}

void test_op_attention_bwd(struct device *dev)
{
    for (int i = 0; i < SHAPES * OP_ACT_TYPES; i++) {
        const enum dtype dtype = op_act_types[i % OP_ACT_TYPES];
        struct op_test test = op_test_begin(dev, (uint64_t)i + 50);
        const struct attention a = make(&test, shapes[i / OP_ACT_TYPES], dtype);
        op_ok(run_forward(dev, &a));
        op_run_on_threads(&test, "attention_bwd", run_backward, &a, &a.dqkv, 1);
        op_expect_gradient(&test, "attention_bwd", a.dqkv, NULL, a.qkv_v, loss, &a,
                           BACKWARD_ROUNDINGS * op_bound(dtype));
        op_test_end(&test);
    }
}

/* One call for new tokens of each of two sequences, which share a cache of S positions. */
struct cached {
    struct tensor o, k_cache, v_cache, qkv, pos;
    int heads, kv_heads;
};

static int run_cached(struct device *dev, const void *ctx)
{
    const struct cached *c = ctx;
    return op_attention_cached(dev, c->o, c->k_cache, c->v_cache, c->qkv, c->pos, c->heads, c->kv_heads);
}

/* Feeds the tokens of two sequences in calls of several sizes; the second sequence is shorter, so its rows are padding
 * at the end of the first call. */
static void check_cached(struct device *dev, enum dtype dtype, struct shape s)
{
    enum { BATCH = 2, CALLS = 3 };
    const int64_t calls[CALLS] = {s.seq_len - 4, 1, 3}, w = width(s), kv_width = (int64_t)s.kv_heads * s.head_dim;
    struct op_test test = op_test_begin(dev, (uint64_t)s.seq_len);
    double *all = op_doubles(&test, w * BATCH * s.seq_len); /* every token so far, by position */
    double *score = op_doubles(&test, s.seq_len);
    int64_t known[BATCH] = {0, 0};
    const struct tensor cache = tensor_3d(NULL, dtype, BATCH, s.seq_len, kv_width);
    struct cached c = {.heads = s.heads, .kv_heads = s.kv_heads};
    c.k_cache = op_values(&test, cache, NULL).t;
    c.v_cache = op_values(&test, cache, NULL).t;
    for (int call = 0; call < CALLS; call++) {
        const int64_t n = calls[call], missing = call == 0 ? (n > 2 ? 2 : 0) : 0;
        const struct op_tensor qkv = op_random(&test, tensor_2d(NULL, dtype, BATCH * n, w), -2, 2);
        double *pos = op_doubles(&test, BATCH * n), *o = op_doubles(&test, BATCH * n * s.heads * s.head_dim);
        for (int64_t row = 0; row < BATCH * n; row++) {
            const int64_t b = row / n;
            const bool padding = b == 1 && row % n >= n - missing;
            pos[row] = padding ? -1 : (double)known[b]++;
            for (int64_t i = 0; i < w && !padding; i++)
                all[(b * s.seq_len + (int64_t)pos[row]) * w + i] = qkv.v[row * w + i];
            const double *k = all + b * s.seq_len * w + (int64_t)s.heads * s.head_dim;
            for (int head = 0; head < s.heads && !padding; head++) {
                const double *own = k + (int64_t)head / (s.heads / s.kv_heads) * s.head_dim;
                attend(qkv.v + row * w + (int64_t)head * s.head_dim, own, own + kv_width, w, 0, (int64_t)pos[row] + 1,
                       s.head_dim, o + (row * s.heads + head) * s.head_dim, score);
            }
        }
        c.qkv = qkv.t;
        c.pos = op_values(&test, tensor_1d(NULL, DT_I32, BATCH * n), pos).t;
        c.o = op_values(&test, tensor_2d(NULL, dtype, BATCH * n, (int64_t)s.heads * s.head_dim), NULL).t;
        const struct tensor outputs[3] = {c.o, c.k_cache, c.v_cache};
        op_run_on_threads(&test, "attention_cached", run_cached, &c, outputs, 3);
        op_expect(&test, "attention_cached", c.o, o, op_bound(dtype) * (dtype == DT_BF16 ? FORWARD_ROUNDINGS : 1));
    }
    op_test_end(&test);
}

void test_op_attention_cached(struct device *dev)
{
    for (int i = 0; i < OP_ACT_TYPES; i++) {
        check_cached(dev, op_act_types[i], (struct shape){2, 5, 4, 2, 6, false});
        check_cached(dev, op_act_types[i], (struct shape){2, 40, 3, 1, 64, false});
        check_cached(dev, op_act_types[i], (struct shape){2, 300, 2, 2, 10, false});
    }
}
