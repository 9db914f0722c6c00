/* xent: cross-entropy with z-loss and its gradient. */
#include <math.h>

#include "op_test.h"

struct xent {
    int64_t classes;
    double grad_scale, z_loss;
    bool aliased; /* dlogits over logits */
    struct op_tensor loss, z, dlogits, logits, target;
};

/* With so many columns behind the classes. */
static struct xent make_xent(struct op_test *test, enum dtype dtype, int64_t rows, int64_t classes, int64_t padding,
                             double z_loss)
{
    const int64_t width = classes + padding;
    return (struct xent){.classes = classes,
                         .grad_scale = 0.25,
                         .z_loss = z_loss,
                         .loss = op_values(test, tensor_1d(NULL, DT_F32, rows), NULL),
                         .z = op_values(test, tensor_1d(NULL, DT_F32, rows), NULL),
                         .dlogits = op_values(test, tensor_2d(NULL, dtype, rows, width), NULL),
                         .logits = op_random(test, tensor_2d(NULL, DT_F32, rows, width), -8, 8),
                         .target =
                             op_random(test, tensor_1d(NULL, DT_I32, rows), -0.5 * (double)classes, (double)classes)};
}

static int run(struct device *dev, const void *ctx)
{
    const struct xent *c = ctx;
    return op_xent(dev, c->loss.t, c->z.t, c->aliased ? c->logits.t : c->dlogits.t, c->logits.t, c->target.t,
                   c->classes, c->grad_scale, c->z_loss);
}

/* Cross-entropy, and in *z the z-loss. */
static double row_loss(const struct xent *c, int64_t row, double *z)
{
    const int64_t target = (int64_t)c->target.v[row];
    const double *x = c->logits.v + row * c->logits.t.shape[1];
    double max = x[0], sum = 0;
    *z = 0;
    if (target < 0) return 0;
    for (int64_t i = 0; i < c->classes; i++)
        max = fmax(max, x[i]);
    for (int64_t i = 0; i < c->classes; i++)
        sum += exp(x[i] - max);
    const double lse = max + log(sum);
    *z = c->z_loss * lse * lse;
    return lse - x[target];
}

static double total_loss(const void *ctx)
{
    const struct xent *c = ctx;
    double total = 0, z = 0;
    for (int64_t row = 0; row < c->logits.t.shape[0]; row++) {
        total += c->grad_scale * row_loss(c, row, &z);
        total += c->grad_scale * z;
    }
    return total;
}

static void check_xent(struct op_test *test, struct xent *c)
{
    const struct tensor outputs[] = {c->loss.t, c->z.t, c->dlogits.t};
    op_run_on_threads(test, "xent", run, c, outputs, 3);
    for (int64_t row = 0; row < c->loss.t.shape[0]; row++)
        c->loss.v[row] = row_loss(c, row, &c->z.v[row]);
    op_expect(test, "xent: loss", c->loss.t, c->loss.v, op_bound(DT_F32));
    op_expect(test, "xent: z-loss", c->z.t, c->z.v, op_bound(DT_F32));
    op_expect_gradient(test, "xent: dlogits", c->dlogits.t, NULL, c->logits.v, total_loss, c,
                       op_bound(c->dlogits.t.dtype));
    const double *losses = op_read(test, c->loss.t), *gradient = op_read(test, c->dlogits.t);
    op_ok(op_xent(test->dev, c->loss.t, TENSOR_NONE, TENSOR_NONE, c->logits.t, c->target.t, c->classes, c->grad_scale,
                  c->z_loss));
    op_expect_exact(test, "xent: loss without gradient", c->loss.t, losses);
    c->aliased = c->dlogits.t.dtype == DT_F32;
    if (!c->aliased) return;
    op_ok(run(test->dev, c));
    op_expect_exact(test, "xent: dlogits over logits", c->logits.t, gradient);
}

/* Logits far apart, and a row whose loss cannot be a number. */
static void check_extremes(struct op_test *test)
{
    const double logits[] = {1e4, -1e4, 0, 3e38, 3e38, -3e38, 0, NAN, 0, 0, INFINITY, 0};
    const double targets[] = {1, 0, 0, 0}, want[] = {2e4, 0.69314718055994531};
    struct xent c = make_xent(test, DT_F32, 4, 3, 0, 0);
    c.logits = op_values(test, c.logits.t, logits);
    c.target = op_values(test, c.target.t, targets);
    op_ok(run(test->dev, &c));
    const double *loss = op_read(test, c.loss.t), *gradient = op_read(test, c.dlogits.t);
    op_expect(test, "xent: loss of logits far apart", tensor_range(c.loss.t, 0, 2), want, op_bound(DT_F32));
    assert_true(gradient[0] == 0.25 && gradient[1] == -0.25 && gradient[2] == 0);
    assert_true(gradient[3] == -0.125 && gradient[4] == 0.125 && gradient[5] == 0);
    assert_true(isnan(loss[2]) && isnan(loss[3]));
}

void test_op_xent(struct device *dev)
{
    const int64_t shapes[][3] = {{0, 5, 0},   {1, 1, 0},    {5, 2, 0},  {7, 13, 0},
                                 {3, 520, 0}, {2, 5003, 0}, {7, 13, 3}, {3, 515, 61}};
    for (int k = 0; k < OP_ACT_TYPES; k++) {
        for (size_t s = 0; s < 2 * (sizeof shapes / sizeof shapes[0]); s++) {
            struct op_test test = op_test_begin(dev, 40 + s);
            struct xent c = make_xent(&test, op_act_types[k], shapes[s / 2][0], shapes[s / 2][1], shapes[s / 2][2],
                                      s % 2 == 0 ? 0 : 0.01);
            check_xent(&test, &c);
            op_test_end(&test);
        }
    }
    struct op_test test = op_test_begin(dev, 49);
    check_extremes(&test);
    const struct xent c = make_xent(&test, DT_BF16, 2, 3, 0, 0);
    op_refused(op_xent(dev, c.loss.t, TENSOR_NONE, c.dlogits.t, c.dlogits.t, c.target.t, 3, 1, 0),
               "xent: logits is bf16");
    op_refused(op_xent(dev, c.target.t, TENSOR_NONE, c.dlogits.t, c.logits.t, c.target.t, 3, 1, 0),
               "xent: loss is i32");
    op_refused(op_xent(dev, c.loss.t, TENSOR_NONE, c.dlogits.t, c.logits.t, c.target.t, 4, 1, 0),
               "xent: 4 classes in 3 columns");
    op_test_end(&test);
}
