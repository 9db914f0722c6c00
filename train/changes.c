/* What differs between a checkpoint and the run that goes on from it (see changes.h). No state, no threads. */
#include "changes.h"

#include "err.h"
#include "log.h"
#include "optim.h"
#include "record.h"

#include <inttypes.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A comparison under way. */
struct look {
    struct changes *changes;
    const struct config *now;
    const char *folder;
    const struct ckpt_meta *meta;
    bool whole, has_record;
    char refused[ERR_MESSAGE_MAX / 2]; /* keys that need leave, with both values */
    char keys[ERR_MESSAGE_MAX / 4];    /* the keys alone, as run.allow_changes wants them */
};

struct config *changes_before(const struct ckpt_meta *meta)
{
    struct config *before = calloc(1, sizeof *before);
    if (before && meta->config_yaml &&
        config_parse(before, "the checkpoint's configuration", meta->config_yaml, strlen(meta->config_yaml)) == 0)
        return before;
    err_clear();
    free(before);
    return NULL;
}

static int note(void *list, const char *key, const char *before, const char *now)
{
    if (json_array_append_new(list, json_pack("{s:s, s:s, s:s}", "key", key, "before", before, "now", now)) == 0)
        return 0;
    FAIL(ERR_SYSTEM, "out of memory for the list of changes");
}

/* Appends to a text that is cut where it is full. */
static void add(char *text, size_t size, const char *between, const char *format, const char *a, const char *b,
                const char *c)
{
    const size_t used = strlen(text);
    const int n = snprintf(text + used, size - used, "%s", used > 0 ? between : "");
    if (n >= 0 && used + (size_t)n < size) snprintf(text + used + n, size - used - (size_t)n, format, a, b, c);
}

static int see_course(struct look *look, const char *key, const char *before, const char *now, const char *effect)
{
    look->changes->course |= strcmp(key, "data.valid") != 0 && strcmp(key, "log.eval_batches") != 0;
    log_info("changed since the checkpoint: %s: %s → %s: %s", key, before, now, effect);
    return note(look->changes->list, key, before, now);
}

static int see_function(struct look *look, const char *key, const char *before, const char *now, const char *effect)
{
    if (config_allows(look->now, key)) return see_course(look, key, before, now, effect);
    add(look->refused, sizeof look->refused, "; ", "%s: %s → %s", key, before, now);
    add(look->keys, sizeof look->keys, ",", "%s%s%s", key, "", "");
    return 0;
}

/* Options that the record answers better: by the contents of data, and by what `auto` became. */
static bool is_recorded(const char *name)
{
    static const char *const names[] = {"data.train", "data.valid", "device", "precision.product"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (strcmp(name, names[i]) == 0) return true;
    return false;
}

static int see_option(void *context, const struct config_difference *difference)
{
    struct look *look = context;
    const char *name = difference->name;
    if (strcmp(name, "data.tokenizer") == 0 || (look->has_record && is_recorded(name))) return 0;
    if (strcmp(name, "comm") == 0 && look->now->parallel.reduce == REDUCE_EXACT) return 0;
    if (strcmp(name, "attention") == 0 && strcmp(difference->before, "auto") == 0) return 0; /* a CPU has one kind */
    if (difference->change == CHANGE_FUNCTION)
        return see_function(look, name, difference->before, difference->now, difference->effect);
    if (difference->change == CHANGE_HARMLESS || !look->whole) return 0;
    return see_course(look, name, difference->before, difference->now, difference->effect);
}

static int see_record(void *context, const struct record_difference *difference)
{
    struct look *look = context;
    if (difference->data) {
        const bool valid = strcmp(difference->key, "data.valid") == 0;
        return see_course(
            look, difference->key, difference->before, difference->now,
            valid ? "the validation loss is that of another text"
                  : "the data from here on: in this epoch some sequences are read again and others left out");
    }
    log_info(
        "changed since the checkpoint: %s: %s → %s: the same within rounding, perhaps not the same bits as without "
        "the stop",
        difference->key, difference->before, difference->now);
    return note(look->changes->arithmetic, difference->key, difference->before, difference->now);
}

static int see_tokenizer(struct look *look, uint64_t id)
{
    char before[20], now[20];
    if (look->meta->tokenizer_id == id || look->meta->tokenizer_id == 0 || id == 0) return 0;
    snprintf(before, sizeof before, "%016" PRIx64, look->meta->tokenizer_id);
    snprintf(now, sizeof now, "%016" PRIx64, id);
    return see_function(look, "data.tokenizer", before, now, "its tokens mean something else");
}

/* What the changes together do to the next step, where no option says it alone. */
static void say_consequences(const struct config *before, const struct config *now, const struct ckpt_meta *meta)
{
    const double old_lr = optim_lr(before, meta->step), lr = optim_lr(now, meta->step);
    if (fabs(old_lr - lr) > 1e-9 * fabs(old_lr))
        log_info("changed since the checkpoint: the learning rate of step %lld is %.4g; it would have been %.4g",
                 (long long)meta->step + 1, lr, old_lr);
    if (before->model.seq_len != now->model.seq_len)
        log_info("changed since the checkpoint: %.0f tokens were read in sequences of %lld; in those of %lld they "
                 "are read "
                 "again",
                 meta->tokens, (long long)before->model.seq_len, (long long)now->model.seq_len);
}

/* Compares the configurations with the vocabulary as a number in both: 0 stands for the tokenizer's. */
static int compare_configs(struct look *look, const struct config *before, const struct config *now,
                           int64_t vocab_size)
{
    int rc = 0;
    struct config *old = malloc(sizeof *old), *new = malloc(sizeof *new);
    if (!old || !new) FAIL_GOTO(done, ERR_SYSTEM, "out of memory to compare the configurations");
    *old = *before;
    *new = *now;
    new->model.vocab_size = vocab_size;
    if (old->model.vocab_size == 0) old->model.vocab_size = vocab_size;
    /* A run keeps the attention that it began with, unless it is told another. */
    if (new->top.attention == 0) new->top.attention = old->top.attention;
    TRY_GOTO(config_compare(old, new, see_option, look), done);
done:
    free(old);
    free(new);
    return rc;
}

int changes_find(struct changes *changes, const struct config *before, const struct config *now, const char *folder,
                 const struct ckpt_meta *meta, int64_t vocab_size, uint64_t tokenizer_id, const char *record,
                 bool whole)
{
    struct look look = {.changes = changes,
                        .now = now,
                        .folder = folder,
                        .meta = meta,
                        .whole = whole,
                        .has_record = meta->record && record};
    *changes = (struct changes){.list = json_array(), .arithmetic = json_array()};
    if (!changes->list || !changes->arithmetic) FAIL(ERR_SYSTEM, "out of memory for the list of changes");
    if (!before) {
        log_warn("%s: its configuration is of another version of the program and cannot be read: what has changed "
                 "since is "
                 "not known",
                 folder);
    } else {
        TRY(compare_configs(&look, before, now, vocab_size));
    }
    TRY(see_tokenizer(&look, tokenizer_id));
    if (look.refused[0]) {
        FAIL(ERR_CONFIG,
             "%s was trained with another configuration, with which the same weights are another model: %s. Set them "
             "as in "
             "`tatara ckpt show %s`, or, if it is meant, give leave: run.allow_changes=%s",
             folder, look.refused, folder, look.keys);
    }
    if (!whole) return 0;
    if (before) say_consequences(before, now, meta);
    if (!meta->record)
        log_info(
            "changed since the checkpoint: it is of %s, which did not record the data's contents and the libraries: "
            "whether they are the same, and give the same bits, is not known",
            meta->version);
    return record_compare(meta->record, record, see_record, &look);
}

void changes_close(struct changes *changes)
{
    json_decref(changes->list);
    json_decref(changes->arithmetic);
    *changes = (struct changes){.list = NULL};
}
