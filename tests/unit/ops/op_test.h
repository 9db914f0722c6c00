/* The harness of the op tests: tensors on any device with their values kept in double, comparison, finite
 * differences.
 *
 * A row of the test is `void test_op_NAME(struct device *dev)`; main.c makes the table of rows from ops.def, so an op
 * without a row does not link. A row knows nothing about the backend: it fills tensors with op_random (or op_values),
 * calls op_NAME, computes what should come out in double from the tensors' `v`, and compares with op_expect.
 * Gradients are compared with central differences of the double forward (op_expect_gradient), so that no row needs a
 * second, possibly equally wrong, derivation. All memory made in a row is given back by op_test_end. */
#ifndef TATARA_OP_TEST_H
#define TATARA_OP_TEST_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "err.h"
#include "ops.h"

#define OP_TEST_BLOCKS 256

/* One test's random state and the memory to give back. */
struct op_test {
    struct device *dev;
    uint64_t random;
    int blocks;
    void *host[OP_TEST_BLOCKS];
    void *device[OP_TEST_BLOCKS];
    size_t bytes[OP_TEST_BLOCKS];
};

/* A tensor on the device and the values that were put there, in double and as rounded to its type. */
struct op_tensor {
    struct tensor t;
    double *v;
};

/* One row for each op of ops.def. */
#define OP(name, params, args) void test_op_##name(struct device *dev);
#include "ops.def"
#undef OP

struct op_test op_test_begin(struct device *dev, uint64_t seed);
void op_test_end(struct op_test *test);

/* Host memory for n numbers, zeroed, given back by op_test_end. */
double *op_doubles(struct op_test *test, int64_t n);
int64_t *op_integers(struct op_test *test, int64_t n);
/* The next pseudo-random number in [low, high). */
double op_uniform(struct op_test *test, double low, double high);

/* A tensor of the type and shape of `shape` (a view whose data pointer is not used: tensor_2d(NULL, DT_F32, 3, 5))
 * with uniform values in [low, high): whole numbers for i32 and i64. */
struct op_tensor op_random(struct op_test *test, struct tensor shape, double low, double high);
/* The same with given values; NULL means zeros. */
struct op_tensor op_values(struct op_test *test, struct tensor shape, const double *values);
/* The exact contents of an i64 tensor: double holds 53 bits only. */
struct tensor op_values_i64(struct op_test *test, const int64_t *values, int64_t n);
/* What the tensor holds now, in double, and exactly for i64. */
double *op_read(struct op_test *test, struct tensor t);
int64_t *op_read_i64(struct op_test *test, struct tensor t);
/* x rounded to the type. */
double op_round(enum dtype dtype, double x);

/* The bound for a result computed with sums in fp32 and rounded once to this type. */
double op_bound(enum dtype dtype);
/* Fails unless every element of t is within `bound` of `want` (tensor_elems(t) values), measured relative to the
 * element's size plus the root mean square of `want`. NaN or infinity where `want` is finite never passes. */
void op_expect(struct op_test *test, const char *what, struct tensor t, const double *want, double bound);
/* Fails unless t holds exactly `want`. */
void op_expect_exact(struct op_test *test, const char *what, struct tensor t, const double *want);

/* A scalar function of what it finds behind ctx, in double: Σ dy·forward(x). */
typedef double op_loss(const void *ctx);
/* Fails unless t holds `base` (NULL: zeros) plus the gradient of loss(ctx) with respect to x[0 … elements of t), by
 * central differences of step h·max(1, |x|) with h = 1e-5. x is part of what ctx shows and is restored. Of large
 * tensors, elements spread over the whole are checked. */
void op_expect_gradient(struct op_test *test, const char *what, struct tensor t, const double *base, double *x,
                        op_loss *loss, const void *ctx, double bound);

/* Runs run(dev, ctx) on 1, 2 and 3 threads, each time from the same contents of the outputs, and fails unless the
 * outputs come out bit for bit the same. They hold the result afterwards. */
typedef int op_run(struct device *dev, const void *ctx);
void op_run_on_threads(struct op_test *test, const char *what, op_run *run, const void *ctx,
                       const struct tensor *outputs, int n_outputs);

/* Fails the test with the message of the error when rc is not 0. */
void op_ok(int rc);
/* Fails the test unless rc is ERR_BUG with a message that contains `text`; clears the error. */
void op_refused(int rc, const char *text);

/* The compute types every op is tested with. */
static const enum dtype op_act_types[] = {DT_F32, DT_BF16};
#define OP_ACT_TYPES 2

#endif
