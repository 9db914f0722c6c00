/* `tatara plan`, and the check that a run fits before it starts. Both use the measuring pass of the layout itself. */
#include "plan.h"

#include "config.h"
#include "data/loader.h"
#include "data/tokenizer.h"
#include "err.h"
#include "path.h"
#include "run.h"
#include "state.h"
#include "step.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define MIB 1048576.0

int plan_check_memory(const struct arena *measured, const struct comm *comm, int sharers)
{
    size_t free_bytes = 0, total_bytes = 0;
    char attention[96] = "", owner[300];
    struct device *dev = measured->dev;
    const struct comm_limits *limits = &comm->limits;
    const size_t least = dev->table->workspace_bytes(dev, NULL, ATTENTION_FLASH);
    const bool cpu = dev->kind == DEVICE_CPU;
    TRY(dev->table->memory(dev, &free_bytes, &total_bytes));
    double share = free_bytes > 0 ? (double)free_bytes / sharers : INFINITY;
    snprintf(owner, sizeof owner, "the %d ranks that share this %s's memory", sharers, cpu ? "node" : "GPU");
    if (cpu && limits->memory_bytes > 0 && (double)limits->memory_bytes < share) {
        share = (double)limits->memory_bytes;
        total_bytes = (size_t)limits->memory_limit_bytes;
        snprintf(owner, sizeof owner, "the ranks under the limit of %s", limits->memory_of);
    }
    if ((double)measured->used <= share) return 0;
    if (dev->workspace_bytes > least)
        snprintf(attention, sizeof attention, "; the workspace takes %.0f MiB less with attention=flash",
                 (double)(dev->workspace_bytes - least) / MIB);
    FAIL(ERR_CONFIG,
         "this run needs %.0f MiB on each of %s, which leaves a rank %.0f of its %.0f MiB. "
         "Activations take %.0f MiB: lower batch.micro or set model.recompute=block; optimizer and gradients take "
         "%.0f "
         "MiB: use more ranks with parallel.zero=1%s. `tatara plan` shows the effect without running",
         (double)measured->used / MIB, owner, share / MIB, (double)total_bytes / MIB,
         (double)measured->by_kind[ARENA_ACTS] / MIB,
         (double)(measured->by_kind[ARENA_OPTIM] + measured->by_kind[ARENA_GRADS]) / MIB, attention);
}

/* The lines that `tatara plan --help` promises. */
static void print_for_scripts(const struct config *cfg, int64_t checkpoint_bytes)
{
    const struct config_checkpoint *c = &cfg->checkpoint;
    const int64_t for_ever = c->keep_every > 0 ? cfg->run.steps / c->keep_every : 0;
    const int64_t go_back = config_rewinds(cfg) ? 1 : 0;
    const int64_t checkpoints = c->keep + for_ever + go_back + 1; /* the one being written */
    const int64_t stop_at = cfg->run.stop_at;
    printf("\nrun.dir=%s\nrun.last_step=%lld\n", cfg->run.dir,
           (long long)(stop_at > 0 && stop_at < cfg->run.steps ? stop_at : cfg->run.steps));
    const int64_t all = checkpoints > INT64_MAX / checkpoint_bytes ? INT64_MAX : checkpoints * checkpoint_bytes;
    printf("checkpoint.bytes=%lld\ncheckpoints=%lld\ncheckpoints.bytes=%lld\n", (long long)checkpoint_bytes,
           (long long)checkpoints, (long long)all);
}

/* What the tokenizer, where it is there already, adds to a checkpoint. */
static int64_t tokenizer_bytes(const struct config *cfg)
{
    struct stat st;
    return stat(cfg->data.tokenizer, &st) == 0 ? (int64_t)st.st_size : 0;
}

/* The run's files that are on this machine, and what they say. */
struct inputs {
    struct config *here; /* the caller's: the configuration without the files that are not */
    struct tokenizer *tokenizer;
    struct loader *train, *valid;
    int64_t vocab_size;
};

static bool is_here(const char *option, const char *path)
{
    char whole[PATH_WHOLE_MAX];
    if (access(path, F_OK) == 0 || (errno != ENOENT && errno != ENOTDIR)) return true;
    printf("not checked     %s %s: it is not on this machine\n", option, path_whole(whole, path));
    return false;
}

static void keep_datasets_here(struct dataset_list *list, const char *option)
{
    int n = 0;
    for (int i = 0; i < list->n; i++)
        if (is_here(option, list->entry[i].path)) list->entry[n++] = list->entry[i];
    list->n = n;
}

/* Refuses what training would refuse of the configuration, the tokenizer and the shards, as far as they are here. */
static int open_inputs(struct inputs *in, const struct config *cfg, int ranks)
{
    uint64_t id = 0;
    in->vocab_size = cfg->model.vocab_size;
    *in->here = *cfg;
    const char *model = cfg->data.tokenizer;
    /* Without vocab_size there is no plan without the tokenizer, and without either no configuration. */
    if (in->vocab_size == 0 || (model[0] != '\0' && is_here("data.tokenizer", model))) {
        TRY(tokenizer_open(&in->tokenizer, model));
        TRY(run_vocab(cfg, in->tokenizer, &in->vocab_size));
        id = tokenizer_id(in->tokenizer);
    }
    keep_datasets_here(&in->here->data.train, "data.train");
    keep_datasets_here(&in->here->data.valid, "data.valid");
    TRY(run_open_loaders(in->here, 0, ranks, in->vocab_size, id, &in->train, &in->valid));
    if (in->train && in->here->data.train.n == cfg->data.train.n) {
        printf("data            %lld tokens, read %.2f times\n", (long long)loader_tokens(in->train),
               (double)cfg->run.steps * (double)cfg->batch.global / (double)loader_sequences(in->train));
    }
    return 0;
}

static void close_inputs(struct inputs *in)
{
    loader_close(in->valid);
    loader_close(in->train);
    tokenizer_close(in->tokenizer);
}

/* The checkpoint that the run begins from, as far as it is here. Once the run has a folder, checkpoints of its own may come
 * before it. */
static int check_start(const struct config *cfg, const struct params *params)
{
    int rc = 0;
    char folder[CKPT_PATH_MAX];
    struct ckpt_meta meta = {0};
    const struct config_checkpoint *c = &cfg->checkpoint;
    const bool resumes = strcmp(c->resume, "auto") != 0 && strcmp(c->resume, "never") != 0;
    const char *from = resumes ? c->resume : c->init_from;
    if (from[0] == '\0' || !is_here(resumes ? "checkpoint.resume" : "checkpoint.init_from", from)) return 0;
    if (access(cfg->run.dir, F_OK) == 0) return 0;
    TRY(ckpt_choose(from, folder));
    TRY_GOTO(ckpt_read_meta(folder, &meta), done);
    rc = state_check_model(params, folder, &meta);
done:
    ckpt_meta_free(&meta);
    return rc;
}

static int print_plan(const struct config *cfg, int64_t vocab_size, int ranks, struct device *dev)
{
    int rc = 0;
    struct comm comm = {.ranks = ranks, .local_ranks = ranks, .threads = 1};
    struct arena measure = arena_measure(dev);
    struct step step;
    TRY(step_layout(&step, cfg, vocab_size, dev, &comm, &measure));
    TRY_GOTO(check_start(cfg, &step.params), done);
    printf("parameters      %lld (%.2f B), vocabulary %lld\n", (long long)step.params.elems,
           (double)step.params.elems / 1e9, (long long)vocab_size);
    printf("compute         %.2f GFLOP a token, forward and backward\n",
           model_flops_per_token(&cfg->model, vocab_size) / 1e9);
    printf("global batch    %lld sequences = %lld tokens a step; %lld micro-batches over %d rank%s\n",
           (long long)cfg->batch.global, (long long)(cfg->batch.global * cfg->model.seq_len),
           (long long)(cfg->batch.global / cfg->batch.micro), ranks, ranks == 1 ? "" : "s");
    printf("whole run       %.3g tokens in %lld steps\n\n",
           (double)cfg->run.steps * (double)(cfg->batch.global * cfg->model.seq_len), (long long)cfg->run.steps);
    const bool cpu = dev->kind == DEVICE_CPU;
    const size_t comm_bytes = cpu ? comm_buffer_bytes(&comm) : 0;
    printf("%s memory of one rank, MiB (ZeRO stage %lld, %s", cpu ? "host" : "GPU", (long long)cfg->parallel.zero,
           cfg->precision.compute == COMPUTE_BF16 ? "bf16" : "fp32");
    if (cpu) {
        printf(", %d thread%s)\n", dev->threads, dev->threads == 1 ? "" : "s");
    } else {
        printf("; what CUDA and NCCL take for themselves comes on top)\n");
    }
    for (int kind = 0; kind < ARENA_KINDS; kind++) {
        printf("  %-14s %12.1f\n", arena_kind_name((enum arena_kind)kind), (double)measure.by_kind[kind] / MIB);
    }
    if (cpu) printf("  %-14s %12.1f\n", "communication", (double)comm_bytes / MIB);
    printf("  %-14s %12.1f\n", "total", (double)(measure.used + comm_bytes) / MIB);
    print_for_scripts(cfg, state_bytes(&step.params) + tokenizer_bytes(cfg));
done:
    step_close(&step);
    return rc;
}

/* The device that the run would choose here, with what is refused of its options; a GPU's memory is planned without opening
 * it, on machines without one too. */
static int choose_device(struct device *dev, const struct config *cfg, const struct comm *comm)
{
    struct comm alone = {.ranks = 1};
    struct attention_case unknown = {.sequences = 1};
    const struct device_table *cuda = cuda_backend();
    enum attention_choice attention = (enum attention_choice)cfg->top.attention;
    const int threads = cfg->run.threads > 0 ? (int)cfg->run.threads : comm->threads;
    const bool gpu = cfg->top.device == CHOOSE_CUDA || (cfg->top.device == CHOOSE_AUTO && cuda && cuda->count() > 0);
    if (gpu && cuda) {
        *dev = (struct device){.kind = DEVICE_CUDA, .table = cuda, .threads = threads};
    } else {
        char why[512];
        TRY(device_open(dev, gpu ? DEVICE_CUDA : DEVICE_CPU, 0, threads));
        TRY(device_choose_product(dev, (enum product_choice)cfg->precision.product));
        TRY(dev->table->choose_attention(dev, &unknown, &attention, why, sizeof why));
    }
    TRY(comm_open_transport(&alone, dev, (enum comm_choice)cfg->top.comm, 0));
    comm_close_transport(&alone);
    return 0;
}

static void usage(void)
{
    puts(
        "usage: tatara plan CONFIG.yaml [ranks=N] [key=value ...]\n"
        "\n"
        "Prints the number of parameters and the memory that each of N data-parallel ranks (default 1) will take, "
        "from\n"
        "the code that takes it; trains nothing. What `tatara train` would refuse of the configuration, the "
        "tokenizer, the\n"
        "shards and the checkpoint to begin from is refused here, with the same words and exit status. Files that\n"
        "are not on this machine are not needed, and named as not checked; the tokenizer is, where model.vocab_size\n"
        "is 0.\n"
        "\n"
        "The last lines are for scripts, each NAME=VALUE:\n"
        "  run.dir            the run's folder, as the configuration has it\n"
        "  run.last_step      the step with which it ends: run.steps, or run.stop_at\n"
        "  checkpoint.bytes   what one checkpoint takes on the disk, all ranks together, and a little more\n"
        "  checkpoints        how many there are at once, at most: those of checkpoint.keep and "
        "checkpoint.keep_every,\n"
        "                     one to go back to (run.on_nan, run.on_spike), and the one that is being written\n"
        "  checkpoints.bytes  what these take");
}

int plan_command(struct comm *comm, int argc, char **argv)
{
    int rc = 0;
    long ranks = 1;
    struct device dev = {.kind = DEVICE_CPU};
    struct config *cfg = NULL;
    char **words = NULL;
    int n = 0;
    for (int i = 0; i < argc; i++) {
        if (strcmp(argv[i], "--help") != 0) continue;
        usage();
        return 0;
    }
    if (argc < 1 || argv[0][0] == '-')
        FAIL(ERR_USAGE, "tatara plan needs a configuration file%s%s; see `tatara plan --help`",
             argc > 0 ? ", not " : "", argc > 0 ? argv[0] : "");
    cfg = calloc(2, sizeof *cfg); /* and room for a part of it */
    words = calloc((size_t)argc, sizeof *words);
    struct inputs in = {.here = NULL};
    if (!cfg || !words) FAIL_GOTO(done, ERR_SYSTEM, "out of memory for the configuration");
    in.here = cfg + 1;
    for (int i = 1; i < argc; i++) {
        if (strncmp(argv[i], "ranks=", 6) != 0) {
            words[n++] = argv[i];
            continue;
        }
        char *end = NULL;
        ranks = strtol(argv[i] + 6, &end, 10);
        if (*end != '\0' || end == argv[i] + 6 || ranks < 1 || ranks > 1000000) {
            FAIL_GOTO(done, ERR_USAGE, "%s: ranks is a whole number from 1 to 1000000", argv[i]);
        }
    }
    TRY_GOTO(config_load(cfg, argv[0], n, words), done);
    TRY_GOTO(config_check_for_training(cfg), done);
    TRY_GOTO(choose_device(&dev, cfg, comm), done);
    TRY_GOTO(open_inputs(&in, cfg, (int)ranks), done);
    TRY_GOTO(print_plan(cfg, in.vocab_size, (int)ranks, &dev), done);
done:
    if (dev.table) device_close(&dev);
    close_inputs(&in);
    free(words);
    free(cfg);
    return rc;
}
