/* The exponentials of the CPU kernels against libm's in double, over the whole range of results and at its ends. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "../../kernels/cpu/cpu.h"

#define BOUND 1e-7
#define STEPS 1000000

static void test_accuracy(void **state)
{
    (void)state;
    for (int i = 0; i < STEPS; i++) {
        const float x = -87.0F + 175.7F * (float)i / STEPS;
        const double want = exp((double)x);
        if (!(fabs((double)cpu_exp(x) - want) <= BOUND * want))
            fail_msg("cpu_exp(%.9g) is %.9g", (double)x, (double)cpu_exp(x));
        if (x <= 0 && !(fabs((double)cpu_exp_negative(x) - want) <= BOUND * want))
            fail_msg("cpu_exp_negative(%.9g) is %.9g", (double)x, (double)cpu_exp_negative(x));
    }
}

static void test_ends(void **state)
{
    (void)state;
    assert_true(cpu_exp(0) == 1 && cpu_exp_negative(0) == 1);
    assert_true(cpu_exp(-INFINITY) == 0 && cpu_exp_negative(-INFINITY) == 0);
    assert_true(cpu_exp(INFINITY) == INFINITY && cpu_exp(89) == INFINITY);
    assert_true(isnan(cpu_exp(NAN)) && isnan(cpu_exp_negative(NAN)));
    assert_true(fabs((double)cpu_exp(-100) - exp(-100)) <= 0x1p-149); /* a subnormal number: to its last place */
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_accuracy), cmocka_unit_test(test_ends)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
