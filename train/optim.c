/* Learning rate, clipping, and the AdamW update of a rank's part. */
#include "optim.h"

#include "err.h"

#include <math.h>

/* Decay from 1 at x = 0 to 0 at x = 1. */
static double decay_at(enum decay_shape shape, double x)
{
    static const double pi = 3.14159265358979323846;
    switch (shape) {
    case DECAY_LINEAR:
        return 1 - x;
    case DECAY_COSINE:
        return 0.5 * (1 + cos(pi * x));
    case DECAY_1_SQRT:
    default:
        return 1 - sqrt(x);
    }
}

double optim_lr(const struct config *cfg, int64_t step)
{
    const struct config_optim *o = &cfg->optim;
    if (step < o->warmup_steps) return o->lr * (double)(step + 1) / (double)o->warmup_steps;
    if (o->schedule == SCHEDULE_CONSTANT) return o->lr;
    const bool wsd = o->schedule == SCHEDULE_WSD;
    const int64_t begin = wsd ? cfg->run.steps - o->decay_steps : o->warmup_steps;
    const int64_t steps = cfg->run.steps - begin;
    if (step < begin || steps <= 0) return o->lr;
    const enum decay_shape shape = wsd                              ? (enum decay_shape)o->decay_shape
                                   : o->schedule == SCHEDULE_COSINE ? DECAY_COSINE
                                                                    : DECAY_LINEAR;
    const double x = (double)(step - begin + 1) / (double)steps;
    return o->min_lr + (o->lr - o->min_lr) * decay_at(shape, x < 1 ? x : 1);
}

/* Updates the elements that neighbouring parameters, from `first` to `last`, have in this rank's part [begin, begin + n) of
 * their unit. Padding between them has no gradient and stays zero. */
static int update_run(struct zero *z, const struct param *first, const struct param *last, int64_t begin, int64_t n,
                      struct tensor gradient, struct adamw_args args)
{
    const int unit = first->unit;
    const int64_t stop = last->offset + last->elems, end = begin + n;
    const int64_t from = first->offset > begin ? first->offset : begin, to = stop < end ? stop : end;
    if (from >= to) return 0;
    const int64_t at = from - begin, elems = to - from;
    if (!first->decay) args.weight_decay = 0;
    return op_adamw(z->dev, tensor_range(z->weights[unit], from, elems), tensor_range(z->master[unit], at, elems),
                    tensor_range(z->m[unit], at, elems), tensor_range(z->v[unit], at, elems),
                    tensor_range(gradient, at, elems), z->control, args);
}

int optim_update(struct zero *z, const struct config *cfg, int64_t step, int64_t seen)
{
    const struct config_optim *o = &cfg->optim;
    const struct adamw_args args = {.lr = optim_lr(cfg, step),
                                    .beta1 = o->beta1,
                                    .beta2 = o->beta2,
                                    .eps = o->eps,
                                    .weight_decay = o->weight_decay,
                                    .bias1 = 1 - pow(o->beta1, (double)(seen + 1)),
                                    .bias2 = 1 - pow(o->beta2, (double)(seen + 1))};
    for (int u = 0; u < z->params->n_units; u++) {
        const struct unit *unit = &z->params->unit[u];
        struct tensor gradient = TENSOR_NONE;
        int64_t begin = 0, n = 0;
        zero_part(z, u, &begin, &n);
        TRY(zero_gradient(z, u, &gradient));
        const struct param *param = &z->params->param[unit->first], *const end = param + unit->count;
        while (param < end) {
            const struct param *const first = param;
            while (param < end && param->decay == first->decay)
                param++;
            TRY(update_run(z, first, param - 1, begin, n, gradient, args));
        }
        if (z->stage > 0) TRY(comm_all_gather_start(z->comm, z->weights[u], u));
    }
    return 0;
}
