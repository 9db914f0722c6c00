/* One optimizer step: micro-batches through the model, gradients through the ranks, and the update. */
#ifndef TATARA_STEP_H
#define TATARA_STEP_H

#include "data/loader.h"
#include "graphs.h"
#include "parallel/zero.h"

/* Everything a rank trains with. Its memory lies in one arena, which the owner opens and closes. */
struct step {
    const struct config *cfg;
    struct comm *comm;
    struct params params;
    struct model model;
    struct zero zero;
    int64_t settled;                 /* steps done whose outcome is known */
    double grad_norm;                /* of the last of them, from which the next scale follows; 0 before the first */
    double grad_scale;               /* that scale */
    double loss_mean, loss_variance; /* as in struct step_control */
    int64_t loss_seen;
    int64_t faults;                      /* steps skipped or rewound in the whole run */
    int64_t batches_skipped;             /* batches left out by rewinds: step_position counts them as read */
    int64_t sequences_before;            /* see step_position; not 0 where batch.global was another before */
    double tokens_before;                /* likewise for step_tokens */
    int64_t optim_steps_before;          /* that AdamW's moments had seen at step 0; not 0: another run's */
    float *snapshot;                     /* room for state.c's copy of what this rank saves, on a CPU; NULL: none */
    int (*before_update)(void *context); /* called before a step first changes the training state; may be NULL */
    void *update_context;
    struct graphs graphs; /* of micro-batches */
    bool warm;            /* a micro-batch was done in an earlier step */
    bool clocked;         /* the device's clock has the last backward pass */
};

/* What a step did; the same on every rank but for the times, which are this rank's. On a GPU step_run knows the loader's
 * alone; step_settle adds what backward passes took of the steps that it settles, by the last one's time, when there are
 * several ranks. */
struct step_report {
    double lr;
    /* From step_settle: */
    double loss;      /* cross-entropy, mean over the tokens of the global batch, in nats */
    double z_loss;    /* its mean, 0 where the configuration has none; what is minimised is the sum of both */
    double grad_norm; /* before clipping */
    int redone;       /* times that steps were done again with a coarser scale */
    int skipped;      /* steps that changed nothing, for a NaN or a spike */
    bool rewind;      /* step `settled` has such a fault, and the caller is to go back to before it */
    bool
        given_up; /* a rank was asked to stop: step `settled` and those after it were not done; the rest is of the one before */
    double load_s, forward_s, backward_s, reduce_s, update_s; /* waiting for data, and the phases of computation */
    int64_t micro_batches;                                    /* of this rank */
};

/* Lays out parameters, model and optimizer state over an arena, measuring or real. step_close undoes it in both cases.
 * Not collective. */
int step_layout(struct step *step, const struct config *cfg, int64_t vocab_size, struct device *dev,
                struct comm *comm, struct arena *arena);
void step_close(struct step *step);
/* The calls of attention that the steps make; from the layout on. */
struct attention_case step_attention_case(const struct step *step);
/* After the real layout: tables, and initial weights unless a checkpoint will bring them. Collective. */
int step_start(struct step *step, bool initial_weights);
/* Does step `index` (from 0); the loader stands at its step_position. On a GPU the step is only issued: the host does not
 * wait for it. A rank that is asked to stop (signals.h) leaves out the micro-batches that it has not begun, and the step
 * changes nothing on any rank. Collective. */
int step_run(struct step *step, struct loader *loader, int64_t index, struct step_report *report);
/* Learns what came out of the steps up to `done`, and adds it to the report of the last one. A step in which an integer
 * sum overflowed has changed nothing, nor has any after it: they are done again here. A step whose loss or gradient is
 * not finite, or whose loss is a spike, has changed nothing either: as run.on_nan and run.on_spike say, it is passed
 * over, or report->rewind asks to go back, or it is ERR_NUMERIC on all ranks. A step that was given up for a request to
 * stop ends it: report->given_up. Collective. */
int step_settle(struct step *step, struct loader *loader, int64_t done, struct step_report *report);
/* Where step `index` (from 0) begins in the order of the data, in sequences: after all that the steps before it have read
 * or left out, whatever their batch.global was. */
int64_t step_position(const struct step *step, int64_t index);
/* Tokens that `done` steps are trained on. */
double step_tokens(const struct step *step, int64_t done);
/* Sets what both begin from, such that they are these after `done` steps. */
void step_set_position(struct step *step, int64_t done, int64_t sequences, double tokens);
/* Goes on after `done` steps, with step->grad_norm, loss_… as they were then; all 0: nothing is known. */
int step_resume(struct step *step, int64_t done);
/* Mean cross-entropy over the first max_micro_batches (0: all) of a validation loader's pass, whatever the number of ranks
 * that share them; NAN when a rank was asked to stop meanwhile. Collective. */
int step_evaluate(struct step *step, struct loader *loader, int64_t max_micro_batches, double *loss);

#endif
