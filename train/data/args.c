/* Options of a subcommand (see args.h). */
#include "data/args.h"

#include "err.h"
#include "path.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int set_number(const struct arg *arg, const char *text)
{
    char *end = NULL;
    errno = 0;
    const int64_t whole = arg->kind == ARG_INT ? strtoll(text, &end, 10) : 0;
    const double number = arg->kind == ARG_INT ? (double)whole : strtod(text, &end);
    if (end == text || *end != '\0' || errno != 0 || !(number >= arg->min && number <= arg->max)) {
        FAIL(ERR_USAGE, "--%s takes a %snumber from %.10g to %.10g, not \"%s\"", arg->name,
             arg->kind == ARG_INT ? "whole " : "", arg->min, arg->max, text);
    }
    if (arg->kind == ARG_INT) {
        *(int64_t *)arg->out = whole;
    } else {
        *(double *)arg->out = number;
    }
    return 0;
}

static const struct arg *find_arg(const struct arg *args, int n, const char *word, size_t bytes)
{
    for (int i = 0; i < n; i++) {
        if (strlen(args[i].name) == bytes && strncmp(args[i].name, word, bytes) == 0) return &args[i];
    }
    return NULL;
}

int args_parse(const struct arg *args, int n, const char *command, int argc, char **argv, int *words)
{
    bool options = true;
    *words = 0;
    for (int i = 0; i < argc; i++) {
        if (!options || strncmp(argv[i], "--", 2) != 0) {
            TRY(path_check_word(NULL, argv[i]));
            argv[(*words)++] = argv[i];
            continue;
        }
        const char *word = argv[i] + 2;
        const char *equals = strchr(word, '=');
        if (*word == '\0') {
            options = false;
            continue;
        }
        const struct arg *arg = find_arg(args, n, word, equals ? (size_t)(equals - word) : strlen(word));
        if (!arg) FAIL(ERR_USAGE, "unknown option %s; see `tatara %s --help`", argv[i], command);
        if (arg->kind == ARG_FLAG) {
            if (equals) FAIL(ERR_USAGE, "--%s takes no value", arg->name);
            *(bool *)arg->out = true;
            continue;
        }
        if (!equals && i + 1 == argc) FAIL(ERR_USAGE, "--%s needs a value: %s", arg->name, arg->value);
        const char *value = equals ? equals + 1 : argv[++i];
        if (arg->kind == ARG_PATH) TRY(path_check_word(arg->name, value));
        if (arg->kind == ARG_TEXT || arg->kind == ARG_PATH) {
            *(const char **)arg->out = value;
        } else if (arg->kind == ARG_WORDS) {
            struct arg_words *all = arg->out;
            if (all->n == ARG_WORDS_MAX)
                FAIL(ERR_USAGE, "--%s is given more than %d times", arg->name, ARG_WORDS_MAX);
            all->word[all->n++] = value;
        } else {
            TRY(set_number(arg, value));
        }
    }
    return 0;
}

void args_help(const struct arg *args, int n)
{
    for (int i = 0; i < n; i++) {
        char name[64];
        (void)snprintf(name, sizeof name, "--%s%s%s", args[i].name, args[i].value ? " " : "",
                       args[i].value ? args[i].value : "");
        printf("  %-26s %s\n", name, args[i].help);
    }
}
