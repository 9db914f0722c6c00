/* Data parallelism: accumulation, reduction and the division of optimizer state. See zero.h. */
#include "parallel/zero.h"

#include "err.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* A gradient's norm is placed at 2^40 quanta: elements of ordinary size then keep more bits than fp32 has, and an element
 * may still be 2^12 times the whole norm before it overflows (see element_limit). */
#define SCALE_NORM_BITS 40
#define SCALE_ELEMENT_BITS 52
/* Before the first step nothing is known: gradients of a freshly initialised model have a norm of this order. */
#define SCALE_FIRST_NORM 4.0
/* Initial weights are made in pieces of so many, because the buffer that they pass through is in no plan. */
#define INIT_ELEMS ((int64_t)1 << 18)

double zero_scale_for(double norm)
{
    int exponent = 0;
    frexp(norm > 0 ? norm : SCALE_FIRST_NORM, &exponent);
    return ldexp(1.0, SCALE_NORM_BITS - exponent);
}

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
                       .micro_batches = cfg->batch.global / cfg->batch.micro,
                       .scale = zero_scale_for(0)};
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
    z->squares = arena_tensor(arena, ARENA_WORK, DT_I64, 4, 0, 0);
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

int zero_init(struct zero *z)
{
    int rc = 0;
    float *buffer = malloc(INIT_ELEMS * sizeof *buffer);
    if (!buffer) FAIL(ERR_SYSTEM, "out of memory for %lld initial weights", (long long)INIT_ELEMS);
    for (int u = 0; u < z->params->n_units; u++)
        TRY_GOTO(init_unit(z, u, buffer), done);
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
    return op_fill(z->dev, z->fault, 0);
}

int zero_accumulate(void *zero, int unit, struct tensor grads)
{
    struct zero *z = zero;
    TRY(op_grad_add(z->dev, z->acc[unit], grads, z->scale, element_limit(z), z->fault));
    if (z->last) TRY(comm_sum_start(z->comm, z->acc[unit], z->stage > 0));
    return comm_poll(z->comm);
}

int zero_accumulate_nothing(struct zero *z)
{
    for (int u = z->params->n_units - 1; u >= 0; u--)
        TRY(comm_sum_start(z->comm, z->acc[u], z->stage > 0));
    return 0;
}

/* The norm of the whole gradient from every rank's shard: as integers when exact, so that it too has no order. */
static int gradient_norm(struct zero *z, double *norm)
{
    int64_t limbs[4] = {0};
    TRY(op_fill(z->dev, z->squares, 0));
    for (int u = 0; u < z->params->n_units; u++) {
        int64_t begin = 0, n = 0;
        zero_shard(z, u, &begin, &n);
        TRY(op_sum_squares(z->dev, z->squares, tensor_range(z->acc[u], begin, n)));
    }
    TRY(z->dev->table->download(z->dev, limbs, z->squares.data, sizeof limbs));
    double total = 0;
    if (z->reduce == REDUCE_EXACT) {
        TRY(comm_sum_i64(z->comm, limbs, 4));
        for (int i = 3; i >= 0; i--)
            total = ldexp(total, 32) + (double)limbs[i];
        total /= z->scale * z->scale;
    } else {
        memcpy(&total, limbs, sizeof total);
        TRY(comm_sum_f64(z->comm, &total, 1));
    }
    *norm = sqrt(total);
    return 0;
}

int zero_reduce(struct zero *z, struct zero_outcome *outcome)
{
    int32_t fault = 0;
    TRY(comm_wait(z->comm));
    TRY(comm_finish(z->comm));
    TRY(z->dev->table->download(z->dev, &fault, z->fault.data, sizeof fault));
    int64_t seen[2] = {(fault & FAULT_OVERFLOW) != 0, (fault & FAULT_NAN) != 0};
    TRY(comm_max_i64(z->comm, seen, 2));
    *outcome = (struct zero_outcome){.overflow = seen[0] != 0, .not_finite = seen[1] != 0};
    TRY(gradient_norm(z, &outcome->norm));
    outcome->not_finite |= !isfinite(outcome->norm);
    return 0;
}

int zero_gradient(struct zero *z, int unit, struct tensor *gradient)
{
    int64_t begin = 0, n = 0;
    zero_part(z, unit, &begin, &n);
    const struct tensor acc = tensor_range(z->acc[unit], begin, n);
    *gradient = tensor_1d(acc.data, DT_F32, n);
    return op_grad_read(z->dev, *gradient, acc, z->scale);
}
