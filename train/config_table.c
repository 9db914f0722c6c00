/* The table of options, and what can be done with a row without knowing which one it is. No state, no threads. */
#include "config_table.h"

#include "utf8.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define NUMBER_MAX 40 /* bytes of a double as text */
#define WHOLE_MAX 1e9 /* below it whole doubles are written without an exponent */

/* What a change at a resume does, as the column of that name says it. */
#define HARMLESS            \
    {                       \
        CHANGE_HARMLESS, "" \
    }
#define COURSE(what)          \
    {                         \
        CHANGE_COURSE, (what) \
    }
#define FUNCTION                                              \
    {                                                         \
        CHANGE_FUNCTION, "the same weights are another model" \
    }

static const struct option options[OPTION_COUNT] = {
#define ROW(sec, name, type) \
    .section = #sec, .key = #name, .kind = (type), .offset = offsetof(struct config, sec.name)
#define INT(sec, name, def, min, max, of, effect, what)                                                  \
    {ROW(sec, name, OPTION_INT), .int_default = (def), .int_min = (min), .int_max = (max), .unit = (of), \
     .change = effect,           .help = (what)},
#define NUM(sec, name, def, min, max, of, effect, what)                                                  \
    {ROW(sec, name, OPTION_NUM), .num_default = (def), .num_min = (min), .num_max = (max), .unit = (of), \
     .change = effect,           .help = (what)},
#define BOOL(sec, name, def, effect, what) \
    {ROW(sec, name, OPTION_BOOL), .int_default = (def), .unit = "", .change = effect, .help = (what)},
#define STR(sec, name, def, effect, what) \
    {ROW(sec, name, OPTION_STR), .text = (def), .unit = "", .change = effect, .help = (what)},
#define PATH(sec, name, def, effect, what) \
    {ROW(sec, name, OPTION_STR), .text = (def), .is_path = true, .unit = "", .change = effect, .help = (what)},
#define CHOICE(sec, name, def, words, effect, what) \
    {ROW(sec, name, OPTION_CHOICE),                 \
     .int_default = (def),                          \
     .text = (words),                               \
     .unit = "",                                    \
     .change = effect,                              \
     .help = (what)},
#define DATASETS(sec, name, effect, what) \
    {ROW(sec, name, OPTION_DATASETS), .unit = "", .change = effect, .help = (what)},
#include "options.def"
};

static const struct section sections[SECTION_COUNT] = {
#define SECTION(title, what) {.name = #title, .help = (what)},
#include "options.def"
};

const struct option *option_at(int i)
{
    return &options[i];
}

const struct section *section_at(int i)
{
    return &sections[i];
}

bool section_is_top(const char *section)
{
    return strcmp(section, "top") == 0;
}

const struct option *option_find(const char *section, const char *key)
{
    for (int i = 0; i < OPTION_COUNT; i++) {
        if (strcmp(options[i].section, section) == 0 && strcmp(options[i].key, key) == 0) return &options[i];
    }
    return NULL;
}

void option_name(const struct option *option, char name[OPTION_NAME_MAX])
{
    const bool top = section_is_top(option->section);
    snprintf(name, OPTION_NAME_MAX, "%s%s%s", top ? "" : option->section, top ? "" : ".", option->key);
}

void *option_value(const struct option *option, struct config *cfg)
{
    return (char *)cfg + option->offset;
}

const void *option_value_const(const struct option *option, const struct config *cfg)
{
    return (const char *)cfg + option->offset;
}

double option_number(const struct option *option, const struct config *cfg)
{
    const void *value = option_value_const(option, cfg);
    return option->kind == OPTION_NUM ? *(const double *)value : (double)*(const int64_t *)value;
}

bool choice_word(const struct option *option, int i, char word[OPTION_NAME_MAX])
{
    const char *at = option->text;
    for (; i > 0 && at != NULL; i--) {
        at = strchr(at, '|');
        if (at != NULL) at++;
    }
    if (at == NULL) return false;
    snprintf(word, OPTION_NAME_MAX, "%.*s", (int)strcspn(at, "|"), at);
    return true;
}

/* A whole number as such, else the fewest digits that read back to the same double. An exponent gets a mantissa with a point, since without one YAML
 * 1.1 readers such as PyYAML take the number for text. */
static void number_text(char text[NUMBER_MAX], double value)
{
    char digits[NUMBER_MAX - 2];
    if (fabs(value) < WHOLE_MAX && value == nearbyint(value)) {
        snprintf(text, NUMBER_MAX, "%.0f", value);
        return;
    }
    for (int precision = 1; precision <= 17; precision++) {
        snprintf(digits, sizeof digits, "%.*g", precision, value);
        if (strtod(digits, NULL) == value) break;
    }
    const size_t mantissa = strcspn(digits, "e");
    const bool needs_point = digits[mantissa] == 'e' && strchr(digits, '.') == NULL;
    snprintf(text, NUMBER_MAX, "%.*s%s%s", (int)mantissa, digits, needs_point ? ".0" : "", digits + mantissa);
}

static void number_write(FILE *file, double value)
{
    char text[NUMBER_MAX];
    number_text(text, value);
    fputs(text, file);
}

/* A double-quoted YAML scalar. */
static void text_write(FILE *file, const char *text)
{
    const bool sound = utf8_valid_bytes(text, strlen(text)) == strlen(text);
    fputs(sound ? "\"" : "!bytes \"", file);
    for (; *text != '\0'; text++) {
        const unsigned char c = (unsigned char)*text;
        if (!sound && (c >= 0x7f || c < 0x20 || c == '%')) {
            fprintf(file, "%%%02X", c);
        } else if (c < 0x20 || c == 0x7f) {
            fprintf(file, "\\x%02X", c);
        } else {
            if (c == '"' || c == '\\') fputc('\\', file);
            fputc(c, file);
        }
    }
    fputc('"', file);
}

static void datasets_write(FILE *file, const struct dataset_list *list)
{
    fputc('[', file);
    for (int i = 0; i < list->n; i++) {
        fputs(i == 0 ? "{path: " : ", {path: ", file);
        text_write(file, list->entry[i].path);
        fputs(", weight: ", file);
        number_write(file, list->entry[i].weight);
        fputc('}', file);
    }
    fputc(']', file);
}

static void choice_write(FILE *file, const struct option *option, int64_t i)
{
    char word[OPTION_NAME_MAX];
    fputs(choice_word(option, (int)i, word) ? word : "?", file);
}

void option_write(FILE *file, const struct option *option, const struct config *cfg)
{
    const void *value = option_value_const(option, cfg);
    switch (option->kind) {
    case OPTION_INT:
        fprintf(file, "%lld", (long long)*(const int64_t *)value);
        break;
    case OPTION_NUM:
        number_write(file, *(const double *)value);
        break;
    case OPTION_BOOL:
        fputs(*(const bool *)value ? "true" : "false", file);
        break;
    case OPTION_STR:
        text_write(file, value);
        break;
    case OPTION_CHOICE:
        choice_write(file, option, *(const int *)value);
        break;
    case OPTION_DATASETS:
        datasets_write(file, value);
        break;
    }
}

char *option_text(const struct option *option, const struct config *cfg)
{
    char *text = NULL;
    size_t bytes = 0;
    FILE *file = open_memstream(&text, &bytes);
    if (file == NULL) return NULL;
    option_write(file, option, cfg);
    if (fclose(file) == 0) return text;
    free(text);
    return NULL;
}

void option_allowed(const struct option *option, char allowed[OPTION_ALLOWED_MAX])
{
    const char *of = option->unit[0] ? " of " : "";
    char low[NUMBER_MAX], high[NUMBER_MAX];
    size_t used = 0;
    switch (option->kind) {
    case OPTION_INT:
        used = (size_t)snprintf(allowed, OPTION_ALLOWED_MAX, "a whole number%s%s from %lld", of, option->unit,
                                (long long)option->int_min);
        if (option->int_max == INT64_MAX) break;
        snprintf(allowed + used, OPTION_ALLOWED_MAX - used, " to %lld", (long long)option->int_max);
        break;
    case OPTION_NUM:
        number_text(low, option->num_min);
        number_text(high, option->num_max);
        snprintf(allowed, OPTION_ALLOWED_MAX, "a number%s%s from %s to %s", of, option->unit, low, high);
        break;
    case OPTION_BOOL:
        snprintf(allowed, OPTION_ALLOWED_MAX, "true or false");
        break;
    case OPTION_STR:
        snprintf(allowed, OPTION_ALLOWED_MAX, "%s of at most %d bytes", option->is_path ? "a path" : "text",
                 CONFIG_TEXT_MAX - 1);
        break;
    case OPTION_CHOICE:
        snprintf(allowed, OPTION_ALLOWED_MAX, "one of ");
        for (const char *at = option->text; *at != '\0'; at++) {
            used = strlen(allowed);
            snprintf(allowed + used, OPTION_ALLOWED_MAX - used, *at == '|' ? ", " : "%c", *at);
        }
        break;
    case OPTION_DATASETS:
        snprintf(allowed, OPTION_ALLOWED_MAX, "a list of at most %d, such as [{path: a, weight: 1}]",
                 CONFIG_DATASETS_MAX);
        break;
    }
}
