/* One optimizer step: micro-batches through the model, gradients through the ranks, and the update. */
#ifndef TATARA_STEP_H
#define TATARA_STEP_H

#include "data/loader.h"
#include "parallel/zero.h"

/* Everything a rank trains with. Its memory lies in one arena, which the owner opens and closes. */
struct step {
    const struct config *cfg;
    struct comm *comm;
    struct params params;
    struct model model;
    struct zero zero;
    double grad_norm; /* of the last step, from which the next scale follows; 0 before the first */
};

/* What a step did; the same on every rank but for the times, which are this rank's. */
struct step_report {
    double loss;      /* mean over the tokens of the global batch, in nats */
    double grad_norm; /* before clipping */
    double lr;
    int redone; /* times that the step was done again with a coarser scale */
    double load_s, forward_s, backward_s, reduce_s, update_s; /* waiting for data, and the phases of computation */
};

/* Lays out parameters, model and optimizer state over an arena, measuring or real. step_close undoes it in both cases.
 * Not collective. */
int step_layout(struct step *step, const struct config *cfg, int64_t vocab_size, struct device *dev,
                struct comm *comm, struct arena *arena);
void step_close(struct step *step);
/* After the real layout: tables, and initial weights unless a checkpoint will bring them. Collective. */
int step_start(struct step *step, bool initial_weights);
/* Does step `index` (from 0); the loader stands there. ERR_NUMERIC, on all ranks, when the loss or a gradient is not
 * finite: the weights are then those before the step. Collective. */
int step_run(struct step *step, struct loader *loader, int64_t index, struct step_report *report);
/* Mean loss over a validation loader, at most max_micro_batches (0: all) of each rank. Collective. */
int step_evaluate(struct step *step, struct loader *loader, int64_t max_micro_batches, double *loss);
/* Seconds since some fixed moment, for measuring. */
double step_clock_s(void);

#endif
