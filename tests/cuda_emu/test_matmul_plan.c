/* A clock decides how long a matrix product takes, and never what comes out (kernels/cuda/matmul.cu).
 *
 * The emulated cuBLASLt offers two algorithms, of which the second sums the halves of k apart. Here its events measure with
 * a clock that favours whichever is tried first, or last: __wrap_clock_gettime. A device makes its plans anew. */
#include "err.h"
#include "ops.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#define SPLIT_WORKSPACE_BYTES 4096 /* what the second algorithm wants, and overwrites */

enum favoured { FAVOUR_FIRST, FAVOUR_LAST };

struct product {
    int64_t m, n, k;
    enum dtype act, y;
};

static enum favoured favoured;
static long asked; /* times since the device was opened */

int __wrap_clock_gettime(clockid_t clock, struct timespec *time);

/* Goes slower each time it is asked, or faster. */
int __wrap_clock_gettime(clockid_t clock, struct timespec *time)
{
    const long n = ++asked, ns = favoured == FAVOUR_FIRST ? n * n : 1000000 * n - n * n;
    (void)clock;
    *time = (struct timespec){.tv_sec = 1, .tv_nsec = ns};
    return 0;
}

static void must(int rc)
{
    if (rc != 0) fail_msg("%s\n%s", err_message(), err_trace_text());
}

/* Pseudo-random, and the second half of k is the first one's mirror, negated in one factor: the product is nothing but its
 * rounding errors, which the order of summation decides. */
static float element(int64_t at, int64_t other, int64_t k, bool negated)
{
    const bool second = at >= k / 2;
    const uint32_t bits = (uint32_t)((second ? k - 1 - at : at) * 7919 + other * 104729 + 1) * 2654435769U;
    const float value = (float)((int32_t)bits >> 16) / (float)(1 << (15 + (bits >> 8 & 7)));
    return second && negated ? -value : value;
}

static struct tensor matrix(struct device *dev, enum dtype dtype, int64_t rows, int64_t cols)
{
    struct tensor t = tensor_2d(NULL, dtype, rows, cols);
    must(dev->table->alloc(dev, tensor_bytes(t), &t.data));
    return t;
}

/* A [rows, k] matrix of such elements, rounded on the device. */
static struct tensor cancelling(struct device *dev, enum dtype dtype, int64_t rows, int64_t k, bool negated)
{
    const struct tensor t = matrix(dev, dtype, rows, k), wide = matrix(dev, DT_F32, rows, k);
    float *host = malloc(tensor_bytes(wide));
    assert_non_null(host);
    for (int64_t row = 0; row < rows; row++)
        for (int64_t at = 0; at < k; at++)
            host[row * k + at] = element(at, row, k, negated);
    must(dev->table->upload(dev, wide.data, host, tensor_bytes(wide)));
    must(op_copy(dev, t, wide));
    dev->table->free(dev, wide.data, tensor_bytes(wide));
    free(host);
    return t;
}

/* A·Bᵀ on a device of its own, under that clock; the caller frees. *split says whether the second algorithm was taken. */
static void *product_of(const struct product *p, enum favoured clock, size_t *bytes, bool *split)
{
    struct device dev;
    unsigned char workspace[SPLIT_WORKSPACE_BYTES], overwritten[SPLIT_WORKSPACE_BYTES];
    favoured = clock;
    asked = 0;
    must(device_open(&dev, DEVICE_CUDA, 0, 1));
    dev.workspace_bytes = dev.table->workspace_bytes(&dev, NULL, ATTENTION_FLASH);
    must(dev.table->alloc(&dev, dev.workspace_bytes, &dev.workspace));
    const struct tensor a = cancelling(&dev, p->act, p->m, p->k, false), y = matrix(&dev, p->y, p->m, p->n);
    const struct tensor b = cancelling(&dev, p->act, p->n, p->k, true);
    must(op_matmul(&dev, y, a, b, TENSOR_NONE, TENSOR_NONE, MATMUL_TB));
    must(op_fill(&dev, tensor_1d(dev.workspace, DT_F32, SPLIT_WORKSPACE_BYTES / 4), 0));
    must(op_matmul(&dev, y, a, b, TENSOR_NONE, TENSOR_NONE, MATMUL_TB)); /* planned already */
    *bytes = tensor_bytes(y);
    void *host = malloc(*bytes);
    assert_non_null(host);
    must(dev.table->download(&dev, host, y.data, *bytes));
    must(dev.table->download(&dev, workspace, dev.workspace, sizeof workspace));
    memset(overwritten, 0xff, sizeof overwritten);
    *split = memcmp(workspace, overwritten, sizeof workspace) == 0;
    dev.table->free(&dev, a.data, tensor_bytes(a));
    dev.table->free(&dev, b.data, tensor_bytes(b));
    dev.table->free(&dev, y.data, tensor_bytes(y));
    dev.table->free(&dev, dev.workspace, dev.workspace_bytes);
    device_close(&dev);
    return host;
}

/* Small results in bf16 are where two algorithms seem alike on most matrices. */
static void test_bits_do_not_depend_on_the_clock(void **state)
{
    static const struct product products[] = {
        {1, 1, 64, DT_BF16, DT_BF16}, {3, 2, 33, DT_BF16, DT_BF16}, {8, 8, 200, DT_BF16, DT_BF16},
        {5, 4, 7, DT_BF16, DT_F32},   {2, 3, 100, DT_F32, DT_F32},  {16, 70, 40, DT_BF16, DT_BF16},
    };
    (void)state;
    for (size_t i = 0; i < sizeof products / sizeof *products; i++) {
        size_t bytes = 0;
        bool split[2];
        void *const first = product_of(&products[i], FAVOUR_FIRST, &bytes, &split[0]);
        void *const last = product_of(&products[i], FAVOUR_LAST, &bytes, &split[1]);
        assert_memory_equal(first, last, bytes);
        assert_false(split[0] || split[1]);
        free(first);
        free(last);
    }
}

/* With one product to sum there is one order, so the clock may choose: that it does shows that these tests mean something. */
static void test_the_faster_of_equals_is_taken(void **state)
{
    static const struct product product = {4, 4, 1, DT_BF16, DT_BF16};
    (void)state;
    size_t bytes = 0;
    bool split = true;
    free(product_of(&product, FAVOUR_FIRST, &bytes, &split));
    assert_false(split);
    free(product_of(&product, FAVOUR_LAST, &bytes, &split));
    assert_true(split);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bits_do_not_depend_on_the_clock),
        cmocka_unit_test(test_the_faster_of_equals_is_taken),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
