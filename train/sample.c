/* `tatara sample`: continues prompts with a checkpoint's model, token by token over a key/value cache. */
#include "ckpt/ckpt.h"
#include "clock.h"
#include "config.h"
#include "data/tokenizer.h"
#include "device.h"
#include "err.h"
#include "log.h"
#include "mix.h"
#include "ops.h"
#include "path.h"
#include "run.h"
#include "state.h"
#include "step.h"

#include <errno.h>
#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PROMPTS_MAX 64

struct sampler_options {
    const char *ckpt, *tokenizer;
    const char *prompt[PROMPTS_MAX];
    int prompts;
    int64_t tokens, top_k, seed;
    double temperature, top_p;
    enum device_choice device;
};

/* A prompt and what follows it. */
struct sequence {
    int32_t *tok; /* seq_len of them */
    int64_t n, prompt_tokens;
    bool ended;
};

struct candidate {
    float logit;
    int32_t token;
};

struct sampling {
    struct sampler_options options;
    char ckpt[CKPT_PATH_MAX]; /* the folder that was chosen */
    struct config *cfg;
    struct ckpt_meta meta;
    struct tokenizer *tokenizer;
    int32_t eos; /* ends a text; −1: there is none */
    struct device dev;
    struct params params;
    struct model model;
    struct arena arena;
    struct sequence sequence[PROMPTS_MAX];
    float *logits;
    int32_t *tok, *pos;
    int32_t *drawable; /* tokens that may follow: those that stand for text, and the end of a document */
    int64_t drawables;
    struct candidate *candidates;
    int64_t vocab_size;
};

/* Higher logits first, equal ones by token, so that the order is fixed. */
static int compare_candidates(const void *a, const void *b)
{
    const struct candidate *x = a, *y = b;
    if (x->logit != y->logit) return x->logit < y->logit ? 1 : -1;
    return x->token < y->token ? -1 : x->token > y->token;
}

/* A uniform number in [0, 1) that depends on the seed, the prompt's number and the position only. */
static double uniform_at(int64_t seed, int64_t prompt, int64_t position)
{
    const uint64_t bits = mix64(mix64(mix64((uint64_t)seed) ^ (uint64_t)prompt) ^ (uint64_t)position);
    return (double)(bits >> 11) * 0x1p-53;
}

/* Draws one of the n tokens of `from`: the top_k likeliest, of these the fewest that hold top_p of the probability (nucleus sampling, Holtzman
 * et al. 2020), at a temperature; 0 takes the likeliest. */
static int32_t draw(const struct sampler_options *o, const float *logits, const int32_t *from, int64_t n,
                    struct candidate *c, double uniform)
{
    for (int64_t i = 0; i < n; i++)
        c[i] = (struct candidate){logits[from[i]], from[i]};
    qsort(c, (size_t)n, sizeof *c, compare_candidates);
    if (o->temperature == 0) return c[0].token;
    int64_t kept = o->top_k > 0 && o->top_k < n ? o->top_k : n;
    double total = 0, sum = 0;
    for (int64_t i = 0; i < kept; i++)
        total += exp((double)(c[i].logit - c[0].logit) / o->temperature);
    const double nucleus = o->top_p * total;
    for (int64_t i = 0; i < kept && sum < nucleus; i++) {
        sum += exp((double)(c[i].logit - c[0].logit) / o->temperature);
        if (sum >= nucleus) kept = i + 1;
    }
    const double at = uniform * (sum > 0 ? sum : total);
    double below = 0;
    for (int64_t i = 0; i < kept; i++) {
        below += exp((double)(c[i].logit - c[0].logit) / o->temperature);
        if (at < below) return c[i].token;
    }
    return c[kept - 1].token;
}

/* The one that was named, else the checkpoint's own, else that of its configuration. */
static int open_tokenizer(struct sampling *s)
{
    char own[CKPT_PATH_MAX];
    TRY(ckpt_tokenizer(s->ckpt, own));
    const char *path = s->options.tokenizer ? s->options.tokenizer : own[0] ? own : s->cfg->data.tokenizer;
    if (path[0] == '\0') FAIL(ERR_USAGE, "%s was trained without a tokenizer; name one with --tokenizer", s->ckpt);
    TRY(tokenizer_open(&s->tokenizer, path));
    /* Checkpoints of earlier versions do not say what ended a document: it was the tokenizer's EOS. */
    s->eos = s->meta.eos >= 0 ? (int32_t)s->meta.eos : tokenizer_eos(s->tokenizer);
    if (s->meta.tokenizer_id == 0) { /* an earlier version, that trained without one */
        log_warn("%s does not say which tokenizer its data is of; taken is %s", s->ckpt, path);
        return 0;
    }
    if (s->meta.tokenizer_id == tokenizer_id(s->tokenizer)) return 0;
    FAIL(ERR_DATA, "%s is not the tokenizer that %s was trained with; name that one with --tokenizer", path, s->ckpt);
}

static int open_model(struct sampling *s, int64_t longest)
{
    TRY(run_vocab(s->cfg, s->tokenizer, &s->vocab_size));
    TRY(params_open(&s->params, s->cfg, s->vocab_size, 1));
    struct arena measure = arena_measure(&s->dev);
    for (int real = 0; real < 2; real++) {
        struct arena *arena = real ? &s->arena : &measure;
        if (real) TRY(arena_open(arena, &s->dev, measure.used));
        model_close(&s->model);
        TRY(model_layout(&s->model, s->cfg, &s->params, s->vocab_size, &s->dev, arena, MODEL_SAMPLE,
                         s->options.prompts, longest));
        s->dev.workspace_bytes = s->dev.table->workspace_bytes(&s->dev, NULL, ATTENTION_FLASH);
        s->dev.workspace = arena_take(arena, ARENA_WORK, s->dev.workspace_bytes);
    }
    TRY(model_start(&s->model));
    return state_load_weights(&s->model, s->ckpt, &s->meta);
}

/* Tokens of all prompts, before each what stood before the text of a document in training: BOS, or the last one's EOS.
 * Their greatest number in *longest. */
static int encode_prompts(struct sampling *s, int64_t *longest)
{
    const int64_t seq_len = s->cfg->model.seq_len;
    *longest = 1;
    for (int i = 0; i < s->options.prompts; i++) {
        struct sequence *q = &s->sequence[i];
        int32_t *tokens = NULL;
        int64_t n = 0;
        q->tok = calloc((size_t)seq_len, sizeof *q->tok);
        if (!q->tok) FAIL(ERR_SYSTEM, "out of memory for a sequence of %lld tokens", (long long)seq_len);
        TRY(tokenizer_encode(s->tokenizer, s->options.prompt[i], strlen(s->options.prompt[i]), &tokens, &n));
        const bool fits = n + 1 < seq_len;
        q->tok[q->n++] = s->meta.bos >= 0 ? (int32_t)s->meta.bos : s->eos >= 0 ? s->eos : 0;
        if (fits && n > 0) memcpy(q->tok + q->n, tokens, (size_t)n * sizeof *tokens);
        free(tokens);
        if (!fits) {
            FAIL(ERR_USAGE, "prompt %d has %lld tokens; the model's sequence is %lld long", i + 1, (long long)n,
                 (long long)seq_len);
        }
        q->n += n;
        q->prompt_tokens = q->n;
        if (q->n > *longest) *longest = q->n;
    }
    return 0;
}

/* Feeds tokens [n − count, n) of each living sequence; sequences with fewer are padded. */
static int feed(struct sampling *s, int64_t count, bool prompts)
{
    for (int i = 0; i < s->options.prompts; i++) {
        const struct sequence *q = &s->sequence[i];
        const int64_t have = q->ended ? 0 : prompts ? q->n : 1;
        for (int64_t k = 0; k < count; k++) {
            s->tok[i * count + k] = k < have ? q->tok[q->n - have + k] : 0;
            s->pos[i * count + k] = k < have ? (int32_t)(q->n - have + k) : -1;
        }
    }
    return model_decode(&s->model, s->tok, s->pos, count, s->logits);
}

static int generate(struct sampling *s, int64_t longest, int64_t *made)
{
    const int64_t seq_len = s->cfg->model.seq_len;
    *made = 0;
    TRY(feed(s, longest, true));
    for (int64_t k = 0; k < s->options.tokens; k++) {
        int living = 0;
        for (int i = 0; i < s->options.prompts; i++) {
            struct sequence *q = &s->sequence[i];
            if (q->ended) continue;
            const int32_t token = draw(&s->options, s->logits + (int64_t)i * s->vocab_size, s->drawable, s->drawables,
                                       s->candidates, uniform_at(s->options.seed, i, q->n));
            q->ended = token == s->eos || q->n == seq_len - 1;
            if (token != s->eos) q->tok[q->n++] = token;
            living += !q->ended;
            ++*made;
        }
        if (living == 0) break;
        if (k + 1 < s->options.tokens) TRY(feed(s, 1, false));
    }
    return 0;
}

static int print_all(struct sampling *s)
{
    for (int i = 0; i < s->options.prompts; i++) {
        const struct sequence *q = &s->sequence[i];
        char *text = NULL;
        TRY(tokenizer_decode(s->tokenizer, q->tok + 1, q->n - 1, &text));
        if (s->options.prompts > 1) printf("%s--- %d ---\n", i > 0 ? "\n" : "", i + 1);
        puts(text);
        free(text);
    }
    return 0;
}

/* Rows of the embedding beyond the tokenizer (a padded vocabulary) have no text either. */
static int list_drawable(struct sampling *s)
{
    s->drawable = calloc((size_t)s->vocab_size, sizeof *s->drawable);
    if (!s->drawable) FAIL(ERR_SYSTEM, "out of memory for %lld tokens", (long long)s->vocab_size);
    for (int32_t token = 0; token < s->vocab_size; token++) {
        if (tokenizer_has_text(s->tokenizer, token) || token == s->eos) s->drawable[s->drawables++] = token;
    }
    return 0;
}

static int sample_run(struct sampling *s, struct comm *comm)
{
    int64_t longest = 1, made = 0;
    TRY(ckpt_choose(s->options.ckpt, s->ckpt));
    TRY(ckpt_verify(comm, s->ckpt));
    TRY(ckpt_read_meta(s->ckpt, &s->meta));
    TRY(config_parse(s->cfg, s->ckpt, s->meta.config_yaml, strlen(s->meta.config_yaml)));
    TRY(open_tokenizer(s));
    TRY(device_choose(&s->dev, s->options.device, comm->threads, comm));
    TRY(encode_prompts(s, &longest));
    TRY(open_model(s, longest));
    TRY(list_drawable(s));
    const size_t fed = (size_t)(s->options.prompts * longest);
    s->logits = calloc((size_t)s->options.prompts * (size_t)s->vocab_size, sizeof *s->logits);
    s->candidates = calloc((size_t)s->vocab_size, sizeof *s->candidates);
    s->tok = calloc(fed, sizeof *s->tok);
    s->pos = calloc(fed, sizeof *s->pos);
    if (!s->logits || !s->candidates || !s->tok || !s->pos) FAIL(ERR_SYSTEM, "out of memory for sampling");
    const double begin = now_s();
    TRY(generate(s, longest, &made));
    const double elapsed_s = now_s() - begin;
    TRY(print_all(s));
    log_info("%lld tokens in %.2f s, %.0f tokens/s", (long long)made, elapsed_s, (double)made / elapsed_s);
    return 0;
}

static void sampling_close(struct sampling *s)
{
    for (int i = 0; i < PROMPTS_MAX; i++)
        free(s->sequence[i].tok);
    free(s->drawable);
    free(s->logits);
    free(s->candidates);
    free(s->tok);
    free(s->pos);
    model_close(&s->model);
    params_close(&s->params);
    if (s->dev.table) arena_close(&s->arena);
    device_close(&s->dev);
    tokenizer_close(s->tokenizer);
    ckpt_meta_free(&s->meta);
    free(s->cfg);
}

static void usage(void)
{
    puts("usage: tatara sample --ckpt FOLDER [--prompt TEXT]... [option ...]\n"
         "\n"
         "Continues each prompt (several at once; none: an empty one) with the model of a checkpoint.\n"
         "\n"
         "  --ckpt FOLDER        a checkpoint, or a run's folder, whose newest checkpoint it is\n"
         "  --prompt TEXT        may be repeated, up to 64 times\n"
         "  --tokens N           at most so many new tokens each (default 200)\n"
         "  --temperature T      0: always the likeliest token (default 0.8)\n"
         "  --top-k K            draw from the K likeliest tokens only; 0: all (default 50)\n"
         "  --top-p P            draw from the fewest tokens that hold P of the probability (default 0.95)\n"
         "  --seed N             the same seed gives the same text (default 1234)\n"
         "  --tokenizer FILE     for a checkpoint that has none of its own (those of earlier versions), if it has "
         "moved\n"
         "  --device D           auto, cpu or cuda (default auto: a GPU where there is one)");
}

/* A number of an option, within [min, max]. */
static int parse_number(const char *option, const char *text, double min, double max, double *value)
{
    char *end = NULL;
    *value = strtod(text, &end);
    if (end == text || *end != '\0' || !(*value >= min && *value <= max)) {
        FAIL(ERR_USAGE, "--%s %s: a number from %g to %g is wanted", option, text, min, max);
    }
    return 0;
}

static int parse_device(const char *text, enum device_choice *device)
{
    static const char *const names[] = {[CHOOSE_AUTO] = "auto", [CHOOSE_CPU] = "cpu", [CHOOSE_CUDA] = "cuda"};
    for (int i = 0; i < 3; i++) {
        if (strcmp(text, names[i]) != 0) continue;
        *device = (enum device_choice)i;
        return 0;
    }
    FAIL(ERR_USAGE, "--device %s: auto, cpu or cuda is wanted", text);
}

static int parse(struct sampler_options *o, int argc, char **argv, bool *help)
{
    static const struct option longs[] = {
        {"ckpt", required_argument, NULL, 'c'},
        {"prompt", required_argument, NULL, 'p'},
        {"tokens", required_argument, NULL, 'n'},
        {"temperature", required_argument, NULL, 't'},
        {"top-k", required_argument, NULL, 'k'},
        {"top-p", required_argument, NULL, 'q'},
        {"seed", required_argument, NULL, 's'},
        {"tokenizer", required_argument, NULL, 'z'},
        {"device", required_argument, NULL, 'd'},
        {"help", no_argument, NULL, 'h'},
        {NULL, 0, NULL, 0},
    };
    double value = 0;
    *o = (struct sampler_options){.tokens = 200, .top_k = 50, .seed = 1234, .temperature = 0.8, .top_p = 0.95};
    int which = 0, at = 0;
    optind = 1;
    while ((which = getopt_long(argc, argv, "", longs, &at)) != -1) {
        switch (which) {
        case 'c':
            TRY(path_check_word("ckpt", optarg));
            o->ckpt = optarg;
            break;
        case 'z':
            TRY(path_check_word("tokenizer", optarg));
            o->tokenizer = optarg;
            break;
        case 'd':
            TRY(parse_device(optarg, &o->device));
            break;
        case 'h':
            *help = true;
            return 0;
        case 'p':
            if (o->prompts == PROMPTS_MAX) FAIL(ERR_USAGE, "at most %d prompts at once", PROMPTS_MAX);
            o->prompt[o->prompts++] = optarg;
            break;
        case 'n':
            TRY(parse_number("tokens", optarg, 1, 1e9, &value));
            o->tokens = (int64_t)value;
            break;
        case 'k':
            TRY(parse_number("top-k", optarg, 0, 1e9, &value));
            o->top_k = (int64_t)value;
            break;
        case 's':
            TRY(parse_number("seed", optarg, 0, 0x1p53, &value));
            o->seed = (int64_t)value;
            break;
        case 't':
            TRY(parse_number("temperature", optarg, 0, 100, &o->temperature));
            break;
        case 'q':
            TRY(parse_number("top-p", optarg, 1e-6, 1, &o->top_p));
            break;
        default:
            FAIL(ERR_USAGE, "see `tatara sample --help`");
        }
    }
    if (optind < argc) FAIL(ERR_USAGE, "%s: not understood; prompts are given with --prompt", argv[optind]);
    if (!o->ckpt) FAIL(ERR_USAGE, "name the checkpoint with --ckpt FOLDER");
    if (o->prompts == 0) o->prompt[o->prompts++] = "";
    return 0;
}

int sample_command(struct comm *comm, int argc, char **argv)
{
    int rc = 0;
    bool help = false;
    struct sampling *s = calloc(1, sizeof *s);
    if (s) s->cfg = calloc(1, sizeof *s->cfg);
    if (!s || !s->cfg) FAIL_GOTO(done, ERR_SYSTEM, "out of memory for sampling");
    /* getopt takes the word before the options for the program's name. */
    TRY_GOTO(parse(&s->options, argc + 1, argv - 1, &help), done);
    if (help) {
        usage();
    } else {
        TRY_GOTO(sample_run(s, comm), done);
    }
done:
    if (s) sampling_close(s);
    free(s);
    return rc;
}
