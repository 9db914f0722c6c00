/* The options as a table, made from options.def; for train/config*.c only. */
#ifndef TATARA_CONFIG_TABLE_H
#define TATARA_CONFIG_TABLE_H

#include "config.h"

#include <stdio.h>

enum option_kind { OPTION_INT, OPTION_NUM, OPTION_BOOL, OPTION_STR, OPTION_CHOICE, OPTION_DATASETS };

/* What it does to a run when the value is another at a resume than in the checkpoint. */
struct option_change {
    enum config_change kind;
    const char *effect; /* for a person; "" when it is harmless */
};

struct option {
    const char *section, *key;
    enum option_kind kind;
    bool is_path;  /* of a STR */
    size_t offset; /* in struct config */
    int64_t int_default, int_min, int_max;
    double num_default, num_min, num_max;
    const char *text; /* STR: the default; CHOICE: the words with bars between */
    const char *unit, *help;
    struct option_change change;
};

struct section {
    const char *name, *help;
};

enum {
    OPTION_COUNT = 0
#define INT(section, key, def, min, max, unit, change, help) +1
#define NUM(section, key, def, min, max, unit, change, help) +1
#define BOOL(section, key, def, change, help) +1
#define STR(section, key, def, change, help) +1
#define CHOICE(section, key, def, choices, change, help) +1
#define DATASETS(section, key, change, help) +1
#include "options.def"
    ,
    SECTION_COUNT = 0
#define SECTION(name, help) +1
#include "options.def"
};

#define OPTION_NAME_MAX 64
#define OPTION_ALLOWED_MAX 256

/* The tables, in the order of options.def. */
const struct option *option_at(int i);
const struct section *section_at(int i);
/* The option of that section and key, NULL when there is none. The section of `device` is "top". */
const struct option *option_find(const char *section, const char *key);
/* "optim.lr"; "device" for one of the section top. */
void option_name(const struct option *option, char name[OPTION_NAME_MAX]);
/* Whether the options of this section stand in the document itself. */
bool section_is_top(const char *section);

/* Where the option's value lies. */
void *option_value(const struct option *option, struct config *cfg);
const void *option_value_const(const struct option *option, const struct config *cfg);
/* The value of a number, INT or NUM, as a double. */
double option_number(const struct option *option, const struct config *cfg);

/* The i-th word of a CHOICE, false when there is none. */
bool choice_word(const struct option *option, int i, char word[OPTION_NAME_MAX]);

/* What may stand for the option, for a person: "a whole number from 1 to 1024", "one of llama, gpt2". */
void option_allowed(const struct option *option, char allowed[OPTION_ALLOWED_MAX]);
/* Writes the option's value as a YAML scalar, or as a flow sequence for DATASETS; it reads back to the same bits. */
void option_write(FILE *file, const struct option *option, const struct config *cfg);
/* The same in memory; the caller frees it. NULL: no memory. */
char *option_text(const struct option *option, const struct config *cfg);

#endif
