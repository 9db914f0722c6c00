/* The configuration as text: YAML, the summary at the start of a run, the reference of options. No state, no threads. */
#include "config.h"

#include "config_table.h"
#include "err.h"
#include "log.h"

#include <stdlib.h>
#include <string.h>

#define COLUMNS 100        /* of what is printed for a person */
#define SUMMARY_DATASETS 4 /* entries of a mixture that the summary names; the rest are counted */
#define SUMMARY_ITEM_MAX 4096

int config_to_yaml(const struct config *cfg, char **text)
{
    size_t bytes = 0;
    *text = NULL;
    FILE *file = open_memstream(text, &bytes);
    if (file == NULL) FAIL(ERR_SYSTEM, "no memory to write the configuration");
    for (int s = 0; s < SECTION_COUNT; s++) {
        const char *section = section_at(s)->name;
        const bool top = section_is_top(section);
        if (!top) fprintf(file, "%s:\n", section);
        for (int i = 0; i < OPTION_COUNT; i++) {
            if (strcmp(option_at(i)->section, section) != 0) continue;
            fprintf(file, "%s%s: ", top ? "" : "  ", option_at(i)->key);
            option_write(file, option_at(i), cfg);
            fputc('\n', file);
        }
    }
    if (fclose(file) != 0) {
        free(*text);
        *text = NULL;
        FAIL(ERR_SYSTEM, "no memory to write the configuration");
    }
    return 0;
}

/* A paragraph with a hanging indent: words are added, lines broken before COLUMNS. */
struct paragraph {
    FILE *file;
    size_t indent, column;
};

static void paragraph_add(struct paragraph *p, const char *word, size_t length)
{
    if (p->column > p->indent && p->column + 1 + length > COLUMNS) {
        fprintf(p->file, "\n%*s", (int)p->indent, "");
        p->column = p->indent;
    }
    const bool spaced = p->column > p->indent;
    fprintf(p->file, "%s%.*s", spaced ? " " : "", (int)length, word);
    p->column += length + (spaced ? 1 : 0);
}

static void paragraph_add_text(struct paragraph *p, const char *text)
{
    for (const char *at = text; *at != '\0';) {
        const size_t length = strcspn(at, " ");
        paragraph_add(p, at, length);
        at += length + strspn(at + length, " ");
    }
}

/* The first entries of a list of datasets, with their shares in percent where the weights differ. */
static void mixture_write(FILE *file, const struct dataset_list *list)
{
    double total = 0;
    bool even = true;
    for (int i = 0; i < list->n; i++) {
        total += list->entry[i].weight;
        even = even && list->entry[i].weight == list->entry[0].weight;
    }
    for (int i = 0; i < list->n && i < SUMMARY_DATASETS; i++) {
        const struct dataset_entry *entry = &list->entry[i];
        fprintf(file, "%s%s", i == 0 ? "" : ",", entry->path);
        if (!even) fprintf(file, ":%.3g%%", 100 * entry->weight / total);
    }
    if (list->n == 0) fputs("none", file);
    if (list->n > SUMMARY_DATASETS) fprintf(file, ",and-%d-more", list->n - SUMMARY_DATASETS);
}

static void summary_add(struct paragraph *p, const struct option *option, const struct config *cfg)
{
    char item[SUMMARY_ITEM_MAX] = "";
    FILE *file = fmemopen(item, sizeof item, "w");
    if (file == NULL) return;
    fprintf(file, "%s=", option->key);
    if (option->kind == OPTION_DATASETS) {
        mixture_write(file, option_value_const(option, cfg));
    } else if (option->kind == OPTION_STR) {
        const char *text = option_value_const(option, cfg);
        fputs(text[0] ? text : "none", file);
    } else {
        option_write(file, option, cfg);
    }
    fclose(file);
    paragraph_add(p, item, strlen(item));
}

void config_print(FILE *file, const struct config *cfg)
{
    for (int s = 0; s < SECTION_COUNT; s++) {
        const char *section = section_at(s)->name;
        struct paragraph p = {.file = file, .indent = 12, .column = 12};
        fprintf(file, "%-12s", section_is_top(section) ? "" : section);
        for (int i = 0; i < OPTION_COUNT; i++) {
            if (strcmp(option_at(i)->section, section) == 0) summary_add(&p, option_at(i), cfg);
        }
        fputc('\n', file);
    }
}

static void option_help(const struct option *option, const struct config *defaults)
{
    char name[OPTION_NAME_MAX], allowed[OPTION_ALLOWED_MAX];
    option_name(option, name);
    option_allowed(option, allowed);
    struct paragraph p = {.file = stdout, .indent = 6, .column = 6};
    printf("  %-26s %s; default ", name, allowed);
    option_write(stdout, option, defaults);
    printf("\n      ");
    paragraph_add_text(&p, option->help);
    if (option->change.kind == CHANGE_FUNCTION)
        paragraph_add_text(&p, "(another value at a resume: only with run.allow_changes)");
    if (option->change.kind == CHANGE_COURSE) {
        paragraph_add_text(&p, "(another value at a resume changes:");
        paragraph_add_text(&p, option->change.effect);
        printf(")");
    }
    putchar('\n');
}

void config_help(void)
{
    struct config *defaults = malloc(sizeof *defaults);
    if (defaults == NULL) {
        log_error("no memory for the reference of options");
        return;
    }
    config_defaults(defaults);
    printf("Options of a configuration: `section: {key: value}` in the YAML file, or section.key=value on\n"
           "the command line, which is read after it. Unknown keys and values out of range are refused.\n"
           "A relative path is relative to the folder in which the program is started, not to the file's; ~ and\n"
           "~/ at the start of a path stand for the home folder.\n");
    for (int s = 0; s < SECTION_COUNT; s++) {
        const struct section *section = section_at(s);
        printf("\n%s: %s\n", section_is_top(section->name) ? "(no section)" : section->name, section->help);
        for (int i = 0; i < OPTION_COUNT; i++) {
            if (strcmp(option_at(i)->section, section->name) == 0) option_help(option_at(i), defaults);
        }
    }
    free(defaults);
}
