/* SwiGLU and GELU, forward and backward. */
#include <math.h>

#include "op_test.h"

struct activation {
    int64_t parts; /* columns of x for one of y: 2 for SwiGLU (gate, then up), 1 for GELU */
    struct op_tensor y, x, dy, dx;
};

static struct activation make_activation(struct op_test *test, enum dtype dtype, int64_t rows, int64_t width,
                                         int64_t parts)
{
    return (struct activation){.parts = parts,
                               .y = op_values(test, tensor_2d(NULL, dtype, rows, width), NULL),
                               .x = op_random(test, tensor_2d(NULL, dtype, rows, parts * width), -8, 8),
                               .dy = op_random(test, tensor_2d(NULL, dtype, rows, width), -1, 1),
                               .dx = op_values(test, tensor_2d(NULL, dtype, rows, parts * width), NULL)};
}

static double silu(double x)
{
    return x / (1 + exp(-x));
}

static double gelu(double x)
{
    const double pi = 3.14159265358979323846;
    return 0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x * x * x)));
}

static void reference(const struct activation *a, double *y)
{
    const int64_t width = a->y.t.shape[1];
    for (int64_t i = 0; i < tensor_elems(a->y.t); i++) {
        const double *row = a->x.v + i / width * a->parts * width;
        const int64_t column = i % width;
        y[i] = a->parts == 2 ? silu(row[column]) * row[width + column] : gelu(row[column]);
    }
}

static double loss(const void *ctx)
{
    const struct activation *a = ctx;
    double total = 0;
    reference(a, a->y.v);
    for (int64_t i = 0; i < tensor_elems(a->y.t); i++)
        total += a->dy.v[i] * a->y.v[i];
    return total;
}

static int run_fwd(struct device *dev, const void *ctx)
{
    const struct activation *a = ctx;
    return a->parts == 2 ? op_swiglu_fwd(dev, a->y.t, a->x.t) : op_gelu_fwd(dev, a->y.t, a->x.t);
}

static int run_bwd(struct device *dev, const void *ctx)
{
    const struct activation *a = ctx;
    return a->parts == 2 ? op_swiglu_bwd(dev, a->dx.t, a->dy.t, a->x.t) : op_gelu_bwd(dev, a->dx.t, a->dy.t, a->x.t);
}

static void check_fwd(struct op_test *test, struct activation *a)
{
    op_run_on_threads(test, "activation", run_fwd, a, &a->y.t, 1);
    reference(a, a->y.v);
    op_expect(test, a->parts == 2 ? "swiglu_fwd: y" : "gelu_fwd: y", a->y.t, a->y.v, op_bound(a->y.t.dtype));
    if (a->y.t.shape[0] == 0) return;
    const int64_t last = a->y.t.shape[0] - 1, width = a->y.t.shape[1]; /* a row alone gives the same bits */
    const double *all = op_read(test, a->y.t);
    struct activation alone = *a;
    alone.y.t = tensor_rows(a->y.t, 0, 1);
    alone.x.t = tensor_rows(a->x.t, last, 1);
    op_ok(run_fwd(test->dev, &alone));
    op_expect_exact(test, "activation: one row", alone.y.t, all + last * width);
}

static void check_bwd(struct op_test *test, struct activation *a)
{
    op_run_on_threads(test, "activation", run_bwd, a, &a->dx.t, 1);
    op_expect_gradient(test, a->parts == 2 ? "swiglu_bwd: dx" : "gelu_bwd: dx", a->dx.t, NULL, a->x.v, loss, a,
                       op_bound(a->dx.t.dtype));
    const double *apart = op_read(test, a->dx.t);
    struct activation over = *a; /* dx may alias x, for GELU dy, too */
    over.dx = a->parts == 2 ? a->x : a->dy;
    op_ok(run_bwd(test->dev, &over));
    op_expect_exact(test, "activation: dx over its input", over.dx.t, apart);
}

/* Far out the results are 0, x or 1, and never NaN. */
static void check_extremes(struct op_test *test, int64_t parts)
{
    const double far[] = {-1e6, -1e4, -100, -88, 88, 100, 1e4, 1e12};
    struct activation a = make_activation(test, DT_F32, 4, 2, parts);
    for (int i = 0; i < 8; i++)
        a.x.v[parts == 1 ? i : i / 2 * 4 + i % 2] = far[i];
    a.x = op_values(test, a.x.t, a.x.v);
    op_ok(run_fwd(test->dev, &a));
    op_ok(run_bwd(test->dev, &a));
    const double *y = op_read(test, a.y.t), *dx = op_read(test, a.dx.t);
    reference(&a, a.y.v);
    for (int i = 0; i < 8; i++)
        assert_true(fabs(y[i] - a.y.v[i]) <= 1e-6 * fabs(a.y.v[i]) + 1e-28);
    for (int i = 0; i < 8 * parts; i++)
        assert_true(isfinite(dx[i]));
}

static void over_shapes(struct device *dev, int64_t parts, void (*check)(struct op_test *test, struct activation *a))
{
    const int64_t shapes[][2] = {{0, 5}, {1, 1}, {3, 5}, {33, 64}, {2, 515}, {3, 1030}};
    for (int k = 0; k < OP_ACT_TYPES; k++) {
        for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++) {
            struct op_test test = op_test_begin(dev, 30 + s);
            struct activation a = make_activation(&test, op_act_types[k], shapes[s][0], shapes[s][1], parts);
            check(&test, &a);
            op_test_end(&test);
        }
    }
    struct op_test test = op_test_begin(dev, 39);
    check_extremes(&test, parts);
    struct activation a = make_activation(&test, DT_F32, 2, 3, parts);
    a.dy.t = tensor_rows(a.dy.t, 0, 1);
    a.y.t = tensor_rows(a.y.t, 0, 1);
    op_refused(run_fwd(dev, &a), parts == 2 ? "swiglu_fwd: x" : "gelu_fwd: y");
    op_refused(run_bwd(dev, &a), parts == 2 ? "swiglu_bwd: x" : "gelu_bwd: dy");
    op_test_end(&test);
}

void test_op_swiglu_fwd(struct device *dev)
{
    over_shapes(dev, 2, check_fwd);
}

void test_op_swiglu_bwd(struct device *dev)
{
    over_shapes(dev, 2, check_bwd);
}

void test_op_gelu_fwd(struct device *dev)
{
    over_shapes(dev, 1, check_fwd);
}

void test_op_gelu_bwd(struct device *dev)
{
    over_shapes(dev, 1, check_bwd);
}
