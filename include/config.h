/* The configuration of a run: a plain struct made from options.def.
 *
 * Read from YAML and key=value words by config_load, which refuses what options.def does not allow and names file, line
 * and key. A struct config has no pointers, so it may be copied and broadcast as bytes. It is large: keep it on the
 * heap. */
#ifndef TATARA_CONFIG_H
#define TATARA_CONFIG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#define CONFIG_TEXT_MAX 512
#define CONFIG_DATASETS_MAX 256

struct dataset_entry {
    char path[CONFIG_TEXT_MAX];
    double weight; /* relative; 1 when not given */
};

struct dataset_list {
    int n;
    struct dataset_entry entry[CONFIG_DATASETS_MAX];
};

/* The values of the CHOICE options, in the order of their words. */
enum arch { ARCH_LLAMA, ARCH_GPT2 };
enum recompute { RECOMPUTE_NONE, RECOMPUTE_ELEMENTWISE, RECOMPUTE_ATTENTION, RECOMPUTE_BLOCK };
enum schedule { SCHEDULE_WSD, SCHEDULE_COSINE, SCHEDULE_LINEAR, SCHEDULE_CONSTANT };
enum decay_shape { DECAY_1_SQRT, DECAY_LINEAR, DECAY_COSINE };
enum compute { COMPUTE_BF16, COMPUTE_FP32 };
enum reduce { REDUCE_EXACT, REDUCE_FAST };
enum on_fault { ON_FAULT_STOP, ON_FAULT_SKIP, ON_FAULT_REWIND };
enum device_choice { CHOOSE_AUTO, CHOOSE_CPU, CHOOSE_CUDA };

/* What another value at a resume does (options.def has the meanings). */
enum config_change { CHANGE_HARMLESS, CHANGE_COURSE, CHANGE_FUNCTION };

#define SECTION(name, help) struct config_##name {
#define INT(section, key, def, min, max, unit, change, help) int64_t key;
#define NUM(section, key, def, min, max, unit, change, help) double key;
#define BOOL(section, key, def, change, help) bool key;
#define STR(section, key, def, change, help) char key[CONFIG_TEXT_MAX];
#define CHOICE(section, key, def, choices, change, help) int key;
#define DATASETS(section, key, change, help) struct dataset_list key;
/* clang-format off */
#define SECTION_END(name) };
/* clang-format on */
#include "options.def"

struct config {
#define SECTION(name, help) struct config_##name name;
#include "options.def"
};

/* Fills cfg with the defaults. */
void config_defaults(struct config *cfg);
/* Defaults, then the YAML file, then the key=value words ("optim.lr=1e-4", "batch.global=8", "device=cpu",
 * "data.train=[{path: shards/a}]": the value is YAML), then config_check. ERR_CONFIG with file, line, key and what
 * would be allowed; for a near miss, the key that was probably meant. Not collective: rank 0 calls it. */
int config_load(struct config *cfg, const char *path, int words, char *const *word);
/* The same from YAML text in memory; `name` stands for the file in messages (a checkpoint's stored configuration). */
int config_parse(struct config *cfg, const char *name, const char *text, size_t bytes);
/* Combinations that no single option's range excludes. */
int config_check(const struct config *cfg);
/* What only training needs: something to train on. ERR_CONFIG. */
int config_check_for_training(const struct config *cfg);
/* Whether a fault may make the run go back to a checkpoint. */
bool config_rewinds(const struct config *cfg);
/* The whole effective configuration as YAML that config_parse reads back to the same bits. The caller frees *text. */
int config_to_yaml(const struct config *cfg, char **text);
/* An option whose value differs between two configurations. The texts are valid during the call only. */
struct config_difference {
    const char *name; /* "optim.lr" */
    enum config_change change;
    const char *effect;       /* for a person; "" when the change is harmless */
    const char *before, *now; /* the values as YAML */
};
/* Calls `each` for every option that differs, in the order of options.def, until it fails. */
int config_compare(const struct config *before, const struct config *now,
                   int (*each)(void *context, const struct config_difference *difference), void *context);
/* run.allow_changes names only keys of CHANGE_FUNCTION. ERR_CONFIG. */
int config_check_allowed(const struct config *cfg);
/* Whether run.allow_changes names this key. */
bool config_allows(const struct config *cfg, const char *name);
/* A comment for an option. */
struct config_note {
    const char *option; /* "optim.lr" */
    char text[400];
};
/* The options that differ from their defaults and those that have a note, as YAML for a person to change, each note as a
 * comment beside its value. The caller frees *text. */
int config_to_noted_yaml(const struct config *cfg, const struct config_note *note, int notes, char **text);
/* Prints the effective configuration compactly, a paragraph a section, in the form of key=value words. */
void config_print(FILE *file, const struct config *cfg);
/* One log_warn for each hyper-parameter outside the range of known training recipes, saying the range and who used it.
 * Returns how many. */
int config_warn_recipes(const struct config *cfg);
/* The reference of every option, on stdout. */
void config_help(void);

#endif
