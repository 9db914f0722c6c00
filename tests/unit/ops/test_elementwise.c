/* fill, copy and bias_bwd. */
#include <math.h>

#include "op_test.h"

static const int64_t sizes[] = {0, 1, 5, 40003};
enum { SIZES = sizeof sizes / sizeof sizes[0] };

void test_op_fill(struct device *dev)
{
    for (int d = 0; d < DT_COUNT; d++) {
        for (int s = 0; s < SIZES; s++) {
            struct op_test test = op_test_begin(dev, 1);
            struct op_tensor y = op_random(&test, tensor_1d(NULL, (enum dtype)d, sizes[s]), 10, 20);
            double *want = op_doubles(&test, sizes[s]);
            for (int64_t i = 0; i < sizes[s]; i++)
                want[i] = d == DT_I32 || d == DT_I64 ? -3 : op_round((enum dtype)d, -3.7);
            op_ok(op_fill(dev, y.t, -3.7));
            op_expect_exact(&test, "fill", y.t, want);
            op_ok(op_fill(dev, y.t, 0));
            op_expect_exact(&test, "fill", y.t, op_doubles(&test, sizes[s]));
            op_test_end(&test);
        }
    }
    op_refused(op_fill(dev, TENSOR_NONE, 0), "fill: y is absent");
    op_refused(op_fill(dev, tensor_1d(NULL, DT_F32, 3), 0), "fill: y has no memory");
}

/* Ties to even, the largest finite values, a number too small for bf16, infinity; the last is not exact. */
static void copy_corner_cases(struct op_test *test)
{
    const double values[] = {1.00390625, 1.01171875, -1.00390625, 0x1.fffffep127, -0.0, 0x1p-140, -INFINITY, 3e38};
    const double wanted[] = {1.0, 1.015625, -1.0, INFINITY, 0.0, 0, -INFINITY, 0};
    enum { N = sizeof values / sizeof values[0], CHECKED = 7 };
    struct op_tensor x = op_values(test, tensor_1d(NULL, DT_F32, N), values);
    struct op_tensor y = op_values(test, tensor_1d(NULL, DT_BF16, N), NULL);
    op_ok(op_copy(test->dev, y.t, x.t));
    op_expect_exact(test, "copy to bf16", tensor_range(y.t, 0, CHECKED), wanted);
    assert_true(fabs(op_read(test, y.t)[CHECKED] - 3e38) < 1e36);

    const double nan_value = NAN;
    struct op_tensor bad = op_values(test, tensor_1d(NULL, DT_F32, 1), &nan_value);
    op_ok(op_copy(test->dev, tensor_range(y.t, 0, 1), bad.t));
    assert_true(isnan(op_read(test, y.t)[0]));
}

void test_op_copy(struct device *dev)
{
    const enum dtype pairs[][2] = {{DT_F32, DT_F32},   {DT_F32, DT_BF16}, {DT_BF16, DT_F32},
                                   {DT_BF16, DT_BF16}, {DT_I32, DT_I32},  {DT_I64, DT_I64}};
    for (size_t p = 0; p < sizeof pairs / sizeof pairs[0]; p++) {
        for (int s = 0; s < SIZES; s++) {
            struct op_test test = op_test_begin(dev, 2);
            struct op_tensor x = op_random(&test, tensor_1d(NULL, pairs[p][0], sizes[s]), -100, 100);
            struct op_tensor y = op_values(&test, tensor_1d(NULL, pairs[p][1], sizes[s]), NULL);
            double *want = op_doubles(&test, sizes[s]);
            for (int64_t i = 0; i < sizes[s]; i++)
                want[i] = op_round(pairs[p][1], x.v[i]);
            op_ok(op_copy(dev, y.t, x.t));
            op_expect_exact(&test, "copy", y.t, want);
            op_test_end(&test);
        }
    }
    struct op_test test = op_test_begin(dev, 3);
    copy_corner_cases(&test);
    struct op_tensor f = op_values(&test, tensor_1d(NULL, DT_F32, 4), NULL);
    struct op_tensor i = op_values(&test, tensor_1d(NULL, DT_I32, 4), NULL);
    op_refused(op_copy(dev, i.t, f.t), "copy: y is i32 [4]");
    op_refused(op_copy(dev, tensor_range(f.t, 0, 3), f.t), "copy: y is f32 [3]");
    op_test_end(&test);
}

struct bias_bwd {
    struct tensor db, dy;
};

static int run_bias_bwd(struct device *dev, const void *ctx)
{
    const struct bias_bwd *c = ctx;
    return op_bias_bwd(dev, c->db, c->dy);
}

void test_op_bias_bwd(struct device *dev)
{
    const int64_t shapes[][2] = {{0, 5}, {1, 1}, {3, 5}, {131, 130}, {300, 257}};
    for (int k = 0; k < OP_ACT_TYPES; k++) {
        for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++) {
            struct op_test test = op_test_begin(dev, 3);
            const int64_t rows = shapes[s][0], width = shapes[s][1];
            struct op_tensor dy = op_random(&test, tensor_2d(NULL, op_act_types[k], rows, width), -1, 2);
            struct op_tensor db = op_random(&test, tensor_1d(NULL, DT_F32, width), -1, 1);
            const struct bias_bwd c = {db.t, dy.t};
            op_run_on_threads(&test, "bias_bwd", run_bias_bwd, &c, &db.t, 1);
            for (int64_t i = 0; i < rows * width; i++)
                db.v[i % width] += dy.v[i];
            op_expect(&test, "bias_bwd: db", db.t, db.v, op_bound(DT_F32));
            op_refused(op_bias_bwd(dev, dy.t, dy.t), "bias_bwd: db");
            op_test_end(&test);
        }
    }
}
