/* The optimizer: learning-rate schedules, clipping and AdamW over a rank's part of the parameters. */
#ifndef TATARA_OPTIM_H
#define TATARA_OPTIM_H

#include "parallel/zero.h"

/* The learning rate of a step, counted from 0. Warm-up is linear: step 0 gets lr/warmup_steps. wsd is
 * warm-up–stable–decay (Hu et al. 2024); its 1-sqrt cool-down is that of Hägele et al. 2024. */
double optim_lr(const struct config *cfg, int64_t step);
/* Applies the reduced gradient as update number `step` (from 0), clipped to cfg->optim.clip as PyTorch's clip_grad_norm_
 * does, unless the step has a fault, and starts gathering the new weights on all ranks. seen: the steps that AdamW's
 * moments have seen before this one, which its bias correction counts. Collective. */
int optim_update(struct zero *zero, const struct config *cfg, int64_t step, int64_t seen);

#endif
