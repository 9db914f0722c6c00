/* One optimizer step, and one validation pass. */
#include "step.h"

#include "clock.h"
#include "err.h"
#include "log.h"
#include "optim.h"
#include "signals.h"

#include <math.h>
#include <stdio.h>

/* An overflow makes the scale coarser by 2^12; a dozen of them span every finite gradient. */
#define RESCALE_BITS 12
#define RESCALE_TRIES 12

/* Adds to *sum the time since *mark, and moves the mark. */
static void lap(double *sum, double *mark)
{
    const double now = now_s();
    *sum += now - *mark;
    *mark = now;
}

struct attention_case step_attention_case(const struct step *step)
{
    const struct config_model *m = &step->cfg->model;
    return (struct attention_case){.act = step->model.act,
                                   .sequences = step->cfg->batch.micro,
                                   .seq_len = (int)m->seq_len,
                                   .heads = (int)m->heads,
                                   .kv_heads = (int)m->kv_heads,
                                   .head_dim = (int)m->head_dim,
                                   .document_mask = step->cfg->data.document_mask};
}

int step_layout(struct step *step, const struct config *cfg, int64_t vocab_size, struct device *dev,
                struct comm *comm, struct arena *arena)
{
    int rc = 0;
    *step = (struct step){.cfg = cfg, .comm = comm};
    TRY(graphs_open(&step->graphs, (enum graphs_choice)cfg->top.graphs, dev, comm));
    TRY_GOTO(params_open(&step->params, cfg, vocab_size, comm->ranks), done);
    TRY_GOTO(model_layout(&step->model, cfg, &step->params, vocab_size, dev, arena, MODEL_TRAIN, cfg->batch.micro,
                          cfg->model.seq_len),
             done);
    TRY_GOTO(zero_layout(&step->zero, cfg, &step->params, &step->model, comm, arena), done);
    /* On a GPU the copy is in host memory, which this arena is not. */
    if (cfg->checkpoint.async && dev->kind == DEVICE_CPU)
        step->snapshot = arena_take(arena, ARENA_CKPT, zero_saved_bytes(&step->zero));
    const struct attention_case c = step_attention_case(step);
    dev->workspace_bytes = dev->table->workspace_bytes(dev, &c, (enum attention_choice)cfg->top.attention);
    dev->workspace = arena_take(arena, ARENA_WORK, dev->workspace_bytes);
done:
    if (rc != 0) step_close(step);
    return rc;
}

void step_close(struct step *step)
{
    graphs_close(&step->graphs);
    zero_close(&step->zero);
    model_close(&step->model);
    params_close(&step->params);
}

int step_start(struct step *step, bool initial_weights)
{
    TRY(model_start(&step->model));
    TRY(step_resume(step, 0));
    if (!initial_weights) return 0;
    TRY(zero_init(&step->zero));
    return model_weights_changed(&step->model);
}

static int read_batch(struct step *step, struct loader *loader, struct batch *batch)
{
    comm_wait_enter(step->comm, "the next batch of data");
    const int rc = loader_next(loader, batch);
    comm_wait_leave(step->comm);
    return rc;
}

/* On a GPU it may wait for the micro-batch before. */
static int upload_batch(struct step *step, const struct batch *batch)
{
    return model_load_batch(&step->model, batch->tok, batch->target, batch->start, batch->pos);
}

/* A micro-batch on its way. */
struct pass {
    struct step *step;
    struct step_report *report;
    double mark;
};

/* Backward of the last micro-batch, with the device's clock: nothing in it waits for other ranks, so that slow ones are
 * told by it. */
static int run_clocked(struct step *step)
{
    struct device *dev = step->model.dev;
    TRY(dev->table->clock_mark(dev, 0));
    TRY(model_backward(&step->model, zero_accumulate, &step->zero));
    step->clocked = true;
    return dev->table->clock_mark(dev, 1);
}

/* Adds what the backward passes of so many steps took, by the last one's. */
static int read_clock(struct step *step, struct loader *loader, int64_t steps, struct step_report *report)
{
    struct device *dev = step->model.dev;
    double s = 0;
    if (!step->clocked) return 0;
    TRY(dev->table->clock_s(dev, &s));
    report->backward_s += s * (double)(steps * loader_micro_batches(loader));
    return 0;
}

/* Forward and backward of the micro-batch that is loaded. */
static int run_pass(void *context)
{
    struct pass *pass = context;
    struct step *step = pass->step;
    const double tokens = (double)(step->cfg->batch.global * step->cfg->model.seq_len);
    const bool clocked = step->comm->ranks > 1 && step->zero.last && step->model.dev->table->clock_mark;
    TRY(model_forward(&step->model, true, 1 / tokens));
    TRY(comm_poll(step->comm));
    lap(&pass->report->forward_s, &pass->mark);
    TRY(clocked ? run_clocked(step) : model_backward(&step->model, zero_accumulate, &step->zero));
    lap(&pass->report->backward_s, &pass->mark);
    return 0;
}

/* A graph of it. The weights are there, so that none need be waited for. */
static int run_graph(struct pass *pass)
{
    struct model *m = &pass->step->model;
    const model_unit_need need = m->need;
    m->need = NULL;
    const int rc = graphs_run(&pass->step->graphs, run_pass, pass);
    m->need = need;
    lap(&pass->report->backward_s, &pass->mark);
    return rc;
}

/* Whether micro-batch i of n neither waits for other ranks nor sends them anything, and so, is like all others of its kind:
 * weights are gathered in the first one, gradients summed in the last. The first step's are left out, in which much is
 * chosen. */
static bool repeats(const struct step *step, int64_t i, int64_t n)
{
    const bool alone = step->comm->ranks == 1, first = i == 0 && step->zero.stage > 0, last = i == n - 1;
    return step->warm && (alone || (!first && !last));
}

/* After the first step that had any micro-batches, n of them. */
static void warmed_up(struct step *step, int64_t n)
{
    bool any = false;
    step->warm = true;
    for (int64_t i = 0; i < n && !any; i++)
        any = repeats(step, i, n);
    if (!any && !step->graphs.decided)
        log_info("graphs: off: a step has %lld micro-batch%s of this rank, and %s", (long long)n, n == 1 ? "" : "es",
                 n == 1 ? "it communicates" : "both communicate");
}

/* This rank's micro-batches, forward and backward, with the sums over ranks under way at the end. When one cannot be
 * loaded, *loaded says so, and the rank only takes part in the sums: all ranks get to where they agree on it. A rank that
 * is asked to stop leaves out the rest of them in the same way, so that what is whole can be saved at once. */
static int accumulate(struct step *step, struct loader *loader, struct step_report *report, int *loaded)
{
    struct batch batch;
    const int64_t n = loader_micro_batches(loader);
    *loaded = 0;
    TRY(zero_begin(&step->zero));
    struct pass pass = {.step = step, .report = report, .mark = now_s()};
    for (int64_t i = 0; i < n; i++) {
        if (signal_stop_asked()) return zero_give_up(&step->zero);
        *loaded = read_batch(step, loader, &batch);
        lap(&report->load_s, &pass.mark);
        if (*loaded == 0) *loaded = upload_batch(step, &batch);
        if (*loaded != 0) return zero_accumulate_nothing(&step->zero);
        step->zero.last = i == n - 1;
        TRY(repeats(step, i, n) ? run_graph(&pass) : run_pass(&pass));
    }
    if (!step->warm && n > 0) warmed_up(step, n);
    return n > 0 ? 0 : zero_accumulate_nothing(&step->zero);
}

int step_run(struct step *step, struct loader *loader, int64_t index, struct step_report *report)
{
    int loaded = 0;
    *report = (struct step_report){.lr = optim_lr(step->cfg, index), .micro_batches = loader_micro_batches(loader)};
    TRY(accumulate(step, loader, report, &loaded));
    double mark = now_s();
    TRY(zero_reduce(&step->zero));
    TRY(comm_agree(step->comm, loaded));
    lap(&report->reduce_s, &mark);
    if (step->before_update) TRY(step->before_update(step->update_context));
    TRY(optim_update(&step->zero, step->cfg, index, step->optim_steps_before + index));
    TRY(model_weights_changed(&step->model));
    lap(&report->update_s, &mark);
    /* Where ops are only issued, the host's time says nothing of them. */
    struct device *dev = step->model.dev;
    if (dev->table->queue(dev)) report->forward_s = report->backward_s = report->reduce_s = report->update_s = 0;
    return 0;
}

/* Gives the step that overflowed a coarser scale. */
static void coarsen(const struct step *step, struct step_control *control, struct step_report *report)
{
    log_info("step %lld: a gradient is more than %g times the last norm; doing the step again with a coarser scale",
             (long long)step->settled + 1, ldexp(1.0, RESCALE_BITS));
    control->scale = ldexp(control->scale, -RESCALE_BITS);
    report->redone++;
}

static int overflows(struct step *step)
{
    return comm_agree(step->comm, err_raise(ERR_NUMERIC, __FILE__, __LINE__,
                                            "step %lld: gradients overflow at every scale; lower optim.lr",
                                            (long long)step->settled + 1));
}

/* Issues the steps that are not settled again, up to `done`. */
static int run_again(struct step *step, struct loader *loader, int64_t done, struct step_control control)
{
    struct step_report report;
    TRY(zero_set_control(&step->zero, control));
    TRY(loader_seek(loader, step_position(step, step->settled)));
    for (int64_t i = step->settled; i < done; i++)
        TRY(step_run(step, loader, i, &report));
    return 0;
}

/* What is wrong with a step, for a person. */
static const char *fault_text(int64_t fault)
{
    return fault & FAULT_NAN ? "the loss or a gradient is NaN or infinite"
                             : "the loss is a spike (optim.spike_sigma)";
}

/* Deals with step `settled`, which a NaN or a spike kept from being applied. */
static int handle_fault(struct step *step, int64_t fault, struct step_report *report)
{
    const struct config_run *run = &step->cfg->run;
    const enum on_fault action = (enum on_fault)(fault & FAULT_NAN ? run->on_nan : run->on_spike);
    const long long number = (long long)step->settled + 1;
    char passed[96];
    snprintf(passed, sizeof passed, ", and run.faults_max allows %lld such step%s", (long long)run->faults_max,
             run->faults_max == 1 ? "" : "s");
    step->faults++;
    if (action == ON_FAULT_STOP || step->faults > run->faults_max) {
        return comm_agree(
            step->comm,
            err_raise(ERR_NUMERIC, __FILE__, __LINE__,
                      "step %lld: %s; nothing was updated%s. Checkpoints saved before are intact: lower "
                      "optim.lr, lengthen optim.warmup_steps or tighten optim.clip, and run again to resume "
                      "from the last one; or set run.on_nan and run.on_spike",
                      number, fault_text(fault), action == ON_FAULT_STOP ? "" : passed));
    }
    report->rewind = action == ON_FAULT_REWIND;
    report->skipped += action == ON_FAULT_SKIP;
    if (step->comm->rank == 0) {
        log_warn("step %lld: %s; %s (%lld of at most %lld)", number, fault_text(fault),
                 report->rewind ? "going back" : "skipped", (long long)step->faults, (long long)run->faults_max);
    }
    step->settled += action == ON_FAULT_SKIP;
    return 0;
}

static void keep_outcome(struct step *step, const struct step_control *control)
{
    step->grad_norm = control->norm;
    step->grad_scale = control->scale;
    step->loss_mean = control->loss_mean;
    step->loss_variance = control->loss_variance;
    step->loss_seen = control->loss_seen;
}

int step_settle(struct step *step, struct loader *loader, int64_t done, struct step_report *report)
{
    struct step_control control;
    const int64_t steps = done - step->settled;
    int tries = 0;
    for (;;) {
        TRY(zero_control(&step->zero, &control));
        const int64_t fault = control.fault;
        if (control.steps > 0) tries = 0;
        step->settled += control.steps;
        control.fault = control.steps = 0;
        report->given_up = (fault & FAULT_STOP) != 0;
        if (fault == 0 || report->given_up) break;
        if (fault & (FAULT_NAN | FAULT_SPIKE)) {
            TRY(handle_fault(step, fault, report));
            if (report->rewind) return 0;
        } else {
            if (tries++ == RESCALE_TRIES) return overflows(step);
            coarsen(step, &control, report);
        }
        TRY(run_again(step, loader, done, control));
    }
    ASSERT(report->given_up || step->settled == done);
    if (report->given_up) report->lr = optim_lr(step->cfg, step->settled - 1);
    TRY(zero_set_control(&step->zero, control));
    const double tokens = (double)(step->cfg->batch.global * step->cfg->model.seq_len);
    report->loss = (double)control.loss / MODEL_LOSS_SCALE / tokens;
    report->z_loss = (double)control.z_loss / MODEL_LOSS_SCALE / tokens;
    report->grad_norm = control.norm;
    keep_outcome(step, &control);
    return read_clock(step, loader, steps, report);
}

int64_t step_position(const struct step *step, int64_t index)
{
    return step->sequences_before + (index + step->batches_skipped) * step->cfg->batch.global;
}

double step_tokens(const struct step *step, int64_t done)
{
    return step->tokens_before + (double)done * (double)(step->cfg->batch.global * step->cfg->model.seq_len);
}

void step_set_position(struct step *step, int64_t done, int64_t sequences, double tokens)
{
    step->sequences_before = 0;
    step->tokens_before = 0;
    step->sequences_before = sequences - step_position(step, done);
    step->tokens_before = tokens - step_tokens(step, done);
}

int step_resume(struct step *step, int64_t done)
{
    const struct step_control control = {.scale = step_scale(step->grad_norm),
                                         .norm = step->grad_norm,
                                         .loss_mean = step->loss_mean,
                                         .loss_variance = step->loss_variance,
                                         .loss_seen = step->loss_seen};
    step->settled = done;
    keep_outcome(step, &control);
    return zero_set_control(&step->zero, control);
}

/* This rank's n micro-batches of a validation pass: sums[0] of losses, sums[1] of tokens; sums[2] = 1: it was asked to stop,
 * and left some out. Not collective. */
static int evaluate(struct step *step, struct loader *loader, int64_t n, int64_t sums[3])
{
    struct batch batch;
    struct model *m = &step->model;
    TRY(loader_seek(loader, 0));
    TRY(op_fill(m->dev, m->loss_sum, 0));
    for (int64_t i = 0; i < n; i++) {
        sums[2] = signal_stop_asked();
        if (sums[2]) break;
        TRY(read_batch(step, loader, &batch));
        TRY(upload_batch(step, &batch));
        for (int64_t t = 0; t < m->tokens; t++)
            sums[1] += batch.target[t] >= 0;
        TRY(model_forward(m, false, 0));
    }
    return m->dev->table->download(m->dev, &sums[0], m->loss_sum.data, sizeof sums[0]);
}

int step_evaluate(struct step *step, struct loader *loader, int64_t max_micro_batches, double *loss)
{
    const struct comm *comm = step->comm;
    int64_t n = loader_micro_batches(loader), sums[3] = {0};
    /* Of the first micro-batches of the pass, those that are this rank's. */
    const int64_t share = (max_micro_batches + comm->ranks - 1 - comm->rank) / comm->ranks;
    TRY(comm_finish(step->comm));
    if (max_micro_batches > 0 && n > share) n = share;
    TRY(comm_agree(step->comm, evaluate(step, loader, n, sums)));
    TRY(comm_sum_i64(step->comm, sums, 3));
    *loss = sums[2] > 0 ? NAN : sums[1] > 0 ? (double)sums[0] / MODEL_LOSS_SCALE / (double)sums[1] : 0;
    return 0;
}
