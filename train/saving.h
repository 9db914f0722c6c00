/* When a run saves, and what it says of it: periodic saves in the background, the last one, and going back to one. */
#ifndef TATARA_SAVING_H
#define TATARA_SAVING_H

#include "ckpt/ckpt.h"
#include "metrics.h"
#include "state.h"

/* Where a rewind leaves out batches: when the run is at this step, struct step's fields become these. */
struct saving_jump {
    int64_t step, batches_skipped, faults;
};

struct saving {
    const struct config *cfg;
    struct comm *comm;
    struct step *step;
    struct metrics *metrics;
    struct ckpt_run folder;
    uint64_t tokenizer_id;
    int64_t bos, eos; /* as in struct ckpt_meta */
    int64_t vocab_size;
    const char *record; /* of this start (record.h) */
    char *tokenizer;    /* its model, which goes into each checkpoint, on rank 0; owned */
    size_t tokenizer_bytes;
    struct state_saver *saver;
    struct ckpt_saver *ckpt;   /* the saver's */
    int64_t saved;             /* the step of the newest checkpoint that this process wrote or read; −1: none */
    int64_t began;             /* as in struct ckpt_meta */
    struct saving_jump *jumps; /* of this process's rewinds, by step; owned */
    int n_jumps;
    int64_t started; /* the step of the save that was started last, when, and for how long it held training up */
    double started_s, stall_s;
    bool asked; /* for a save that has not begun, since another is under way */
};

/* After a checkpoint has been loaded: what saving must know of it. own: it lies in run.dir. `before`: its configuration; NULL
 * where that is not known, or where the run goes another course from here on. */
void saving_resume(struct saving *saving, bool own, const struct ckpt_meta *meta, const struct config *before);
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
/* Goes back, since step step->settled is faulty, and leaves out the batches from step D up to the faulty one's. D is the
 * newest multiple of checkpoint.every that is not after the fault, whether or not it was saved: what is trained does not
 * depend on saves that were skipped or failed, nor on when the run was stopped and resumed. The newest checkpoint of such
 * a multiple is loaded, or the run begins anew; it comes to D (from step *done) by the same batches as before, and there
 * saving_jump leaves out the others. A checkpoint on request is of no use: batches that led to it may be left out by now.
 *
 * A run that resumed from another folder, on another course, with another checkpoint.every, or from an attempt that did not rewind may lack
 * older checkpoints: it goes back no further than to there (struct ckpt_meta's `began`), and ends with ERR_DATA when that
 * checkpoint is gone. The metrics' "rewind" event: step D, fault_step, and batches_skipped from D on. Collective. */
int saving_rewind(struct saving *saving, int64_t *done);
/* Whether a rewind leaves out batches here, and step->batches_skipped is another now. After a step's save: a checkpoint is
 * of before the jump, and a run that resumes from it meets the same fault. Not collective. */
bool saving_jump(struct saving *saving, int64_t done);

#endif
