/* The few scalars that a training step turns on, and their arithmetic.
 *
 * They lie in device memory: what later ops of a step need to know of earlier ones, the host need not wait for. The
 * functions are what both backends' ops of the same names do (ops.h), on the host or in one thread of a kernel. */
#ifndef TATARA_STEP_CONTROL_H
#define TATARA_STEP_CONTROL_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>

/* FAULT_STOP: a rank was asked to stop, and left out micro-batches. */
enum { FAULT_OVERFLOW = 1, FAULT_NAN = 2, FAULT_SPIKE = 4, FAULT_STOP = 8 };

/* How a step stands; equal on all ranks. */
struct step_control {
    double scale;   /* quanta per unit of gradient, for grad_add; a power of two */
    double unscale; /* its inverse, as it was in the last step applied */
    double clip;    /* factor of the gradient in adamw */
    double norm;    /* of the gradient in the last step applied, before clipping */
    int64_t loss;   /* the same step's sum of losses: cross-entropy alone */
    int64_t z_loss; /* and of z-losses */
    int64_t fault;  /* FAULT_ bits of the step after it: that one was not applied, nor any that was issued later */
    int64_t steps;  /* applied since the host set this to 0 */
    double loss_mean, loss_variance; /* of the sums of losses of steps applied, the recent ones weighing most */
    int64_t loss_seen;               /* how many steps they know of */
};

/* What a step must keep to. */
struct step_limits {
    double clip;        /* larger norms are scaled down to this; 0: none is */
    double spike_sigma; /* a loss so many standard deviations above the mean is a fault; 0: none is */
};

/* Steps that mean and variance reach back, and that they must have seen before a loss is judged by them. */
#define SPIKE_STEPS 64

#define CONTROL_ELEMS ((int64_t)(sizeof(struct step_control) / sizeof(int64_t)))

/* Where in the sums: counts of ranks, the losses, and the four limbs of the squares. */
enum { SUMS_OVERFLOW, SUMS_NAN, SUMS_STOP, SUMS_LOSS, SUMS_Z_LOSS, SUMS_SQUARES, SUMS_ELEMS = SUMS_SQUARES + 4 };
#define SQUARES_BITS 64

#ifdef __CUDACC__
#define STEP_INLINE __host__ __device__ static inline
#else
#define STEP_INLINE static inline
#endif

/* A gradient's norm is placed at 2^40 quanta: elements of ordinary size then keep more bits than fp32 has, and an element
 * may still be 2^12 times the whole norm before it overflows (grad_add's limit). Before the first step nothing is known:
 * gradients of a freshly initialised model have a norm of about 4. */
STEP_INLINE double step_scale(double norm)
{
    int exponent = 0;
    frexp(norm > 0 ? norm : 4.0, &exponent);
    return ldexp(1.0, 40 - exponent);
}

/* limbs += squares · 2^SQUARES_BITS; false when there is no room for them. */
STEP_INLINE bool step_squares(int64_t *limbs, double squares)
{
    double rest = ldexp(squares, SQUARES_BITS);
    if (!(rest < ldexp(1.0, 126))) return false;
    for (int i = 3; i >= 0; i--) {
        const double limb = floor(ldexp(rest, -32 * i));
        limbs[i] += (int64_t)limb;
        rest -= ldexp(limb, 32 * i);
    }
    return true;
}

STEP_INLINE void step_sums(int64_t *sums, int32_t fault, const int64_t *loss)
{
    sums[SUMS_OVERFLOW] = (fault & FAULT_OVERFLOW) != 0;
    sums[SUMS_NAN] = (fault & FAULT_NAN) != 0;
    sums[SUMS_STOP] = (fault & FAULT_STOP) != 0;
    sums[SUMS_LOSS] = loss[0];
    sums[SUMS_Z_LOSS] = loss[1];
}

/* Judges the loss, and lets mean and variance know of it when it is good (West 1979, with exponential weights). */
STEP_INLINE bool step_is_spike(struct step_control *control, double loss, double sigma)
{
    const double away = loss - control->loss_mean;
    if (sigma > 0 && control->loss_seen >= SPIKE_STEPS && away > sigma * sqrt(control->loss_variance)) return true;
    const double weight =
        control->loss_seen < SPIKE_STEPS ? 1.0 / (double)(control->loss_seen + 1) : 1.0 / SPIKE_STEPS;
    control->loss_mean += weight * away;
    control->loss_variance = (1 - weight) * (control->loss_variance + weight * away * away);
    control->loss_seen++;
    return false;
}

STEP_INLINE void step_decide(struct step_control *control, const int64_t *sums, bool exact, struct step_limits limits)
{
    if (control->fault != 0) return;
    control->fault = (sums[SUMS_OVERFLOW] ? FAULT_OVERFLOW : 0) | (sums[SUMS_NAN] ? FAULT_NAN : 0);
    if (sums[SUMS_STOP]) control->fault = FAULT_STOP; /* of a part of a step nothing else is known */
    if (control->fault != 0) return;
    double squares = 0;
    for (int i = 3; i >= 0; i--)
        squares = ldexp(squares, 32) + (double)sums[SUMS_SQUARES + i];
    const double quanta = exact ? control->scale : ldexp(1.0, SQUARES_BITS / 2);
    const double norm = sqrt(squares / (quanta * quanta)), factor = limits.clip > 0 ? limits.clip / (norm + 1e-6) : 1;
    if (!isfinite(norm))
        control->fault = FAULT_NAN;
    else if (step_is_spike(control, (double)sums[SUMS_LOSS], limits.spike_sigma))
        control->fault = FAULT_SPIKE;
    if (control->fault != 0) return;
    control->norm = norm;
    control->clip = factor < 1 ? factor : 1;
    control->unscale = 1 / control->scale;
    control->scale = step_scale(norm);
    control->loss = sums[SUMS_LOSS];
    control->z_loss = sums[SUMS_Z_LOSS];
    control->steps++;
}

#endif
