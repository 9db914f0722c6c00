/* One optimizer step, and one validation pass. */
#include "step.h"

#include "err.h"
#include "log.h"
#include "optim.h"

#include <math.h>
#include <time.h>

/* An overflow makes the scale coarser by 2^12; a dozen of them span every finite gradient. */
#define RESCALE_BITS 12
#define RESCALE_TRIES 12

double step_clock_s(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* Adds to *sum the time since *mark, and moves the mark. */
static void lap(double *sum, double *mark)
{
    const double now = step_clock_s();
    *sum += now - *mark;
    *mark = now;
}

int step_layout(struct step *step, const struct config *cfg, int64_t vocab_size, struct device *dev,
                struct comm *comm, struct arena *arena)
{
    int rc = 0;
    *step = (struct step){.cfg = cfg, .comm = comm};
    TRY_GOTO(params_open(&step->params, cfg, vocab_size, comm->ranks), done);
    TRY_GOTO(model_layout(&step->model, cfg, &step->params, vocab_size, dev, arena, MODEL_TRAIN, cfg->batch.micro,
                          cfg->model.seq_len),
             done);
    TRY_GOTO(zero_layout(&step->zero, cfg, &step->params, &step->model, comm, arena), done);
    dev->workspace_bytes = dev->table->workspace_bytes(dev);
    dev->workspace = arena_take(arena, ARENA_WORK, dev->workspace_bytes);
done:
    if (rc != 0) step_close(step);
    return rc;
}

void step_close(struct step *step)
{
    zero_close(&step->zero);
    model_close(&step->model);
    params_close(&step->params);
}

int step_start(struct step *step, bool initial_weights)
{
    TRY(model_start(&step->model));
    if (!initial_weights) return 0;
    TRY(zero_init(&step->zero));
    return model_weights_changed(&step->model);
}

static int load(struct model *m, struct loader *loader, struct batch *batch)
{
    TRY(loader_next(loader, batch));
    return model_load_batch(m, batch->tok, batch->target, batch->start, batch->pos);
}

/* Takes and clears the sum of losses on this rank. */
static int take_loss_sum(struct model *m, int64_t *sum)
{
    TRY(m->dev->table->download(m->dev, sum, m->loss_sum.data, sizeof *sum));
    return op_fill(m->dev, m->loss_sum, 0);
}

/* This rank's micro-batches, forward and backward, with the sums over ranks under way at the end. When one cannot be
 * loaded, *loaded says so, and the rank only takes part in the sums: all ranks get to where they agree on it. */
static int accumulate(struct step *step, struct loader *loader, double tokens, struct step_report *report,
                      int *loaded)
{
    struct model *m = &step->model;
    struct batch batch;
    const int64_t n = loader_micro_batches(loader);
    *loaded = 0;
    TRY(zero_begin(&step->zero));
    TRY(op_fill(m->dev, m->loss_sum, 0));
    double mark = step_clock_s();
    for (int64_t i = 0; i < n; i++) {
        *loaded = load(m, loader, &batch);
        if (*loaded != 0) return zero_accumulate_nothing(&step->zero);
        lap(&report->load_s, &mark);
        TRY(model_forward(m, true, 1 / tokens));
        TRY(comm_poll(step->comm));
        lap(&report->forward_s, &mark);
        step->zero.last = i == n - 1;
        TRY(model_backward(m, zero_accumulate, &step->zero));
        lap(&report->backward_s, &mark);
    }
    return n > 0 ? 0 : zero_accumulate_nothing(&step->zero);
}

/* A failure that every rank has found alike. */
static int fail(struct step *step, const char *what, int64_t index)
{
    return comm_agree(step->comm,
                      err_raise(ERR_NUMERIC, __FILE__, __LINE__, "step %lld: %s", (long long)index + 1, what));
}

int step_run(struct step *step, struct loader *loader, int64_t index, struct step_report *report)
{
    const struct config *cfg = step->cfg;
    struct zero *zero = &step->zero;
    struct zero_outcome outcome = {.overflow = true};
    const double tokens = (double)(cfg->batch.global * cfg->model.seq_len);
    int64_t loss_sum = 0;
    int loaded = 0;
    *report = (struct step_report){.lr = optim_lr(cfg, index)};
    zero->scale = zero_scale_for(step->grad_norm);
    for (; outcome.overflow && !outcome.not_finite; report->redone++) {
        if (report->redone == RESCALE_TRIES) {
            return fail(step, "gradients overflow at every scale; lower optim.lr", index);
        }
        if (report->redone > 0) {
            log_info("step %lld: a gradient is more than %g times the last norm; doing the step again with a coarser "
                     "scale",
                     (long long)index + 1, ldexp(1.0, RESCALE_BITS));
            zero->scale = ldexp(zero->scale, -RESCALE_BITS);
            TRY(loader_seek(loader, index));
        }
        TRY(accumulate(step, loader, tokens, report, &loaded));
        double mark = step_clock_s();
        TRY(zero_reduce(zero, &outcome));
        TRY(comm_agree(step->comm, loaded));
        lap(&report->reduce_s, &mark);
    }
    report->redone--;
    TRY(take_loss_sum(&step->model, &loss_sum));
    TRY(comm_sum_i64(step->comm, &loss_sum, 1));
    report->loss = (double)loss_sum / MODEL_LOSS_SCALE / tokens;
    report->grad_norm = outcome.norm;
    if (outcome.not_finite) {
        return fail(
            step,
            "the loss or a gradient is NaN or infinite; nothing was updated. Checkpoints saved before are intact: "
            "lower optim.lr, lengthen optim.warmup_steps or tighten optim.clip, and run again to resume from the "
            "last one",
            index);
    }
    double mark = step_clock_s();
    TRY(optim_update(zero, cfg, index, outcome.norm));
    TRY(model_weights_changed(&step->model));
    lap(&report->update_s, &mark);
    step->grad_norm = outcome.norm;
    return 0;
}

/* This rank's n micro-batches of a validation pass: sums[0] of losses, sums[1] of tokens. Not collective. */
static int evaluate(struct model *m, struct loader *loader, int64_t n, int64_t sums[2])
{
    struct batch batch;
    TRY(loader_seek(loader, 0));
    TRY(op_fill(m->dev, m->loss_sum, 0));
    for (int64_t i = 0; i < n; i++) {
        TRY(load(m, loader, &batch));
        for (int64_t t = 0; t < m->tokens; t++)
            sums[1] += batch.target[t] >= 0;
        TRY(model_forward(m, false, 0));
    }
    return take_loss_sum(m, &sums[0]);
}

int step_evaluate(struct step *step, struct loader *loader, int64_t max_micro_batches, double *loss)
{
    int64_t n = loader_micro_batches(loader), sums[2] = {0};
    TRY(comm_finish(step->comm));
    if (max_micro_batches > 0 && n > max_micro_batches) n = max_micro_batches;
    TRY(comm_agree(step->comm, evaluate(&step->model, loader, n, sums)));
    TRY(comm_sum_i64(step->comm, sums, 2));
    *loss = sums[1] > 0 ? (double)sums[0] / MODEL_LOSS_SCALE / (double)sums[1] : 0;
    return 0;
}
