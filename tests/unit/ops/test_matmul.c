/* matmul, what is fused with it, and pack: every orientation, type and odd size against sums in double. */
#include <math.h>
#include <string.h>

#include "op_test.h"

struct shape {
    int64_t m, n, k;
};

/* Odd sizes, sizes around the padding of tiles, and more than one tile and one block of k in every direction. */
static const struct shape shapes[] = {{1, 1, 1},    {3, 17, 5},     {17, 65, 130},  {65, 130, 3}, {130, 1, 65},
                                      {64, 64, 64}, {260, 258, 40}, {20, 70, 1030}, {1, 65, 2100}};
#define SHAPES ((int)(sizeof shapes / sizeof shapes[0]))

/* One call of the op. */
struct call {
    struct tensor y, a, b, packed, bias;
    unsigned flags;
};

static int run_matmul(struct device *dev, const void *ctx)
{
    const struct call *c = ctx;
    return op_matmul(dev, c->y, c->a, c->b, c->packed, c->bias, c->flags);
}

static struct tensor matrix(enum dtype dtype, int64_t rows, int64_t cols, bool transposed)
{
    return transposed ? tensor_2d(NULL, dtype, cols, rows) : tensor_2d(NULL, dtype, rows, cols);
}

/* The bound for an f32 sum of k products: the roundings of a long sum add up like a random walk. */
static double sum_bound(int64_t k)
{
    return op_bound(DT_F32) * fmax(1, sqrt((double)k / 256));
}

static double *product(struct op_test *test, struct shape s, const double *a, const double *b, unsigned flags)
{
    double *y = op_doubles(test, s.m * s.n);
    for (int64_t i = 0; i < s.m; i++)
        for (int64_t l = 0; l < s.k; l++) {
            const double left = a[flags & MATMUL_TA ? l * s.m + i : i * s.k + l];
            for (int64_t j = 0; j < s.n; j++)
                y[i * s.n + j] += left * b[flags & MATMUL_TB ? j * s.k + l : l * s.n + j];
        }
    return y;
}

static struct tensor packed_copy(struct op_test *test, struct tensor b, bool tb)
{
    const size_t bytes = test->dev->table->pack_bytes(test->dev, b, tb);
    if (bytes == 0) return TENSOR_NONE;
    const struct op_tensor packed =
        op_values(test, tensor_1d(NULL, b.dtype, (int64_t)(bytes / dtype_bytes(b.dtype))), NULL);
    op_ok(op_pack(test->dev, packed.t, b, tb));
    return packed.t;
}

/* One shape, orientation and type: plain, packed, with bias, rounded to the type, and added. */
static void check_matmul(struct device *dev, struct shape s, unsigned flags, enum dtype dtype)
{
    struct op_test test = op_test_begin(dev, (uint64_t)(s.m * 1000 + s.n + s.k));
    const struct op_tensor a = op_random(&test, matrix(dtype, s.m, s.k, flags & MATMUL_TA), -1, 1);
    const struct op_tensor b = op_random(&test, matrix(dtype, s.k, s.n, flags & MATMUL_TB), -1, 1);
    const struct op_tensor bias = op_random(&test, tensor_1d(NULL, dtype, s.n), -1, 1);
    const struct op_tensor before = op_random(&test, tensor_2d(NULL, DT_F32, s.m, s.n), -1, 1);
    const struct tensor wide = op_values(&test, tensor_2d(NULL, DT_F32, s.m, s.n), NULL).t;
    const struct tensor narrow = op_values(&test, tensor_2d(NULL, dtype, s.m, s.n), NULL).t;
    const struct tensor packed = packed_copy(&test, b.t, flags & MATMUL_TB);
    double *want = product(&test, s, a.v, b.v, flags);

    struct call call = {wide, a.t, b.t, TENSOR_NONE, TENSOR_NONE, flags};
    op_run_on_threads(&test, "matmul", run_matmul, &call, &call.y, 1);
    op_expect(&test, "matmul", wide, want, sum_bound(s.k));
    if (tensor_given(packed)) {
        call.packed = packed;
        call.b.data = NULL; /* not to be read */
        op_ok(run_matmul(dev, &call));
        op_expect(&test, "matmul, packed", wide, want, sum_bound(s.k));
    }
    call.y = before.t;
    call.flags = flags | MATMUL_ADD;
    for (int64_t i = 0; i < s.m * s.n; i++)
        before.v[i] += want[i];
    op_run_on_threads(&test, "matmul, added", run_matmul, &call, &call.y, 1);
    op_expect(&test, "matmul, added", before.t, before.v, sum_bound(s.k));

    call = (struct call){narrow, a.t, b.t, packed, bias.t, flags};
    for (int64_t i = 0; i < s.m * s.n; i++)
        want[i] += bias.v[i % s.n];
    op_run_on_threads(&test, "matmul, biased", run_matmul, &call, &call.y, 1);
    op_expect(&test, "matmul, biased", narrow, want, fmax(op_bound(dtype), sum_bound(s.k)));
    call.y = wide;
    op_ok(run_matmul(dev, &call));
    op_expect(&test, "matmul, biased, in f32", wide, want, sum_bound(s.k));
    op_test_end(&test);
}

/* Whether products are cuBLASLt's own. The emulated GPU, whose table is the same, is known by its name. */
static bool on_real_gpu(struct device *dev)
{
    char text[256];
    device_describe(dev, text, sizeof text);
    return dev->kind == DEVICE_CUDA && !strstr(text, "emulated");
}

/* A row's result must not depend on how many rows there are, nor on what the others hold. cuBLASLt may compute another
 * number of rows in another way (ops.h): there, both ways are within the bound of the exact sum. */
static void check_rows(struct device *dev, enum dtype dtype)
{
    const struct shape s = {290, 130, 1200};
    const bool other_ways = on_real_gpu(dev);
    static const int64_t rows[] = {1, 17, 130};
    struct op_test test = op_test_begin(dev, 7);
    const struct op_tensor a = op_random(&test, tensor_2d(NULL, dtype, s.m, s.k), -1, 1);
    const struct op_tensor b = op_random(&test, tensor_2d(NULL, dtype, s.k, s.n), -1, 1);
    const struct tensor y = op_values(&test, tensor_2d(NULL, DT_F32, s.m, s.n), NULL).t;
    op_ok(op_matmul(dev, y, a.t, b.t, TENSOR_NONE, TENSOR_NONE, 0));
    const double *all = op_read(&test, y);
    for (int i = 0; i < 3; i++) {
        const struct tensor part = op_values(&test, tensor_2d(NULL, DT_F32, rows[i], s.n), NULL).t;
        op_ok(op_matmul(dev, part, tensor_rows(a.t, s.m - rows[i], rows[i]), b.t, TENSOR_NONE, TENSOR_NONE, 0));
        const double *want = all + (s.m - rows[i]) * s.n;
        if (other_ways)
            op_expect(&test, "the last rows alone", part, want, 2 * sum_bound(s.k));
        else
            op_expect_exact(&test, "the last rows alone", part, want);
    }
    op_ok(op_fill(dev, tensor_rows(a.t, 0, s.m - 1), 0.5));
    op_ok(op_matmul(dev, y, a.t, b.t, TENSOR_NONE, TENSOR_NONE, 0));
    op_expect_exact(&test, "the last row after others", tensor_rows(y, s.m - 1, 1), all + (s.m - 1) * s.n);
    op_test_end(&test);
}

/* No rows, and no columns in common: y is the bias, or stays as it was when added to. */
static void check_empty(struct device *dev)
{
    struct op_test test = op_test_begin(dev, 8);
    const struct op_tensor b = op_random(&test, tensor_2d(NULL, DT_F32, 3, 5), -1, 1);
    const struct tensor none = op_values(&test, tensor_2d(NULL, DT_F32, 0, 3), NULL).t;
    op_ok(op_matmul(dev, op_values(&test, tensor_2d(NULL, DT_F32, 0, 5), NULL).t, none, b.t, TENSOR_NONE, TENSOR_NONE,
                    0));
    const struct op_tensor y = op_random(&test, tensor_2d(NULL, DT_F32, 3, 3), -1, 1);
    op_ok(op_matmul(dev, y.t, none, none, TENSOR_NONE, TENSOR_NONE, MATMUL_TA | MATMUL_ADD));
    op_expect_exact(&test, "nothing added", y.t, y.v);
    op_ok(op_matmul(dev, y.t, none, none, TENSOR_NONE, TENSOR_NONE, MATMUL_TA));
    op_expect_exact(&test, "an empty sum", y.t, op_doubles(&test, 9));
    op_test_end(&test);
}

void test_op_matmul(struct device *dev)
{
    for (int type = 0; type < OP_ACT_TYPES; type++) {
        for (int i = 0; i < SHAPES; i++)
            for (unsigned flags = 0; flags < 4; flags++)
                check_matmul(dev, shapes[i], flags, op_act_types[type]);
        check_rows(dev, op_act_types[type]);
    }
    check_empty(dev);
}

/* ---- GELU and gradients of biases with a product ---- */

/* Shapes with the 8 columns that a GPU's library asks for, and without. */
static const struct shape fused_shapes[] = {{0, 8, 3},    {1, 1, 1},      {17, 65, 130},
                                            {33, 64, 40}, {5, 136, 1030}, {130, 8, 65}};
#define FUSED_SHAPES ((int)(sizeof fused_shapes / sizeof fused_shapes[0]))

struct fused_call {
    struct tensor y, x, a, b, packed, bias; /* weight_bwd: dw, none, x, dy, none, db */
    unsigned flags;
};

static double gelu(double x)
{
    const double pi = 3.14159265358979323846;
    return 0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x * x * x)));
}

static double gelu_slope(double x)
{
    const double h = 1e-5;
    return (gelu(x + h) - gelu(x - h)) / (2 * h);
}

static int run_matmul_gelu(struct device *dev, const void *ctx)
{
    const struct fused_call *c = ctx;
    return op_matmul_gelu(dev, c->y, c->x, c->a, c->b, c->packed, c->bias, c->flags);
}

/* The bound of y: it is rounded, and GELU may have been taken of x as rounded, which makes at most twice as much of x's
 * error, relative to the sizes of x and y. */
static void check_matmul_gelu(struct device *dev, struct shape s, unsigned flags, enum dtype dtype, bool biased)
{
    struct op_test test = op_test_begin(dev, (uint64_t)(s.m * 1000 + s.n + s.k));
    const struct op_tensor a = op_random(&test, matrix(dtype, s.m, s.k, flags & MATMUL_TA), -1, 1);
    const struct op_tensor b = op_random(&test, matrix(dtype, s.k, s.n, flags & MATMUL_TB), -1, 1);
    const struct op_tensor bias = op_random(&test, tensor_1d(NULL, dtype, s.n), -1, 1);
    const struct tensor out[2] = {op_values(&test, tensor_2d(NULL, dtype, s.m, s.n), NULL).t,
                                  op_values(&test, tensor_2d(NULL, dtype, s.m, s.n), NULL).t};
    const struct tensor packed = packed_copy(&test, b.t, flags & MATMUL_TB);
    const struct fused_call call = {out[0], out[1], a.t, b.t, packed, biased ? bias.t : TENSOR_NONE, flags};
    double *want = product(&test, s, a.v, b.v, flags);
    const double bound = fmax(op_bound(dtype), sum_bound(s.k));
    for (int64_t i = 0; i < s.m * s.n && biased; i++)
        want[i] += bias.v[i % s.n];
    op_run_on_threads(&test, "matmul_gelu", run_matmul_gelu, &call, out, 2);
    op_expect(&test, "matmul_gelu: x", call.x, want, bound);
    for (int64_t i = 0; i < s.m * s.n; i++)
        want[i] = gelu(want[i]);
    op_expect(&test, "matmul_gelu: y", call.y, want, 3 * bound);
    op_test_end(&test);
}

void test_op_matmul_gelu(struct device *dev)
{
    for (int type = 0; type < OP_ACT_TYPES; type++)
        for (int i = 0; i < FUSED_SHAPES; i++)
            for (unsigned flags = 0; flags < 4; flags++)
                check_matmul_gelu(dev, fused_shapes[i], flags, op_act_types[type], i % 2 == 0);
    struct op_test test = op_test_begin(dev, 10);
    const struct tensor x = op_values(&test, tensor_2d(NULL, DT_BF16, 3, 3), NULL).t;
    const struct tensor wide = op_values(&test, tensor_2d(NULL, DT_F32, 3, 3), NULL).t;
    op_refused(op_matmul_gelu(dev, x, wide, x, x, TENSOR_NONE, TENSOR_NONE, 0), "matmul_gelu: x");
    op_refused(op_matmul_gelu(dev, wide, x, x, x, TENSOR_NONE, TENSOR_NONE, 0), "matmul_gelu: y");
    op_refused(op_matmul_gelu(dev, wide, wide, x, x, TENSOR_NONE, TENSOR_NONE, MATMUL_ADD),
               "matmul_gelu: MATMUL_ADD");
    op_test_end(&test);
}

static int run_matmul_dgelu(struct device *dev, const void *ctx)
{
    const struct fused_call *c = ctx;
    return op_matmul_dgelu(dev, c->y, c->a, c->b, c->packed, c->x, c->flags);
}

/* The bound of dx: the product may be rounded, dx is; and the product's own error counts relative to the product's size,
 * which the derivative, below 1.13, makes smaller in the middle only by half. */
static void check_matmul_dgelu(struct device *dev, struct shape s, unsigned flags, enum dtype dtype)
{
    struct op_test test = op_test_begin(dev, (uint64_t)(s.m * 1000 + s.n + s.k));
    const struct op_tensor a = op_random(&test, matrix(dtype, s.m, s.k, flags & MATMUL_TA), -1, 1);
    const struct op_tensor b = op_random(&test, matrix(dtype, s.k, s.n, flags & MATMUL_TB), -1, 1);
    const struct op_tensor x = op_random(&test, tensor_2d(NULL, dtype, s.m, s.n), -4, 4);
    const struct tensor dx = op_values(&test, tensor_2d(NULL, dtype, s.m, s.n), NULL).t;
    const struct tensor packed = packed_copy(&test, b.t, flags & MATMUL_TB);
    const struct fused_call call = {dx, x.t, a.t, b.t, packed, TENSOR_NONE, flags};
    double *want = product(&test, s, a.v, b.v, flags);
    for (int64_t i = 0; i < s.m * s.n; i++)
        want[i] *= gelu_slope(x.v[i]);
    op_run_on_threads(&test, "matmul_dgelu", run_matmul_dgelu, &call, &dx, 1);
    op_expect(&test, "matmul_dgelu: dx", dx, want, 2 * fmax(op_bound(dtype), sum_bound(s.k)));
    op_expect_exact(&test, "matmul_dgelu: x stays", x.t, x.v);
    op_test_end(&test);
}

void test_op_matmul_dgelu(struct device *dev)
{
    for (int type = 0; type < OP_ACT_TYPES; type++)
        for (int i = 0; i < FUSED_SHAPES; i++)
            for (unsigned flags = 0; flags < 4; flags++)
                check_matmul_dgelu(dev, fused_shapes[i], flags, op_act_types[type]);
    struct op_test test = op_test_begin(dev, 11);
    const struct tensor x = op_values(&test, tensor_2d(NULL, DT_BF16, 3, 3), NULL).t;
    const struct tensor wide = op_values(&test, tensor_2d(NULL, DT_F32, 3, 3), NULL).t;
    op_refused(op_matmul_dgelu(dev, wide, x, x, TENSOR_NONE, x, 0), "matmul_dgelu: dx");
    op_refused(op_matmul_dgelu(dev, x, x, x, TENSOR_NONE, wide, 0), "matmul_dgelu: x");
    op_test_end(&test);
}

static int run_weight_bwd(struct device *dev, const void *ctx)
{
    const struct fused_call *c = ctx;
    return op_weight_bwd(dev, c->y, c->bias, c->a, c->b);
}

/* k is the number of rows, which are summed over. */
static void check_weight_bwd(struct device *dev, struct shape s, enum dtype dtype)
{
    struct op_test test = op_test_begin(dev, (uint64_t)(s.m * 1000 + s.n + s.k));
    const struct op_tensor x = op_random(&test, tensor_2d(NULL, dtype, s.k, s.m), -1, 1);
    const struct op_tensor dy = op_random(&test, tensor_2d(NULL, dtype, s.k, s.n), -1, 1);
    const struct op_tensor dw = op_random(&test, tensor_2d(NULL, DT_F32, s.m, s.n), -1, 1);
    const struct op_tensor db = op_random(&test, tensor_1d(NULL, DT_F32, s.n), -1, 1);
    const struct tensor out[2] = {dw.t, db.t};
    const struct fused_call call = {dw.t, TENSOR_NONE, x.t, dy.t, TENSOR_NONE, db.t, 0};
    const double *added = product(&test, s, x.v, dy.v, MATMUL_TA);
    for (int64_t i = 0; i < s.m * s.n; i++)
        dw.v[i] += added[i];
    for (int64_t i = 0; i < s.k * s.n; i++)
        db.v[i % s.n] += dy.v[i];
    op_run_on_threads(&test, "weight_bwd", run_weight_bwd, &call, out, 2);
    op_expect(&test, "weight_bwd: dw", dw.t, dw.v, sum_bound(s.k));
    op_expect(&test, "weight_bwd: db", db.t, db.v, sum_bound(s.k));
    op_test_end(&test);
}

void test_op_weight_bwd(struct device *dev)
{
    static const struct shape empty = {3, 8, 0};
    for (int type = 0; type < OP_ACT_TYPES; type++) {
        for (int i = 0; i < FUSED_SHAPES; i++)
            check_weight_bwd(dev, fused_shapes[i], op_act_types[type]);
        check_weight_bwd(dev, empty, op_act_types[type]);
    }
    struct op_test test = op_test_begin(dev, 12);
    const struct tensor dw = op_values(&test, tensor_2d(NULL, DT_F32, 3, 3), NULL).t;
    const struct tensor db = op_values(&test, tensor_1d(NULL, DT_F32, 2), NULL).t;
    op_refused(op_weight_bwd(dev, dw, db, dw, dw), "weight_bwd: db");
    op_test_end(&test);
}

/* Packing is observed through matmul, which test_op_matmul compares with and without it; here: it repeats exactly,
 * on any number of threads, and matmul takes the packed weights of both orientations of one matrix. */
static int run_pack(struct device *dev, const void *ctx)
{
    const struct call *c = ctx;
    return op_pack(dev, c->packed, c->b, c->flags & MATMUL_TB);
}

void test_op_pack(struct device *dev)
{
    for (int type = 0; type < OP_ACT_TYPES; type++) {
        const enum dtype dtype = op_act_types[type];
        struct op_test test = op_test_begin(dev, 9);
        const struct op_tensor w = op_random(&test, tensor_2d(NULL, dtype, 300, 1030), -1, 1);
        for (unsigned flags = 0; flags <= MATMUL_TB; flags += MATMUL_TB) {
            const struct shape s = {5, flags ? 300 : 1030, flags ? 1030 : 300};
            const struct op_tensor x = op_random(&test, tensor_2d(NULL, dtype, s.m, s.k), -1, 1);
            const struct tensor y = op_values(&test, tensor_2d(NULL, DT_F32, s.m, s.n), NULL).t;
            struct call call = {y, x.t, w.t, packed_copy(&test, w.t, flags), TENSOR_NONE, flags};
            if (!tensor_given(call.packed)) continue;
            op_run_on_threads(&test, "pack", run_pack, &call, &call.packed, 1);
            op_ok(run_matmul(dev, &call));
            op_expect(&test, "matmul of packed weights", y, product(&test, s, x.v, w.v, flags), sum_bound(s.k));
        }
        op_test_end(&test);
    }
}
