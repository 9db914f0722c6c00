/* The few scalars of a step: what the ranks sum up, and what is decided from it. */
#include <math.h>
#include <string.h>

#include "op_test.h"

void test_op_step_sums(struct device *dev)
{
    struct op_test test = op_test_begin(dev, 130);
    const double faults[] = {0, FAULT_OVERFLOW, FAULT_NAN, FAULT_OVERFLOW | FAULT_NAN, FAULT_STOP};
    const int64_t loss[2] = {-0x123456789abc, 0x1234567890};
    for (int i = 0; i < 5; i++) {
        const int64_t before[SUMS_ELEMS] = {9, 9, 9, 9, 9, 4, 5, 6, 7};
        const struct tensor sums = op_values_i64(&test, before, SUMS_ELEMS);
        const struct op_tensor fault = op_values(&test, tensor_1d(NULL, DT_I32, 1), &faults[i]);
        const int64_t want[SUMS_ELEMS] = {i & 1, i >> 1 & 1, i >> 2, loss[0], loss[1], 4, 5, 6, 7};
        op_ok(op_step_sums(dev, sums, fault.t, op_values_i64(&test, loss, 2)));
        assert_memory_equal(op_read_i64(&test, sums), want, sizeof want);
    }
    op_test_end(&test);
}

/* What op_step_decide makes of `control` and sums with these faults, of two ranks each, and squares Σ limb·2^(32·i). */
static struct step_control decide(struct op_test *test, struct step_control control, int faults,
                                  const int64_t limbs[4], bool exact, struct step_limits limits)
{
    int64_t values[SUMS_ELEMS] = {[SUMS_OVERFLOW] = faults & FAULT_OVERFLOW ? 2 : 0,
                                  [SUMS_NAN] = faults & FAULT_NAN ? 2 : 0,
                                  [SUMS_STOP] = faults & FAULT_STOP ? 2 : 0,
                                  [SUMS_LOSS] = 77,
                                  [SUMS_Z_LOSS] = 78};
    memcpy(&values[SUMS_SQUARES], limbs, 4 * sizeof *limbs);
    const struct tensor t = op_values_i64(test, (const int64_t *)&control, CONTROL_ELEMS);
    struct step_control after;
    op_ok(op_step_decide(test->dev, t, op_values_i64(test, values, SUMS_ELEMS), exact, limits));
    memcpy(&after, op_read_i64(test, t), sizeof after);
    return after;
}

static bool near(double got, double want)
{
    return fabs(got - want) <= 1e-14 * fabs(want);
}

void test_op_step_decide(struct device *dev)
{
    struct op_test test = op_test_begin(dev, 131);
    const struct step_control before = {.scale = 0x1p30, .clip = 0.5, .norm = 2, .loss = 5, .steps = 3};
    const int64_t limbs[4] = {1, 2, 300, 0}; /* as summed over ranks: not carried */
    const double squares = 1 + 2 * 0x1p32 + 300 * 0x1p64;

    struct step_control c = decide(&test, before, 0, limbs, true, (struct step_limits){.clip = 1});
    const double norm = sqrt(squares) / 0x1p30;
    assert_true(near(c.norm, norm) && near(c.clip, 1 / (norm + 1e-6)));
    assert_true(c.unscale == 0x1p-30 && c.scale == step_scale(norm));
    assert_true(c.loss == 77 && c.z_loss == 78 && c.fault == 0 && c.steps == 4);

    c = decide(&test, before, 0, limbs, false, (struct step_limits){.clip = 1e6});
    assert_true(near(c.norm, sqrt(squares) / 0x1p32) && c.clip == 1); /* a norm below the largest is left alone */
    assert_true(decide(&test, before, 0, limbs, true, (struct step_limits){.clip = 0}).clip == 1);

    c = decide(&test, before, FAULT_OVERFLOW, limbs, true, (struct step_limits){.clip = 1});
    assert_true(c.fault == FAULT_OVERFLOW && c.scale == before.scale && c.steps == 3 && c.loss == 5 && c.norm == 2);
    c = decide(&test, before, FAULT_OVERFLOW | FAULT_NAN, limbs, true, (struct step_limits){.clip = 1});
    assert_true(c.fault == (FAULT_OVERFLOW | FAULT_NAN));
    c = decide(&test, before, FAULT_STOP | FAULT_NAN, limbs, true, (struct step_limits){.clip = 1});
    assert_true(c.fault == FAULT_STOP && c.scale == before.scale && c.steps == 3 && c.loss == 5 && c.norm == 2);

    struct step_control stopped = before; /* a fault stays, whatever comes after it */
    stopped.fault = FAULT_OVERFLOW;
    c = decide(&test, stopped, FAULT_NAN, limbs, true, (struct step_limits){.clip = 1});
    assert_memory_equal(&c, &stopped, sizeof c);

    /* A loss of 77 is a spike to a mean of 70 and a deviation of 2, when that is known from enough steps, and not before. */
    struct step_control calm = before;
    calm.loss_mean = 70;
    calm.loss_variance = 4;
    calm.loss_seen = SPIKE_STEPS;
    c = decide(&test, calm, 0, limbs, true, (struct step_limits){.clip = 1, .spike_sigma = 3});
    assert_true(c.fault == FAULT_SPIKE && c.steps == 3 && c.loss_mean == 70 && c.loss_seen == SPIKE_STEPS);
    c = decide(&test, calm, 0, limbs, true, (struct step_limits){.clip = 1, .spike_sigma = 4});
    assert_true(c.fault == 0 && near(c.loss_mean, 70 + 7.0 / 64) &&
                near(c.loss_variance, 63.0 / 64 * (4 + 49.0 / 64)));
    calm.loss_seen--;
    c = decide(&test, calm, 0, limbs, true, (struct step_limits){.clip = 1, .spike_sigma = 3});
    assert_true(c.fault == 0 && c.loss_seen == SPIKE_STEPS);

    const int64_t zeros[4] = {0};
    c = decide(&test, before, 0, zeros, true, (struct step_limits){.clip = 1});
    assert_true(c.norm == 0 && c.clip == 1 && c.scale == step_scale(0));
    op_test_end(&test);
}
