/* The training loop: batch, step, log, save, stop; and what must be open before it. */
#include "run.h"

#include "ckpt/ckpt.h"
#include "clock.h"
#include "data/loader.h"
#include "data/overlap.h"
#include "data/shard.h"
#include "data/tokenizer.h"
#include "device.h"
#include "err.h"
#include "log.h"
#include "metrics.h"
#include "plan.h"
#include "record.h"
#include "replicas.h"
#include "requests.h"
#include "saving.h"
#include "signals.h"
#include "start.h"
#include "step.h"

#include <errno.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* What a node's ranks write together on an ordinary disk. */
#define SAVE_BYTES_PER_S 0.5e9

const char run_version[] = TATARA_VERSION " (" TATARA_COMMIT ")";

struct run {
    struct config *cfg;
    struct comm *comm;
    struct device dev;
    struct arena arena;
    struct step step;
    struct loader *train, *valid; /* valid NULL: nothing to evaluate on */
    struct metrics metrics;
    struct saving saving;
    int64_t vocab_size;
    uint64_t tokenizer_id;
    char *record; /* of data and arithmetic; owned */
    struct start_outcome start;
    int64_t done; /* steps */
    bool stop;    /* asked for */
    size_t base_bytes;
};

int run_vocab(const struct config *cfg, const struct tokenizer *tokenizer, int64_t *vocab_size)
{
    const int64_t size = tokenizer_vocab_size(tokenizer);
    *vocab_size = cfg->model.vocab_size;
    if (*vocab_size == 0) *vocab_size = size;
    if (*vocab_size < size) {
        FAIL(ERR_CONFIG, "model.vocab_size is %lld, but %s has %lld tokens; use at least that many, or 0",
             (long long)*vocab_size, cfg->data.tokenizer, (long long)size);
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

/* The vocabulary, and on rank 0 the model that goes into the checkpoints. Not collective. */
static int open_tokenizer(struct run *run)
{
    int rc = 0;
    struct tokenizer *tokenizer = NULL;
    run->vocab_size = run->cfg->model.vocab_size;
    if (run->cfg->data.tokenizer[0] == '\0') return 0;
    TRY(tokenizer_open(&tokenizer, run->cfg->data.tokenizer));
    run->tokenizer_id = tokenizer_id(tokenizer);
    TRY_GOTO(run_vocab(run->cfg, tokenizer, &run->vocab_size), done);
    if (run->comm->rank == 0) {
        TRY_GOTO(tokenizer_copy_model(tokenizer, &run->saving.tokenizer, &run->saving.tokenizer_bytes), done);
    }
done:
    tokenizer_close(tokenizer);
    return rc;
}

/* Either may be NULL. */
static int check_overlap(const struct loader *train, const struct loader *valid)
{
    int rc = 0;
    struct overlap overlap = {.uses = {.data = NULL}};
    if (train) TRY_GOTO(loader_add_shards(train, &overlap), done);
    if (valid) TRY_GOTO(loader_add_shards(valid, &overlap), done);
    rc = overlap_check(&overlap);
done:
    overlap_free(&overlap);
    return rc;
}

int run_open_loaders(const struct config *cfg, int rank, int ranks, int64_t vocab_size, uint64_t tokenizer_id,
                     struct loader **train, struct loader **valid)
{
    struct loader_options options = {.sets = &cfg->data.train,
                                     .seq_len = cfg->model.seq_len,
                                     .micro = cfg->batch.micro,
                                     .global = cfg->batch.global,
                                     .seed = (uint64_t)cfg->run.seed,
                                     .rank = rank,
                                     .ranks = ranks,
                                     .prefetch = (int)cfg->data.prefetch,
                                     .document_mask = cfg->data.document_mask,
                                     .tokenizer_id = tokenizer_id,
                                     .vocab_size = vocab_size};
    if (cfg->data.train.n > 0) TRY(loader_open(train, &options));
    options.sets = &cfg->data.valid;
    options.like = cfg->data.train.n > 0 ? loader_shard_info(*train) : NULL;
    options.sequential = true;
    if (cfg->data.valid.n > 0) TRY(loader_open(valid, &options));
    return check_overlap(*train, *valid);
}

/* Data, and what the model needs to know of it. Not collective. */
static int open_data(struct run *run)
{
    const struct config *cfg = run->cfg;
    TRY(open_tokenizer(run));
    TRY(run_open_loaders(cfg, run->comm->rank, run->comm->ranks, run->vocab_size, run->tokenizer_id, &run->train,
                         &run->valid));
    run->tokenizer_id = loader_shard_info(run->train)->tokenizer_id; /* where data.tokenizer is not given, too */
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
    TRY(plan_check_memory(&measure, run->comm, shared ? (run->comm->local_ranks + devices - 1) / devices : 1));
    TRY(arena_open(&run->arena, &run->dev, measure.used));
    return step_layout(&run->step, run->cfg, run->vocab_size, &run->dev, run->comm, &run->arena);
}

static int open_folder(struct run *run)
{
    return ckpt_open_run_dir(run->comm, run->cfg->run.dir,
                             (struct ckpt_terms){run->cfg->run.takeover, signal_stop_asked}, &run->saving.folder);
}

/* From step 0 or a checkpoint. Collective. */
static int open_state(struct run *run)
{
    struct saving *saving = &run->saving;
    TRY(comm_agree(run->comm, record_make(run->cfg, run->train, run->valid, &run->dev, run->comm, &run->record)));
    saving->tokenizer_id = run->tokenizer_id;
    saving->vocab_size = run->vocab_size;
    saving->record = run->record;
    TRY(start_begin(saving, &run->start));
    run->done = run->start.done;
    run->cfg->top.attention = run->start.attention;
    return 0;
}

/* Rank 0 chooses what computes attention, and all take the same; the configuration says which from here on. Collective. */
static int choose_attention(struct run *run)
{
    int rc = 0;
    char why[512] = "";
    struct device *dev = &run->dev;
    enum attention_choice choice = (enum attention_choice)run->cfg->top.attention;
    const struct attention_case c = step_attention_case(&run->step);
    if (run->comm->rank == 0) rc = dev->table->choose_attention(dev, &c, &choice, why, sizeof why);
    TRY(comm_agree(run->comm, rc));
    TRY(comm_bcast(run->comm, &choice, sizeof choice, 0));
    if (run->comm->rank != 0) rc = dev->table->choose_attention(dev, &c, &choice, why, sizeof why);
    TRY(comm_agree(run->comm, rc));
    log_info("attention: %s", why);
    run->cfg->top.attention = (int)choice;
    return 0;
}

/* Whether the file holds exactly this text. */
static bool holds(const char *path, const char *text)
{
    const size_t bytes = strlen(text);
    FILE *file = fopen(path, "rb");
    char *found = malloc(bytes + 1);
    const bool same = file && found && fread(found, 1, bytes + 1, file) == bytes && memcmp(found, text, bytes) == 0;
    free(found);
    if (file) (void)fclose(file);
    return same;
}

/* Gives a config.yaml of an earlier attempt that is another the next free number: config.1.yaml was the first. */
static int keep_config(const char *dir, const char *path)
{
    char kept[CONFIG_TEXT_MAX + 32];
    int n = 1;
    do {
        snprintf(kept, sizeof kept, "%s/config.%d.yaml", dir, n++);
    } while (access(kept, F_OK) == 0);
    if (rename(path, kept) == 0 || errno == ENOENT) return 0;
    FAIL(ERR_SYSTEM, "%s cannot be renamed to %s: %s; check the folder's rights", path, kept, strerror(errno));
}

/* The effective configuration, beside those of earlier attempts where they differ. By rank 0. */
static int save_config(struct run *run)
{
    int rc = 0;
    if (run->comm->rank != 0) return 0;
    char path[CONFIG_TEXT_MAX + 32], *text = NULL;
    FILE *file = NULL;
    snprintf(path, sizeof path, "%s/config.yaml", run->cfg->run.dir);
    TRY_GOTO(config_to_yaml(run->cfg, &text), done);
    if (holds(path, text)) goto done;
    TRY_GOTO(keep_config(run->cfg->run.dir, path), done);
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
    struct peak peak;
    TRY(peak_open(&peak, &run->step, run->cfg->run.dir));
    TRY(comm_agree(run->comm, metrics_open(&run->metrics, run->comm, run->cfg,
                                           model_flops_per_token(&run->cfg->model, run->vocab_size), &peak)));
    if (run->comm->rank != 0) return 0;
    log_info("matmul: %.0f GFLOP/s, all ranks together, measured %s", peak.flops / 1e9,
             peak.kept ? "by an earlier start of this run" : "with the model's largest product");
    /* On a GPU the arena is its memory, and what MPI takes is the host's. */
    const size_t comm_bytes = run->dev.kind == DEVICE_CPU ? comm_buffer_bytes(run->comm) : 0;
    return metrics_event(&run->metrics, run->done > 0 ? "resume" : "start", run->done,
                         json_pack("{s:i, s:I, s:I, s:I, s:I, s:f, s:O*, s:O*}", "ranks", run->comm->ranks,
                                   "parameters", (json_int_t)run->step.params.elems, "arena_bytes",
                                   (json_int_t)run->arena.size, "planned_bytes",
                                   (json_int_t)(run->arena.size + comm_bytes), "base_rss_bytes",
                                   (json_int_t)run->base_bytes, "matmul_flops", peak.flops, "changes",
                                   run->start.changes.list, "arithmetic_changes", run->start.changes.arithmetic));
}

/* A phase that may read or write files: it ends the run when it stands still for run.hang_timeout_s. */
static int watched(struct run *run, const char *what, int (*phase)(struct run *))
{
    comm_wait_enter(run->comm, what);
    const int rc = phase(run);
    comm_wait_leave(run->comm);
    return rc;
}

static int evaluate(struct run *run)
{
    double loss = 0;
    const double begin = now_s();
    if (!run->valid) return 0;
    TRY(step_evaluate(&run->step, run->valid, run->cfg->log.eval_batches, &loss));
    if (isnan(loss)) {
        log_info("no validation loss at step %lld: asked to stop meanwhile", (long long)run->done);
        return 0;
    }
    if (run->comm->rank == 0) {
        printf("step %lld/%lld  validation loss %.4f  (%.1f s)\n", (long long)run->done,
               (long long)run->cfg->run.steps, loss, now_s() - begin);
        log_flush();
    }
    TRY(metrics_event(&run->metrics, "evaluation", run->done, json_pack("{s:f}", "loss", loss)));
    metrics_skip(&run->metrics, begin);
    return 0;
}

static bool due(int64_t step, int64_t every)
{
    return every > 0 && step % every == 0;
}

/* Whether the outcome of the step just issued is wanted at once. A CPU has it anyway. */
static bool must_settle(struct run *run)
{
    const struct config *cfg = run->cfg;
    return !run->dev.table->queue(&run->dev) || due(run->done, cfg->log.every) ||
           due(run->done, cfg->log.eval_every) || due(run->done, cfg->run.check_replicas_every) ||
           saving_wanted(&run->saving, run->done);
}

/* Takes up what was asked for meanwhile, and moves the save under way on. Collective. */
static int take_requests(struct run *run)
{
    struct request request;
    TRY(request_poll(run->comm, &run->saving.folder, saving_busy(&run->saving), &request));
    saving_advance(&run->saving, request.busy);
    run->saving.asked |= request.save;
    run->stop |= request.stop;
    return 0;
}

/* Says it when the launcher would kill the ranks before they have done a micro-batch and saved; a step takes step_s. */
static void check_grace(const struct run *run, double step_s, int64_t micro_batches)
{
    const double grace_s = comm_grace_s(), bytes = (double)zero_saved_bytes(&run->step.zero) * run->comm->local_ranks;
    const double need_s = step_s / (double)(micro_batches > 0 ? micro_batches : 1) + bytes / SAVE_BYTES_PER_S;
    if (need_s < grace_s) return;
    log_info("to stop, send SIGUSR1 to mpirun: after Ctrl-C or SIGTERM it kills the ranks within %.0f s, and a "
             "micro-batch and a save take some %.1f s; with --mca odls_base_sigkill_timeout %.0f it leaves them time",
             grace_s, need_s, 2 + ceil(need_s));
}

/* Back to the last whole step, when one was given up for a request to stop. */
static int give_up(struct run *run, const struct step_report *report)
{
    log_info("step %lld: given up half-way on request; the next start does it again",
             (long long)run->step.settled + 1);
    run->done = run->step.settled;
    return run->metrics.steps > 0 ? metrics_step(&run->metrics, run->comm, run->done, report, true) : 0;
}

/* Steps until the end of the run or a request to stop. */
static int loop(struct run *run)
{
    const struct config *cfg = run->cfg;
    const int64_t end = cfg->run.stop_at > 0 && cfg->run.stop_at < cfg->run.steps ? cfg->run.stop_at : cfg->run.steps;
    struct saving *saving = &run->saving;
    bool last = run->done >= end;
    struct step_report report;
    TRY(loader_seek(run->train, step_position(&run->step, run->done)));
    /* What it may have to go back to must be in its own folder. */
    if (!last && saving->saved < 0 && run->done > 0 && config_rewinds(cfg)) saving_now(saving, run->done);
    bool checked = false;
    run->metrics.mark_s = now_s();
    while (!last) {
        TRY(step_run(&run->step, run->train, run->done, &report));
        run->done++;
        TRY(take_requests(run));
        last = run->done == end || run->stop;
        if (last || must_settle(run)) TRY(step_settle(&run->step, run->train, run->done, &report));
        if (report.rewind) {
            TRY(saving_rewind(saving, &run->done));
            TRY(loader_seek(run->train, step_position(&run->step, run->done)));
            last = run->stop;
            continue;
        }
        if (report.skipped > 0)
            TRY(metrics_event(&run->metrics, "skip", run->done, json_pack("{s:i}", "steps", report.skipped)));
        if (report.given_up) {
            TRY(give_up(run, &report));
            break;
        }
        if (!checked && run->step.settled == run->done) {
            check_grace(run, (now_s() - run->metrics.mark_s) / (double)(run->metrics.steps + 1),
                        report.micro_batches);
            checked = true;
        }
        TRY(metrics_step(&run->metrics, run->comm, run->done, &report, last));
        if (due(run->done, cfg->run.check_replicas_every)) TRY(replicas_check(&run->step, run->done));
        if (due(run->done, cfg->log.eval_every) && run->done < end) {
            TRY(evaluate(run));
            TRY(take_requests(run));
            last |= run->stop;
        }
        if (!last && saving_wanted(saving, run->done)) saving_now(saving, run->done);
        if (!last && saving_jump(saving, run->done))
            TRY(loader_seek(run->train, step_position(&run->step, run->done)));
    }
    if (run->done > 0) TRY(saving_last(saving, run->done));
    if (run->done >= cfg->run.steps) TRY(evaluate(run));
    if (run->done >= cfg->run.steps) {
        log_info("done: %lld steps; the model is in %s/step-%08lld", (long long)run->done, cfg->run.dir,
                 (long long)run->done);
    } else {
        log_info("stopped at step %lld of %lld %s goes on from here", (long long)run->done, (long long)cfg->run.steps,
                 run->stop ? "on request; the same command" : "as run.stop_at says; the command without it");
    }
    TRY(metrics_event(&run->metrics, "end", run->done, NULL));
    if (!run->stop || run->done == end) return 0;
    err_share(); /* no message: this is how it was meant to end */
    return ERR_STOPPED;
}

/* Ends the start of a run that is asked to stop meanwhile: there is nothing to save yet. Collective. */
static int go_on(struct comm *comm)
{
    const int rc = comm_agree(comm, signal_stop_asked() ? ERR_STOPPED : 0);
    if (rc != ERR_STOPPED) return rc;
    log_info("stopped on request before the first step; the same command starts again");
    err_share();
    return rc;
}

static int run_train(struct comm *comm, struct config *cfg)
{
    int rc = 0;
    struct run run = {.cfg = cfg, .comm = comm};
    run.saving = (struct saving){.cfg = cfg, .comm = comm, .step = &run.step, .metrics = &run.metrics, .saved = -1};
    TRY_GOTO(comm_agree(comm, device_start(&run.dev, cfg, comm)), done);
    TRY_GOTO(comm_agree(comm, open_transport(&run)), done);
    TRY_GOTO(comm_agree(comm, watched(&run, "the tokenizer and the shards of data", open_data)), done);
    TRY_GOTO(go_on(comm), done);
    TRY_GOTO(comm_agree(comm, open_memory(&run)), done);
    log_info("model: %.1f M parameters; memory: %.0f MiB a rank", (double)run.step.params.elems / 1e6,
             (double)run.arena.size / (1 << 20));
    TRY_GOTO(watched(&run, "the run's folder", open_folder), done);
    TRY_GOTO(watched(&run, "the checkpoint to go on from", open_state), done);
    TRY_GOTO(go_on(comm), done);
    TRY_GOTO(choose_attention(&run), done);
    TRY_GOTO(comm_agree(comm, watched(&run, "config.yaml", save_config)), done);
    run.saving.bos = loader_shard_info(run.train)->bos;
    run.saving.eos = (int64_t)loader_shard_info(run.train)->eos;
    TRY_GOTO(comm_agree(comm, saving_open(&run.saving)), done);
    TRY_GOTO(go_on(comm), done);
    TRY_GOTO(watched(&run, "metrics.jsonl", open_metrics), done);
    TRY_GOTO(loop(&run), done);
done:
    if (rc == ERR_NUMERIC && (err_shared() || comm->ranks == 1)) saving_finish(&run.saving);
    saving_close(&run.saving);
    ckpt_close_run_dir(&run.saving.folder);
    metrics_close(&run.metrics);
    changes_close(&run.start.changes);
    free(run.record);
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
         "key=value words override the file, for example optim.lr=1e-4 or batch.global=128. Relative paths begin in\n"
         "the folder in which the program is started. `tatara plan CONFIG.yaml` says what a run needs, and what is\n"
         "refused of it, without starting one.\n"
         "\n"
         "  --help-config   every option: type, default, range, meaning\n"
         "  --help          this text\n"
         "\n"
         "To stop: Ctrl-C, SIGTERM, SIGHUP, SIGXCPU or SIGUSR1. The step in hand is given up, the last whole one\n"
         "is saved, and the exit status is 11; `tatara --help` lists the others. A second Ctrl-C, a second or more\n"
         "after the first, ends the run at once and unsaved. `touch RUN_DIR/STOP` stops after the step in hand.\n"
         "To save and go on: `touch RUN_DIR/SAVE`.\n"
         "Under mpirun or srun, send SIGUSR1 to it: it passes that on. After Ctrl-C or SIGTERM, Open MPI 4's mpirun\n"
         "kills the ranks within 2 s, or 2T s with --mca odls_base_sigkill_timeout T, and ends with 1; srun kills\n"
         "them at once; MPICH's mpirun lets them save. The README has a table.\n"
         "Progress and validation losses go to stdout, all else that a run says to stderr; both, and more, to\n"
         "RUN_DIR/metrics.jsonl.\n"
         "Environment: TATARA_LOG=debug|info|warn|error: what is said on stderr.");
}

int run_command(struct comm *comm, int argc, char **argv)
{
    int rc = 0;
    bool help = false, help_config = false;
    for (int i = 0; i < argc; i++) {
        help = help || strcmp(argv[i], "--help") == 0;
        help_config = help_config || strcmp(argv[i], "--help-config") == 0;
    }
    if (help || help_config || argc < 1 || argv[0][0] == '-') {
        if (comm->rank == 0 && help_config) config_help();
        if (comm->rank == 0 && !help_config) usage();
        if (help || help_config) return 0;
        return comm_agree(comm,
                          err_raise(ERR_USAGE, __FILE__, __LINE__, "tatara train needs a configuration file%s%s",
                                    argc > 0 ? ", not " : "", argc > 0 ? argv[0] : ""));
    }
    struct config *cfg = calloc(1, sizeof *cfg);
    if (!cfg) rc = err_raise(ERR_SYSTEM, __FILE__, __LINE__, "out of memory for the configuration");
    TRY_GOTO(comm_agree(comm, rc), done);
    ASSERT(cfg);
    config_defaults(cfg);
    rc = comm_watch(comm, NULL, (double)cfg->run.hang_timeout_s);
    if (rc == 0 && comm->rank == 0) {
        rc = config_load(cfg, argv[0], argc - 1, argv + 1);
        if (rc == 0) rc = config_check_for_training(cfg);
    }
    TRY_GOTO(comm_agree(comm, rc), done);
    TRY_GOTO(comm_bcast(comm, cfg, sizeof *cfg, 0), done);
    TRY_GOTO(comm_watch(comm, cfg->run.dir, (double)cfg->run.hang_timeout_s), done);
    if (comm->rank == 0) {
        log_info("tatara %s: training, %d rank%s", run_version, comm->ranks, comm->ranks == 1 ? "" : "s");
        if (log_shows(LOG_INFO)) config_print(stderr, cfg);
        config_warn_recipes(cfg);
    }
    TRY_GOTO(run_train(comm, cfg), done);
done:
    free(cfg);
    return rc;
}
