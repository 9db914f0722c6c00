/* rope_table, qk_fwd and qk_bwd: head norms and rotation, each with and without the other. */
#include <math.h>
#include <string.h>

#include "op_test.h"

enum { POSITIONS = 80 };
static const double eps = 1e-6, theta = 500;

void test_op_rope_table(struct device *dev)
{
    const int64_t shapes[][2] = {{0, 3}, {1, 1}, {POSITIONS, 3}, {4099, 33}};
    for (int s = 0; s < 4; s++) {
        struct op_test test = op_test_begin(dev, 50);
        const int64_t pairs = shapes[s][1];
        struct op_tensor table = op_values(&test, tensor_3d(NULL, DT_F32, shapes[s][0], pairs, 2), NULL);
        for (int64_t i = 0; i < shapes[s][0] * pairs; i++) {
            const int64_t position = i / pairs, pair = i % pairs;
            const double angle = (double)position * pow(10000, -2.0 * (double)pair / (2.0 * (double)pairs));
            table.v[2 * i] = (double)(float)cos(angle);
            table.v[2 * i + 1] = (double)(float)sin(angle);
        }
        op_ok(op_rope_table(dev, table.t, 10000));
        op_expect(&test, "rope_table", table.t, table.v, 1e-7);
        op_refused(op_rope_table(dev, tensor_rows(table.t, 0, shapes[s][0]), 0), "theta");
        op_test_end(&test);
    }
}

struct qk {
    int heads, kv_heads;
    int64_t head;
    struct op_tensor y, rstd, qkv, qw, kw, pos, table, dqkv, dqw, dkw, dy;
};

struct qk_case {
    int64_t tokens, head;
    int heads, kv_heads;
    bool norm, rotate;
};

static struct qk make_qk(struct op_test *test, enum dtype dtype, const struct qk_case *c)
{
    const struct tensor act = tensor_2d(NULL, dtype, c->tokens, (c->heads + 2 * c->kv_heads) * c->head);
    struct qk q = {
        .heads = c->heads,
        .kv_heads = c->kv_heads,
        .head = c->head,
        .y = op_values(test, act, NULL),
        .qkv = op_random(test, act, -2, 2),
        .dqkv = op_values(test, act, NULL),
        .dy = op_random(test, act, -1, 1),
    };
    if (c->norm) {
        q.rstd = op_values(test, tensor_2d(NULL, DT_F32, c->tokens, c->heads + c->kv_heads), NULL);
        q.qw = op_random(test, tensor_1d(NULL, dtype, c->head), 0.5, 1.5);
        q.kw = op_random(test, tensor_1d(NULL, dtype, c->head), 0.5, 1.5);
        q.dqw = op_random(test, tensor_1d(NULL, DT_F32, c->head), -1, 1);
        q.dkw = op_random(test, tensor_1d(NULL, DT_F32, c->head), -1, 1);
    }
    if (c->rotate) {
        q.pos = op_random(test, tensor_1d(NULL, DT_I32, c->tokens), 0, POSITIONS);
        q.table = op_values(test, tensor_3d(NULL, DT_F32, POSITIONS, c->head / 2, 2), NULL);
        op_ok(op_rope_table(test->dev, q.table.t, theta));
        q.table.v = op_read(test, q.table.t);
    }
    return q;
}

/* One head: y = rotate(x·rstd·w), and its rstd. */
static double reference_head(const struct qk *q, const double *x, const double *w, int64_t token, double *y)
{
    const int64_t half = q->head / 2;
    double squares = 0;
    for (int64_t i = 0; i < q->head; i++)
        squares += x[i] * x[i];
    const double rstd = 1 / sqrt(squares / (double)q->head + eps);
    for (int64_t i = 0; i < q->head; i++)
        y[i] = w ? x[i] * rstd * w[i] : x[i];
    for (int64_t i = 0; q->table.v && i < half; i++) {
        const double *angle = q->table.v + ((int64_t)q->pos.v[token] * half + i) * 2;
        const double low = y[i], high = y[i + half];
        y[i] = low * angle[0] - high * angle[1];
        y[i + half] = high * angle[0] + low * angle[1];
    }
    return rstd;
}

/* All rows; rstd may be NULL. */
static void reference(const struct qk *q, double *y, double *rstd)
{
    const int rotated = q->heads + q->kv_heads, all = q->heads + 2 * q->kv_heads;
    memcpy(y, q->qkv.v, (size_t)tensor_elems(q->qkv.t) * sizeof(double));
    for (int64_t k = 0; k < q->qkv.t.shape[0] * all; k++) {
        const int64_t token = k / all, h = k % all;
        if (h >= rotated) continue;
        const double r =
            reference_head(q, q->qkv.v + k * q->head, h < q->heads ? q->qw.v : q->kw.v, token, y + k * q->head);
        if (rstd) rstd[token * rotated + h] = r;
    }
}

static double loss(const void *ctx)
{
    const struct qk *q = ctx;
    double total = 0;
    reference(q, q->y.v, NULL);
    for (int64_t i = 0; i < tensor_elems(q->y.t); i++)
        total += q->dy.v[i] * q->y.v[i];
    return total;
}

static int run_fwd(struct device *dev, const void *ctx)
{
    const struct qk *q = ctx;
    return op_qk_fwd(dev, q->y.t, q->rstd.t, q->qkv.t, q->qw.t, q->kw.t, q->pos.t, q->table.t, q->heads, q->kv_heads,
                     eps);
}

static int run_bwd(struct device *dev, const void *ctx)
{
    const struct qk *q = ctx;
    return op_qk_bwd(dev, q->dqkv.t, q->dqw.t, q->dkw.t, q->dy.t, q->rstd.t, q->qw.v ? q->qkv.t : TENSOR_NONE,
                     q->qw.t, q->kw.t, q->pos.t, q->table.t, q->heads, q->kv_heads);
}

static void check_fwd(struct op_test *test, struct qk *q)
{
    const struct tensor outputs[] = {q->y.t, q->rstd.t};
    const enum dtype dtype = q->y.t.dtype;
    op_run_on_threads(test, "qk_fwd", run_fwd, q, outputs, q->qw.v ? 2 : 1);
    reference(q, q->y.v, q->rstd.v);
    op_expect(test, "qk_fwd: y", q->y.t, q->y.v, op_bound(dtype));
    if (q->qw.v) {
        op_expect(test, "qk_fwd: rstd", q->rstd.t, q->rstd.v, op_bound(DT_F32));
        return;
    }
    struct qk over = *q; /* y may alias qkv */
    over.y = q->qkv;
    op_ok(run_fwd(test->dev, &over));
    op_expect_exact(test, "qk_fwd: y over qkv", over.y.t, op_read(test, q->y.t));
}

static void check_bwd(struct op_test *test, struct qk *q)
{
    const struct tensor outputs[] = {q->dqkv.t, q->dqw.t, q->dkw.t};
    if (q->qw.v) {
        reference(q, q->y.v, q->rstd.v);
        q->rstd = op_values(test, q->rstd.t, q->rstd.v);
    }
    op_run_on_threads(test, "qk_bwd", run_bwd, q, outputs, q->qw.v ? 3 : 1);
    op_expect_gradient(test, "qk_bwd: dqkv", q->dqkv.t, NULL, q->qkv.v, loss, q, op_bound(q->y.t.dtype));
    if (q->qw.v) {
        op_expect_gradient(test, "qk_bwd: dqw", q->dqw.t, q->dqw.v, q->qw.v, loss, q, op_bound(DT_F32));
        op_expect_gradient(test, "qk_bwd: dkw", q->dkw.t, q->dkw.v, q->kw.v, loss, q, op_bound(DT_F32));
    }
    struct qk over = *q; /* dqkv may alias dy */
    over.dqkv = q->dy;
    op_ok(run_bwd(test->dev, &over));
    op_expect_exact(test, "qk_bwd: dqkv over dy", over.dqkv.t, op_read(test, q->dqkv.t));
}

static void over_cases(struct device *dev, void (*check)(struct op_test *test, struct qk *q))
{
    const struct qk_case cases[] = {
        {0, 6, 2, 1, true, true},    {1, 2, 1, 1, false, true},  {5, 6, 3, 1, true, true},
        {5, 7, 2, 2, true, false},   {70, 6, 3, 1, false, true}, {150, 8, 2, 1, true, true},
        {2, 1030, 1, 1, true, true}, {2, 64, 4, 2, false, true}, {1100, 2, 2, 1, true, true},
    };
    for (int k = 0; k < OP_ACT_TYPES; k++) {
        for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
            struct op_test test = op_test_begin(dev, 60 + i);
            struct qk q = make_qk(&test, op_act_types[k], &cases[i]);
            check(&test, &q);
            op_test_end(&test);
        }
    }
}

void test_op_qk_fwd(struct device *dev)
{
    over_cases(dev, check_fwd);

    const struct qk_case norm_only = {3, 4, 2, 1, true, false}, rotate_only = {3, 4, 2, 1, false, true};
    struct op_test test = op_test_begin(dev, 70);
    struct qk q = make_qk(&test, DT_F32, &norm_only);
    q.heads = 3;
    op_refused(run_fwd(dev, &q), "qk_fwd: a row of 16 elements");
    q.heads = 2;
    q.y = q.qkv;
    op_refused(run_fwd(dev, &q), "qk_fwd: y aliases qkv");
    q = make_qk(&test, DT_F32, &rotate_only);
    q.pos = (struct op_tensor){0};
    op_refused(run_fwd(dev, &q), "qk_fwd: pos is absent");
    op_test_end(&test);
}

void test_op_qk_bwd(struct device *dev)
{
    over_cases(dev, check_bwd);

    const struct qk_case norm_only = {3, 4, 2, 1, true, false};
    struct op_test test = op_test_begin(dev, 71);
    struct qk q = make_qk(&test, DT_F32, &norm_only);
    q.dkw = (struct op_tensor){0};
    op_refused(run_bwd(dev, &q), "qk_bwd: dkw is absent");
    op_test_end(&test);
}
