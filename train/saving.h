/* When a run saves, and what it says of it: periodic saves in the background, the last one, and going back to one. */
#ifndef TATARA_SAVING_H
#define TATARA_SAVING_H

#include "ckpt/ckpt.h"
#include "metrics.h"
#include "state.h"

struct saving {
    const struct config *cfg;
    struct comm *comm;
    struct step *step;
    struct metrics *metrics;
    struct ckpt_run folder;
    uint64_t tokenizer_id;
    struct state_saver *saver;
    struct ckpt_saver *ckpt; /* the saver's */
    int64_t saved;           /* the step of the newest checkpoint that this process wrote or read; −1: none */
    int64_t began_at;        /* the step that this process resumed at, and from which folder */
    char began_from[CKPT_PATH_MAX];
    int64_t started; /* the step of the save that was started last, when, and for how long it held training up */
    double started_s, stall_s;
    bool asked; /* for a save that has not begun, since another is under way */
};

/* The state with which a run without checkpoints begins: initial weights, or what
 * checkpoint.init_from and init_optimizer say. Collective. */
int saving_begin(struct saving *saving);
/* Takes the memory that saving needs; after the state is as the run begins with it. Not collective. */
int saving_open(struct saving *saving);
void saving_close(struct saving *saving);
/* Whether this rank's part of a save is under way: what the ranks tell each other at each step. Not collective. */
bool saving_busy(const struct saving *saving);
/* Moves the save under way on, if there is one and no rank is busy with it. Collective. */
void saving_advance(struct saving *saving, bool any_busy);
/* Whether saving_now is to be called after this step: the interval says so, or it was asked for and can be done. */
bool saving_wanted(const struct saving *saving, int64_t done);
/* Starts a save of `done` steps, whose outcome is settled; one that is under way is not waited for. A failure is a warning:
 * nothing that was saved before is lost. Collective. */
void saving_now(struct saving *saving, int64_t done);
/* Waits for the save under way, if any, and makes the last one, unless it is there. Collective. */
int saving_last(struct saving *saving, int64_t done);
/* Waits for the save under way, if any, after a failure that all ranks know of, which stays this thread's error. Collective. */
void saving_finish(struct saving *saving);
/* Goes back from the faulty step step->settled to the newest checkpoint that the interval made (not one that a request did,
 * so that a run which was stopped in between goes back just as far), else to where the run began. *done: the steps of
 * it. The batches from there up to the faulty step's are left out: step->batches_skipped. Collective. */
int saving_rewind(struct saving *saving, int64_t *done);

#endif
