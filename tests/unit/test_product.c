/* The portable product has one meaning, bit for bit: each element is one chain of fused multiply-adds along k, in order.
 * The same source compiled for several kinds of CPU, and matmul on top of it, are held against that chain. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#ifdef __aarch64__
#include <sys/auxv.h>
#endif

#include "../kernels/cpu/product.h"
#include "err.h"

/* kernels/cpu/portable.c as compiled for each kind of CPU: one X(name, whether it runs on this one) for each. */
#ifdef __x86_64__
#define PORTABLE_VARIANTS(X)                    \
    X(baseline, 1)                              \
    X(avx2, __builtin_cpu_supports("avx2") > 0) \
    X(avx512, __builtin_cpu_supports("avx512vl") > 0)
#elif defined(__aarch64__)
#define PORTABLE_VARIANTS(X) X(baseline, 1) X(sve, (getauxval(AT_HWCAP) & HWCAP_SVE) != 0)
#else
#define PORTABLE_VARIANTS(X) X(baseline, 1)
#endif
#define X(name, runs) int portable_##name(struct product_table *table);
PORTABLE_VARIANTS(X)
#undef X

static uint64_t the_random = 1;

/* Of either sign and of sizes so different that each order of additions, and each rounding, shows; SplitMix64. */
static float draw(void)
{
    uint64_t z = the_random += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return ldexpf((float)(int32_t)(z >> 40) - 0x1p23f, (int)(z % 16) - 30);
}

static float *draw_many(int64_t n)
{
    float *x = malloc((size_t)(n > 0 ? n : 1) * sizeof *x);
    assert_non_null(x);
    for (int64_t i = 0; i < n; i++)
        x[i] = draw();
    return x;
}

static uint32_t bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static void check_tiles(const char *name, const struct product_table *table, struct tile_product p)
{
    float *a = draw_many(p.m * p.k), *b = draw_many(p.k * p.n), *c = draw_many(p.m * p.n);
    float *want = malloc((size_t)(p.m * p.n) * sizeof *want);
    assert_non_null(want);
    const int64_t panel = table->panel[DT_F32];
    for (int64_t i = 0; i < p.m * p.n; i++) {
        const int64_t row = i / p.n, col = i % p.n;
        want[i] = p.adds ? c[i] : 0;
        for (int64_t l = 0; l < p.k; l++)
            want[i] = fmaf(a[row * p.k + l], b[(col / panel * p.k + l) * panel + col % panel], want[i]);
    }
    assert_int_equal(table->run(table, 0, NULL, p, a, b, c), 0);
    for (int64_t i = 0; i < p.m * p.n; i++)
        if (bits_of(c[i]) != bits_of(want[i]))
            fail_msg("%s: element %lld of %lld × %lld × %lld is %a, expected %a", name, (long long)i, (long long)p.m,
                     (long long)p.n, (long long)p.k, (double)c[i], (double)want[i]);
    free(a), free(b), free(c), free(want);
}

static void test_variants(void **state)
{
    (void)state;
    const struct {
        const char *name;
        bool runs;
        int (*open)(struct product_table *);
    } variants[] = {
#define X(name, runs) {#name, runs, portable_##name},
        PORTABLE_VARIANTS(X)
#undef X
    };
    static const struct tile_product products[] = {
        {.m = 16, .n = 64, .k = 16}, {.m = 48, .n = 128, .k = 160}, {.m = 16, .n = 192, .k = 512, .adds = true}};
    for (size_t v = 0; v < sizeof variants / sizeof *variants; v++) {
        struct product_table table = {.threads = 1};
        if (!variants[v].runs) {
            print_message("%s: not on this CPU\n", variants[v].name);
            continue;
        }
        assert_int_equal(variants[v].open(&table), 0);
        for (size_t i = 0; i < sizeof products / sizeof *products; i++)
            check_tiles(variants[v].name, &table, products[i]);
    }
}

/* Rounds to bf16, ties to even. */
static uint16_t narrow(float x)
{
    const uint32_t bits = bits_of(x);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

static float widen(uint16_t x)
{
    const uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}

static void *stored(const float *x, int64_t n, enum dtype dtype)
{
    void *data = calloc((size_t)n + 1, sizeof(float));
    assert_non_null(data);
    for (int64_t i = 0; i < n; i++) {
        if (dtype == DT_BF16)
            ((uint16_t *)data)[i] = narrow(x[i]);
        else
            ((float *)data)[i] = x[i];
    }
    return data;
}

static struct tensor matrix(void *data, enum dtype dtype, int64_t rows, int64_t cols, bool transposed)
{
    return transposed ? tensor_2d(data, dtype, cols, rows) : tensor_2d(data, dtype, rows, cols);
}

/* y (f32) = A·B with packed and plain B, on 1 and 3 threads: the bits of the chain. */
static void check_matmul(struct device *dev, enum dtype dtype, unsigned flags, int64_t m, int64_t n, int64_t k)
{
    const bool ta = flags & MATMUL_TA, tb = flags & MATMUL_TB;
    float *a = draw_many(m * k), *b = draw_many(k * n), *y = malloc((size_t)(m * n) * sizeof *y);
    assert_non_null(y);
    for (int64_t i = 0; i < m * k && dtype == DT_BF16; i++)
        a[i] = widen(narrow(a[i]));
    for (int64_t i = 0; i < k * n && dtype == DT_BF16; i++)
        b[i] = widen(narrow(b[i]));
    void *a_data = stored(a, m * k, dtype), *b_data = stored(b, k * n, dtype), *packed_data = NULL;
    const struct tensor bt = matrix(b_data, dtype, k, n, tb);
    const size_t bytes = dev->table->pack_bytes(dev, bt, tb);
    assert_int_equal(dev->table->alloc(dev, bytes, &packed_data), 0);
    const struct tensor packed = tensor_1d(packed_data, dtype, (int64_t)(bytes / dtype_bytes(dtype)));
    assert_int_equal(op_pack(dev, packed, bt, tb), 0);
    for (int run = 0; run < 4; run++) {
        dev->threads = run & 1 ? 3 : 1;
        assert_int_equal(op_matmul(dev, tensor_2d(y, DT_F32, m, n), matrix(a_data, dtype, m, k, ta), bt,
                                   run & 2 ? packed : TENSOR_NONE, TENSOR_NONE, flags),
                         0);
        for (int64_t i = 0; i < m * n; i++) {
            float want = 0;
            for (int64_t l = 0; l < k; l++)
                want = fmaf(a[ta ? l * m + i / n : i / n * k + l], b[tb ? i % n * k + l : l * n + i % n], want);
            if (bits_of(want) != bits_of(y[i]))
                fail_msg("%s, flags %u, run %d: element %lld of %lld × %lld × %lld is %a, expected %a",
                         dtype_name(dtype), flags, run, (long long)i, (long long)m, (long long)n, (long long)k,
                         (double)y[i], (double)want);
        }
    }
    dev->table->free(dev, packed_data, bytes);
    free(a), free(b), free(y), free(a_data), free(b_data);
}

static void test_matmul(void **state)
{
    static const enum dtype types[] = {DT_F32, DT_BF16};
    struct device *dev = *state;
    for (int t = 0; t < 2; t++) {
        for (unsigned flags = 0; flags < 4; flags++) {
            check_matmul(dev, types[t], flags, 1, 1, 1);
            check_matmul(dev, types[t], flags, 17, 65, 130);
            check_matmul(dev, types[t], flags, 7, 19, 1100); /* three tiles along k */
        }
        check_matmul(dev, types[t], 0, 260, 258, 40); /* two by two tiles */
    }
}

/* A library is refused where there is none, and the device says what multiplies. */
static void test_choice(void **state)
{
    struct device *dev = *state;
    char text[128];
    assert_int_equal(device_choose_product(dev, PRODUCT_LIBRARY), product_library_built() ? 0 : ERR_UNSUPPORTED);
    err_clear();
    assert_int_equal(device_choose_product(dev, PRODUCT_PORTABLE), 0);
    device_describe(dev, text, sizeof text);
    assert_non_null(strstr(text, "portable product"));
}

int main(void)
{
    struct device dev;
    int rc = device_open(&dev, DEVICE_CPU, 0, 3);
    if (rc == 0) rc = device_choose_product(&dev, PRODUCT_PORTABLE);
    if (rc == 0) {
        dev.workspace_bytes = dev.table->workspace_bytes(&dev, NULL, ATTENTION_FLASH);
        rc = dev.table->alloc(&dev, dev.workspace_bytes, &dev.workspace);
    }
    if (rc != 0) return 1;
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_variants), cmocka_unit_test_prestate(test_choice, &dev),
                                       cmocka_unit_test_prestate(test_matmul, &dev)};
    const int failed = cmocka_run_group_tests(tests, NULL, NULL);
    dev.table->free(&dev, dev.workspace, dev.workspace_bytes);
    device_close(&dev);
    return failed;
}
