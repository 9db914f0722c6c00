/* norm_fwd and norm_bwd: RMSNorm and LayerNorm, with and without the residual addition. */
#include <math.h>

#include "op_test.h"

static const double eps = 1e-5;

struct norm {
    bool layer, residual; /* LayerNorm, else RMSNorm; delta and sum, or dres, are given */
    struct op_tensor y, sum, stat, x, delta, w, b, dx, dw, db, dy, dres;
};

static struct norm make_norm(struct op_test *test, enum dtype dtype, int64_t rows, int64_t width, bool layer,
                             bool residual)
{
    const struct tensor act = tensor_2d(NULL, dtype, rows, width), row = tensor_1d(NULL, dtype, width);
    struct norm n = {
        .layer = layer,
        .residual = residual,
        .y = op_values(test, act, NULL),
        .stat = op_values(test, tensor_2d(NULL, DT_F32, rows, 2), NULL),
        .x = op_random(test, act, -2, 3),
        .w = op_random(test, row, 0.5, 1.5),
        .dx = op_values(test, act, NULL),
        .dw = op_random(test, tensor_1d(NULL, DT_F32, width), -1, 1),
        .dy = op_random(test, act, -1, 1),
    };
    if (layer) {
        n.b = op_random(test, row, -1, 1);
        n.db = op_random(test, tensor_1d(NULL, DT_F32, width), -1, 1);
    }
    if (residual) {
        n.delta = op_random(test, act, -1, 1);
        n.sum = op_values(test, act, NULL);
        n.dres = op_random(test, act, -1, 1);
    }
    return n;
}

/* mean (0 for RMSNorm) and 1/sqrt(mean square + eps) of one row. */
static void row_stat(const double *x, int64_t width, bool layer, double *mean, double *rstd)
{
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < width; i++)
        sum += x[i];
    *mean = layer ? sum / (double)width : 0;
    for (int64_t i = 0; i < width; i++)
        squares += (x[i] - *mean) * (x[i] - *mean);
    *rstd = 1 / sqrt(squares / (double)width + eps);
}

/* y = norm(x)·w (+ b), in double; stat (optional) gets mean and rstd of each row. */
static void reference(const struct norm *n, double *y, double *stat)
{
    const int64_t rows = n->x.t.shape[0], width = n->x.t.shape[1];
    for (int64_t row = 0; row < rows; row++) {
        double mean, rstd;
        const double *x = n->x.v + row * width;
        row_stat(x, width, n->layer, &mean, &rstd);
        for (int64_t i = 0; i < width; i++)
            y[row * width + i] = (x[i] - mean) * rstd * n->w.v[i] + (n->layer ? n->b.v[i] : 0);
        if (stat) {
            stat[2 * row] = mean;
            stat[2 * row + 1] = rstd;
        }
    }
}

/* Σ dy·norm(x) + Σ dres·x. */
static double loss(const void *ctx)
{
    const struct norm *n = ctx;
    double total = 0;
    reference(n, n->y.v, NULL);
    for (int64_t i = 0; i < tensor_elems(n->x.t); i++)
        total += n->dy.v[i] * n->y.v[i] + (n->residual ? n->dres.v[i] * n->x.v[i] : 0);
    return total;
}

static int run_fwd(struct device *dev, const void *ctx)
{
    const struct norm *n = ctx;
    return op_norm_fwd(dev, n->y.t, n->sum.t, n->stat.t, n->x.t, n->delta.t, n->w.t, n->b.t, eps);
}

static int run_bwd(struct device *dev, const void *ctx)
{
    const struct norm *n = ctx;
    return op_norm_bwd(dev, n->dx.t, n->dw.t, n->db.t, n->dy.t, n->dres.t, n->x.t, n->stat.t, n->w.t);
}

/* The last row alone gives the same bits. */
static void check_one_row(struct op_test *test, const struct norm *n)
{
    const int64_t last = n->x.t.shape[0] - 1;
    if (last < 0) return;
    const double *all = op_read(test, tensor_rows(n->y.t, last, 1));
    struct norm alone = *n;
    alone.y.t = tensor_rows(n->y.t, 0, 1);
    alone.stat.t = tensor_rows(n->stat.t, 0, 1);
    alone.x.t = tensor_rows(n->x.t, last, 1);
    if (n->residual) {
        alone.delta.t = tensor_rows(n->delta.t, last, 1);
        alone.sum.t = tensor_rows(n->sum.t, 0, 1);
    }
    op_ok(run_fwd(test->dev, &alone));
    op_expect_exact(test, "norm_fwd: one row", alone.y.t, all);
}

static void check_fwd(struct op_test *test, struct norm *n)
{
    const enum dtype dtype = n->x.t.dtype;
    const struct tensor outputs[] = {n->y.t, n->stat.t, n->sum.t};
    op_run_on_threads(test, "norm_fwd", run_fwd, n, outputs, n->residual ? 3 : 2);
    for (int64_t i = 0; n->residual && i < tensor_elems(n->x.t); i++)
        n->x.v[i] = op_round(dtype, n->x.v[i] + n->delta.v[i]);
    if (n->residual) op_expect_exact(test, "norm_fwd: sum", n->sum.t, n->x.v);
    reference(n, n->y.v, n->stat.v);
    op_expect(test, "norm_fwd: stat", n->stat.t, n->stat.v, op_bound(DT_F32));
    op_expect(test, "norm_fwd: y", n->y.t, n->y.v, op_bound(dtype));
    check_one_row(test, n);
    if (n->residual) { /* sum may alias x */
        op_ok(op_norm_fwd(test->dev, n->y.t, n->x.t, n->stat.t, n->x.t, n->delta.t, n->w.t, n->b.t, eps));
        op_expect_exact(test, "norm_fwd: sum over x", n->x.t, n->x.v);
        op_expect(test, "norm_fwd: y with sum over x", n->y.t, n->y.v, op_bound(dtype));
    }
}

static void check_bwd(struct op_test *test, struct norm *n)
{
    const enum dtype dtype = n->x.t.dtype;
    const struct tensor outputs[] = {n->dx.t, n->dw.t, n->db.t};
    reference(n, n->y.v, n->stat.v);
    n->stat = op_values(test, n->stat.t, n->stat.v);
    op_run_on_threads(test, "norm_bwd", run_bwd, n, outputs, n->layer ? 3 : 2);
    op_expect_gradient(test, "norm_bwd: dx", n->dx.t, NULL, n->x.v, loss, n, op_bound(dtype));
    op_expect_gradient(test, "norm_bwd: dw", n->dw.t, n->dw.v, n->w.v, loss, n, op_bound(DT_F32));
    if (n->layer) op_expect_gradient(test, "norm_bwd: db", n->db.t, n->db.v, n->b.v, loss, n, op_bound(DT_F32));
    if (n->residual) { /* dx may alias dres */
        op_ok(op_norm_bwd(test->dev, n->dres.t, n->dw.t, n->db.t, n->dy.t, n->dres.t, n->x.t, n->stat.t, n->w.t));
        op_expect(test, "norm_bwd: dx over dres", n->dres.t, op_read(test, n->dx.t), 0);
    }
}

static void over_shapes(struct device *dev, const int64_t shapes[][2], int count,
                        void (*check)(struct op_test *test, struct norm *n))
{
    for (int k = 0; k < OP_ACT_TYPES; k++) {
        for (int s = 0; s < 4 * count; s++) {
            struct op_test test = op_test_begin(dev, 20 + (uint64_t)s);
            struct norm n =
                make_norm(&test, op_act_types[k], shapes[s / 4][0], shapes[s / 4][1], (s & 1) != 0, (s & 2) != 0);
            check(&test, &n);
            op_test_end(&test);
        }
    }
}

void test_op_norm_fwd(struct device *dev)
{
    const int64_t shapes[][2] = {{0, 5}, {1, 1}, {3, 5}, {150, 64}, {2, 515}, {3, 1030}, {1, 24600}};
    over_shapes(dev, shapes, 7, check_fwd);

    struct op_test test = op_test_begin(dev, 21);
    const struct norm n = make_norm(&test, DT_F32, 2, 5, true, true);
    op_refused(op_norm_fwd(dev, n.y.t, TENSOR_NONE, n.stat.t, n.x.t, n.delta.t, n.w.t, n.b.t, eps), "delta and sum");
    op_refused(op_norm_fwd(dev, n.y.t, n.sum.t, n.stat.t, n.x.t, n.delta.t, n.w.t, n.stat.t, eps), "norm_fwd: b");
    op_test_end(&test);
}

void test_op_norm_bwd(struct device *dev)
{
    const int64_t shapes[][2] = {{0, 5}, {1, 5}, {3, 9}, {150, 7}, {9, 64}, {2, 67}, {2, 1030}, {1, 24600}};
    over_shapes(dev, shapes, 8, check_bwd);

    struct op_test test = op_test_begin(dev, 22);
    const struct norm n = make_norm(&test, DT_BF16, 2, 5, false, false);
    op_refused(op_norm_bwd(dev, n.dx.t, n.w.t, n.db.t, n.dy.t, n.dres.t, n.x.t, n.stat.t, n.w.t), "norm_bwd: dw");
    op_test_end(&test);
}
