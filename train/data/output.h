/* The folder that `tatara prepare` writes: made under another name, then renamed, so that it is whole or not there.
 *
 * A folder of the user's is never touched: what is there must be empty, or, to be replaced, hold only what prepare
 * itself writes. Called by rank 0. */
#ifndef TATARA_OUTPUT_H
#define TATARA_OUTPUT_H

#include <stdbool.h>

#include <jansson.h>

/* Ranks that fail leave this in the unfinished folder, for the others to stop. */
#define OUTPUT_FAILED "FAILED"

struct output {
    char *final, *partial; /* the folder, and where it is made */
    bool begun;
};

/* Names the folders, links followed. Called by all ranks. */
int output_name(struct output *output, const char *folder);
/* ERR_USAGE when both are one folder, however they are written, or one lies in the other. Called by all ranks. */
int output_check_apart(const struct output *out, const struct output *valid);
/* ERR_USAGE when something is in the folder that may not be replaced. */
int output_check(const struct output *output, bool overwrite);
/* Makes the unfinished folder, after removing what a killed run left of it. */
int output_begin(struct output *output);
/* Writes the dataset's list, with report in it, and gives the folder its name. */
int output_commit(struct output *output, json_t *report);
/* Removes what is unfinished, if anything is. */
void output_discard(struct output *output);
void output_free(struct output *output);

#endif
