/* The work of one rank of `tatara prepare`: groups of parts of files become shards. */
#ifndef TATARA_PREPARE_WORK_H
#define TATARA_PREPARE_WORK_H

#include "data/drops.h"
#include "data/output.h"
#include "data/source.h"
#include "data/tokenizer.h"

/* What was read and written; every field is summed over the ranks as a whole number. */
struct prepare_counts {
    int64_t documents[2], tokens[2], text_bytes[2], shards[2]; /* of training, of the held-out part */
    int64_t dropped[DROPS];
    int64_t found[FIELDS]; /* JSON objects that have the field */
    struct fidelity fidelity;
};

struct prepare_work {
    struct source_list *list; /* divided */
    struct tokenizer *tokenizer;
    struct document_rules rules;
    const struct output *outputs; /* [2]: of training, of the held-out part */
    double valid_fraction;        /* 0: nothing is held out */
    int64_t shard_tokens;         /* a shard ends before the document that would make it larger */
    uint64_t group_bytes;         /* of text: a group ends with the part that reaches it */
    int threads, rank, ranks;
    struct prepare_counts counts;
    struct drop_first first[DROPS];
    int64_t *unit_lines; /* [units] of the list, 0 for those of other ranks */
};

/* Turns the groups of this rank into shards, counting into work->counts. Not collective; stops early, with success, when
 * another rank has left OUTPUT_FAILED. Ranks take groups in turn. */
int prepare_run(struct prepare_work *work);

#endif
