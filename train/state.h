/* A training state in and out of checkpoints: says which tensor lies where, for a checkpoint that knows no models. */
#ifndef TATARA_STATE_H
#define TATARA_STATE_H

#include "ckpt/ckpt.h"
#include "step.h"

/* Saves weights and optimizer state of `step` with meta->step steps done. Collective. */
int state_save(struct step *step, const struct ckpt_run *run, const struct ckpt_meta *meta, int64_t keep);
/* Restores them from a verified checkpoint, written by any number of ranks at any ZeRO stage, and readies the weights of
 * all ranks. ERR_DATA when it is of another model. Collective. */
int state_load(struct step *step, const char *folder, const struct ckpt_meta *meta);
/* Reads only the weights, into a model laid out for sampling. Not collective. */
int state_load_weights(struct model *model, const char *folder, const struct ckpt_meta *meta);

#endif
