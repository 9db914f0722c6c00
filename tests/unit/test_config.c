/* The configuration: what is accepted, what is refused and with which words, that it survives a round trip to the bit,
 * and that every configuration that we ship is sound and has as many parameters as the model that it names. */
#include "config.h"
#include "config_guess.h"
#include "config_table.h"
#include "err.h"

#include <glob.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

static int setup(void **state)
{
    *state = calloc(2, sizeof(struct config));
    return *state ? 0 : -1;
}

static int teardown(void **state)
{
    free(*state);
    return 0;
}

/* A configuration needs a vocabulary to be complete. */
#define COMPLETE "data: {tokenizer: t.model}\n"

static int parse(struct config *cfg, const char *text)
{
    err_clear();
    return config_parse(cfg, "test.yaml", text, strlen(text));
}

/* Loads `text` from a file, with one key=value word. */
static int load_with_word(struct config *cfg, const char *text, const char *word)
{
    char path[] = "/tmp/test_config_XXXXXX";
    char copy[1024];
    char *words[] = {copy};
    const int fd = mkstemp(path);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, text, strlen(text)), strlen(text));
    close(fd);
    snprintf(copy, sizeof copy, "%s", word);
    err_clear();
    const int rc = config_load(cfg, path, 1, words);
    unlink(path);
    return rc;
}

static void assert_message_has(const char *part)
{
    if (strstr(err_message(), part) == NULL) fail_msg("the message lacks \"%s\": %s", part, err_message());
}

static void test_defaults(void **state)
{
    struct config *cfg = *state;
    config_defaults(cfg);
    assert_int_equal(cfg->model.layers, 12);
    assert_true(cfg->optim.eps == 1e-8);
    assert_string_equal(cfg->checkpoint.resume, "auto");
    assert_int_equal(cfg->top.device, CHOOSE_AUTO);
    assert_int_equal(config_check(cfg), ERR_CONFIG); /* no vocabulary */
    assert_message_has("model.vocab_size");
    cfg->model.vocab_size = 100;
    assert_int_equal(config_check(cfg), 0);
    assert_int_equal(config_check_for_training(cfg), ERR_CONFIG);
    assert_message_has("data.train");
}

/* The vocabulary of the configuration, as the issue that founded it wrote it. */
static const char founding[] =
    "run:        {dir: runs/ja-small, seed: 1234, steps: 2000}\n"
    "model:      {arch: llama, layers: 12, hidden: 768, heads: 12, kv_heads: 4, head_dim: 64, ffn_hidden: 2048,\n"
    "             seq_len: 1024, rope_theta: 500000, norm_eps: 1.0e-5, qk_norm: false, tie_embeddings: true, z_loss: "
    "0}\n"
    "data:       {tokenizer: tok.model, train: [{path: shards/ja, weight: 1}], valid: [{path: shards/ja-valid}],\n"
    "             document_mask: true}\n"
    "batch:      {global: 64, micro: 4}                 # sequences\n"
    "optim:      {lr: 3.0e-4, min_lr: 3.0e-5, schedule: wsd, warmup_steps: 100, decay_steps: 400,\n"
    "             decay_shape: 1-sqrt, beta1: 0.9, beta2: 0.95, eps: 1.0e-8, weight_decay: 0.1, clip: 1.0}\n"
    "precision:  {compute: bf16}\n"
    "parallel:   {zero: 1, reduce: exact}\n"
    "device:     auto\n"
    "checkpoint: {every: 200, keep: 3, resume: auto}\n"
    "log:        {every: 10}\n";

static void test_founding_vocabulary(void **state)
{
    struct config *cfg = *state;
    assert_int_equal(parse(cfg, founding), 0);
    assert_string_equal(cfg->run.dir, "runs/ja-small");
    assert_int_equal(cfg->run.steps, 2000);
    assert_int_equal(cfg->model.kv_heads, 4);
    assert_true(cfg->model.norm_eps == 1.0e-5);
    assert_int_equal(cfg->data.train.n, 1);
    assert_string_equal(cfg->data.train.entry[0].path, "shards/ja");
    assert_true(cfg->data.valid.entry[0].weight == 1);
    assert_int_equal(cfg->optim.decay_steps, 400);
    assert_int_equal(cfg->precision.compute, COMPUTE_BF16);
    assert_int_equal(cfg->parallel.reduce, REDUCE_EXACT);
    assert_int_equal(config_check_for_training(cfg), 0);
    assert_int_equal(config_warn_recipes(cfg), 0);
}

/* How numbers may be written. */
static void test_numbers(void **state)
{
    struct config *cfg = *state;
    assert_int_equal(parse(cfg, COMPLETE "optim: {lr: 3e-4, min_lr: .00001, beta1: +0.5, clip: 1.}\nrun: {seed: 7}"),
                     0);
    assert_true(cfg->optim.lr == 3e-4 && cfg->optim.min_lr == 1e-5 && cfg->optim.beta1 == 0.5 &&
                cfg->optim.clip == 1);
    assert_int_equal(cfg->run.seed, 7);
    assert_int_equal(parse(cfg, COMPLETE "run: {seed: 9223372036854775807}"), 0);
    assert_true(cfg->run.seed == INT64_MAX);
    assert_int_equal(parse(cfg, COMPLETE "run: {seed: 9223372036854775808}"), ERR_CONFIG);
}

struct refusal {
    const char *text;    /* YAML, or a key=value word */
    const char *part[3]; /* of the message */
};

static void test_refused_yaml(void **state)
{
    static const struct refusal refusals[] = {
        {"", {"test.yaml: is empty"}},
        {"- a\n", {"test.yaml:1: the configuration must be a mapping"}},
        {"run: {steps: 5\n", {"test.yaml:2: not YAML"}},
        {"data: {tokenizer: !bytes \"a%E\"}\n", {"data.tokenizer", "!bytes", "%E9"}},
        {"data: {tokenizer: !bytes \"a%00\"}\n", {"data.tokenizer", "!bytes", "%E9"}},
        {"run: {steps: 5}\n---\nrun: {}\n", {"second document"}},
        {"run: {steps: 5}\nrun: {seed: 1}\n", {"test.yaml:2: ", "'run' is given twice", "line 1"}},
        {"run:\n  steps: 5\n  steps: 6\n", {"test.yaml:3: ", "'steps' is given twice", "line 2"}},
        {"run:\n", {"test.yaml:1: run must be a mapping", "it is empty"}},
        {"run: 5\n", {"test.yaml:1: run must be a mapping"}},
        {"\nmodle: {layers: 2}\n", {"test.yaml:2: unknown key 'modle' at the top: did you mean 'model'?"}},
        {"model:\n  hiden: 2\n", {"test.yaml:2: unknown key 'hiden' in model: did you mean 'hidden'?"}},
        {"model: {lr: 1}\n", {"unknown key 'lr' in model: did you mean optim.lr"}},
        {"layers: 1\n", {"did you mean model.layers"}},
        {"optim:\n  decay: 2\n", {"unknown key 'decay' in optim: did you mean 'decay_steps'?"}},
        {"\nlearning_rate: 1\n", {"test.yaml:2: unknown key 'learning_rate' at the top: it is called optim.lr here"}},
        {"optim: {learning_rate: 1}\n", {"'learning_rate' in optim: it is called optim.lr here"}},
        {"model: {Hidden-Size: 1}\n", {"'Hidden-Size' in model: it is called model.hidden here"}},
        {"learnig_rate: 1\n", {"it is called optim.lr here"}},
        {"model: {untie_embeddings_and_output_weights: true}\n",
         {"model.tie_embeddings here, and means the opposite"}},
        {"optimizer: {lr: 1}\n", {"it is called optim here"}},
        {"log: {zzzzzzzz: 1}\n", {"unknown key 'zzzzzzzz' in log; known: every, eval_every, eval_batches"}},
        {"{[a]: 1}\n", {"a key must be a word"}},
        {"model: {layers: two}\n", {"model.layers: got two; allowed is a whole number from 1 to 1024"}},
        {"model: {layers: 0}\n", {"model.layers: got 0; allowed is a whole number from 1 to 1024"}},
        {"model: {layers: 1025}\n", {"got 1025"}},
        {"model: {layers: -1}\n", {"got -1"}},
        {"model: {layers: '12'}\n", {"got the text \"12\""}},
        {"model: {layers: [12]}\n", {"got a list"}},
        {"model: {layers: {a: 12}}\n", {"got a mapping"}},
        {"model: {layers: 12.0}\n", {"got 12.0", "digits only"}},
        {"model: {layers: 1e1}\n", {"got 1e1", "digits only"}},
        {"model: {layers: 0x10}\n", {"got 0x10"}},
        {"model: {layers: 010}\n", {"without leading zeros"}},
        {"run: {steps: 1_000}\n", {"run.steps: got 1_000", "without underscores"}},
        {"run:\n  steps: 1,000\n", {"run.steps: got 1,000", "without commas"}},
        {"run: {steps: 99999999999999999999}\n", {"run.steps: got 9999"}},
        {"optim: {lr: fast}\n", {"optim.lr: got fast; allowed is a number from 0 to 10"}},
        {"optim: {lr: .nan}\n", {"got .nan"}},
        {"optim: {lr: nan}\n", {"got nan"}},
        {"optim: {lr: .inf}\n", {"got .inf"}},
        {"optim: {lr: 1e999}\n", {"got 1e999"}},
        {"optim: {lr: 1e}\n", {"got 1e;"}},
        {"optim: {lr: .}\n", {"got .;"}},
        {"optim: {lr: 0x1p3}\n", {"got 0x1p3"}},
        {"optim: {lr: -1e-4}\n", {"got -1e-4"}},
        {"optim: {lr: 1_0.5}\n", {"without underscores"}},
        {"optim: {beta2: 1}\n", {"optim.beta2: got 1; allowed is a number from 0 to 0.999999999"}},
        {"optim: {lr: }\n", {"optim.lr: has no value"}},
        {"optim: {lr: null}\n", {"optim.lr: has no value"}},
        {"run: {dir: ~}\n", {"run.dir: has no value", "\"\" for none"}},
        {"run: {dir: [a]}\n", {"run.dir: got a list"}},
        {"\nrun: {dir: ~other/runs}\n",
         {"test.yaml:2: run.dir: ~other/runs: only ~ and ~/… stand for a home folder"}},
        {"data: {train: [{path: ~other}]}\n", {"data.train: ~other: only ~ and ~/…"}},
        {"run: {dir: \"a\\0b\"}\n", {"run.dir: has a zero byte"}},
        {"model: {qk_norm: yes}\n", {"model.qk_norm: got yes; allowed is true or false"}},
        {"model: {qk_norm: 1}\n", {"got 1; allowed is true or false"}},
        {"model: {qk_norm: 'true'}\n", {"got the text \"true\""}},
        {"model: {arch: lama}\n", {"got lama; allowed is one of llama, gpt2. Did you mean 'llama'?"}},
        {"model: {arch: bert}\n", {"got bert; allowed is one of llama, gpt2"}},
        {"model: {arch: [llama]}\n", {"got a list"}},
        {"data: {train: shards}\n", {"data.train: got shards; allowed is a list"}},
        {"data: {train: [shards]}\n", {"data.train: an entry must be {path:"}},
        {"data: {train: [{weight: 1}]}\n", {"data.train: an entry has no path"}},
        {"data: {train: [{path: a, wait: 1}]}\n", {"unknown key 'wait'"}},
        {"data: {train: [{path: a, path: b}]}\n", {"'path' is given twice"}},
        {"data: {train: [{path: [a]}]}\n", {"path must be text"}},
        {"data: {train: [{path: a, weight: 0}]}\n", {"weight must be a number above 0"}},
        {"data: {train: [{path: a, weight: -2}]}\n", {"weight must be a number above 0"}},
        {"data: {train: [{path: a, weight: .inf}]}\n", {"weight must be a number above 0"}},
        {"data: {train: [{path: a},\n {path: a}]}\n", {"test.yaml:2: data.train: a is listed twice"}},
    };
    for (size_t i = 0; i < sizeof refusals / sizeof *refusals; i++) {
        const int rc = parse(*state, refusals[i].text);
        if (rc != ERR_CONFIG) fail_msg("got %d for: %s", rc, refusals[i].text);
        for (int k = 0; k < 3 && refusals[i].part[k]; k++)
            assert_message_has(refusals[i].part[k]);
    }
}

static void test_words(void **state)
{
    struct config *cfg = *state;
    assert_int_equal(load_with_word(cfg, COMPLETE "optim: {lr: 1e-3}", "optim.lr=2e-3"), 0);
    assert_true(cfg->optim.lr == 2e-3);
    assert_int_equal(load_with_word(cfg, COMPLETE, "device=cpu"), 0);
    assert_int_equal(cfg->top.device, CHOOSE_CPU);
    assert_int_equal(load_with_word(cfg, COMPLETE, "data.train=[{path: a}, {path: b=c, weight: 2}]"), 0);
    assert_int_equal(cfg->data.train.n, 2);
    assert_string_equal(cfg->data.train.entry[1].path, "b=c");
    assert_int_equal(load_with_word(cfg, COMPLETE "model: {vocab_size: 9}", "data.tokenizer=\"\""), 0);
    assert_string_equal(cfg->data.tokenizer, "");
}

/* Names of files hold any bytes, YAML Unicode only: a word is taken as it is, and written after the tag !bytes. */
static void test_names_of_any_bytes(void **state)
{
    struct config *cfg = *state;
    char *text = NULL;
    const char *name = "caf\xE9 50% \"\\\x01.model";
    char word[64];
    (void)snprintf(word, sizeof word, "data.tokenizer=%s", name);
    assert_int_equal(load_with_word(cfg, "data: {train: [{path: !bytes \"sh%E9\"}]}\n", word), 0);
    assert_string_equal(cfg->data.tokenizer, name);
    assert_string_equal(cfg->data.train.entry[0].path, "sh\xE9");
    assert_int_equal(config_to_yaml(cfg, &text), 0);
    assert_non_null(strstr(text, "!bytes \"caf%E9 50%25 \\\"\\\\%01.model\""));
    memset(cfg, 0, sizeof *cfg);
    assert_int_equal(config_parse(cfg, "again", text, strlen(text)), 0);
    assert_string_equal(cfg->data.tokenizer, name);
    assert_string_equal(cfg->data.train.entry[0].path, "sh\xE9");
    free(text);
}

static void test_refused_words(void **state)
{
    static const struct refusal refusals[] = {
        {"optim.lr", {"optim.lr: what follows", "key=value"}},
        {"=5", {"=5: what follows"}},
        {"optim.lr=", {"optim.lr=: has no value"}},
        {"optim.lr=fast", {"optim.lr=fast: optim.lr: got fast; allowed is a number"}},
        {"optim.lr=1: 2", {"optim.lr=1: 2: optim.lr: got a mapping"}},
        {"optim.lr=[1", {"optim.lr=[1: the value is not YAML"}},
        {"optim.lrr=1", {"optim.lrr=1: no such option; did you mean optim.lr?"}},
        {"optim.decay=3", {"did you mean optim.decay_steps?"}},
        {"run.stop=3", {"did you mean run.stop_at?"}},
        {"learning_rate=1", {"learning_rate=1: no such option: it is called optim.lr here"}},
        {"model.num_layers=1", {"no such option: it is called model.layers here"}},
        {"train.max_steps=1", {"it is called run.steps here"}},
        {"lr=1", {"lr=1: write it with its section: optim.lr="}},
        {"optim={lr: 1}", {"name one option of the section, as in optim.key=value"}},
        {"top.device=cpu", {"no such option"}},
        {"qqqqqqqq.rrrrrr=1", {"no such option", "--help-config"}},
    };
    for (size_t i = 0; i < sizeof refusals / sizeof *refusals; i++) {
        const int rc = load_with_word(*state, COMPLETE, refusals[i].text);
        if (rc != ERR_CONFIG) fail_msg("got %d for: %s", rc, refusals[i].text);
        for (int k = 0; k < 3 && refusals[i].part[k]; k++)
            assert_message_has(refusals[i].part[k]);
    }
    assert_int_equal(config_load(*state, "/nonexistent/c.yaml", 0, NULL), ERR_CONFIG);
    assert_message_has("cannot open /nonexistent/c.yaml: No such file or directory");
    assert_int_equal(config_load(*state, "/tmp", 0, NULL), ERR_CONFIG);
    assert_message_has("cannot read /tmp: Is a directory");
}

/* What other programs call an option leads to one that there is, from the top and from any section; and no name of theirs
 * is one of ours, which would be read. */
static void test_foreign_names(void **state)
{
    char text[160], names[160];
    for (int i = 0; foreign_at(i) != NULL; i++) {
        const struct foreign *foreign = foreign_at(i);
        bool known = false;
        for (int k = 0; k < OPTION_COUNT; k++) {
            char name[OPTION_NAME_MAX];
            option_name(option_at(k), name);
            known = known || strcmp(name, foreign->ours) == 0 || strcmp(option_at(k)->section, foreign->ours) == 0;
            if (strcmp(option_at(k)->key, foreign->theirs) == 0) fail_msg("%s is ours", name);
        }
        if (!known) fail_msg("%s leads to %s, which there is not", foreign->theirs, foreign->ours);
        snprintf(names, sizeof names, "it is called %s here", foreign->ours);
        for (int nested = 0; nested < 2; nested++) {
            snprintf(text, sizeof text, nested ? "batch: {%s: 1}" : "%s: 1", foreign->theirs);
            assert_int_equal(parse(*state, text), ERR_CONFIG);
            assert_message_has(names);
        }
        snprintf(text, sizeof text, "%s=1", foreign->theirs);
        assert_int_equal(load_with_word(*state, COMPLETE, text), ERR_CONFIG);
        assert_message_has(names);
    }
}

/* A ~ at the start of a path is the home folder, in the file and in words alike; elsewhere it is a letter. */
static void test_home(void **state)
{
    struct config *cfg = *state;
    assert_int_equal(setenv("HOME", "/home/me", 1), 0);
    assert_int_equal(parse(cfg, "run: {dir: ~/runs/a~b}\n"
                                "data: {tokenizer: '~/t.model', train: [{path: ~/a}, {path: a/~}, {path: ./~}]}\n"
                                "checkpoint: {init_from: \"~\", resume: ~/b}"),
                     0);
    assert_string_equal(cfg->run.dir, "/home/me/runs/a~b");
    assert_string_equal(cfg->data.tokenizer, "/home/me/t.model");
    assert_string_equal(cfg->data.train.entry[0].path, "/home/me/a");
    assert_string_equal(cfg->data.train.entry[1].path, "a/~");
    assert_string_equal(cfg->data.train.entry[2].path, "./~");
    assert_string_equal(cfg->checkpoint.init_from, "/home/me");
    assert_string_equal(cfg->checkpoint.resume, "/home/me/b");
    assert_int_equal(load_with_word(cfg, COMPLETE, "run.dir=~/c"), 0);
    assert_string_equal(cfg->run.dir, "/home/me/c");
    assert_int_equal(unsetenv("HOME"), 0);
    assert_int_equal(load_with_word(cfg, COMPLETE, "run.dir=~/c"), ERR_CONFIG);
    assert_message_has("run.dir=~/c: run.dir: ~/c: ~ is your home folder, which HOME does not say");
    assert_int_equal(setenv("HOME", "/home/me", 1), 0);
    assert_int_equal(load_with_word(cfg, COMPLETE, "run.dir=~"), ERR_CONFIG);
    assert_message_has("in quotes for the home folder");
}

static void test_refused_combinations(void **state)
{
    static const struct refusal refusals[] = {
        {COMPLETE "model: {heads: 6,\n kv_heads: 4}",
         {"test.yaml:2: model.heads (6) is not a multiple of model.kv_heads (4)", "model.kv_heads at line 3"}},
        {COMPLETE "model: {heads: 6}", {"model.heads at line 2, model.kv_heads by default"}},
        {COMPLETE "model: {head_dim: 33}", {"model.head_dim (33) is odd"}},
        {COMPLETE "model: {arch: gpt2, kv_heads: 4}", {"model.kv_heads (4) must equal model.heads (12)"}},
        {COMPLETE "model: {arch: gpt2, hidden: 800}",
         {"model.hidden (800) = model.heads (12) × model.head_dim (64)"}},
        {COMPLETE "model: {arch: gpt2, qk_norm: true}", {"model.qk_norm"}},
        {COMPLETE "batch: {global: 10}", {"batch.global (10) is not a multiple of batch.micro (4)"}},
        {COMPLETE "optim: {min_lr: 1}", {"optim.min_lr (1) is above optim.lr (0.0003)"}},
        {COMPLETE "run: {steps: 150}", {"optim.warmup_steps (100) and optim.decay_steps (100)", "run.steps (150)"}},
        {COMPLETE "run: {steps: 100}\noptim: {schedule: cosine}", {"leaves nothing of run.steps (100)"}},
        {COMPLETE "run: {steps: 99}\noptim: {schedule: constant}", {"leaves nothing of run.steps (99)"}},
        {COMPLETE "run: {stop_at: 1001}", {"run.stop_at (1001)"}},
        {COMPLETE "log: {eval_every: 5}", {"data.valid is empty"}},
        {COMPLETE "run: {dir: ''}", {"run.dir is empty"}},
        {COMPLETE "checkpoint: {resume: ''}", {"checkpoint.resume is empty"}},
        {COMPLETE "checkpoint: {init_optimizer: true}",
         {"checkpoint.init_optimizer is true, but checkpoint.init_from names no checkpoint",
          "init_optimizer at line 2"}},
        {"run: {steps: 1000}", {"the vocabulary is unknown"}},
        {"data: {tokenizer: t, train: [{path: a}], valid: [{path: a}]}", {"data.train and data.valid both name a"}},
    };
    for (size_t i = 0; i < sizeof refusals / sizeof *refusals; i++) {
        const int rc = parse(*state, refusals[i].text);
        if (rc != ERR_CONFIG) fail_msg("got %d for: %s", rc, refusals[i].text);
        for (int k = 0; k < 3 && refusals[i].part[k]; k++)
            assert_message_has(refusals[i].part[k]);
    }
    /* The neighbours of what is refused. */
    assert_int_equal(parse(*state, COMPLETE "run: {steps: 200, stop_at: 200}"), 0);
    assert_int_equal(parse(*state, COMPLETE "run: {steps: 101}\noptim: {schedule: cosine}"), 0);
    assert_int_equal(parse(*state, COMPLETE "model: {heads: 5, kv_heads: 5}"), 0); /* llama: hidden is free */
}

static uint64_t random_next(uint64_t *seed)
{
    *seed = *seed * 6364136223846793005u + 1442695040888963407u;
    return *seed >> 16;
}

/* Any value that the option's range allows. */
static void option_randomise(const struct option *option, struct config *cfg, uint64_t *seed)
{
    void *value = option_value(option, cfg);
    const uint64_t span = (uint64_t)option->int_max - (uint64_t)option->int_min;
    const double share = (double)random_next(seed) / (double)((uint64_t)1 << 48);
    if (option->kind == OPTION_INT) {
        *(int64_t *)value = option->int_min + (int64_t)(random_next(seed) * 65537 % (span == 0 ? 1 : span));
    } else if (option->kind == OPTION_NUM) {
        *(double *)value = fmin(option->num_max, option->num_min + share * share * share * option->num_max);
    } else if (option->kind == OPTION_BOOL) {
        *(bool *)value = share < 0.5;
    } else if (option->kind == OPTION_STR) {
        static const char *const texts[] = {"null", "", "踏鞴/鋼", "a \"b\" \\ # c: {d}", "- 1", "tab\tnew\nline\x01",
                                            "07"};
        memset(value, 0, CONFIG_TEXT_MAX);
        snprintf(value, CONFIG_TEXT_MAX, "%s", texts[random_next(seed) % 7]);
    } else if (option->kind == OPTION_CHOICE) {
        char word[OPTION_NAME_MAX];
        *(int *)value = choice_word(option, 1, word) ? (int)(random_next(seed) % 2) : 0;
    } else {
        struct dataset_list *list = value;
        list->n = (int)(random_next(seed) % 4);
        for (int i = 0; i < list->n; i++) {
            snprintf(list->entry[i].path, CONFIG_TEXT_MAX, "%s \"%d\"", option->key, i);
            list->entry[i].weight = 1e-3 + 1e9 * share * share / (i + 1);
        }
    }
}

/* Puts right what random values break between options. */
static void combinations_mend(struct config *cfg)
{
    cfg->model.arch = ARCH_LLAMA;
    cfg->model.heads = cfg->model.kv_heads;
    cfg->model.head_dim -= cfg->model.head_dim % 2;
    cfg->model.vocab_size += 1;
    cfg->batch.global = cfg->batch.micro;
    cfg->optim.min_lr = cfg->optim.lr / 3;
    cfg->optim.warmup_steps = cfg->optim.decay_steps = 0;
    cfg->run.stop_at = 0;
    memset(cfg->run.allow_changes, 0, sizeof cfg->run.allow_changes);
    cfg->log.eval_every = 0;
    if (cfg->run.dir[0] == '\0') cfg->run.dir[0] = 'x';
    if (cfg->checkpoint.resume[0] == '\0') cfg->checkpoint.resume[0] = 'x';
    cfg->checkpoint.init_optimizer &= cfg->checkpoint.init_from[0] != '\0';
}

static void test_round_trip(void **state)
{
    struct config *cfg = *state, *back = cfg + 1;
    uint64_t seed = 1;
    for (int round = 0; round < 300; round++) {
        config_defaults(cfg);
        for (int i = 0; i < OPTION_COUNT; i++)
            option_randomise(option_at(i), cfg, &seed);
        combinations_mend(cfg);
        char *text = NULL;
        assert_int_equal(config_to_yaml(cfg, &text), 0);
        if (parse(back, text) != 0) fail_msg("%s in:\n%s", err_message(), text);
        assert_memory_equal(cfg, back, sizeof *cfg);
        free(text);
    }
}

/* Damaged text is refused or read, but nothing else happens; sanitizers watch. */
static void test_damaged_text(void **state)
{
    char text[sizeof founding];
    uint64_t seed = 2;
    int refused = 0;
    for (int round = 0; round < 3000; round++) {
        memcpy(text, founding, sizeof founding);
        for (int k = 0; k < 1 + round % 3; k++)
            text[random_next(&seed) % (sizeof founding - 1)] = (char)random_next(&seed);
        const size_t bytes = round % 2 ? sizeof founding - 1 : random_next(&seed) % sizeof founding;
        const int rc = config_parse(*state, "test.yaml", text, bytes);
        assert_true(rc == 0 || rc == ERR_CONFIG);
        refused += rc != 0;
    }
    assert_true(refused > 1000);
}

static void print_help(FILE *file, const struct config *cfg)
{
    (void)file, (void)cfg;
    config_help();
}

/* What `print` writes on stdout; the caller frees it. */
static char *captured(void (*print)(FILE *, const struct config *), const struct config *cfg)
{
    enum { BYTES = 1 << 16 };
    char *text = calloc(1, BYTES);
    FILE *file = tmpfile();
    assert_non_null(text);
    assert_non_null(file);
    fflush(stdout);
    const int saved = dup(STDOUT_FILENO);
    assert_true(saved >= 0 && dup2(fileno(file), STDOUT_FILENO) >= 0);
    print(stdout, cfg);
    fflush(stdout);
    assert_true(dup2(saved, STDOUT_FILENO) >= 0);
    close(saved);
    rewind(file);
    assert_true(fread(text, 1, BYTES - 1, file) > 0);
    fclose(file);
    return text;
}

static void assert_columns(const char *text, size_t most)
{
    while (*text != '\0') {
        const size_t length = strcspn(text, "\n");
        if (length > most) fail_msg("%zu columns: %.*s", length, (int)length, text);
        text += length + (text[length] == '\n');
    }
}

static void test_printed(void **state)
{
    struct config *cfg = *state;
    assert_int_equal(parse(cfg, founding), 0);
    char *help = captured(print_help, cfg), *summary = captured(config_print, cfg);
    for (int i = 0; i < OPTION_COUNT; i++) {
        char name[OPTION_NAME_MAX + 4], key[OPTION_NAME_MAX];
        option_name(option_at(i), key);
        snprintf(name, sizeof name, "  %s ", key);
        if (strstr(help, name) == NULL) fail_msg("the reference lacks %s", key);
        snprintf(name, sizeof name, "%.60s=", option_at(i)->key);
        if (strstr(summary, name) == NULL) fail_msg("the summary lacks %s", key);
    }
    assert_columns(help, 100);
    assert_columns(summary, 100);
    assert_non_null(strstr(help, "a number from 1.0e-20 to 1; default 1.0e-08"));
    free(help);
    free(summary);
}

/* Parameters of the model, counted from its published architecture. */
static int64_t params_count(const struct config_model *m)
{
    const bool gpt2 = m->arch == ARCH_GPT2;
    const int64_t q = m->heads * m->head_dim, kv = m->kv_heads * m->head_dim, d = m->hidden, f = m->ffn_hidden;
    const int64_t attention =
        d * (q + 2 * kv) + q * d + (gpt2 ? q + 2 * kv + d : 0) + (m->qk_norm ? 2 * m->head_dim : 0);
    const int64_t ffn = gpt2 ? 2 * d * f + f + d : 3 * d * f;
    const int64_t norm = gpt2 ? 2 * d : d;
    const int64_t embedding = m->vocab_size * d * (m->tie_embeddings ? 1 : 2) + (gpt2 ? m->seq_len * d : 0);
    return m->layers * (attention + ffn + 2 * norm) + norm + embedding;
}

/* Every shipped configuration loads, follows known recipes, and is the model that it says. */
static void test_shipped(void **state)
{
    static const struct {
        const char *name;
        int64_t params;
    } known[] = {
        {"quickstart", 10060608},    {"tiny", 158080},
        {"gpt2-124m", 124439808},    {"llama-1b", 1235814400},
        {"llm-jp-4-8b", 8590200832}, {"llm-jp-3-172b", 172394557440},
        {"fugaku-13b", 13173549696}, {"smoke", 1738240},
    };
    const size_t n = sizeof known / sizeof *known;
    struct config *cfg = *state;
    for (size_t i = 0; i < n; i++) {
        char path[CONFIG_TEXT_MAX];
        snprintf(path, sizeof path, "%s/%s.yaml", TATARA_CONFIGS, known[i].name);
        if (config_load(cfg, path, 0, NULL) != 0) fail_msg("%s", err_message());
        if (params_count(&cfg->model) != known[i].params) {
            fail_msg("%s has %lld parameters", known[i].name, (long long)params_count(&cfg->model));
        }
        assert_int_equal(config_warn_recipes(cfg), 0);
    }
    glob_t files;
    assert_int_equal(glob(TATARA_CONFIGS "/*.yaml", 0, NULL, &files), 0);
    assert_int_equal(files.gl_pathc, n); /* a new one belongs in the table above */
    globfree(&files);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_defaults),      cmocka_unit_test(test_founding_vocabulary),
        cmocka_unit_test(test_numbers),       cmocka_unit_test(test_refused_yaml),
        cmocka_unit_test(test_words),         cmocka_unit_test(test_names_of_any_bytes),
        cmocka_unit_test(test_refused_words), cmocka_unit_test(test_foreign_names),
        cmocka_unit_test(test_home),          cmocka_unit_test(test_refused_combinations),
        cmocka_unit_test(test_round_trip),    cmocka_unit_test(test_damaged_text),
        cmocka_unit_test(test_printed),       cmocka_unit_test(test_shipped),
    };
    return cmocka_run_group_tests_name("config", tests, setup, teardown);
}
