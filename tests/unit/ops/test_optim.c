/* adamw, and the gradient accumulators in floats and in fixed point. */
#include "op_test.h"
#include <math.h>

static const int64_t sizes[] = {0, 1, 5, 511, 513, 40003};
enum { SIZES = sizeof sizes / sizeof sizes[0] };

static struct tensor make_control(struct op_test *test, struct step_control control)
{
    return op_values_i64(test, (const int64_t *)&control, CONTROL_ELEMS);
}

/* ---- adamw ---- */

#define CLIP 0.3

struct adamw {
    struct tensor control;
    struct op_tensor w, master, m, v, g;
    struct adamw_args args;
};

static struct adamw make_adamw(struct op_test *test, enum dtype dtype, int64_t n)
{
    const struct tensor flat = tensor_1d(NULL, DT_F32, n);
    return (struct adamw){.control = make_control(test, (struct step_control){.clip = CLIP}),
                          .w = op_values(test, tensor_1d(NULL, dtype, n), NULL),
                          .master = op_random(test, flat, -1, 1),
                          .m = op_random(test, flat, -0.1, 0.1),
                          .v = op_random(test, flat, 0, 0.01),
                          .g = op_random(test, flat, -3, 3),
                          .args = {.lr = 0.05,
                                   .beta1 = 0.9,
                                   .beta2 = 0.95,
                                   .eps = 1e-8,
                                   .weight_decay = 0.1,
                                   .bias1 = 1 - pow(0.9, 3),
                                   .bias2 = 1 - pow(0.95, 3)}};
}

static int run_adamw(struct device *dev, const void *ctx)
{
    const struct adamw *a = ctx;
    return op_adamw(dev, a->w.t, a->master.t, a->m.t, a->v.t, a->g.t, a->control, a->args);
}

/* Elements [begin, end) only, as a rank that owns them would. */
static int run_adamw_part(struct device *dev, const struct adamw *a, int64_t begin, int64_t end)
{
    const int64_t n = end - begin;
    return op_adamw(dev, tensor_range(a->w.t, begin, n), tensor_range(a->master.t, begin, n),
                    tensor_range(a->m.t, begin, n), tensor_range(a->v.t, begin, n), tensor_range(a->g.t, begin, n),
                    a->control, a->args);
}

static void reference_adamw(const struct adamw *a)
{
    const struct adamw_args *p = &a->args;
    for (int64_t i = 0; i < tensor_elems(a->g.t); i++) {
        const double g = a->g.v[i] * CLIP;
        double *w = &a->master.v[i], *m = &a->m.v[i], *v = &a->v.v[i];
        *w -= p->lr * p->weight_decay * *w;
        *m = p->beta1 * *m + (1 - p->beta1) * g;
        *v = p->beta2 * *v + (1 - p->beta2) * g * g;
        *w -= p->lr / p->bias1 * *m / (sqrt(*v / p->bias2) + p->eps);
    }
}

static void check_adamw(struct op_test *test, enum dtype dtype, int64_t n)
{
    const struct adamw a = make_adamw(test, dtype, n);
    struct adamw cut = make_adamw(test, dtype, n);
    cut.master = op_values(test, a.master.t, a.master.v);
    cut.m = op_values(test, a.m.t, a.m.v);
    cut.v = op_values(test, a.v.t, a.v.v);
    cut.g = a.g;
    const struct tensor outputs[] = {a.w.t, a.master.t, a.m.t, a.v.t};
    op_run_on_threads(test, "adamw", run_adamw, &a, outputs, 4);
    reference_adamw(&a);
    op_expect(test, "adamw: master", a.master.t, a.master.v, op_bound(DT_F32));
    op_expect(test, "adamw: m", a.m.t, a.m.v, op_bound(DT_F32));
    op_expect(test, "adamw: v", a.v.t, a.v.v, op_bound(DT_F32));

    double *master = op_read(test, a.master.t), *rounded = op_doubles(test, n);
    for (int64_t i = 0; i < n; i++)
        rounded[i] = op_round(dtype, master[i]);
    op_expect_exact(test, "adamw: w", a.w.t, rounded);

    const int64_t first = n / 3, second = first + n / 7; /* where the parameters are cut changes no bit */
    op_ok(run_adamw_part(test->dev, &cut, 0, first));
    op_ok(run_adamw_part(test->dev, &cut, first, second));
    op_ok(run_adamw_part(test->dev, &cut, second, n));
    op_expect_exact(test, "adamw: master in three parts", cut.master.t, master);
    op_expect_exact(test, "adamw: v in three parts", cut.v.t, op_read(test, a.v.t));
}

/* From zero weights and without decay, what is left is the update alone, and its error is not hidden by the weight. */
static void check_adamw_update(struct op_test *test)
{
    struct adamw a = make_adamw(test, DT_F32, 700);
    a.args.lr = 1e-5;
    a.master = op_values(test, a.master.t, NULL);
    struct adamw over = a; /* w may alias master */
    over.w = over.master;
    op_ok(run_adamw(test->dev, &over));
    reference_adamw(&a);
    op_expect(test, "adamw: update", a.master.t, a.master.v, op_bound(DT_F32));
}

/* A step with a fault changes nothing. */
static void check_adamw_fault(struct op_test *test)
{
    struct adamw a = make_adamw(test, DT_BF16, 600);
    a.control = make_control(test, (struct step_control){.clip = 1, .fault = FAULT_OVERFLOW});
    op_ok(run_adamw(test->dev, &a));
    op_expect_exact(test, "adamw: master after a fault", a.master.t, a.master.v);
    op_expect_exact(test, "adamw: m after a fault", a.m.t, a.m.v);
    op_expect_exact(test, "adamw: v after a fault", a.v.t, a.v.v);
    op_expect_exact(test, "adamw: w after a fault", a.w.t, a.w.v);
}

void test_op_adamw(struct device *dev)
{
    for (int k = 0; k < OP_ACT_TYPES; k++) {
        for (int s = 0; s < SIZES; s++) {
            struct op_test test = op_test_begin(dev, 80);
            check_adamw(&test, op_act_types[k], sizes[s]);
            op_test_end(&test);
        }
    }
    struct op_test test = op_test_begin(dev, 81);
    check_adamw_update(&test);
    check_adamw_fault(&test);
    struct adamw a = make_adamw(&test, DT_BF16, 4);
    a.m.t = tensor_range(a.m.t, 0, 3);
    op_refused(run_adamw(dev, &a), "adamw: m is f32 [3]");
    op_test_end(&test);
}

/* ---- grad_add ---- */

struct grad_add {
    double limit;
    struct tensor acc, g, control, fault;
};

static int run_grad_add(struct device *dev, const void *ctx)
{
    const struct grad_add *c = ctx;
    return op_grad_add(dev, c->acc, c->g, c->control, c->limit, c->fault);
}

/* Adds g to zeros of the type at scale 4 with limit 2^40, and returns the fault. */
static int fault_of(struct op_test *test, enum dtype dtype, const double *g, const double *want)
{
    enum { N = 9 };
    const double old_fault = 8;
    struct op_tensor acc = op_values(test, tensor_1d(NULL, dtype, N), NULL);
    struct op_tensor grad = op_values(test, tensor_1d(NULL, DT_F32, N), g);
    struct op_tensor fault = op_values(test, tensor_1d(NULL, DT_I32, 1), &old_fault);
    const struct tensor control = make_control(test, (struct step_control){.scale = 4});
    op_ok(op_grad_add(test->dev, acc.t, grad.t, control, 0x1p40, fault.t));
    if (want) op_expect_exact(test, "grad_add: acc", acc.t, want);
    return (int)op_read(test, fault.t)[0] - 8;
}

static void check_grad_add_faults(struct op_test *test)
{
    const double ties[] = {0.125, 0.375, 0.625, -0.125, -0.375, -0.625, 0.126, 0x1p38, -0x1p38};
    const double even[] = {0, 2, 2, 0, -2, -2, 1, 0x1p40, -0x1p40};
    assert_int_equal(fault_of(test, DT_I64, ties, even), 0);
    const double large[] = {1, 2, 0x1.000002p38, -1, 0, 0, 0, 0, -0x1p100};
    const double without[] = {4, 8, 0, -4, 0, 0, 0, 0, 0};
    assert_int_equal(fault_of(test, DT_I64, large, without), FAULT_OVERFLOW);
    const double nan_first[] = {NAN, 1, 0, 0, 0, 0, 0, 0, 1}, after_nan[] = {0, 4, 0, 0, 0, 0, 0, 0, 4};
    assert_int_equal(fault_of(test, DT_I64, nan_first, after_nan), FAULT_NAN);
    const double infinite_last[] = {0, 1, 0, 0, 0, 0, 0, 0, -INFINITY}, before[] = {0, 4, 0, 0, 0, 0, 0, 0, 0};
    assert_int_equal(fault_of(test, DT_I64, infinite_last, before) & FAULT_NAN, FAULT_NAN);
    assert_int_equal(fault_of(test, DT_F32, large, large), 0);
    assert_int_equal(fault_of(test, DT_F32, nan_first, NULL), FAULT_NAN);
    assert_int_equal(fault_of(test, DT_F32, infinite_last, NULL), FAULT_NAN);
}

void test_op_grad_add(struct device *dev)
{
    for (int s = 0; s < 2 * SIZES; s++) {
        struct op_test test = op_test_begin(dev, 90);
        const enum dtype dtype = s % 2 == 0 ? DT_F32 : DT_I64;
        const int64_t n = sizes[s / 2];
        struct op_tensor g = op_random(&test, tensor_1d(NULL, DT_F32, n), -9, 9);
        struct op_tensor acc = op_random(&test, tensor_1d(NULL, dtype, n), -1e6, 1e6);
        struct op_tensor fault = op_values(&test, tensor_1d(NULL, DT_I32, 1), NULL);
        const struct tensor control = make_control(&test, (struct step_control){.scale = 0x1p30});
        const struct grad_add c = {0x1p50, acc.t, g.t, control, fault.t};
        const struct tensor outputs[] = {acc.t, fault.t};
        op_run_on_threads(&test, "grad_add", run_grad_add, &c, outputs, 2);
        for (int64_t i = 0; i < n; i++)
            acc.v[i] = dtype == DT_F32 ? (double)(float)(acc.v[i] + g.v[i]) : acc.v[i] + rint(g.v[i] * 0x1p30);
        op_expect_exact(&test, "grad_add: acc", acc.t, acc.v);
        op_expect_exact(&test, "grad_add: fault", fault.t, fault.v);
        op_test_end(&test);
    }
    struct op_test test = op_test_begin(dev, 91);
    check_grad_add_faults(&test);
    struct op_tensor acc = op_values(&test, tensor_1d(NULL, DT_I64, 2), NULL);
    struct op_tensor g = op_values(&test, tensor_1d(NULL, DT_F32, 2), NULL);
    struct op_tensor fault = op_values(&test, tensor_1d(NULL, DT_I32, 1), NULL);
    const struct tensor control = make_control(&test, (struct step_control){.scale = 1});
    op_refused(op_grad_add(dev, acc.t, g.t, acc.t, 1, fault.t), "grad_add: control is i64 [2]");
    op_refused(op_grad_add(dev, acc.t, acc.t, control, 1, fault.t), "grad_add: g is i64");
    op_test_end(&test);
}

/* ---- grad_read ---- */

struct grad_read {
    struct tensor g, acc, control;
};

static int run_grad_read(struct device *dev, const void *ctx)
{
    const struct grad_read *c = ctx;
    return op_grad_read(dev, c->g, c->acc, c->control);
}

/* Integers of every size up to 2^62. */
static void fill_integers(struct op_test *test, int64_t *values, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        values[i] = (int64_t)ldexp(op_uniform(test, -1, 1), (int)(i % 63)) + i % 2;
}

void test_op_grad_read(struct device *dev)
{
    for (int s = 0; s <= SIZES; s++) {
        struct op_test test = op_test_begin(dev, 100);
        const int64_t n = s < SIZES ? sizes[s] : 150001; /* several ranges that double */
        int64_t *values = op_integers(&test, n);
        double *want = op_doubles(&test, n);
        fill_integers(&test, values, n);
        for (int64_t i = 0; i < n; i++)
            want[i] = (double)(float)values[i] / 0x1p45;
        const struct tensor acc = op_values_i64(&test, values, n);
        struct op_tensor g = op_values(&test, tensor_1d(NULL, DT_F32, n), NULL);
        const struct tensor control = make_control(&test, (struct step_control){.unscale = 0x1p-45});
        const struct grad_read apart = {g.t, acc, control}, over = {tensor_1d(acc.data, DT_F32, n), acc, control};
        op_run_on_threads(&test, "grad_read", run_grad_read, &apart, &g.t, 1);
        op_expect_exact(&test, "grad_read: g", g.t, want);
        op_run_on_threads(&test, "grad_read over acc", run_grad_read, &over, &acc, 1);
        op_expect_exact(&test, "grad_read: g over acc", over.g, want);
        op_test_end(&test);
    }
    struct op_test test = op_test_begin(dev, 101);
    struct op_tensor acc = op_random(&test, tensor_1d(NULL, DT_F32, 700), -1, 1);
    struct op_tensor g = op_values(&test, acc.t, NULL);
    const struct tensor control = make_control(&test, (struct step_control){.unscale = 2});
    op_ok(op_grad_read(dev, g.t, acc.t, control));
    op_expect_exact(&test, "grad_read: g of floats", g.t, acc.v);
    op_ok(op_grad_read(dev, acc.t, acc.t, control));
    op_expect_exact(&test, "grad_read: g of floats in place", acc.t, acc.v);
    op_refused(op_grad_read(dev, tensor_range(g.t, 0, 1), acc.t, control), "grad_read: g is f32 [1]");
    op_test_end(&test);
}

/* ---- sums ---- */

struct sum {
    struct tensor out, x, fault;
};

static int run_sum_fixed(struct device *dev, const void *ctx)
{
    const struct sum *c = ctx;
    return op_sum_fixed(dev, c->out, c->x, 0x1p20, c->fault);
}

void test_op_sum_fixed(struct device *dev)
{
    for (int s = 0; s < SIZES; s++) {
        struct op_test test = op_test_begin(dev, 110);
        struct op_tensor x = op_random(&test, tensor_1d(NULL, DT_F32, sizes[s]), -20, 20);
        struct op_tensor out = op_random(&test, tensor_1d(NULL, DT_I64, 1), -1e9, 1e9);
        struct op_tensor fault = op_values(&test, tensor_1d(NULL, DT_I32, 1), NULL);
        const struct sum c = {out.t, x.t, fault.t};
        const struct tensor outputs[] = {out.t, fault.t};
        op_run_on_threads(&test, "sum_fixed", run_sum_fixed, &c, outputs, 2);
        for (int64_t i = 0; i < sizes[s]; i++)
            out.v[0] += rint(x.v[i] * 0x1p20);
        op_expect_exact(&test, "sum_fixed: acc", out.t, out.v);
        op_expect_exact(&test, "sum_fixed: fault", fault.t, fault.v);
        op_test_end(&test);
    }
    const double bad[] = {NAN, INFINITY, -0x1.000002p32};
    for (int i = 0; i < 3; i++) {
        struct op_test test = op_test_begin(dev, 111);
        const double values[] = {1, bad[i], 2}, want = 3 * 0x1p20, nan_fault = FAULT_NAN;
        struct op_tensor x = op_values(&test, tensor_1d(NULL, DT_F32, 3), values);
        struct op_tensor out = op_values(&test, tensor_1d(NULL, DT_I64, 1), NULL);
        struct op_tensor fault = op_values(&test, tensor_1d(NULL, DT_I32, 1), NULL);
        op_ok(op_sum_fixed(dev, out.t, x.t, 0x1p20, fault.t));
        op_expect_exact(&test, "sum_fixed: acc", out.t, &want);
        op_expect_exact(&test, "sum_fixed: fault", fault.t, &nan_fault);
        op_refused(op_sum_fixed(dev, fault.t, x.t, 1, fault.t), "sum_fixed: acc is i32");
        op_test_end(&test);
    }
}

static int run_sum_squares(struct device *dev, const void *ctx)
{
    const struct sum *c = ctx;
    return op_sum_squares(dev, c->out, c->x, c->fault);
}

/* sum += x², schoolbook, in digits of 32 bits with carries at once. */
static void add_square(uint64_t sum[4], int64_t x)
{
    const uint64_t size = x < 0 ? 0 - (uint64_t)x : (uint64_t)x, digits[2] = {size & 0xffffffffu, size >> 32};
    for (int i = 0; i < 2; i++) {
        for (int j = 0; j < 2; j++) {
            const uint64_t product = digits[i] * digits[j];
            uint64_t carry = product & 0xffffffffu;
            for (int k = i + j; k < 4; k++) {
                sum[k] += carry;
                carry = (sum[k] >> 32) + (k == i + j ? product >> 32 : 0);
                if (k < 3) sum[k] &= 0xffffffffu;
            }
        }
    }
}

static void check_sum_squares_fixed(struct op_test *test, int64_t n)
{
    const int64_t base[4] = {5, -1, 7, 1000}; /* limbs of several ranks, not carried */
    int64_t *values = op_integers(test, n);
    uint64_t want[4] = {0};
    fill_integers(test, values, n);
    if (n > 3) values[2] = INT64_MIN;
    for (int64_t i = 0; i < n; i++)
        add_square(want, values[i]);
    const struct tensor out = op_values_i64(test, base, 4);
    const struct op_tensor fault = op_values(test, tensor_1d(NULL, DT_I32, 1), NULL);
    const struct sum c = {out, op_values_i64(test, values, n), fault.t};
    op_run_on_threads(test, "sum_squares", run_sum_squares, &c, &out, 1);
    const int64_t *got = op_read_i64(test, out);
    for (int i = 0; i < 4; i++)
        assert_true(got[i] - base[i] == (int64_t)want[i]);
}

static void check_sum_squares_float(struct op_test *test, int64_t n)
{
    struct op_tensor x = op_random(test, tensor_1d(NULL, DT_F32, n), -3, 3);
    const int64_t base[4] = {0, 0x40000000, 1, 0}; /* 1.25 */
    double want = 1.25, got = 0;
    const struct tensor out = op_values_i64(test, base, 4);
    const struct op_tensor fault = op_values(test, tensor_1d(NULL, DT_I32, 1), NULL);
    const struct sum c = {out, x.t, fault.t};
    op_run_on_threads(test, "sum_squares", run_sum_squares, &c, &out, 1);
    for (int64_t i = 0; i < n; i++)
        want += x.v[i] * x.v[i];
    for (int i = 3; i >= 0; i--)
        got += ldexp((double)op_read_i64(test, out)[i], 32 * i - SQUARES_BITS);
    if (!(fabs(got - want) <= 1e-13 * want)) fail_msg("sum_squares of floats: %.17g, expected %.17g", got, want);
    op_expect_exact(test, "sum_squares: fault", fault.t, fault.v);
}

/* Squares that the limbs have no room for. */
static void check_sum_squares_fault(struct op_test *test, double x)
{
    const double nan_fault = FAULT_NAN;
    const struct op_tensor values = op_values(test, tensor_1d(NULL, DT_F32, 1), &x);
    const struct op_tensor fault = op_values(test, tensor_1d(NULL, DT_I32, 1), NULL);
    const struct tensor out = op_values_i64(test, (const int64_t[4]){0}, 4);
    op_ok(op_sum_squares(test->dev, out, values.t, fault.t));
    op_expect_exact(test, "sum_squares: fault", fault.t, &nan_fault);
}

void test_op_sum_squares(struct device *dev)
{
    for (int s = 0; s < SIZES; s++) {
        struct op_test test = op_test_begin(dev, 120);
        check_sum_squares_fixed(&test, sizes[s]);
        check_sum_squares_float(&test, sizes[s]);
        op_test_end(&test);
    }
    struct op_test test = op_test_begin(dev, 121);
    struct op_tensor x = op_values(&test, tensor_1d(NULL, DT_I64, 3), NULL);
    struct op_tensor fault = op_values(&test, tensor_1d(NULL, DT_I32, 1), NULL);
    op_refused(op_sum_squares(dev, x.t, x.t, fault.t), "sum_squares: out is i64 [3]");
    check_sum_squares_fault(&test, NAN);
    check_sum_squares_fault(&test, INFINITY);
    check_sum_squares_fault(&test, 0x1p31);
    op_test_end(&test);
}
