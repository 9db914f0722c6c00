/* The training loop: batch, step, log, save, stop; and what must be open before it. */
#include "run.h"

#include "ckpt/ckpt.h"
#include "data/loader.h"
#include "data/tokenizer.h"
#include "device.h"
#include "err.h"
#include "log.h"
#include "metrics.h"
#include "plan.h"
#include "replicas.h"
#include "signals.h"
#include "state.h"
#include "step.h"

#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define RATE_TRIES 5

const char run_version[] = TATARA_VERSION " (" TATARA_COMMIT ")";

struct run {
    struct config *cfg;
    struct comm *comm;
    struct device dev;
    struct arena arena;
    struct step step;
    struct loader *train, *valid; /* valid NULL: nothing to evaluate on */
    struct metrics metrics;
    struct ckpt_run folder;
    int64_t vocab_size;
    uint64_t tokenizer_id;
    int64_t done; /* steps */
    struct state_saver *saver;
    int64_t saved;    /* the step of the newest checkpoint that this process wrote or read; −1: none */
    int64_t began_at; /* the step that this process resumed at, and from which folder */
    char began_from[CKPT_PATH_MAX];
    int64_t saving; /* the step of the save that was started last, when, and for how long it held training up */
    double saving_s, stall_s;
    size_t base_bytes;
};

int run_vocab(const struct config *cfg, int64_t *vocab_size, uint64_t *id)
{
    struct tokenizer *tokenizer = NULL;
    *vocab_size = cfg->model.vocab_size;
    *id = 0;
    if (cfg->data.tokenizer[0] == '\0') return 0;
    TRY(tokenizer_open(&tokenizer, cfg->data.tokenizer));
    const int64_t size = tokenizer_vocab_size(tokenizer);
    *id = tokenizer_id(tokenizer);
    tokenizer_close(tokenizer);
    if (*vocab_size == 0) *vocab_size = size;
    if (*vocab_size < size) {
        FAIL(ERR_CONFIG, "model.vocab_size is %lld, but %s has %lld tokens; use at least that many, or 0",
             (long long)*vocab_size, cfg->data.tokenizer, (long long)size);
    }
    return 0;
}

static int open_device(struct device *dev, const struct config *cfg, struct comm *comm)
{
    char text[256];
    const int threads = cfg->run.threads > 0 ? (int)cfg->run.threads : comm->cores;
    TRY(device_choose(dev, (enum device_choice)cfg->top.device, threads, comm));
    device_describe(dev, text, sizeof text);
    log_info("device: %s a rank, %d rank%s, %d on this node%s", text, comm->ranks, comm->ranks == 1 ? "" : "s",
             comm->local_ranks,
             cfg->top.device == CHOOSE_AUTO && !cuda_backend() ? " (auto: this build has no CUDA backend)" : "");
    if (cfg->run.threads == 0 && dev->kind == DEVICE_CPU) {
        log_info("threads: %d a rank, of the %d cores that this rank may use%s", threads, comm->allowed_cores,
                 comm->local_ranks == 1 && comm->ranks == 1 && comm->allowed_cores < comm->node_cores
                     ? "; mpirun --bind-to none would give it all of the node"
                     : "");
    }
    return 0;
}

/* What carries tensors between the ranks. Collective. */
static int open_transport(struct run *run)
{
    char text[64];
    const struct config *cfg = run->cfg;
    TRY(comm_open_transport(run->comm, &run->dev, (enum comm_choice)cfg->top.comm, (double)cfg->run.hang_timeout_s));
    comm_describe(run->comm, text, sizeof text);
    if (run->comm->ranks > 1) log_info("communication: %s", text);
    return 0;
}

/* Data, and what the model needs to know of it. Not collective. */
static int open_data(struct run *run)
{
    const struct config *cfg = run->cfg;
    struct loader_options options = {.sets = &cfg->data.train,
                                     .seq_len = cfg->model.seq_len,
                                     .micro = cfg->batch.micro,
                                     .global = cfg->batch.global,
                                     .seed = (uint64_t)cfg->run.seed,
                                     .rank = run->comm->rank,
                                     .ranks = run->comm->ranks,
                                     .prefetch = (int)cfg->data.prefetch,
                                     .document_mask = cfg->data.document_mask};
    TRY(run_vocab(cfg, &run->vocab_size, &run->tokenizer_id));
    options.tokenizer_id = run->tokenizer_id;
    options.vocab_size = run->vocab_size;
    TRY(loader_open(&run->train, &options));
    if (cfg->data.valid.n > 0) {
        options.sets = &cfg->data.valid;
        options.sequential = true;
        TRY(loader_open(&run->valid, &options));
    }
    const double epochs = (double)cfg->run.steps * (double)cfg->batch.global / (double)loader_sequences(run->train);
    log_info("data: %lld training tokens, %lld sequences of %lld; the run reads them %.2f times",
             (long long)loader_tokens(run->train), (long long)loader_sequences(run->train),
             (long long)cfg->model.seq_len, epochs);
    return 0;
}

/* Measures, checks and takes the memory of the run. Not collective. */
static int open_memory(struct run *run)
{
    struct arena measure = arena_measure(&run->dev);
    TRY(step_layout(&run->step, run->cfg, run->vocab_size, &run->dev, run->comm, &measure));
    step_close(&run->step);
    run->base_bytes = metrics_rss_bytes();
    /* Ranks of a node share its memory; under MPI they may share a GPU's. */
    const bool shared = run->dev.kind == DEVICE_CPU || run->cfg->top.comm == COMM_MPI;
    const int devices = run->dev.table->count();
    TRY(plan_check_memory(&measure, shared ? (run->comm->local_ranks + devices - 1) / devices : 1));
    TRY(arena_open(&run->arena, &run->dev, measure.used));
    return step_layout(&run->step, run->cfg, run->vocab_size, &run->dev, run->comm, &run->arena);
}

/* Finds the checkpoint to go on from; folder "" when the run starts at step 0. Collective. */
static int find_checkpoint(struct run *run, char folder[CKPT_PATH_MAX])
{
    const char *from = run->cfg->checkpoint.resume;
    folder[0] = '\0';
    if (strcmp(from, "auto") == 0) return ckpt_find_newest(run->comm, run->cfg->run.dir, INT64_MAX, 1, folder);
    if (strcmp(from, "never") == 0) {
        char newest[CKPT_PATH_MAX];
        TRY(ckpt_find_newest(run->comm, run->cfg->run.dir, INT64_MAX, 1, newest));
        if (newest[0] == '\0') return 0;
        return comm_agree(run->comm, err_raise(ERR_CONFIG, __FILE__, __LINE__,
                                               "checkpoint.resume is never, but %s exists; remove it, or choose "
                                               "another run.dir, so that no run is mixed with another",
                                               newest));
    }
    snprintf(folder, CKPT_PATH_MAX, "%s", from);
    return ckpt_verify(run->comm, folder);
}

/* A run keeps the attention that it began with: what a clock would choose now could give other bits. */
static void keep_attention(struct run *run, const struct ckpt_meta *meta)
{
    struct config *before = calloc(1, sizeof *before);
    if (before && meta->config_yaml && run->cfg->top.attention == ATTENTION_AUTO &&
        config_parse(before, "the checkpoint's configuration", meta->config_yaml, strlen(meta->config_yaml)) == 0)
        run->cfg->top.attention = before->top.attention;
    err_clear(); /* a configuration of another version chooses nothing */
    free(before);
}

/* The weights of another run's checkpoint, and nothing else of it. Collective. */
static int init_from(struct run *run)
{
    const char *folder = run->cfg->checkpoint.init_from;
    struct ckpt_meta meta = {0};
    TRY(ckpt_verify(run->comm, folder));
    int rc = ckpt_read_meta(folder, &meta);
    if (rc == 0) rc = state_load_masters(&run->step, folder, &meta);
    TRY_GOTO(comm_agree(run->comm, rc), done);
    TRY_GOTO(state_ready(&run->step), done);
    log_info("weights: from %s, step %lld", folder, (long long)meta.step);
done:
    ckpt_meta_free(&meta);
    return rc;
}

static int resume(struct run *run)
{
    int rc = 0;
    char folder[CKPT_PATH_MAX];
    struct ckpt_meta meta = {0};
    TRY(find_checkpoint(run, folder));
    TRY(step_start(&run->step, folder[0] == '\0'));
    if (folder[0] == '\0') return run->cfg->checkpoint.init_from[0] ? init_from(run) : 0;
    TRY_GOTO(comm_agree(run->comm, ckpt_read_meta(folder, &meta)), done);
    TRY_GOTO(state_load(&run->step, folder, &meta), done);
    run->done = run->saved = meta.step;
    run->began_at = meta.step;
    memcpy(run->began_from, folder, sizeof folder);
    keep_attention(run, &meta);
    log_info("resume: step %lld from %s", (long long)run->done, folder);
    if (meta.tokenizer_id != run->tokenizer_id) {
        log_warn("%s was trained with another tokenizer than %s: its tokens mean something else", folder,
                 run->cfg->data.tokenizer);
    }
done:
    ckpt_meta_free(&meta);
    return rc;
}

/* Rank 0 chooses what computes attention, and all take the same; the configuration says which from here on. Collective. */
static int choose_attention(struct run *run)
{
    int rc = 0;
    char why[512] = "";
    struct device *dev = &run->dev;
    const struct config_model *m = &run->cfg->model;
    enum attention_choice choice = (enum attention_choice)run->cfg->top.attention;
    const struct attention_case c = {.act = run->step.model.act,
                                     .sequences = run->cfg->batch.micro,
                                     .seq_len = (int)m->seq_len,
                                     .heads = (int)m->heads,
                                     .kv_heads = (int)m->kv_heads,
                                     .head_dim = (int)m->head_dim,
                                     .document_mask = run->cfg->data.document_mask};
    if (run->comm->rank == 0) rc = dev->table->choose_attention(dev, &c, &choice, why, sizeof why);
    TRY(comm_agree(run->comm, rc));
    TRY(comm_bcast(run->comm, &choice, sizeof choice, 0));
    log_info("attention: %s", why);
    if (run->comm->rank != 0) rc = dev->table->choose_attention(dev, &c, &choice, why, sizeof why);
    run->cfg->top.attention = (int)choice;
    return comm_agree(run->comm, rc);
}

/* The rate of the model's largest matrix product, all ranks together, in FLOP/s: what progress is compared with. */
static int measure_peak(struct run *run, double *flops)
{
    struct model *m = &run->step.model;
    double best = 0;
    const struct tensor x = tensor_rows(m->nf, 0, m->chunk);
    for (int i = 0; i < RATE_TRIES; i++) {
        const double begin = step_clock_s();
        TRY(op_matmul(&run->dev, m->logits, x, m->head.w, m->head.pack_fwd, TENSOR_NONE, MATMUL_TB));
        TRY(run->dev.table->sync(&run->dev));
        const double rate =
            2.0 * (double)m->chunk * (double)m->vocab_size * (double)m->cfg.hidden / (step_clock_s() - begin);
        best = rate > best ? rate : best;
    }
    *flops = best;
    return comm_sum_f64(run->comm, flops, 1);
}

static int save_config(const struct run *run)
{
    int rc = 0;
    char path[CONFIG_TEXT_MAX + 32], *text = NULL;
    FILE *file = NULL;
    snprintf(path, sizeof path, "%s/config.yaml", run->cfg->run.dir);
    TRY_GOTO(config_to_yaml(run->cfg, &text), done);
    file = fopen(path, "w");
    if (!file || fputs(text, file) == EOF || fflush(file) != 0) {
        FAIL_GOTO(done, ERR_SYSTEM, "cannot write %s: %s; check the folder's rights and space", path,
                  strerror(errno));
    }
done:
    if (file) fclose(file);
    free(text);
    return rc;
}

static int open_metrics(struct run *run)
{
    double peak_flops = 0;
    TRY(measure_peak(run, &peak_flops));
    TRY(comm_agree(run->comm, metrics_open(&run->metrics, run->comm, run->cfg,
                                           model_flops_per_token(&run->cfg->model, run->vocab_size), peak_flops)));
    if (run->comm->rank != 0) return 0;
    log_info("matmul: %.0f GFLOP/s measured, all ranks together", peak_flops / 1e9);
    /* On a GPU the arena is its memory, and what MPI takes is the host's. */
    const size_t comm_bytes = run->dev.kind == DEVICE_CPU ? comm_buffer_bytes(run->comm) : 0;
    return metrics_event(&run->metrics, run->done > 0 ? "resume" : "start", run->done,
                         json_pack("{s:i, s:I, s:I, s:I, s:I, s:f}", "ranks", run->comm->ranks, "parameters",
                                   (json_int_t)run->step.params.elems, "arena_bytes", (json_int_t)run->arena.size,
                                   "planned_bytes", (json_int_t)(run->arena.size + comm_bytes), "base_rss_bytes",
                                   (json_int_t)run->base_bytes, "matmul_flops", peak_flops));
}

/* How the save under way ended. Not collective. */
static int report_save(struct run *run, int rc)
{
    const double all_s = step_clock_s() - run->saving_s;
    const double stall_s = run->stall_s + state_saver_take_wait_s(run->saver);
    if (rc != 0) {
        /* All ranks agreed on this failure, and nothing that was saved before is lost: training is worth going on. */
        if (err_message()[0] != '\0')
            log_warn("no checkpoint at step %lld: %s", (long long)run->saving, err_message());
        return rc;
    }
    run->saved = run->saving;
    log_info("checkpoint: %s/step-%08lld in %.1f s, for which training stood still %.2f s", run->cfg->run.dir,
             (long long)run->saved, all_s, stall_s);
    return metrics_event(&run->metrics, "checkpoint", run->saved,
                         json_pack("{s:f, s:f}", "s", all_s, "stall_s", stall_s));
}

/* Starts a save. Collective. */
static int save_start(struct run *run)
{
    int rc = 0;
    struct ckpt_meta meta = {.step = run->done,
                             .grad_scale = run->step.grad_scale,
                             .grad_norm = run->step.grad_norm,
                             .faults = run->step.faults,
                             .batches_skipped = run->step.batches_skipped,
                             .loss_seen = run->step.loss_seen,
                             .loss_mean = run->step.loss_mean,
                             .loss_variance = run->step.loss_variance,
                             .model_id = run->step.params.id,
                             .tokenizer_id = run->tokenizer_id,
                             .tokens =
                                 (double)run->done * (double)(run->cfg->batch.global * run->cfg->model.seq_len)};
    const struct ckpt_keep keep = {.newest = run->cfg->checkpoint.keep, .every = run->cfg->checkpoint.keep_every};
    snprintf(meta.version, sizeof meta.version, "%s", run_version);
    run->saving = run->done;
    run->saving_s = step_clock_s();
    TRY_GOTO(comm_agree(run->comm, config_to_yaml(run->cfg, &meta.config_yaml)), done);
    TRY_GOTO(state_save_start(run->saver, &meta, keep), done);
    if (!run->cfg->checkpoint.async) TRY_GOTO(ckpt_save_wait(state_saver_ckpt(run->saver)), done);
done:
    free(meta.config_yaml);
    run->stall_s = step_clock_s() - run->saving_s;
    metrics_skip(&run->metrics, run->saving_s);
    return rc != 0 || !run->cfg->checkpoint.async ? report_save(run, rc) : 0;
}

/* Moves the save under way on, when no rank is busy with its part. Collective. */
static int save_advance(struct run *run)
{
    struct ckpt_saver *ckpt = state_saver_ckpt(run->saver);
    const int rc = ckpt_save_advance(ckpt);
    return ckpt_save_busy(ckpt) ? 0 : report_save(run, rc);
}

/* A save that is due. One that is under way is not waited for. A failure is a warning. Collective. */
static void save_periodic(struct run *run)
{
    if (ckpt_save_busy(state_saver_ckpt(run->saver))) {
        const int64_t steps = run->done - run->saving;
        if (run->comm->rank == 0) {
            log_warn("no checkpoint at step %lld: that of step %lld is still being written, %lld steps later; "
                     "checkpoint.every=%lld would fit",
                     (long long)run->done, (long long)run->saving, (long long)steps,
                     (long long)(steps + run->cfg->checkpoint.every));
        }
    } else if (run->saved != run->done) {
        (void)save_start(run);
    }
    err_clear();
}

/* The last save, which is waited for. Collective. */
static int save_last(struct run *run)
{
    struct ckpt_saver *ckpt = state_saver_ckpt(run->saver);
    if (ckpt_save_busy(ckpt) && report_save(run, ckpt_save_wait(ckpt)) != 0) err_clear();
    if (run->saved == run->done) return 0;
    TRY(save_start(run));
    return ckpt_save_busy(ckpt) ? report_save(run, ckpt_save_wait(ckpt)) : 0;
}

static int evaluate(struct run *run)
{
    double loss = 0;
    const double begin = step_clock_s();
    if (!run->valid) return 0;
    TRY(step_evaluate(&run->step, run->valid, run->cfg->log.eval_batches, &loss));
    if (run->comm->rank == 0) {
        printf("step %lld/%lld  validation loss %.4f  (%.1f s)\n", (long long)run->done,
               (long long)run->cfg->run.steps, loss, step_clock_s() - begin);
        fflush(stdout);
    }
    TRY(metrics_event(&run->metrics, "evaluation", run->done, json_pack("{s:f}", "loss", loss)));
    metrics_skip(&run->metrics, begin);
    return 0;
}

static bool due(int64_t step, int64_t every)
{
    return every > 0 && step % every == 0;
}

/* Where a rewind from this step goes back to: the newest checkpoint that the interval made, not one that a request did, so
 * that a run which was stopped in between goes back just as far; else the one that the run began from; "": to the
 * beginning. Collective. */
static int find_rewind(struct run *run, int64_t step, char folder[CKPT_PATH_MAX])
{
    const int64_t every = run->cfg->checkpoint.every;
    folder[0] = '\0';
    if (every > 0) TRY(ckpt_find_newest(run->comm, run->cfg->run.dir, step, every, folder));
    if (folder[0] == '\0' && run->began_at > 0) memcpy(folder, run->began_from, CKPT_PATH_MAX);
    return 0;
}

/* Goes back, and leaves out the batches from there up to the faulty step's. Collective. */
static int rewind_run(struct run *run)
{
    int rc = 0;
    char folder[CKPT_PATH_MAX];
    struct step *step = &run->step;
    struct ckpt_saver *ckpt = state_saver_ckpt(run->saver);
    struct ckpt_meta meta = {0};
    const int64_t fault = step->settled, batch_after = fault + step->batches_skipped + 1;
    if (ckpt_save_busy(ckpt) && report_save(run, ckpt_save_wait(ckpt)) != 0) err_clear();
    TRY(find_rewind(run, fault, folder));
    if (folder[0] != '\0') {
        TRY_GOTO(comm_agree(run->comm, ckpt_read_meta(folder, &meta)), done);
        TRY_GOTO(state_load(step, folder, &meta), done);
    } else {
        step->grad_norm = step->loss_mean = step->loss_variance = 0;
        step->loss_seen = 0;
        TRY_GOTO(step_start(step, true), done);
    }
    run->done = meta.step;
    step->batches_skipped = batch_after - run->done;
    TRY_GOTO(loader_seek(run->train, batch_after), done);
    TRY_GOTO(metrics_event(&run->metrics, "rewind", run->done,
                           json_pack("{s:I, s:I}", "fault_step", (json_int_t)fault + 1, "batches_skipped",
                                     (json_int_t)step->batches_skipped)),
             done);
done:
    ckpt_meta_free(&meta);
    return rc;
}

/* Whether the outcome of the step just issued is wanted at once. A CPU has it anyway. */
static bool must_settle(struct run *run)
{
    const struct config *cfg = run->cfg;
    return !run->dev.table->queue(&run->dev) || due(run->done, cfg->log.every) ||
           due(run->done, cfg->log.eval_every) || due(run->done, cfg->checkpoint.every) ||
           due(run->done, cfg->run.check_replicas_every);
}

/* Steps until the end of the run or a request to stop. */
static int loop(struct run *run)
{
    const struct config *cfg = run->cfg;
    const int64_t end = cfg->run.stop_at > 0 && cfg->run.stop_at < cfg->run.steps ? cfg->run.stop_at : cfg->run.steps;
    struct request request = {.stop = false};
    bool last = run->done >= end;
    bool save_asked = false; /* and not yet begun, since another save was under way */
    struct step_report report;
    TRY(loader_seek(run->train, run->done + run->step.batches_skipped));
    run->metrics.mark_s = step_clock_s();
    while (!last) {
        TRY(step_run(&run->step, run->train, run->done, &report));
        run->done++;
        TRY(signal_poll(run->comm, cfg->run.dir, !ckpt_save_ready(state_saver_ckpt(run->saver)), &request));
        if (!request.busy && ckpt_save_busy(state_saver_ckpt(run->saver)) && save_advance(run) != 0) err_clear();
        last = run->done == end || request.stop;
        if (last || request.save || must_settle(run)) {
            TRY(step_settle(&run->step, run->train, run->done, &report));
        }
        if (report.rewind) {
            TRY(rewind_run(run));
            last = false;
            continue;
        }
        if (report.skipped > 0)
            TRY(metrics_event(&run->metrics, "skip", run->done, json_pack("{s:i}", "steps", report.skipped)));
        TRY(metrics_step(&run->metrics, run->comm, run->done, &report, last));
        if (due(run->done, cfg->run.check_replicas_every)) TRY(replicas_check(&run->step, run->done));
        if (due(run->done, cfg->log.eval_every) && run->done < end) TRY(evaluate(run));
        save_asked |= request.save;
        if (!last && (due(run->done, cfg->checkpoint.every) ||
                      (save_asked && !ckpt_save_busy(state_saver_ckpt(run->saver))))) {
            save_periodic(run);
            save_asked = false;
        }
    }
    if (run->done >= cfg->run.steps) TRY(evaluate(run));
    TRY(save_last(run));
    if (run->done >= cfg->run.steps) {
        log_info("done: %lld steps; the model is in %s/step-%08lld", (long long)run->done, cfg->run.dir,
                 (long long)run->done);
    } else {
        log_info("stopped at step %lld of %lld %s; the same command goes on from here", (long long)run->done,
                 (long long)cfg->run.steps, request.stop ? "on request" : "as run.stop_at says");
    }
    TRY(metrics_event(&run->metrics, "end", run->done, NULL));
    if (!request.stop || run->done == end) return 0;
    err_share(); /* no message: this is how it was meant to end */
    return ERR_STOPPED;
}

static int run_train(struct comm *comm, struct config *cfg)
{
    int rc = 0;
    struct run run = {.cfg = cfg, .comm = comm, .saved = -1};
    TRY_GOTO(signal_open(), done);
    TRY_GOTO(comm_agree(comm, open_device(&run.dev, cfg, comm)), done);
    TRY_GOTO(comm_agree(comm, open_transport(&run)), done);
    TRY_GOTO(comm_agree(comm, open_data(&run)), done);
    TRY_GOTO(comm_agree(comm, open_memory(&run)), done);
    log_info("model: %.1f M parameters; memory: %.0f MiB a rank", (double)run.step.params.elems / 1e6,
             (double)run.arena.size / (1 << 20));
    TRY_GOTO(ckpt_open_run_dir(comm, cfg->run.dir, &run.folder), done);
    TRY_GOTO(comm_agree(comm, comm_watch(comm, cfg->run.dir, (double)cfg->run.hang_timeout_s)), done);
    TRY_GOTO(resume(&run), done);
    TRY_GOTO(choose_attention(&run), done);
    if (comm->rank == 0) rc = save_config(&run);
    TRY_GOTO(comm_agree(comm, rc), done);
    TRY_GOTO(comm_agree(comm, state_saver_open(&run.saver, &run.step, &run.folder)), done);
    TRY_GOTO(open_metrics(&run), done);
    TRY_GOTO(loop(&run), done);
done:
    state_saver_close(run.saver);
    metrics_close(&run.metrics);
    loader_close(run.valid);
    loader_close(run.train);
    step_close(&run.step);
    comm_close_transport(comm);
    arena_close(&run.arena);
    device_close(&run.dev);
    return rc;
}

static void usage(void)
{
    puts("usage: tatara train CONFIG.yaml [key=value ...]\n"
         "       mpirun -n RANKS tatara train CONFIG.yaml [key=value ...]\n"
         "\n"
         "Trains the model that the configuration describes; with checkpoints in run.dir, goes on from the newest.\n"
         "key=value words override the file, for example optim.lr=1e-4 or batch.global=128.\n"
         "\n"
         "  --help-config   every option: type, default, range, meaning\n"
         "  --help          this text\n"
         "\n"
         "To stop: Ctrl-C, SIGTERM or SIGUSR1, or `touch RUN_DIR/STOP`; the step in hand is finished and saved.\n"
         "To save and go on: `touch RUN_DIR/SAVE`. Under mpirun send SIGUSR1 to mpirun, which passes it on.\n"
         "Environment: TATARA_LOG=debug|info|warn|error.");
}

int run_command(struct comm *comm, int argc, char **argv)
{
    int rc = 0;
    const bool help_config = argc > 0 && strcmp(argv[0], "--help-config") == 0;
    if (argc < 1 || argv[0][0] == '-') {
        const bool asked = argc > 0 && (help_config || strcmp(argv[0], "--help") == 0);
        if (comm->rank == 0 && help_config) config_help();
        if (comm->rank == 0 && !help_config) usage();
        if (asked) return 0;
        return comm_agree(comm,
                          err_raise(ERR_USAGE, __FILE__, __LINE__, "tatara train needs a configuration file%s%s",
                                    argc > 0 ? ", not " : "", argc > 0 ? argv[0] : ""));
    }
    struct config *cfg = calloc(1, sizeof *cfg);
    if (!cfg) rc = err_raise(ERR_SYSTEM, __FILE__, __LINE__, "out of memory for the configuration");
    TRY_GOTO(comm_agree(comm, rc), done);
    ASSERT(cfg);
    if (comm->rank == 0) {
        rc = config_load(cfg, argv[0], argc - 1, argv + 1);
        if (rc == 0) rc = config_check_for_training(cfg);
    }
    TRY_GOTO(comm_agree(comm, rc), done);
    TRY_GOTO(comm_bcast(comm, cfg, sizeof *cfg, 0), done);
    if (comm->rank == 0) {
        printf("tatara %s: training, %d rank%s\n", run_version, comm->ranks, comm->ranks == 1 ? "" : "s");
        config_print(cfg);
        fflush(stdout);
        config_warn_recipes(cfg);
    }
    TRY_GOTO(run_train(comm, cfg), done);
done:
    free(cfg);
    return rc;
}
