/* Data parallelism: accumulates gradients over micro-batches, sums them over ranks, and divides the optimizer state.
 *
 * ZeRO (Rajbhandari et al. 2020) stage 0: every rank holds all master weights and optimizer state. Stage 1: each rank
 * holds one shard of every unit. Both compute the same bits, because the update is per element.
 *
 * reduce: exact. The gradient of each micro-batch is rounded to a multiple of 1/scale, a power of two that is the same on
 * every rank, and from there on summed as a 64-bit integer. Integer addition is associative, so the sum does not depend
 * on which rank computed which micro-batch, nor on the order in which ranks are reduced. The scale follows from the norm
 * of the previous step's gradient. A micro-batch's element beyond `limit` is an overflow; the step is then done again
 * with a coarser scale (step.c).
 *
 * How a step stands (its scale, norm, faults) is kept on the device, in `control`; only zero_control waits for it. */
#ifndef TATARA_ZERO_H
#define TATARA_ZERO_H

#include "arena.h"
#include "comm.h"
#include "config.h"
#include "model/model.h"

struct zero {
    const struct params *params;
    struct comm *comm;
    struct device *dev;
    int stage;
    enum reduce reduce;
    int64_t micro_batches;         /* in a step, over all ranks: bounds the integer sum */
    struct tensor *acc;            /* per unit: i64 (exact) or f32 (fast), all its elements */
    struct tensor *master, *m, *v; /* per unit: f32, this rank's part (zero_part) */
    struct tensor control;         /* i64 [CONTROL_ELEMS], struct step_control */
    struct tensor sums;            /* i64 [SUMS_ELEMS] */
    struct tensor fault;           /* i32 [1], shared with the model */
    struct tensor loss_sum;        /* i64 [2], the model's */
    struct tensor *weights;        /* the model's units, in the compute type */
    struct step_limits limits;
    bool last; /* the micro-batch in hand is this rank's last of the step */
};

/* Takes memory for accumulators and optimizer state. model is laid out already, over the same arena. */
int zero_layout(struct zero *zero, const struct config *cfg, const struct params *params, struct model *model,
                struct comm *comm, struct arena *arena);
void zero_close(struct zero *zero);
/* The elements [begin, begin + n) of a unit whose optimizer state this rank holds: its shard, or all of them. */
void zero_part(const struct zero *zero, int unit, int64_t *begin, int64_t *n);
/* The elements that this rank writes to a checkpoint: its shard, at every stage. */
void zero_shard(const struct zero *zero, int unit, int64_t *begin, int64_t *n);
/* Room for those: weights and both moments, with each tensor's beginning at such a boundary. */
#define ZERO_SAVED_ALIGN 4096
size_t zero_saved_bytes(const struct zero *zero);

/* Sets how the next step stands: the norm of the gradient before it (0: there was none), or a coarser scale. */
int zero_set_control(struct zero *zero, struct step_control control);
/* How the last step stands, once it is done: the host waits for it. Collective in effect. */
int zero_control(struct zero *zero, struct step_control *control);

/* Sets both of AdamW's moments to zero. Not collective. */
int zero_clear_moments(struct zero *zero);
/* Initial weights, and moments of zero: fills this rank's master weights, and then everyone's weights from them.
 * Collective. */
int zero_init(struct zero *zero);
/* Rounds this rank's master weights to the compute type and starts gathering everyone's. Collective. */
int zero_gather(struct zero *zero);
/* A model_unit_need callback (context is the struct zero): the weights of a unit, gathered last by zero_gather or
 * optim_update, are there for what is issued next. */
int zero_need(void *zero, int unit);

/* Forgets the gradients and losses of the step before. */
int zero_begin(struct zero *zero);
/* A model_unit_done callback (context is the struct zero): adds a unit's gradients, and on the rank's last micro-batch
 * starts their sum over ranks while the backward pass goes on. */
int zero_accumulate(void *zero, int unit, struct tensor grads);
/* For a rank that has no micro-batch in this step: takes part in the sums with zeros. Collective with the others'
 * last zero_accumulate. */
int zero_accumulate_nothing(struct zero *zero);
/* For a rank that leaves out the rest of its micro-batches: takes part in the sums, and says with FAULT_STOP that they are
 * worth nothing. Collective as zero_accumulate_nothing. */
int zero_give_up(struct zero *zero);
/* Completes the sums, and decides with faults and the norm over all ranks what the step comes to. Collective. */
int zero_reduce(struct zero *zero);
/* The gradient of this rank's part of a unit as f32, after zero_reduce. */
int zero_gradient(struct zero *zero, int unit, struct tensor *gradient);

#endif
