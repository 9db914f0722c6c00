/* A training state in and out of checkpoints: says which tensor lies where, for a checkpoint that knows no models. */
#ifndef TATARA_STATE_H
#define TATARA_STATE_H

#include "ckpt/ckpt.h"
#include "step.h"

/* The bytes that a checkpoint takes, all ranks together: a little more than it will be. */
int64_t state_bytes(const struct params *params);

/* Saves the training state, in the background where a copy of it fits (checkpoint.async). */
struct state_saver;
/* Takes the memory for a copy on a GPU; on a CPU step_layout has taken it. Not collective. */
int state_saver_open(struct state_saver **saver, struct step *step, const struct ckpt_run *run);
/* Starts a save of weights and optimizer state with meta->step steps done. Collective. */
int state_save_start(struct state_saver *saver, const struct ckpt_meta *meta, struct ckpt_keep keep);
/* For ckpt_save_busy, _ready, _advance and _wait. */
struct ckpt_saver *state_saver_ckpt(struct state_saver *saver);
/* Seconds that updates, with nothing else to wait for, have waited for the copy since the last call. */
double state_saver_take_wait_s(struct state_saver *saver);
void state_saver_close(struct state_saver *saver);
/* ERR_DATA when the checkpoint is of another model. Not collective. */
int state_check_model(const struct params *params, const char *folder, const struct ckpt_meta *meta);
/* Restores them from a verified checkpoint, written by any number of ranks at any ZeRO stage, and readies the weights of
 * all ranks. ERR_DATA when it is of another model. Collective. */
int state_load(struct step *step, const char *folder, const struct ckpt_meta *meta);
/* Begins another run, at step 0, with the weights of a verified checkpoint and, when asked, its optimizer state: both
 * moments, how many steps they have seen, and the norm of the last gradient, from which the next scale follows; else the
 * moments are zero. Collective. */
int state_begin_from(struct step *step, const char *folder, const struct ckpt_meta *meta, bool optimizer);
/* Reads only the weights, into a model laid out for sampling. Not collective. */
int state_load_weights(struct model *model, const char *folder, const struct ckpt_meta *meta);

#endif
