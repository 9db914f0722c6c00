/* Options of a subcommand, from one table: what is parsed is what --help says. */
#ifndef TATARA_ARGS_H
#define TATARA_ARGS_H

#include <stdbool.h>
#include <stddef.h>

enum arg_kind {
    ARG_FLAG,
    ARG_TEXT,
    ARG_PATH, /* a text that names a file or a folder */
    ARG_INT,
    ARG_NUM,
    ARG_WORDS /* texts: the option may be repeated */
};

enum { ARG_WORDS_MAX = 32 };
struct arg_words {
    const char *word[ARG_WORDS_MAX];
    bool used[ARG_WORDS_MAX]; /* for whoever uses them */
    int n;
};

struct arg {
    const char *name;  /* without the dashes */
    const char *value; /* what its value is called in the help; NULL for a flag */
    enum arg_kind kind;
    void *out; /* bool, const char * (TEXT, PATH), int64_t, double or struct arg_words; holds the default before */
    double min, max; /* of a number */
    const char *help;
};

/* Reads "--name value", "--name=value" and flags; moves the other words, paths, to the front of argv, in order, and counts them.
 * "--" ends the options. ERR_USAGE names the option and what it would take, and `command`, whose --help says more. */
int args_parse(const struct arg *args, int n, const char *command, int argc, char **argv, int *words);
/* A line for each option, on stdout. */
void args_help(const struct arg *args, int n);

#endif
