/* `tatara init`: a first configuration, fitted to shards, tokenizer and machine.
 *
 * Rules of thumb choose the values; each rule stands as a comment beside the value that it chose, so that a person can
 * judge and change it. Sizes are those that training itself would take: parameters and memory are measured by the layout of
 * the model. Nothing is written over. */
#include "config.h"
#include "data/args.h"
#include "data/dataset.h"
#include "data/overlap.h"
#include "data/shard.h"
#include "data/tokenizer.h"
#include "err.h"
#include "log.h"
#include "ops.h"
#include "run.h"
#include "step.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define TOKENS_A_PARAM 20.0 /* Hoffmann et al. 2022 */
#define EPOCHS_MAX 4.0      /* Muennighoff et al. 2023: read so often, text is nearly worth fresh text */
#define CORE_FLOPS 50e9     /* what training gets out of a core, or out of a GPU: cautious */
#define GPU_FLOPS 200e12
#define MEMORY_SHARE 0.8 /* of what is free */
#define BILLION 0.95e9   /* from here on recipes for large models hold */
#define NOTES_MAX 40

enum { SEQ_LEAST = 64, OPTIONS = 7 };

struct options {
    const char *valid, *tokenizer, *size, *out;
    int64_t ranks;
    double hours;
    bool help;
};

/* A dataset's shards. */
struct amount {
    int64_t tokens;
    int shards;
    int64_t *shard_tokens;
};

/* What the values are fitted to. */
struct facts {
    struct options o;
    int sets;
    char **set;
    struct amount *train, valid; /* train[sets] */
    struct overlap overlap;      /* of the shards of all of them */
    int64_t tokens, vocab_size;
    double params_wanted; /* 0: as many as suits the data */
    int ranks;
    struct device dev;
    int sharers; /* ranks that share the device's memory */
    size_t free_bytes;
    double flops; /* of all ranks */
};

/* What was chosen besides the configuration. */
struct choice {
    double params, tokens; /* parameters; tokens to train on */
    size_t rank_bytes;     /* memory of a rank */
    bool fits;
    int notes;
    struct config_note note[NOTES_MAX];
};

static void note(struct choice *choice, const char *option, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

static void note(struct choice *choice, const char *option, const char *format, ...)
{
    va_list args;
    ASSERT(choice->notes < NOTES_MAX);
    struct config_note *n = &choice->note[choice->notes++];
    n->option = option;
    va_start(args, format);
    vsnprintf(n->text, sizeof n->text, format, args);
    va_end(args);
}

/* "1.2B", "124M", "8192": a number with at most three digits that matter. */
static const char *short_number(double value, char text[16])
{
    static const char *const units[] = {"", "k", "M", "B", "T"};
    int unit = 0;
    for (; value >= 999.5 && unit < 4; unit++)
        value /= 1000;
    snprintf(text, 16, "%.3g%s", value, units[unit]);
    return text;
}

/* "3 hours" */
static const char *duration(double seconds, char text[32])
{
    static const struct {
        double seconds;
        const char *name;
    } units[] = {{86400 * 365, "years"}, {86400, "days"}, {3600, "hours"}, {60, "minutes"}, {0, "s"}};
    int unit = 0;
    while (seconds < 2 * units[unit].seconds)
        unit++;
    snprintf(text, 32, "%.0f %s", ceil(seconds / fmax(units[unit].seconds, 1)), units[unit].name);
    return text;
}

static int size_parse(double *params, const char *text)
{
    char *end = NULL;
    *params = strtod(text, &end);
    const char *unit = end[0] == '\0' ? NULL : strchr("kMBT", end[0]);
    if (end == text || (end[0] != '\0' && (!unit || end[1] != '\0')) || !(*params > 0)) {
        FAIL(ERR_USAGE, "--size takes a number of parameters, as in 10M, 124M or 1.2B, not \"%s\"", text);
    }
    if (unit) *params *= pow(1000, (double)(unit - "kMBT") + 1);
    if (*params < 1e3 || *params > 1e13) FAIL(ERR_USAGE, "--size %s: allowed is 1k to 10T", text);
    return 0;
}

static int amount_read(struct facts *facts, struct amount *amount, const char *path,
                       const struct tokenizer *tokenizer)
{
    int rc = 0;
    struct path_list shards = {.path = NULL};
    struct shard *shard = NULL;
    TRY_GOTO(dataset_shards(&shards, path), done);
    amount->shard_tokens = calloc((size_t)shards.n + 1, sizeof *amount->shard_tokens);
    if (!amount->shard_tokens) FAIL_GOTO(done, ERR_SYSTEM, "out of memory for the list of shards");
    for (int i = 0; i < shards.n; i++) {
        TRY_GOTO(shard_open(&shard, shards.path[i]), done);
        const struct shard_info *info = shard_get_info(shard);
        if (info->tokenizer_id != tokenizer_id(tokenizer)) {
            FAIL_GOTO(done, ERR_DATA, "%s was not made with the tokenizer %s: give the one that made it",
                      shards.path[i], facts->o.tokenizer);
        }
        TRY_GOTO(overlap_add(&facts->overlap, shard, amount == &facts->valid), done);
        amount->shard_tokens[i] = (int64_t)info->tokens;
        amount->tokens += (int64_t)info->tokens;
        shard_close(shard);
        shard = NULL;
    }
    amount->shards = shards.n;
done:
    shard_close(shard);
    path_list_free(&shards);
    return rc;
}

/* Whole sequences, as the loader cuts them: none crosses from one shard to the next, and each needs the token behind it. */
static int64_t sequences(const struct amount *amount, int64_t seq_len)
{
    int64_t n = 0;
    for (int i = 0; i < amount->shards; i++)
        n += amount->shard_tokens[i] > 0 ? (amount->shard_tokens[i] - 1) / seq_len : 0;
    return n;
}

static int check_amount(const struct amount *amount, const char *path, const char *remedy)
{
    if (sequences(amount, SEQ_LEAST) > 0) return 0;
    FAIL(ERR_DATA,
         "%s has %lld tokens in %d shard%s, and no shard has the %d that one sequence of the shortest length takes: "
         "%s",
         path, (long long)amount->tokens, amount->shards, amount->shards == 1 ? "" : "s", SEQ_LEAST + 1, remedy);
}

static int facts_read(struct facts *facts)
{
    int rc = 0;
    struct tokenizer *tokenizer = NULL;
    TRY_GOTO(tokenizer_open(&tokenizer, facts->o.tokenizer), done);
    facts->vocab_size = tokenizer_vocab_size(tokenizer);
    for (int i = 0; i < facts->sets; i++) {
        TRY_GOTO(amount_read(facts, &facts->train[i], facts->set[i], tokenizer), done);
        TRY_GOTO(check_amount(&facts->train[i], facts->set[i], "prepare more text"), done);
        facts->tokens += facts->train[i].tokens;
    }
    if (facts->o.valid) {
        TRY_GOTO(amount_read(facts, &facts->valid, facts->o.valid, tokenizer), done);
        TRY_GOTO(check_amount(&facts->valid, facts->o.valid,
                              "hold out more (prepare's --valid-fraction), or leave --valid out"),
                 done);
    }
    rc = overlap_check(&facts->overlap);
done:
    tokenizer_close(tokenizer);
    return rc;
}

/* The device that a run would take here, and its memory. */
static int machine_read(struct facts *facts, const struct comm *comm)
{
    size_t total = 0;
    const int gpus = cuda_backend() ? cuda_backend()->count() : 0;
    const int usual = gpus > 0 ? gpus : comm->threads > 1 ? 2 : 1;
    facts->ranks = facts->o.ranks > 0 ? (int)facts->o.ranks : usual;
    /* More ranks than there are GPUs or cores here are on several machines like this one. */
    const int here = facts->ranks <= (gpus > 0 ? gpus : comm->threads) ? facts->ranks : usual;
    const int machines = (facts->ranks + here - 1) / here;
    facts->sharers = gpus > 0 ? 1 : here;
    const int threads = gpus > 0 ? comm->threads : comm->threads / here;
    TRY(device_open(&facts->dev, gpus > 0 ? DEVICE_CUDA : DEVICE_CPU, 0, threads));
    TRY(facts->dev.table->memory(&facts->dev, &facts->free_bytes, &total));
    const uint64_t left = gpus > 0 ? 0 : comm->limits.memory_bytes;
    if (left > 0 && left < facts->free_bytes) facts->free_bytes = (size_t)left;
    facts->flops = gpus > 0 ? GPU_FLOPS * facts->ranks : CORE_FLOPS * comm->threads * machines;
    return 0;
}

static int count_params(double *params, const struct config *cfg, int64_t vocab_size)
{
    struct params layout;
    TRY(params_open(&layout, cfg, vocab_size, 1));
    *params = (double)layout.elems;
    params_close(&layout);
    return 0;
}

static void choose_width(struct config_model *m, int64_t hidden)
{
    m->hidden = hidden;
    m->head_dim = hidden >= 2048 ? 128 : hidden >= 256 ? 64 : 32;
    m->heads = hidden / m->head_dim;
    m->kv_heads = hidden >= 2048 ? m->heads / 4 : m->heads;
    m->ffn_hidden = (hidden * 8 / 3 + 63) / 64 * 64;
    m->tie_embeddings = hidden < 4096;
}

static int64_t width_step(int64_t hidden)
{
    return hidden < 256 ? 32 : hidden < 512 ? 64 : hidden < 2048 ? 128 : 512;
}

/* The width and depth that come nearest to `wanted` parameters, and nearest to the proportions of known models. */
static int choose_shape(struct config *cfg, double *params, double wanted, int64_t vocab_size)
{
    struct config_model *m = &cfg->model, best = *m;
    double best_score = INFINITY;
    for (int64_t hidden = 64; hidden <= 16384; hidden += width_step(hidden)) {
        double one = 0, two = 0;
        choose_width(m, hidden);
        m->layers = 1;
        TRY(count_params(&one, cfg, vocab_size));
        m->layers = 2;
        TRY(count_params(&two, cfg, vocab_size));
        const double layers = fmin(fmax(round(1 + (wanted - one) / (two - one)), 2), 256);
        const double usual = hidden <= 768 ? 64 : hidden < 4096 ? 96 : 128;
        const double score =
            4 * fabs(log((one + (layers - 1) * (two - one)) / wanted)) + fabs(log((double)hidden / layers / usual));
        if (score >= best_score) continue;
        best_score = score;
        m->layers = (int64_t)layers;
        best = *m;
        *params = one + (layers - 1) * (two - one);
    }
    *m = best;
    return 0;
}

static void choose_seq_len(struct config *cfg, const struct facts *facts, double params)
{
    int64_t seq_len = params < 50e6 ? 512 : params < 1e9 ? 1024 : params < 5e9 ? 2048 : 4096;
    for (; seq_len > SEQ_LEAST; seq_len /= 2) {
        int64_t all = 0;
        bool enough = !facts->o.valid || sequences(&facts->valid, seq_len) > 0;
        for (int i = 0; i < facts->sets; i++) {
            const int64_t n = sequences(&facts->train[i], seq_len);
            enough = enough && n > 0;
            all += n;
        }
        if (enough && all >= 64) break;
    }
    cfg->model.seq_len = seq_len;
    cfg->model.rope_theta = seq_len < 2048 ? 10000 : 500000;
}

static double two_digits(double value)
{
    char text[32];
    snprintf(text, sizeof text, "%.1e", value);
    return strtod(text, NULL);
}

/* Learning rate and batch: the powers of the training's compute that Bi et al. 2024 (DeepSeek LLM) found, within what is known
 * of models of this size. */
static void choose_batch(struct config *cfg, const struct facts *facts, double params, double tokens)
{
    const double compute = 6 * params * tokens;
    const double least = params < BILLION ? 0 : 2.5e5, highest = params < BILLION  ? 3e-3
                                                                 : params < 1.9e10 ? 1e-3
                                                                                   : 4e-4;
    const double want = fmin(fmax(0.2920 * pow(compute, 0.3271), least), 1.6e7) / (double)cfg->model.seq_len;
    const int64_t at_once = (facts->dev.kind == DEVICE_CPU ? 2048 : 16384) / cfg->model.seq_len;
    int64_t micro = at_once > 1 ? at_once : 1;
    while (micro > 1 && (double)(micro * facts->ranks) > want)
        micro /= 2;
    const double rounds = round(want / (double)(micro * facts->ranks));
    cfg->batch.micro = micro;
    cfg->batch.global = micro * facts->ranks * (rounds > 1 ? (int64_t)rounds : 1);
    if ((double)(cfg->batch.global * cfg->model.seq_len) < least) cfg->batch.global += micro * facts->ranks;
    cfg->optim.lr = two_digits(fmin(0.3118 * pow(compute, -0.125), highest));
    cfg->optim.min_lr = two_digits(cfg->optim.lr / 10);
}

static int measure(struct facts *facts, const struct config *cfg, size_t *rank_bytes)
{
    struct comm comm = {.ranks = facts->ranks, .local_ranks = facts->ranks, .threads = 1};
    struct arena arena = arena_measure(&facts->dev);
    struct step step;
    TRY(step_layout(&step, cfg, facts->vocab_size, &facts->dev, &comm, &arena));
    step_close(&step);
    *rank_bytes = arena.used + (facts->dev.kind == DEVICE_CPU ? comm_buffer_bytes(&comm) : 0);
    return 0;
}

/* Trades speed for memory until the ranks fit: what costs least time first. */
static int choose_memory(struct config *cfg, struct choice *choice, struct facts *facts)
{
    const double most = MEMORY_SHARE * (double)facts->free_bytes / facts->sharers;
    for (;;) {
        TRY(measure(facts, cfg, &choice->rank_bytes));
        choice->fits = facts->free_bytes == 0 || (double)choice->rank_bytes <= most;
        if (choice->fits) return 0;
        if (cfg->model.recompute == RECOMPUTE_NONE) {
            cfg->model.recompute = RECOMPUTE_ELEMENTWISE;
        } else if (cfg->batch.micro > 1) {
            cfg->batch.micro /= 2;
        } else if (cfg->model.recompute != RECOMPUTE_BLOCK) {
            cfg->model.recompute = RECOMPUTE_BLOCK;
        } else {
            return 0;
        }
    }
}

/* The largest of 1, 2, 5, 10, 20, 50 … that is not above. */
static int64_t round_number(int64_t most)
{
    int64_t unit = 1;
    while (unit * 10 <= most)
        unit *= 10;
    return most >= 5 * unit ? 5 * unit : most >= 2 * unit ? 2 * unit : unit;
}

static void choose_steps(struct config *cfg, const struct facts *facts, double tokens)
{
    const double steps = round(tokens / (double)(cfg->batch.global * cfg->model.seq_len));
    cfg->run.steps = steps > 1 ? (int64_t)fmin(steps, 1e9) : 1;
    cfg->optim.warmup_steps = cfg->run.steps / 10 < 2000 ? cfg->run.steps / 10 : 2000;
    cfg->optim.decay_steps = cfg->run.steps / 5;
    cfg->log.every = round_number(cfg->run.steps / 100);
    cfg->checkpoint.every = round_number(cfg->run.steps / 10);
    if (!facts->o.valid) return;
    cfg->log.eval_every = cfg->checkpoint.every;
    if (sequences(&facts->valid, cfg->model.seq_len) > 64 * cfg->batch.micro) cfg->log.eval_batches = 64;
}

/* Model, batch and schedule for about so many parameters. */
static int choose(struct config *cfg, struct choice *choice, struct facts *facts, double wanted)
{
    cfg->model.qk_norm = true;
    cfg->model.recompute = RECOMPUTE_NONE;
    TRY(choose_shape(cfg, &choice->params, wanted, facts->vocab_size));
    cfg->model.init_std = cfg->model.hidden < 512 ? 0.04 : 0.02;
    choice->tokens = fmin(TOKENS_A_PARAM * choice->params, EPOCHS_MAX * (double)facts->tokens);
    choose_seq_len(cfg, facts, choice->params);
    choose_batch(cfg, facts, choice->params, choice->tokens);
    TRY(choose_memory(cfg, choice, facts));
    choose_steps(cfg, facts, choice->tokens);
    return 0;
}

static int choose_all(struct config *cfg, struct choice *choice, struct facts *facts)
{
    double wanted = facts->params_wanted;
    if (wanted > 0) return choose(cfg, choice, facts, wanted);
    const double compute = facts->flops * facts->o.hours * 3600;
    wanted = fmin(EPOCHS_MAX * (double)facts->tokens / TOKENS_A_PARAM, sqrt(compute / 6 / TOKENS_A_PARAM));
    do {
        TRY(choose(cfg, choice, facts, wanted));
        wanted *= 0.8;
    } while (!choice->fits && wanted > 1e5);
    return 0;
}

static int set_paths(struct config *cfg, const struct facts *facts)
{
    const char *name = path_name(facts->o.out), *dot = strrchr(name, '.');
    const int length = dot && dot > name ? (int)(dot - name) : (int)strlen(name);
    if (facts->sets > CONFIG_DATASETS_MAX) FAIL(ERR_USAGE, "at most %d datasets", CONFIG_DATASETS_MAX);
    int longest = snprintf(cfg->run.dir, CONFIG_TEXT_MAX, "runs/%.*s", length, name);
    const int tokenizer = snprintf(cfg->data.tokenizer, CONFIG_TEXT_MAX, "%s", facts->o.tokenizer);
    longest = tokenizer > longest ? tokenizer : longest;
    for (int i = 0; i < facts->sets + (facts->o.valid ? 1 : 0); i++) {
        const bool train = i < facts->sets;
        struct dataset_list *list = train ? &cfg->data.train : &cfg->data.valid;
        struct dataset_entry *entry = &list->entry[list->n++];
        const int path = snprintf(entry->path, CONFIG_TEXT_MAX, "%s", train ? facts->set[i] : facts->o.valid);
        longest = path > longest ? path : longest;
        entry->weight = train && facts->sets > 1 ? (double)facts->train[i].tokens : 1;
    }
    if (longest >= CONFIG_TEXT_MAX) FAIL(ERR_USAGE, "a path is longer than %d bytes", CONFIG_TEXT_MAX - 1);
    return 0;
}

static void explain_model(struct choice *c, const struct config *cfg, const struct facts *facts)
{
    const struct config_model *m = &cfg->model;
    char params[16];
    short_number(c->params, params);
    if (facts->params_wanted > 0) {
        note(c, "model.layers", "%s parameters: the nearest to --size %s in known proportions", params,
             facts->o.size);
    } else {
        note(c, "model.layers",
             "%s parameters: a twentieth of the tokens that the data gives when read %.0f times, or as many as 20 "
             "tokens "
             "each can be read for in %g hours (--hours; a core does about 50 GFLOP/s, a GPU 200 TFLOP/s), or as fit",
             params, EPOCHS_MAX, facts->o.hours);
    }
    note(c, "model.hidden", "64 to 128 times the layers, as in known models of this size");
    note(c, "model.heads", "hidden / head_dim");
    note(c, "model.kv_heads",
         m->kv_heads < m->heads ? "grouped-query attention: four query heads share one"
                                : "as many as heads; fewer make sampling cheaper");
    note(c, "model.head_dim", "128 from a width of 2,048 on, 64 from 256 on");
    note(c, "model.ffn_hidden", "8/3 of hidden, as SwiGLU has three matrices, in multiples of 64");
    note(c, "model.seq_len",
         "tokens: 512 below 50M parameters, up to 4,096 from 5B on; shorter where the data is small");
    note(c, "model.vocab_size", "the tokenizer's");
    note(c, "model.rope_theta", m->seq_len < 2048 ? "enough for short sequences" : "for sequences of 2,048 and more");
    note(c, "model.qk_norm", "steadier attention, which bears a higher learning rate");
    note(c, "model.tie_embeddings",
         m->tie_embeddings ? "the classifier shares the embedding: the embedding is a large part of so small a model"
                           : "a large model gains from a classifier of its own");
    if (m->hidden < 512) note(c, "model.init_std", "narrow models start better from larger weights");
    if (m->recompute != RECOMPUTE_NONE) note(c, "model.recompute", "saves the memory that is not there");
}

static void explain_run(struct choice *c, const struct config *cfg, const struct facts *facts)
{
    char tokens[16], step[16], time[32];
    const double trained = (double)cfg->run.steps * (double)(cfg->batch.global * cfg->model.seq_len);
    short_number(trained, tokens);
    short_number((double)(cfg->batch.global * cfg->model.seq_len), step);
    note(c, "run.dir", "checkpoints, metrics.jsonl, config.yaml");
    note(c, "run.steps",
         "%s tokens: 20 a parameter (Hoffmann et al. 2022), but the data at most %.0f times (Muennighoff et al. 2023)"
         "; here %.2g a parameter, the data %.2g times, about %s",
         tokens, EPOCHS_MAX, trained / c->params, trained / (double)facts->tokens,
         duration(6 * c->params * trained / facts->flops, time));
    if (facts->sets > 1) note(c, "data.train", "weights are the tokens: all are read equally often");
    if (facts->o.valid) note(c, "data.valid", "held out: the loss on it says what was learnt");
    note(c, "batch.global",
         "sequences: %s tokens a step, by compute^0.327 (Bi et al. 2024), and micro-batches for %d rank%s", step,
         facts->ranks, facts->ranks == 1 ? "" : "s");
    note(c, "batch.micro", "sequences at once: enough to keep %s busy, as far as memory goes",
         facts->dev.kind == DEVICE_CPU ? "the cores" : "a GPU");
    note(c, "optim.lr",
         "by compute^-0.125 (Bi et al. 2024), within what is known of this size; too high shows as spikes");
    note(c, "optim.min_lr", "a tenth of lr, where the decay ends");
    note(c, "optim.schedule", "warm-up, stable, decay: the stable part may be prolonged later");
    note(c, "optim.warmup_steps", "a tenth of the steps, at most 2,000");
    note(c, "optim.decay_steps", "the last fifth of the steps");
    note(c, "checkpoint.every", "ten or so in the run");
    note(c, "log.every", "a hundred lines or so");
    if (facts->o.valid) note(c, "log.eval_every", "a pass over data.valid; there is one at the end, too");
    if (cfg->log.eval_batches > 0) note(c, "log.eval_batches", "of the held-out data, so that a pass stays short");
}

static int write_file(const char *path, const char *head, const char *text)
{
    FILE *file = fopen(path, "wx");
    if (!file && errno == EEXIST) {
        FAIL(ERR_USAGE, "%s exists and is not written over: remove it, or give another --out", path);
    }
    if (!file) FAIL(ERR_SYSTEM, "cannot write %s: %s", path, strerror(errno));
    const bool written = fputs(head, file) != EOF && fputs(text, file) != EOF;
    if (fclose(file) != 0 || !written) {
        (void)remove(path);
        FAIL(ERR_SYSTEM, "cannot write %s: %s; check the space there", path, strerror(errno));
    }
    return 0;
}

/* What was written, and the commands that use it, ready to be copied. */
static void print_next(const struct config *cfg, const struct choice *choice, const struct facts *facts)
{
    char params[16], program[4096] = "tatara";
    const ssize_t length = readlink("/proc/self/exe", program, sizeof program - 1);
    if (length > 0) program[length] = '\0';
    printf("%s: %s parameters, %lld steps of %lld tokens, %.0f MiB a rank\n"
           "next:  %s plan %s ranks=%d\n"
           "       mpirun -n %d --bind-to none %s%s train %s\n",
           facts->o.out, short_number(choice->params, params), (long long)cfg->run.steps,
           (long long)(cfg->batch.global * cfg->model.seq_len), (double)choice->rank_bytes / (1 << 20), program,
           facts->o.out, facts->ranks, facts->ranks, geteuid() == 0 ? "--allow-run-as-root " : "", program,
           facts->o.out);
}

static int init(struct config *cfg, struct choice *choice, struct facts *facts, struct comm *comm)
{
    int rc = 0;
    char head[2048], tokens[16], device[256], *text = NULL;
    config_defaults(cfg);
    TRY(facts_read(facts));
    TRY(machine_read(facts, comm));
    TRY(set_paths(cfg, facts));
    cfg->model.vocab_size = facts->vocab_size;
    TRY(choose_all(cfg, choice, facts));
    explain_model(choice, cfg, facts);
    explain_run(choice, cfg, facts);
    TRY(config_check(cfg));
    device_describe(&facts->dev, device, sizeof device);
    snprintf(head, sizeof head,
             "# Written by `tatara init` for %s tokens of training data and %d rank%s (%s a rank).\n"
             "# Any value may be changed. What is not here has its default: `tatara train --help-config`.\n\n",
             short_number((double)facts->tokens, tokens), facts->ranks, facts->ranks == 1 ? "" : "s", device);
    TRY_GOTO(config_to_noted_yaml(cfg, choice->note, choice->notes, &text), done);
    TRY_GOTO(write_file(facts->o.out, head, text), done);
    print_next(cfg, choice, facts);
    if (!choice->fits) {
        log_warn(
            "this machine has not the memory for it: each of %d ranks takes %.0f MiB, and %.0f MiB are free for the "
            "%d of them that would be here; use more ranks (--ranks) on more machines, or a smaller --size",
            facts->ranks, (double)choice->rank_bytes / (1 << 20), (double)facts->free_bytes / (1 << 20),
            facts->sharers);
    }
done:
    free(text);
    return rc;
}

int init_command(struct comm *comm, int argc, char **argv)
{
    int rc = 0;
    struct facts facts = {.o = {.out = "mine.yaml", .hours = 24}};
    struct choice choice = {.notes = 0};
    struct config *cfg = NULL;
    const struct arg args[OPTIONS] = {
        {"tokenizer", "FILE", ARG_PATH, &facts.o.tokenizer, 0, 0, "SentencePiece model that made the shards"},
        {"valid", "SHARDS", ARG_PATH, &facts.o.valid, 0, 0, "held-out shards, to measure the model on"},
        {"size", "N", ARG_TEXT, &facts.o.size, 0, 0, "parameters, as in 10M or 1.2B; default: what suits the data"},
        {"hours", "N", ARG_NUM, &facts.o.hours, 0.001, 1e6,
         "without --size: how long the run may take, about; default 24"},
        {"ranks", "N", ARG_INT, &facts.o.ranks, 1, 1e6,
         "for so many ranks; default: one for each GPU, or two on a CPU"},
        {"out", "FILE", ARG_PATH, &facts.o.out, 0, 0, "the configuration to write; default mine.yaml"},
        {"help", NULL, ARG_FLAG, &facts.o.help, 0, 0, "this text"},
    };
    TRY(args_parse(args, OPTIONS, "init", argc, argv, &facts.sets));
    if (facts.o.help) {
        puts("usage: tatara init --tokenizer FILE [options] SHARDS...\n"
             "\n"
             "Writes a first configuration, fitted to token shards, their tokenizer and this machine, with the rule "
             "by\n"
             "which each value was chosen beside it. `tatara plan` shows what it takes, `tatara train` trains it.\n");
        args_help(args, OPTIONS);
        return 0;
    }
    if (facts.sets == 0) FAIL(ERR_USAGE, "which shards? Give the folders of training data; see `tatara init --help`");
    if (!facts.o.tokenizer) FAIL(ERR_USAGE, "which tokenizer made the shards? Add --tokenizer FILE");
    if (facts.o.size) TRY(size_parse(&facts.params_wanted, facts.o.size));
    facts.set = argv;
    facts.train = calloc((size_t)facts.sets, sizeof *facts.train);
    cfg = calloc(1, sizeof *cfg);
    if (!facts.train || !cfg) FAIL_GOTO(done, ERR_SYSTEM, "out of memory for the configuration");
    TRY_GOTO(init(cfg, &choice, &facts, comm), done);
done:
    if (facts.dev.table) device_close(&facts.dev);
    for (int i = 0; facts.train && i < facts.sets; i++)
        free(facts.train[i].shard_tokens);
    free(facts.valid.shard_tokens);
    overlap_free(&facts.overlap);
    free(facts.train);
    free(cfg);
    return rc;
}
