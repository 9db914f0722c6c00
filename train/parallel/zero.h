/* Data parallelism: accumulates gradients over micro-batches, sums them over ranks, and divides the optimizer state.
 *
 * ZeRO (Rajbhandari et al. 2020) stage 0: every rank holds all master weights and optimizer state. Stage 1: each rank
 * holds one shard of every unit. Both compute the same bits, because the update is per element.
 *
 * reduce: exact. The gradient of each micro-batch is rounded to a multiple of 1/scale, a power of two that is the same on
 * every rank, and from there on summed as a 64-bit integer. Integer addition is associative, so the sum does not depend
 * on which rank computed which micro-batch, nor on the order in which ranks are reduced. The scale follows from the norm
 * of the previous step's gradient. A micro-batch's element beyond `limit` is reported as an overflow; the step is then
 * done again with a coarser scale (step.c). */
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
    struct tensor squares;         /* i64 [4] */
    struct tensor fault;           /* i32 [1], shared with the model */
    struct tensor *weights;        /* the model's units, in the compute type */
    double scale;                  /* quanta per unit of gradient; a power of two */
    bool last;                     /* the micro-batch in hand is this rank's last of the step */
};

/* What the reduction found, the same on every rank. */
struct zero_outcome {
    double norm;     /* of the summed gradient; meaningless after a fault */
    bool overflow;   /* an element did not fit: choose a coarser scale and do the step again */
    bool not_finite; /* NaN or infinity in the loss or a gradient */
};

/* Takes memory for accumulators and optimizer state. model is laid out already, over the same arena. */
int zero_layout(struct zero *zero, const struct config *cfg, const struct params *params, struct model *model,
                struct comm *comm, struct arena *arena);
void zero_close(struct zero *zero);
/* The elements [begin, begin + n) of a unit whose optimizer state this rank holds: its shard, or all of them. */
void zero_part(const struct zero *zero, int unit, int64_t *begin, int64_t *n);
/* The elements that this rank writes to a checkpoint: its shard, at every stage. */
void zero_shard(const struct zero *zero, int unit, int64_t *begin, int64_t *n);

/* Initial weights: fills this rank's master weights, and then everyone's weights from them. Collective. */
int zero_init(struct zero *zero);
/* Rounds this rank's master weights to the compute type and starts gathering everyone's. Collective. */
int zero_gather(struct zero *zero);
/* A model_unit_need callback (context is the struct zero): the weights of a unit, gathered last by zero_gather or
 * optim_update, are there for what is issued next. */
int zero_need(void *zero, int unit);

/* Forgets the gradients of the step before. */
int zero_begin(struct zero *zero);
/* A model_unit_done callback (context is the struct zero): adds a unit's gradients, and on the rank's last micro-batch
 * starts their sum over ranks while the backward pass goes on. */
int zero_accumulate(void *zero, int unit, struct tensor grads);
/* For a rank that has no micro-batch in this step: takes part in the sums with zeros. Collective with the others'
 * last zero_accumulate. */
int zero_accumulate_nothing(struct zero *zero);
/* Waits for the sums, finds faults and the norm over all ranks. Collective. */
int zero_reduce(struct zero *zero, struct zero_outcome *outcome);
/* The gradient of this rank's part of a unit as f32, after zero_reduce. */
int zero_gradient(struct zero *zero, int unit, struct tensor *gradient);

/* The scale for a gradient of about this norm; norm 0: nothing is known yet. */
double zero_scale_for(double norm);

#endif
