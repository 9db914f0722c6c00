/* Where a start begins: at step 0, or from which checkpoint. */
#ifndef TATARA_START_H
#define TATARA_START_H

#include "changes.h"
#include "saving.h"

/* What the rule goes by. */
enum start_resume { RESUME_AUTO, RESUME_NEVER, RESUME_FOLDER };
struct start_facts {
    enum start_resume resume;
    bool own;       /* run.dir holds checkpoints that verify */
    bool same_job;  /* the attempt before was one of this job or chain */
    bool offspring; /* RESUME_FOLDER: the newest of run.dir came of the same checkpoint.resume */
    bool inside;    /* RESUME_FOLDER: it lies in run.dir */
    bool latest;    /* RESUME_FOLDER: no checkpoint that verifies there is newer */
    bool there;     /* RESUME_FOLDER: it exists */
};
enum start { START_ANEW, START_NEWEST, START_FOLDER, START_REFUSED };
/* The rule, of which start.c's head has the table. */
enum start start_choose(const struct start_facts *facts);

/* How a run begins. */
struct start_outcome {
    int64_t done;  /* steps */
    int attention; /* that the run began with; 0, auto: none yet */
    bool resumed;
    struct changes changes; /* since the checkpoint; empty when it starts anew */
};
/* Finds the checkpoint, compares it with the configuration and loads it, or gives the run its initial state. `saving` has its
 * folder, tokenizer_id, vocab_size and record. Collective. */
int start_begin(struct saving *saving, struct start_outcome *outcome);

#endif
