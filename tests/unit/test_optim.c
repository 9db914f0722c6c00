/* Learning-rate schedules at their corners, and the scale of exact reduction. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "optim.h"

#include <math.h>
#include <stdlib.h>

static struct config *schedule(enum schedule kind, enum decay_shape shape)
{
    struct config *cfg = calloc(1, sizeof *cfg);
    assert_non_null(cfg);
    config_defaults(cfg);
    cfg->run.steps = 100;
    cfg->optim.lr = 1;
    cfg->optim.min_lr = 0.1;
    cfg->optim.warmup_steps = 10;
    cfg->optim.decay_steps = 20;
    cfg->optim.schedule = (int)kind;
    cfg->optim.decay_shape = (int)shape;
    return cfg;
}

static void near(double a, double b)
{
    assert_true(fabs(a - b) < 1e-12);
}

static void warmup_is_linear_and_never_zero(void **state)
{
    (void)state;
    for (int kind = SCHEDULE_WSD; kind <= SCHEDULE_CONSTANT; kind++) {
        struct config *cfg = schedule((enum schedule)kind, DECAY_LINEAR);
        near(optim_lr(cfg, 0), 0.1);
        near(optim_lr(cfg, 4), 0.5);
        near(optim_lr(cfg, 9), 1);
        cfg->optim.warmup_steps = 0;
        assert_true(optim_lr(cfg, 0) > 0.9);
        free(cfg);
    }
}

static void decay_ends_at_min_lr(void **state)
{
    (void)state;
    static const double halfway[] = {0.1 + 0.9 * (1 - 0.70710678118654752), 0.55, 0.55};
    for (int shape = DECAY_1_SQRT; shape <= DECAY_COSINE; shape++) {
        struct config *cfg = schedule(SCHEDULE_WSD, (enum decay_shape)shape);
        near(optim_lr(cfg, 10), 1);
        near(optim_lr(cfg, 79), 1);
        assert_true(optim_lr(cfg, 80) < 1);
        near(optim_lr(cfg, 89), halfway[shape]);
        near(optim_lr(cfg, 99), 0.1);
        free(cfg);
    }
    struct config *cfg = schedule(SCHEDULE_COSINE, DECAY_1_SQRT);
    near(optim_lr(cfg, 54), 0.55);
    near(optim_lr(cfg, 99), 0.1);
    cfg->optim.schedule = SCHEDULE_LINEAR;
    near(optim_lr(cfg, 54), 0.55);
    cfg->optim.schedule = SCHEDULE_CONSTANT;
    near(optim_lr(cfg, 99), 1);
    free(cfg);
}

static void scale_is_a_power_of_two_that_follows_the_norm(void **state)
{
    (void)state;
    for (int i = 0; i < 32; i++) {
        const double norm = 1e-9 * pow(3.7, i);
        int exponent = 0;
        const double scale = step_scale(norm);
        assert_true(frexp(scale, &exponent) == 0.5);
        assert_true(norm * scale >= ldexp(1, 39) && norm * scale <= ldexp(1, 40));
    }
    assert_true(step_scale(0) > 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(warmup_is_linear_and_never_zero),
        cmocka_unit_test(decay_ends_at_min_lr),
        cmocka_unit_test(scale_is_a_power_of_two_that_follows_the_norm),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
