/* The sampler: a bijection for every size, uniform, exact quotas, and an order that never changes. */
#include "data/sampler.h"

#include "err.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static void permutation_is_a_bijection(void **state)
{
    (void)state;
    const uint64_t sizes[] = {1, 2, 3, 4, 5, 15, 16, 17, 1000, 4097, 65536, 65537};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        const uint64_t n = sizes[i];
        unsigned char *seen = calloc(n, 1);
        assert_non_null(seen);
        for (uint64_t x = 0; x < n; x++) {
            const uint64_t y = sampler_permute(42, n, x);
            assert_true(y < n);
            assert_int_equal(seen[y], 0);
            seen[y] = 1;
        }
        free(seen);
    }
    assert_true(sampler_permute(1, UINT64_C(1) << 50, 12345) < UINT64_C(1) << 50);
}

/* Pearson's chi-square of counts against a uniform law. */
static double chi_square(const int *count, int cells, double expected)
{
    double sum = 0;
    for (int i = 0; i < cells; i++)
        sum += (count[i] - expected) * (count[i] - expected) / expected;
    return sum;
}

/* Over keys, each x lands on each y equally often. The bound is the 99.99% quantile for n² − 2n + 1 degrees of freedom
 * (Wilson & Hilferty 1931). */
static void permutation_is_uniform(void **state)
{
    (void)state;
    static const struct {
        int n;
        double bound;
    } cases[] = {{3, 24.15}, {5, 46.23}, {17, 348.8}, {32, 1132.6}};
    enum { KEYS = 20000 };
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        const int n = cases[c].n;
        int *count = calloc((size_t)n * (size_t)n, sizeof *count);
        assert_non_null(count);
        for (int key = 0; key < KEYS; key++) {
            for (int x = 0; x < n; x++)
                count[x * n + (int)sampler_permute((uint64_t)key, (uint64_t)n, (uint64_t)x)]++;
        }
        assert_true(chi_square(count, n * n, (double)KEYS / n) < cases[c].bound);
        free(count);
    }
}

/* Neighbouring samples are not neighbours in the data: few steps of +1 remain, as in a random order (about one). */
static void permutation_breaks_up_runs(void **state)
{
    (void)state;
    int runs = 0;
    for (uint64_t x = 0; x + 1 < 10007; x++)
        runs += sampler_permute(7, 10007, x) + 1 == sampler_permute(7, 10007, x + 1);
    assert_in_range(runs, 0, 8);
}

static void epochs_cover_and_differ(void **state)
{
    (void)state;
    enum { N = 1000 };
    const int64_t sequences[] = {N};
    const double weights[] = {1};
    struct sampler sampler;
    assert_int_equal(sampler_open(&sampler, 5, 1, sequences, weights), 0);
    /* A block of 65536 slots holds 65 whole epochs of 1000; slots are permuted, so take the block as a whole. */
    int *count = calloc((size_t)66 * N, sizeof *count);
    assert_non_null(count);
    for (int64_t i = 0; i < SAMPLER_BLOCK; i++) {
        const struct sample s = sampler_at(&sampler, i);
        assert_in_range(s.epoch, 0, 65);
        count[s.epoch * N + s.sequence]++;
    }
    for (int i = 0; i < 65 * N; i++)
        assert_int_equal(count[i], 1);
    free(count);

    /* The same sample of two epochs, and of two seeds, is another sequence nearly always. */
    struct sampler other;
    assert_int_equal(sampler_open(&other, 6, 1, sequences, weights), 0);
    int same_block = 0, same_seed = 0;
    for (int64_t i = 0; i < N; i++) {
        const int64_t here = sampler_at(&sampler, i).sequence;
        same_block += here == sampler_at(&sampler, i + SAMPLER_BLOCK).sequence;
        same_seed += here == sampler_at(&other, i).sequence;
    }
    assert_in_range(same_block, 0, 12);
    assert_in_range(same_seed, 0, 12);
}

static void quotas_are_exact(void **state)
{
    (void)state;
    const int64_t sequences[] = {70001, 13, 999, 5, 100};
    const double weights[] = {0.6, 0.3, 0.1, 1e-9, 0};
    struct sampler sampler;
    assert_int_equal(sampler_open(&sampler, 1234, 5, sequences, weights), 0);
    for (int64_t block = 0; block < 3; block++) {
        int64_t count[5] = {0};
        for (int64_t i = 0; i < SAMPLER_BLOCK; i++) {
            const struct sample s = sampler_at(&sampler, block * SAMPLER_BLOCK + i);
            assert_in_range(s.sequence, 0, sequences[s.dataset] - 1);
            count[s.dataset]++;
        }
        /* 39321.6, 19660.8, 6553.6 and at least 1: the largest remainder gets the one slot that is left. */
        assert_int_equal(count[0], 39321);
        assert_int_equal(count[1], 19661);
        assert_int_equal(count[2], 6553);
        assert_int_equal(count[3], 1);
        assert_int_equal(count[4], 0);
    }
}

/* Many datasets with tiny weights: each gets its slot, the largest pays for it. */
static void tiny_weights_get_a_slot(void **state)
{
    (void)state;
    int64_t sequences[CONFIG_DATASETS_MAX];
    double weights[CONFIG_DATASETS_MAX];
    for (int d = 0; d < CONFIG_DATASETS_MAX; d++) {
        sequences[d] = d + 1;
        weights[d] = d == 0 ? 1 : 1e-12;
    }
    struct sampler sampler;
    assert_int_equal(sampler_open(&sampler, 1, CONFIG_DATASETS_MAX, sequences, weights), 0);
    assert_int_equal(sampler.quota_begin[1], SAMPLER_BLOCK - (CONFIG_DATASETS_MAX - 1));
    assert_int_equal(sampler.quota_begin[CONFIG_DATASETS_MAX], SAMPLER_BLOCK);
}

static void answers_do_not_depend_on_the_order_of_calls(void **state)
{
    (void)state;
    const int64_t sequences[] = {123457, 89};
    const double weights[] = {2, 1};
    struct sampler a, b;
    assert_int_equal(sampler_open(&a, 99, 2, sequences, weights), 0);
    assert_int_equal(sampler_open(&b, 99, 2, sequences, weights), 0);
    enum { N = 5000 };
    struct sample forward[N];
    for (int i = 0; i < N; i++)
        forward[i] = sampler_at(&a, (int64_t)i * 977);
    for (int i = N - 1; i >= 0; i--) {
        const struct sample s = sampler_at(&b, (int64_t)i * 977);
        assert_int_equal(s.dataset, forward[i].dataset);
        assert_int_equal(s.sequence, forward[i].sequence);
        assert_int_equal(s.epoch, forward[i].epoch);
    }
}

/* These values are a promise to every run ever started: if they change, resumed runs read other data. */
static void golden_order(void **state)
{
    (void)state;
    const int64_t sequences[] = {1000003, 4096, 77};
    const double weights[] = {5, 3, 0.5};
    struct sampler sampler;
    assert_int_equal(sampler_open(&sampler, 1234, 3, sequences, weights), 0);
    static const struct {
        int64_t index;
        struct sample sample;
    } golden[] = {
        {INT64_C(0), {0, 484489, 0}},
        {INT64_C(1), {1, 1877, 1}},
        {INT64_C(2), {0, 611458, 0}},
        {INT64_C(3), {1, 3077, 0}},
        {INT64_C(65535), {0, 60458, 0}},
        {INT64_C(65536), {0, 428673, 0}},
        {INT64_C(1000000), {0, 419599, 0}},
        {INT64_C(123456789), {0, 342647, 72}},
        {INT64_C(1099511627776), {1, 307, 94740482}},
    };
    for (size_t i = 0; i < sizeof golden / sizeof *golden; i++) {
        const struct sample s = sampler_at(&sampler, golden[i].index);
        assert_int_equal(s.dataset, golden[i].sample.dataset);
        assert_int_equal(s.sequence, golden[i].sample.sequence);
        assert_int_equal(s.epoch, golden[i].sample.epoch);
    }
}

static void bad_datasets_are_refused(void **state)
{
    (void)state;
    const int64_t sequences[] = {10, 0};
    const double empty[] = {1, 1}, zero[] = {0, 0}, negative[] = {1, -1};
    struct sampler sampler;
    assert_int_equal(sampler_open(&sampler, 1, 2, sequences, empty), ERR_DATA);
    assert_int_equal(sampler_open(&sampler, 1, 2, sequences, zero), ERR_CONFIG);
    assert_int_equal(sampler_open(&sampler, 1, 2, sequences, negative), ERR_CONFIG);
    assert_non_null(strstr(err_message(), "dataset 2"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(permutation_is_a_bijection),
        cmocka_unit_test(permutation_is_uniform),
        cmocka_unit_test(permutation_breaks_up_runs),
        cmocka_unit_test(epochs_cover_and_differ),
        cmocka_unit_test(quotas_are_exact),
        cmocka_unit_test(tiny_weights_get_a_slot),
        cmocka_unit_test(answers_do_not_depend_on_the_order_of_calls),
        cmocka_unit_test(golden_order),
        cmocka_unit_test(bad_datasets_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
