/* matmul and pack: every orientation, type, epilogue and odd size against sums in double. */
#include <math.h>

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

/* A row's result must not depend on how many rows there are. */
static void check_rows(struct device *dev, enum dtype dtype)
{
    const struct shape s = {290, 130, 1200};
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
        op_expect_exact(&test, "the last rows alone", part, all + (s.m - rows[i]) * s.n);
    }
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
