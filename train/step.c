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
    /* On a GPU the copy is in host memory, which this arena is not. */
    if (cfg->checkpoint.async && dev->kind == DEVICE_CPU)
        step->snapshot = arena_take(arena, ARENA_CKPT, zero_saved_bytes(&step->zero));
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
    TRY(step_resume(step, 0, 0));
    if (!initial_weights) return 0;
    TRY(zero_init(&step->zero));
    return model_weights_changed(&step->model);
}

static int load(struct model *m, struct loader *loader, struct batch *batch)
{
    TRY(loader_next(loader, batch));
    return model_load_batch(m, batch->tok, batch->target, batch->start, batch->pos);
}

/* This rank's micro-batches, forward and backward, with the sums over ranks under way at the end. When one cannot be
 * loaded, *loaded says so, and the rank only takes part in the sums: all ranks get to where they agree on it. */
static int accumulate(struct step *step, struct loader *loader, struct step_report *report, int *loaded)
{
    const double tokens = (double)(step->cfg->batch.global * step->cfg->model.seq_len);
    struct model *m = &step->model;
    struct batch batch;
    const int64_t n = loader_micro_batches(loader);
    *loaded = 0;
    TRY(zero_begin(&step->zero));
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

int step_run(struct step *step, struct loader *loader, int64_t index, struct step_report *report)
{
    int loaded = 0;
    *report = (struct step_report){.lr = optim_lr(step->cfg, index)};
    TRY(accumulate(step, loader, report, &loaded));
    double mark = step_clock_s();
    TRY(zero_reduce(&step->zero));
    TRY(comm_agree(step->comm, loaded));
    lap(&report->reduce_s, &mark);
    if (step->before_update) TRY(step->before_update(step->update_context));
    TRY(optim_update(&step->zero, step->cfg, index));
    TRY(model_weights_changed(&step->model));
    lap(&report->update_s, &mark);
    /* Where ops are only issued, the host's time says nothing of them. */
    struct device *dev = step->model.dev;
    if (dev->table->queue(dev)) *report = (struct step_report){.lr = report->lr, .load_s = report->load_s};
    return 0;
}

/* A failure that every rank has found alike. */
static int fail(struct step *step, int64_t index, const char *what)
{
    return comm_agree(step->comm,
                      err_raise(ERR_NUMERIC, __FILE__, __LINE__, "step %lld: %s", (long long)index + 1, what));
}

/* Issues the steps [begin, end) again, the first of them with a coarser scale. */
static int run_again(struct step *step, struct loader *loader, int64_t begin, int64_t end,
                     struct step_control control)
{
    struct step_report report;
    log_info("step %lld: a gradient is more than %g times the last norm; doing the step again with a coarser scale",
             (long long)begin + 1, ldexp(1.0, RESCALE_BITS));
    control.scale = ldexp(control.scale, -RESCALE_BITS);
    control.fault = 0;
    control.steps = 0;
    TRY(zero_set_control(&step->zero, control));
    TRY(loader_seek(loader, begin));
    for (int64_t i = begin; i < end; i++)
        TRY(step_run(step, loader, i, &report));
    return 0;
}

int step_settle(struct step *step, struct loader *loader, int64_t done, struct step_report *report)
{
    struct step_control control;
    int tries = 0;
    for (;;) {
        TRY(zero_control(&step->zero, &control));
        if (control.steps > 0) tries = 0;
        step->settled += control.steps;
        if (control.fault == 0) break;
        if (control.fault & FAULT_NAN) {
            return fail(
                step, step->settled,
                "the loss or a gradient is NaN or infinite; nothing was updated. Checkpoints saved before are "
                "intact: lower optim.lr, lengthen optim.warmup_steps or tighten optim.clip, and run again to "
                "resume from the last one");
        }
        if (tries == RESCALE_TRIES)
            return fail(step, step->settled, "gradients overflow at every scale; lower optim.lr");
        tries++;
        report->redone++;
        TRY(run_again(step, loader, step->settled, done, control));
    }
    ASSERT(step->settled == done);
    control.steps = 0;
    TRY(zero_set_control(&step->zero, control));
    const double tokens = (double)(step->cfg->batch.global * step->cfg->model.seq_len);
    report->loss = (double)control.loss / MODEL_LOSS_SCALE / tokens;
    report->grad_norm = control.norm;
    step->grad_norm = control.norm;
    step->grad_scale = control.scale;
    return 0;
}

int step_resume(struct step *step, int64_t done, double grad_norm)
{
    const struct step_control control = {.scale = step_scale(grad_norm), .norm = grad_norm};
    step->settled = done;
    step->grad_norm = control.norm;
    step->grad_scale = control.scale;
    return zero_set_control(&step->zero, control);
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
    return m->dev->table->download(m->dev, &sums[0], m->loss_sum.data, sizeof sums[0]);
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
