/* Data parallelism: accumulation, reduction and the division of optimizer state. See zero.h. */
#include "parallel/zero.h"

#include "err.h"

#include <math.h>
#include <stdlib.h>

/* An element of one micro-batch stays exact as a double up to here. */
#define SCALE_ELEMENT_BITS 52
/* Initial weights are made in pieces of so many, because the buffer that they pass through is in no plan. */
#define INIT_ELEMS ((int64_t)1 << 18)

/* The largest element of one micro-batch, in quanta, with which no sum over the step can leave 63 bits, nor leave what a
 * double holds exactly. */
static double element_limit(const struct zero *z)
{
    const double sum_bits = 62 - ceil(log2((double)z->micro_batches));
    return ldexp(1.0, sum_bits < SCALE_ELEMENT_BITS ? (int)sum_bits : SCALE_ELEMENT_BITS);
}

void zero_shard(const struct zero *z, int unit, int64_t *begin, int64_t *n)
{
    *n = params_shard(z->params, unit);
    *begin = *n * z->comm->rank;
}

size_t zero_saved_bytes(const struct zero *z)
{
    size_t elems = 0;
    for (int u = 0; u < z->params->n_units; u++)
        elems += (size_t)params_shard(z->params, u);
    return 3 * (elems * sizeof(float) + (size_t)z->params->n * ZERO_SAVED_ALIGN);
}

void zero_part(const struct zero *z, int unit, int64_t *begin, int64_t *n)
{
    zero_shard(z, unit, begin, n);
    if (z->stage > 0) return;
    *begin = 0;
    *n = z->params->unit[unit].elems;
}

int zero_layout(struct zero *z, const struct config *cfg, const struct params *params, struct model *model,
                struct comm *comm, struct arena *arena)
{
    *z = (struct zero){.params = params,
                       .comm = comm,
                       .dev = model->dev,
                       .stage = (int)cfg->parallel.zero,
                       .reduce = (enum reduce)cfg->parallel.reduce,
                       .weights = model->unit,
                       .fault = model->fault,
                       .loss_sum = model->loss_sum,
                       .limits = {.clip = cfg->optim.clip, .spike_sigma = cfg->optim.spike_sigma},
                       .micro_batches = cfg->batch.global / cfg->batch.micro};
    const size_t n_units = (size_t)params->n_units;
    z->acc = calloc(4 * n_units, sizeof *z->acc);
    if (!z->acc) FAIL(ERR_SYSTEM, "out of memory for the table of %d units", params->n_units);
    z->master = z->acc + n_units;
    z->m = z->master + n_units;
    z->v = z->m + n_units;
    const enum dtype acc_type = z->reduce == REDUCE_EXACT ? DT_I64 : DT_F32;
    for (int u = 0; u < params->n_units; u++) {
        int64_t begin = 0, n = 0;
        zero_part(z, u, &begin, &n);
        z->acc[u] = arena_tensor(arena, ARENA_GRADS, acc_type, params->unit[u].elems, 0, 0);
        /* In fp32 the weights are their own master copy. */
        z->master[u] = model->act == DT_F32 ? tensor_range(model->unit[u], begin, n)
                                            : arena_tensor(arena, ARENA_OPTIM, DT_F32, n, 0, 0);
        z->m[u] = arena_tensor(arena, ARENA_OPTIM, DT_F32, n, 0, 0);
        z->v[u] = arena_tensor(arena, ARENA_OPTIM, DT_F32, n, 0, 0);
    }
    z->sums = arena_tensor(arena, ARENA_WORK, DT_I64, SUMS_ELEMS, 0, 0);
    z->control = arena_tensor(arena, ARENA_WORK, DT_I64, CONTROL_ELEMS, 0, 0);
    model->need = zero_need;
    model->need_context = z;
    return 0;
}

void zero_close(struct zero *z)
{
    free(z->acc);
    *z = (struct zero){0};
}

/* Initial master weights of a unit, through the host buffer. */
static int init_unit(struct zero *z, int unit, float *buffer)
{
    int64_t begin = 0, n = 0;
    zero_part(z, unit, &begin, &n);
    for (int64_t at = 0; at < n; at += INIT_ELEMS) {
        const int64_t elems = n - at < INIT_ELEMS ? n - at : INIT_ELEMS;
        const struct tensor part = tensor_range(z->master[unit], at, elems);
        params_init(z->params, unit, begin + at, begin + at + elems, buffer);
        TRY(z->dev->table->upload(z->dev, part.data, buffer, tensor_bytes(part)));
    }
    return 0;
}

int zero_clear_moments(struct zero *z)
{
    for (int u = 0; u < z->params->n_units; u++) {
        TRY(op_fill(z->dev, z->m[u], 0));
        TRY(op_fill(z->dev, z->v[u], 0));
    }
    return 0;
}

int zero_init(struct zero *z)
{
    int rc = 0;
    float *buffer = malloc(INIT_ELEMS * sizeof *buffer);
    if (!buffer) FAIL(ERR_SYSTEM, "out of memory for %lld initial weights", (long long)INIT_ELEMS);
    for (int u = 0; u < z->params->n_units; u++)
        TRY_GOTO(init_unit(z, u, buffer), done);
    TRY_GOTO(zero_clear_moments(z), done);
    TRY_GOTO(zero_gather(z), done);
done:
    free(buffer);
    return rc;
}

int zero_gather(struct zero *z)
{
    for (int u = 0; u < z->params->n_units; u++) {
        int64_t begin = 0, n = 0;
        zero_part(z, u, &begin, &n);
        const struct tensor mine = tensor_range(z->weights[u], begin, n);
        if (mine.data != z->master[u].data) TRY(op_copy(z->dev, mine, z->master[u]));
        if (z->stage > 0) TRY(comm_all_gather_start(z->comm, z->weights[u], u));
    }
    return 0;
}

int zero_need(void *zero, int unit)
{
    struct zero *z = zero;
    return comm_all_gather_wait(z->comm, unit);
}

int zero_begin(struct zero *z)
{
    z->last = false;
    for (int u = 0; u < z->params->n_units; u++)
        TRY(op_fill(z->dev, z->acc[u], 0));
    TRY(op_fill(z->dev, z->loss_sum, 0));
    return op_fill(z->dev, z->fault, 0);
}

int zero_accumulate(void *zero, int unit, struct tensor grads)
{
    struct zero *z = zero;
    TRY(op_grad_add(z->dev, z->acc[unit], grads, z->control, element_limit(z), z->fault));
    if (z->last) TRY(comm_sum_start(z->comm, z->acc[unit], z->stage > 0));
    return comm_poll(z->comm);
}

int zero_accumulate_nothing(struct zero *z)
{
    for (int u = z->params->n_units - 1; u >= 0; u--)
        TRY(comm_sum_start(z->comm, z->acc[u], z->stage > 0));
    return 0;
}

int zero_give_up(struct zero *z)
{
    const int32_t fault = FAULT_STOP;
    TRY(z->dev->table->upload(z->dev, z->fault.data, &fault, sizeof fault));
    return zero_accumulate_nothing(z);
}

int zero_reduce(struct zero *z)
{
    TRY(comm_wait(z->comm));
    TRY(op_fill(z->dev, z->sums, 0));
    for (int u = 0; u < z->params->n_units; u++) {
        int64_t begin = 0, n = 0;
        zero_shard(z, u, &begin, &n);
        TRY(op_sum_squares(z->dev, tensor_range(z->sums, SUMS_SQUARES, 4), tensor_range(z->acc[u], begin, n),
                           z->fault));
    }
    TRY(op_step_sums(z->dev, z->sums, z->fault, z->loss_sum));
    TRY(comm_sum_start(z->comm, z->sums, false));
    TRY(comm_wait(z->comm));
    return op_step_decide(z->dev, z->control, z->sums, z->reduce == REDUCE_EXACT, z->limits);
}

int zero_set_control(struct zero *z, struct step_control control)
{
    return z->dev->table->upload(z->dev, z->control.data, &control, sizeof control);
}

int zero_control(struct zero *z, struct step_control *control)
{
    TRY(comm_finish(z->comm));
    return z->dev->table->download(z->dev, control, z->control.data, sizeof *control);
}

int zero_gradient(struct zero *z, int unit, struct tensor *gradient)
{
    int64_t begin = 0, n = 0;
    zero_part(z, unit, &begin, &n);
    const struct tensor acc = tensor_range(z->acc[unit], begin, n);
    *gradient = tensor_1d(acc.data, DT_F32, n);
    return op_grad_read(z->dev, *gradient, acc, z->control);
}
