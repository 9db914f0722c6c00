/* The configuration: defaults, file and words in that order, then the checks of combinations.
 *
 * Single values are checked where they are read (config_yaml.c); here stands what only several options together can
 * break. No state, no threads. */
#include "config.h"

#include "config_yaml.h"
#include "err.h"
#include "fs.h"
#include "path.h"

#include <ctype.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define FILE_BYTES_MAX ((size_t)1 << 20)

void config_defaults(struct config *cfg)
{
    memset(cfg, 0, sizeof *cfg);
    for (int i = 0; i < OPTION_COUNT; i++) {
        const struct option *option = option_at(i);
        void *value = option_value(option, cfg);
        switch (option->kind) {
        case OPTION_INT:
            *(int64_t *)value = option->int_default;
            break;
        case OPTION_NUM:
            *(double *)value = option->num_default;
            break;
        case OPTION_BOOL:
            *(bool *)value = option->int_default != 0;
            break;
        case OPTION_CHOICE:
            *(int *)value = (int)option->int_default;
            break;
        case OPTION_STR:
            snprintf(value, CONFIG_TEXT_MAX, "%s", option->text);
            break;
        case OPTION_DATASETS: /* none */
            break;
        }
    }
}

static int model_check(const struct config_model *m)
{
    if (m->heads % m->kv_heads != 0) {
        FAIL(ERR_CONFIG,
             "model.heads (%lld) is not a multiple of model.kv_heads (%lld): each key/value head serves the same "
             "number "
             "of query heads",
             (long long)m->heads, (long long)m->kv_heads);
    }
    if (m->head_dim % 2 != 0) {
        FAIL(ERR_CONFIG, "model.head_dim (%lld) is odd: RoPE rotates pairs, so it must be even",
             (long long)m->head_dim);
    }
    if (m->arch != ARCH_GPT2) return 0;
    if (m->kv_heads != m->heads) {
        FAIL(ERR_CONFIG,
             "model.arch gpt2 has no grouped-query attention: model.kv_heads (%lld) must equal model.heads (%lld)",
             (long long)m->kv_heads, (long long)m->heads);
    }
    if (m->hidden != m->heads * m->head_dim) {
        FAIL(ERR_CONFIG, "model.arch gpt2 needs model.hidden (%lld) = model.heads (%lld) × model.head_dim (%lld)",
             (long long)m->hidden, (long long)m->heads, (long long)m->head_dim);
    }
    if (m->qk_norm) FAIL(ERR_CONFIG, "model.arch gpt2 has no QK-norm: set model.qk_norm to false, or use llama");
    return 0;
}

/* The same folder in both lists would make the validation loss a training loss. */
static int data_check(const struct config *cfg)
{
    const struct dataset_list *train = &cfg->data.train, *valid = &cfg->data.valid;
    for (int i = 0; i < train->n; i++) {
        for (int k = 0; k < valid->n; k++) {
            if (strcmp(train->entry[i].path, valid->entry[k].path) != 0) continue;
            FAIL(ERR_CONFIG, "data.train and data.valid both name %s: held-out shards must not be trained on",
                 train->entry[i].path);
        }
    }
    if (cfg->log.eval_every > 0 && valid->n == 0) {
        FAIL(ERR_CONFIG, "log.eval_every is %lld but data.valid is empty: name held-out shards, or set it to 0",
             (long long)cfg->log.eval_every);
    }
    if (cfg->model.vocab_size == 0 && cfg->data.tokenizer[0] == '\0') {
        FAIL(ERR_CONFIG, "the vocabulary is unknown: give data.tokenizer, or model.vocab_size");
    }
    return 0;
}

static int schedule_check(const struct config *cfg)
{
    const struct config_optim *o = &cfg->optim;
    const long long steps = cfg->run.steps, warmup = o->warmup_steps, decay = o->decay_steps;
    const bool decays = o->schedule != SCHEDULE_CONSTANT && !(o->schedule == SCHEDULE_WSD && decay == 0);
    if (decays && o->min_lr > o->lr) {
        FAIL(ERR_CONFIG, "optim.min_lr (%g) is above optim.lr (%g): the learning rate decays from lr to min_lr",
             o->min_lr, o->lr);
    }
    if (o->schedule == SCHEDULE_WSD && warmup + decay > steps) {
        FAIL(ERR_CONFIG,
             "optim.warmup_steps (%lld) and optim.decay_steps (%lld) together exceed run.steps (%lld): shorten them, "
             "or "
             "run longer",
             warmup, decay, steps);
    }
    if (warmup > steps || (warmup == steps && (o->schedule == SCHEDULE_COSINE || o->schedule == SCHEDULE_LINEAR))) {
        FAIL(ERR_CONFIG, "optim.warmup_steps (%lld) leaves nothing of run.steps (%lld) for the schedule after it",
             warmup, steps);
    }
    if (cfg->run.stop_at > cfg->run.steps) {
        FAIL(ERR_CONFIG,
             "run.stop_at (%lld) comes after the last of run.steps (%lld): it would never act; 0 means none",
             (long long)cfg->run.stop_at, steps);
    }
    return 0;
}

int config_check(const struct config *cfg)
{
    TRY(model_check(&cfg->model));
    if (cfg->batch.global % cfg->batch.micro != 0) {
        FAIL(ERR_CONFIG, "batch.global (%lld) is not a multiple of batch.micro (%lld)", (long long)cfg->batch.global,
             (long long)cfg->batch.micro);
    }
    TRY(schedule_check(cfg));
    TRY(data_check(cfg));
    TRY(config_check_allowed(cfg));
    if (cfg->run.dir[0] == '\0') FAIL(ERR_CONFIG, "run.dir is empty: name a folder for the run's files");
    if (cfg->checkpoint.resume[0] == '\0') {
        FAIL(ERR_CONFIG, "checkpoint.resume is empty: use auto, never, or a checkpoint's folder");
    }
    if (cfg->checkpoint.init_optimizer && cfg->checkpoint.init_from[0] == '\0') {
        FAIL(ERR_CONFIG,
             "checkpoint.init_optimizer is true, but checkpoint.init_from names no checkpoint whose optimizer "
             "state the run could begin with: name one, or leave init_optimizer out");
    }
    return 0;
}

int config_check_for_training(const struct config *cfg)
{
    if (cfg->data.train.n == 0) {
        FAIL(ERR_CONFIG, "data.train is empty: name folders of shards, made with `tatara prepare`, as in "
                         "data.train='[{path: shards/ja}]'");
    }
    return 0;
}

bool config_rewinds(const struct config *cfg)
{
    return cfg->run.on_nan == ON_FAULT_REWIND || cfg->run.on_spike == ON_FAULT_REWIND;
}

/* Whether the message names the option, as a whole word. */
static bool message_names(const char *message, const char *name)
{
    const size_t length = strlen(name);
    for (const char *at = strstr(message, name); at != NULL; at = strstr(at + 1, name)) {
        const unsigned char next = (unsigned char)at[length];
        if (!isalnum(next) && next != '_') return true;
    }
    return false;
}

/* Checks the combinations; to a failure's message it adds the file, and where each option that it names was set. */
static int check_with_places(const struct config *cfg, const char *name, const int line[OPTION_COUNT])
{
    const int rc = config_check(cfg);
    if (rc == 0) return 0;
    char places[400] = "";
    int first = 0;
    for (int i = 0; i < OPTION_COUNT; i++) {
        char key[OPTION_NAME_MAX];
        option_name(option_at(i), key);
        if (strchr(key, '.') == NULL || !message_names(err_message(), key)) continue;
        const size_t used = strlen(places);
        const size_t left = sizeof places - used;
        const char *comma = used == 0 ? "" : ", ";
        if (line[i] > 0) {
            snprintf(places + used, left, "%s%s at line %d", comma, key, line[i]);
            if (first == 0) first = line[i];
        } else {
            snprintf(places + used, left, "%s%s %s", comma, key,
                     line[i] == CONFIG_LINE_WORD ? "on the command line" : "by default");
        }
    }
    char message[ERR_MESSAGE_MAX];
    snprintf(message, sizeof message, "%s", err_message());
    if (first > 0) FAIL(rc, "%s:%d: %s (%s)", name, first, message, places);
    FAIL(rc, "%s: %s%s%s%s", name, message, places[0] ? " (" : "", places, places[0] ? ")" : "");
}

/* Reads a file whole. The caller frees *text, also after a failure. */
static int file_read(const char *path, char **text, size_t *bytes)
{
    int rc = 0;
    FILE *file = fopen(path, "rb");
    if (file == NULL) FAIL_FS("cannot open", path, ERR_CONFIG, NULL);
    *text = malloc(FILE_BYTES_MAX);
    if (*text == NULL) FAIL_GOTO(done, ERR_SYSTEM, "no memory to read %s", path);
    *bytes = fread(*text, 1, FILE_BYTES_MAX, file);
    if (ferror(file)) FAIL_FS_GOTO(done, "cannot read", path, ERR_CONFIG, NULL);
    if (*bytes == FILE_BYTES_MAX) FAIL_GOTO(done, ERR_CONFIG, "%s: is no configuration: 1 MiB or larger", path);
done:
    fclose(file);
    return rc;
}

int config_load(struct config *cfg, const char *path, int words, char *const *word)
{
    int rc = 0;
    int line[OPTION_COUNT] = {0};
    char *text = NULL;
    size_t bytes = 0;
    config_defaults(cfg);
    TRY(path_check_word(NULL, path));
    TRY_GOTO(file_read(path, &text, &bytes), done);
    TRY_GOTO(config_yaml_read(cfg, line, path, text, bytes), done);
    for (int i = 0; i < words; i++)
        TRY_GOTO(config_yaml_word(cfg, line, word[i]), done);
    TRY_GOTO(check_with_places(cfg, path, line), done);
done:
    free(text);
    return rc;
}

int config_parse(struct config *cfg, const char *name, const char *text, size_t bytes)
{
    int line[OPTION_COUNT] = {0};
    config_defaults(cfg);
    TRY(config_yaml_read(cfg, line, name, text, bytes));
    return check_with_places(cfg, name, line);
}
