/* A configuration for a person to change: few options, each with a comment. No state, no threads. */
#include "config.h"

#include "config_table.h"
#include "err.h"

#include <stdlib.h>
#include <string.h>

#define COLUMNS 100
#define NOTE_COLUMN 30 /* where comments begin */

static const char *find_note(const struct option *option, const struct config_note *note, int notes)
{
    char name[OPTION_NAME_MAX];
    option_name(option, name);
    for (int i = 0; i < notes; i++) {
        if (strcmp(note[i].option, name) == 0) return note[i].text;
    }
    return NULL;
}

/* The note as a comment, from `column` of a line on; below it on lines of its own where one is too short. */
static void note_write(FILE *file, int column, const char *note)
{
    const size_t room = COLUMNS - NOTE_COLUMN - 2;
    while (*note != '\0') {
        size_t length = strlen(note);
        if (length > room) {
            for (length = room; length > 1 && note[length] != ' '; length--)
                ;
        }
        fprintf(file, "%*s# %.*s\n", column < NOTE_COLUMN ? NOTE_COLUMN - column : 1, "", (int)length, note);
        note += length + strspn(note + length, " ");
        column = 0;
    }
}

int config_to_noted_yaml(const struct config *cfg, const struct config_note *note, int notes, char **text)
{
    int rc = 0;
    size_t bytes = 0;
    const char *section = "";
    char *value = NULL, *usual = NULL;
    FILE *file = open_memstream(text, &bytes);
    struct config *defaults = calloc(1, sizeof *defaults);
    if (file == NULL || defaults == NULL) FAIL_GOTO(done, ERR_SYSTEM, "no memory to write the configuration");
    config_defaults(defaults);
    for (int i = 0; i < OPTION_COUNT; i++) {
        const struct option *option = option_at(i);
        const char *comment = find_note(option, note, notes);
        free(value);
        free(usual);
        value = option_text(option, cfg);
        usual = option_text(option, defaults);
        if (!value || !usual) FAIL_GOTO(done, ERR_SYSTEM, "no memory to write the configuration");
        if (comment == NULL && strcmp(value, usual) == 0) continue;
        const bool top = section_is_top(option->section);
        if (!top && strcmp(section, option->section) != 0) fprintf(file, "%s:\n", option->section);
        section = option->section;
        const char *indent = top ? "" : "  ";
        const bool beside = comment != NULL && strlen(value) < NOTE_COLUMN; /* a long value has its note above */
        if (comment != NULL && !beside) fprintf(file, "%s# %s\n", indent, comment);
        const int column = fprintf(file, "%s%s: %s", indent, option->key, value);
        if (beside) {
            note_write(file, column, comment);
        } else {
            fputc('\n', file);
        }
    }
done:
    free(value);
    free(usual);
    free(defaults);
    if (file != NULL && fclose(file) != 0 && rc == 0)
        rc = err_raise(ERR_SYSTEM, __FILE__, __LINE__, "no memory to write the configuration");
    if (rc != 0 && file != NULL) {
        free(*text);
        *text = NULL;
    }
    return rc;
}
