/* When a run saves, and what it says of it. */
#include "saving.h"

#include "changes.h"
#include "clock.h"
#include "err.h"
#include "log.h"
#include "run.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int saving_open(struct saving *s)
{
    TRY(state_saver_open(&s->saver, s->step, &s->folder));
    s->ckpt = state_saver_ckpt(s->saver);
    ckpt_saver_add_tokenizer(s->ckpt, s->tokenizer, s->tokenizer_bytes);
    return 0;
}

void saving_close(struct saving *s)
{
    state_saver_close(s->saver);
    s->saver = NULL;
    free(s->tokenizer);
    s->tokenizer = NULL;
    free(s->jumps);
    s->jumps = NULL;
}

bool saving_busy(const struct saving *s)
{
    return !ckpt_save_ready(s->ckpt);
}

/* How the save under way ended. Not collective. */
static int report(struct saving *s, int rc)
{
    const double all_s = now_s() - s->started_s, stall_s = s->stall_s + state_saver_take_wait_s(s->saver);
    if (rc != 0) { /* all ranks agreed on this failure; one of them has the message */
        if (err_message()[0] != '\0')
            log_warn("no checkpoint at step %lld: %s", (long long)s->started, err_message());
        return rc;
    }
    s->saved = s->started;
    const struct ckpt_written written = ckpt_save_written(s->ckpt);
    const double gib = (double)written.bytes / 0x1p30;
    log_info("checkpoint: %s/step-%08lld, %.2f GiB, in %.1f s, %.1f s of them to disk (%.2f GiB/s); training stood "
             "still %.2f s",
             s->cfg->run.dir, (long long)s->saved, gib, all_s, written.s, gib / written.s, stall_s);
    return metrics_event(s->metrics, "checkpoint", s->saved,
                         json_pack("{s:f, s:f, s:f, s:I}", "s", all_s, "write_s", written.s, "stall_s", stall_s,
                                   "bytes", (json_int_t)written.bytes));
}

/* Waits for the save under way, if any, and reports it. Collective. */
static int wait(struct saving *s)
{
    return ckpt_save_busy(s->ckpt) ? report(s, ckpt_save_wait(s->ckpt)) : 0;
}

static int start(struct saving *s, int64_t done)
{
    int rc = 0;
    const struct step *step = s->step;
    struct ckpt_meta meta = {.step = done,
                             .sequences = step_position(step, done),
                             .optim_steps = step->optim_steps_before + done,
                             .grad_scale = step->grad_scale,
                             .grad_norm = step->grad_norm,
                             .faults = step->faults,
                             .batches_skipped = step->batches_skipped,
                             .loss_seen = step->loss_seen,
                             .loss_mean = step->loss_mean,
                             .loss_variance = step->loss_variance,
                             .began = s->began,
                             .model_id = step->params.id,
                             .tokenizer_id = s->tokenizer_id,
                             .bos = s->bos,
                             .eos = s->eos,
                             .tokens = step_tokens(step, done),
                             .record = (char *)s->record};
    const struct ckpt_keep keep = {.newest = s->cfg->checkpoint.keep,
                                   .every = s->cfg->checkpoint.keep_every,
                                   .back = config_rewinds(s->cfg),
                                   .back_from = s->began,
                                   .back_every = s->cfg->checkpoint.every};
    ASSERT(step->settled == done);
    snprintf(meta.version, sizeof meta.version, "%s", run_version);
    s->started = done;
    s->started_s = now_s();
    TRY_GOTO(comm_agree(s->comm, config_to_yaml(s->cfg, &meta.config_yaml)), done);
    TRY_GOTO(state_save_start(s->saver, &meta, keep), done);
    if (!s->cfg->checkpoint.async) TRY_GOTO(ckpt_save_wait(s->ckpt), done);
done:
    free(meta.config_yaml);
    s->stall_s = now_s() - s->started_s;
    metrics_skip(s->metrics, s->started_s);
    return ckpt_save_busy(s->ckpt) ? 0 : report(s, rc);
}

void saving_advance(struct saving *s, bool any_busy)
{
    if (any_busy || !ckpt_save_busy(s->ckpt)) return;
    const int rc = ckpt_save_advance(s->ckpt);
    if (!ckpt_save_busy(s->ckpt) && report(s, rc) != 0) err_clear();
}

static bool is_due(const struct saving *s, int64_t done)
{
    return s->cfg->checkpoint.every > 0 && done % s->cfg->checkpoint.every == 0;
}

bool saving_wanted(const struct saving *s, int64_t done)
{
    return is_due(s, done) || (s->asked && !ckpt_save_busy(s->ckpt));
}

void saving_now(struct saving *s, int64_t done)
{
    if (ckpt_save_busy(s->ckpt)) {
        const int64_t steps = done - s->started;
        if (s->comm->rank == 0) {
            log_warn("no checkpoint at step %lld: that of step %lld is still being written, %lld steps later; "
                     "checkpoint.every=%lld would fit",
                     (long long)done, (long long)s->started, (long long)steps,
                     (long long)(steps + s->cfg->checkpoint.every));
        }
        return;
    }
    s->asked = false;
    if (s->saved != done && start(s, done) != 0) err_clear();
}

int saving_last(struct saving *s, int64_t done)
{
    if (wait(s) != 0) err_clear();
    if (s->saved == done) return 0;
    TRY(start(s, done));
    return wait(s);
}

void saving_finish(struct saving *s)
{
    struct err_record failure;
    if (!s->ckpt || !ckpt_save_busy(s->ckpt)) return;
    err_take(&failure, ERR_NUMERIC);
    if (wait(s) != 0) err_clear();
    (void)err_give(&failure);
    err_share();
}

/* The weights of another run's checkpoint, its optimizer state if asked for, and nothing else of it. */
static int init_from(struct saving *s, const char *named)
{
    int rc = 0;
    const bool optimizer = s->cfg->checkpoint.init_optimizer;
    char folder[CKPT_PATH_MAX] = "";
    struct ckpt_meta meta = {0};
    struct config *before = NULL;
    struct changes changes = {.list = NULL};
    TRY(comm_agree(s->comm, s->comm->rank == 0 ? ckpt_choose(named, folder) : 0));
    TRY(comm_bcast(s->comm, folder, sizeof folder, 0));
    TRY(ckpt_verify(s->comm, folder));
    TRY_GOTO(comm_agree(s->comm, ckpt_read_meta(folder, &meta)), done);
    before = changes_before(&meta);
    if (meta.model_id == s->step->params.id) /* else state_begin_from says what is wrong */
        rc = changes_find(&changes, before, s->cfg, folder, &meta, s->vocab_size, s->tokenizer_id, NULL, false);
    TRY_GOTO(comm_agree(s->comm, rc), done);
    TRY_GOTO(state_begin_from(s->step, folder, &meta, optimizer), done);
    log_info("weights%s: from %s, step %lld", optimizer ? " and optimizer state" : "", folder, (long long)meta.step);
done:
    changes_close(&changes);
    free(before);
    ckpt_meta_free(&meta);
    return rc;
}

void saving_resume(struct saving *s, bool own, const struct ckpt_meta *meta, const struct config *before)
{
    const bool kept = before && config_rewinds(before) && before->checkpoint.every == s->cfg->checkpoint.every;
    s->saved = own ? meta->step : -1;
    s->began = own && kept ? meta->began : meta->step;
}

int saving_begin(struct saving *s)
{
    const char *folder = s->cfg->checkpoint.init_from;
    s->step->grad_norm = s->step->loss_mean = s->step->loss_variance = 0;
    s->step->loss_seen = s->step->optim_steps_before = s->step->faults = s->step->batches_skipped = 0;
    step_set_position(s->step, 0, 0, 0);
    TRY(step_start(s->step, folder[0] == '\0'));
    return folder[0] ? init_from(s, folder) : 0;
}

/* The newest checkpoint up to this step that a rewind may load; "" when there is none. Collective. */
static int find_rewind(struct saving *s, int64_t upto, char folder[CKPT_PATH_MAX])
{
    TRY(ckpt_find_newest(s->comm, s->cfg->run.dir, s->began, upto, s->cfg->checkpoint.every, folder));
    if (folder[0] != '\0' || s->began == 0) return 0;
    return comm_agree(s->comm, err_raise(ERR_DATA, __FILE__, __LINE__,
                                         "%s has no checkpoint to go back to any more: this run began with that of "
                                         "step %lld; put it back, or set run.on_nan and run.on_spike to stop or skip",
                                         s->cfg->run.dir, (long long)s->began));
}

/* Keeps a jump instead of those from its step on: their faults will be met again. Not collective. */
static int jump_add(struct saving *s, struct saving_jump jump)
{
    int n = 0;
    while (n < s->n_jumps && s->jumps[n].step < jump.step)
        n++;
    struct saving_jump *jumps = realloc(s->jumps, (size_t)(n + 1) * sizeof *jumps);
    if (!jumps) FAIL(ERR_SYSTEM, "no memory left to go back to step %lld", (long long)jump.step);
    jumps[n] = jump;
    s->jumps = jumps;
    s->n_jumps = n + 1;
    return 0;
}

bool saving_jump(struct saving *s, int64_t done)
{
    for (int i = 0; i < s->n_jumps; i++) {
        if (s->jumps[i].step != done) continue;
        ASSERT(s->step->settled == done);
        s->step->batches_skipped = s->jumps[i].batches_skipped;
        s->step->faults = s->jumps[i].faults;
        return true;
    }
    return false;
}

int saving_rewind(struct saving *s, int64_t *done)
{
    int rc = 0;
    char folder[CKPT_PATH_MAX];
    struct step *step = s->step;
    struct ckpt_meta meta = {0};
    const int64_t every = s->cfg->checkpoint.every, fault = step->settled;
    const int64_t due = every > 0 ? fault / every * every : 0, from = due > s->began ? due : s->began;
    const struct saving_jump jump = {from, fault + step->batches_skipped + 1 - from, step->faults};
    if (wait(s) != 0) err_clear();
    TRY(find_rewind(s, from, folder));
    if (folder[0] != '\0') {
        TRY_GOTO(comm_agree(s->comm, ckpt_read_meta(folder, &meta)), done);
        TRY_GOTO(state_load(step, folder, &meta), done);
    } else {
        TRY_GOTO(saving_begin(s), done);
    }
    TRY_GOTO(comm_agree(s->comm, jump_add(s, jump)), done);
    *done = meta.step;
    (void)saving_jump(s, meta.step);
    log_info("going on from step %lld; from step %lld on without the batches up to that of step %lld",
             (long long)meta.step, (long long)from, (long long)fault + 1);
    TRY_GOTO(metrics_event(s->metrics, "rewind", from,
                           json_pack("{s:I, s:I}", "fault_step", (json_int_t)fault + 1, "batches_skipped",
                                     (json_int_t)jump.batches_skipped)),
             done);
done:
    ckpt_meta_free(&meta);
    return rc;
}
