/* A training state in and out of checkpoints. */
#include "state.h"

#include "clock.h"
#include "err.h"

#include <errno.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The tensors of one parameter: its master weights under its own name, and AdamW's two moments. */
static const char *const prefixes[] = {"", "optim/exp_avg/", "optim/exp_avg_sq/"};
enum { KINDS = sizeof prefixes / sizeof *prefixes };
_Static_assert(ZERO_SAVED_ALIGN >= CKPT_ALIGN, "the copy of a state must fit");

int state_check_model(const struct params *params, const char *folder, const struct ckpt_meta *meta)
{
    if (meta->model_id == params->id) return 0;
    FAIL(ERR_DATA,
         "%s holds another model than the configuration describes (names or shapes of parameters differ); set "
         "model.* as "
         "in `tatara ckpt show %s`, or another run.dir",
         folder, folder);
}

static struct ckpt_slab slab_of(const struct param *param, const char *prefix, int64_t begin, int64_t end,
                                float *data)
{
    struct ckpt_slab slab = {.ndim = param->ndim, .begin = begin, .end = end, .data = data};
    snprintf(slab.name, sizeof slab.name, "%s%s", prefix, param->name);
    memcpy(slab.shape, param->shape, sizeof slab.shape);
    return slab;
}

/* ---- the slabs of a state ---- */

/* What this rank writes (its shard) or reads (its part): KINDS slabs of every parameter, and where on the device the data
 * of each lies. A slab's own data is NULL. */
struct slabs {
    struct ckpt_slab *slab;
    float **device;
    int n;
};

static void slabs_close(struct slabs *s)
{
    free(s->slab);
    free(s->device);
    *s = (struct slabs){.n = 0};
}

static size_t slab_bytes(const struct ckpt_slab *slab)
{
    return (size_t)(slab->end - slab->begin) * sizeof *slab->data;
}

static int slabs_open(struct slabs *s, const struct zero *z, bool saving)
{
    const struct params *p = z->params;
    *s = (struct slabs){.slab = calloc((size_t)p->n * KINDS, sizeof *s->slab),
                        .device = calloc((size_t)p->n * KINDS, sizeof *s->device)};
    if (!s->slab || !s->device) FAIL(ERR_SYSTEM, "out of memory for the list of %d tensors", p->n * KINDS);
    for (int i = 0; i < p->n; i++) {
        const struct param *param = &p->param[i];
        const struct tensor *const state[KINDS] = {z->master, z->m, z->v};
        int64_t part = 0, part_elems = 0, begin = 0, elems = 0;
        zero_part(z, param->unit, &part, &part_elems);
        if (saving) {
            zero_shard(z, param->unit, &begin, &elems);
        } else {
            begin = part;
            elems = part_elems;
        }
        const int64_t last = param->offset + param->elems, end = begin + elems;
        const int64_t from = begin > param->offset ? begin : param->offset, to = end < last ? end : last;
        const bool some = from < to;
        for (int k = 0; k < KINDS; k++) {
            s->device[s->n] = some ? (float *)state[k][param->unit].data + (from - part) : NULL;
            s->slab[s->n++] =
                slab_of(param, prefixes[k], some ? from - param->offset : 0, some ? to - param->offset : 0, NULL);
        }
    }
    return 0;
}

/* Lets the slabs' data lie one after the other in `host`; NULL: where they are on the device, a CPU. */
static void slabs_place(struct slabs *s, float *host)
{
    for (int i = 0; i < s->n; i++) {
        struct ckpt_slab *slab = &s->slab[i];
        slab->data = host ? ckpt_slab_place(slab, host) : s->device[i];
        if (host) host = slab->data + (slab->end - slab->begin);
    }
}

static size_t slabs_bytes(const struct slabs *s)
{
    size_t bytes = (size_t)s->n * CKPT_ALIGN;
    for (int i = 0; i < s->n; i++)
        bytes += slab_bytes(&s->slab[i]);
    return bytes;
}

/* Host memory for all slabs. */
static int slabs_host(const struct slabs *s, float **host)
{
    const size_t bytes = slabs_bytes(s);
    *host = malloc(bytes > 0 ? bytes : 1);
    if (!*host) FAIL(ERR_SYSTEM, "out of memory for a copy of the training state of %zu bytes", bytes);
    return 0;
}

int64_t state_bytes(const struct params *p)
{
    int64_t bytes = ckpt_frame_bytes(p->shards);
    for (int i = 0; i < p->n; i++) {
        const struct param *param = &p->param[i];
        const int64_t shard = params_shard(p, param->unit), last = param->offset + param->elems;
        for (int64_t at = param->offset, end = 0; at < last; at = end) {
            end = (at / shard + 1) * shard;
            if (end > last) end = last;
            const struct ckpt_slab slab = slab_of(param, prefixes[0], at - param->offset, end - param->offset, NULL);
            bytes += KINDS * ckpt_slab_bytes(&slab);
        }
    }
    return bytes;
}

/* ---- saving ---- */

/* The thread that writes the state makes the copy of it first, while the next step's passes run: nothing of the state
 * changes before that step's update, which waits for `copied`. On a GPU there is always a copy, since only host memory can
 * be written; on a CPU with checkpoint.async. */
struct state_saver {
    struct step *step;
    struct ckpt_saver *ckpt;
    struct slabs slabs;
    float *host;  /* owned; of a GPU's state */
    bool copies;  /* else the slabs' data are the state itself */
    sem_t copied; /* posted when the copy has ended, well or not */
    bool copying;
    double wait_s;
};

/* In the thread that writes. */
static int fill_snapshot(void *context)
{
    int rc = 0;
    struct state_saver *s = context;
    struct device *dev = s->step->model.dev;
    for (int i = 0; i < s->slabs.n; i++) {
        const struct ckpt_slab *slab = &s->slabs.slab[i];
        TRY_GOTO(dev->table->download_beside(dev, slab->data, s->slabs.device[i], slab_bytes(slab)), done);
    }
done:
    (void)sem_post(&s->copied);
    return rc;
}

/* What was issued is done then, on this rank's device. */
static int wait_for_device(const struct state_saver *s)
{
    struct device *dev = s->step->model.dev;
    TRY(comm_finish(s->step->comm));
    return dev->table->sync(dev);
}

/* Before an update. A GPU that is still at the step's passes does not stand still: only what comes after them counts. */
static int wait_for_copy(void *context)
{
    struct state_saver *s = context;
    if (!s->copying) return 0;
    if (sem_trywait(&s->copied) != 0) {
        int error = EINTR;
        TRY(wait_for_device(s));
        const double began_s = now_s();
        comm_wait_enter(s->step->comm, "the copy of the training state");
        while (error == EINTR)
            error = sem_wait(&s->copied) == 0 ? 0 : errno;
        comm_wait_leave(s->step->comm);
        if (error) FAIL(ERR_SYSTEM, "cannot wait for the copy of the training state: %s", strerror(error));
        s->wait_s += now_s() - began_s;
    }
    s->copying = false;
    return 0;
}

double state_saver_take_wait_s(struct state_saver *s)
{
    const double wait_s = s->wait_s;
    s->wait_s = 0;
    return wait_s;
}

int state_saver_open(struct state_saver **saver, struct step *step, const struct ckpt_run *run)
{
    struct device *dev = step->model.dev;
    struct state_saver *s = *saver = calloc(1, sizeof *s);
    if (!s) FAIL(ERR_SYSTEM, "no memory for saving checkpoints");
    s->step = step;
    if (sem_init(&s->copied, 0, 0) != 0) FAIL(ERR_SYSTEM, "no semaphore for saving: %s", strerror(errno));
    TRY(ckpt_saver_open(&s->ckpt, step->comm, run));
    TRY(slabs_open(&s->slabs, &step->zero, true));
    if (dev->kind != DEVICE_CPU) TRY(slabs_host(&s->slabs, &s->host));
    s->copies = s->host || step->snapshot;
    slabs_place(&s->slabs, s->host ? s->host : step->snapshot);
    step->before_update = wait_for_copy;
    step->update_context = s;
    return 0;
}

void state_saver_close(struct state_saver *s)
{
    if (!s) return;
    ckpt_saver_close(s->ckpt);
    slabs_close(&s->slabs);
    free(s->host);
    (void)sem_destroy(&s->copied);
    s->step->before_update = NULL;
    free(s);
}

struct ckpt_saver *state_saver_ckpt(struct state_saver *s)
{
    return s->ckpt;
}

int state_save_start(struct state_saver *s, const struct ckpt_meta *meta, struct ckpt_keep keep)
{
    TRY(comm_agree(s->step->comm, wait_for_device(s)));
    while (sem_trywait(&s->copied) == 0) {
        /* what a save that failed to start may have left */
    }
    s->copying = s->copies;
    const int rc =
        ckpt_save_start(s->ckpt, meta, s->slabs.slab, s->slabs.n, keep, s->copying ? fill_snapshot : NULL, s);
    if (rc != 0) s->copying = false;
    return rc;
}

/* ---- loading ---- */

/* Leaves only the first `kinds` slabs of each parameter. */
static void slabs_keep(struct slabs *s, int kinds)
{
    int n = 0;
    for (int i = 0; i < s->n; i++) {
        if (i % KINDS >= kinds) continue;
        s->slab[n] = s->slab[i];
        s->device[n++] = s->device[i];
    }
    s->n = n;
}

/* kinds: the first of each parameter's KINDS slabs that are wanted. */
static int load_slabs(struct slabs *s, struct step *step, const char *folder, int kinds)
{
    int rc = 0;
    float *host = NULL;
    struct device *dev = step->model.dev;
    TRY(slabs_open(s, &step->zero, false));
    slabs_keep(s, kinds);
    if (dev->kind != DEVICE_CPU) TRY(slabs_host(s, &host));
    slabs_place(s, host);
    TRY_GOTO(ckpt_load(folder, s->slab, s->n), done);
    for (int i = 0; host && i < s->n; i++)
        TRY_GOTO(dev->table->upload(dev, s->device[i], s->slab[i].data, slab_bytes(&s->slab[i])), done);
done:
    free(host);
    return rc;
}

static int load(struct step *step, const char *folder, const struct ckpt_meta *meta, int kinds)
{
    struct slabs s = {.n = 0};
    int rc = state_check_model(&step->params, folder, meta);
    if (rc == 0) rc = load_slabs(&s, step, folder, kinds);
    slabs_close(&s);
    return rc;
}

/* Readies the weights of all ranks after a change of master weights. Collective. */
static int ready(struct step *step)
{
    TRY(zero_gather(&step->zero));
    return model_weights_changed(&step->model);
}

int state_begin_from(struct step *step, const char *folder, const struct ckpt_meta *meta, bool optimizer)
{
    TRY(comm_agree(step->comm, load(step, folder, meta, optimizer ? KINDS : 1)));
    if (optimizer) {
        step->grad_norm = meta->grad_norm;
        step->optim_steps_before = meta->optim_steps;
        TRY(step_resume(step, 0));
    } else {
        TRY(zero_clear_moments(&step->zero));
    }
    return ready(step);
}

int state_load(struct step *step, const char *folder, const struct ckpt_meta *meta)
{
    TRY(comm_agree(step->comm, load(step, folder, meta, KINDS)));
    step->grad_norm = meta->grad_norm;
    step->loss_mean = meta->loss_mean;
    step->loss_variance = meta->loss_variance;
    step->loss_seen = meta->loss_seen;
    step->faults = meta->faults;
    step->batches_skipped = meta->batches_skipped;
    step->optim_steps_before = meta->optim_steps - meta->step;
    /* A checkpoint that does not say where the data stood is of a program that could only count steps. */
    step_set_position(step, meta->step,
                      meta->sequences >= 0 ? meta->sequences
                                           : (meta->step + meta->batches_skipped) * step->cfg->batch.global,
                      meta->tokens);
    TRY(step_resume(step, meta->step));
    return ready(step);
}

int state_load_weights(struct model *model, const char *folder, const struct ckpt_meta *meta)
{
    int rc = 0;
    const struct params *p = model->params;
    struct device *dev = model->dev;
    void *staged = NULL;
    float *host = NULL;
    size_t largest = 0;
    TRY(state_check_model(p, folder, meta));
    for (int i = 0; i < p->n; i++) {
        const size_t bytes = (size_t)p->param[i].elems * sizeof *host;
        largest = bytes > largest ? bytes : largest;
    }
    host = malloc(largest);
    if (!host) FAIL_GOTO(done, ERR_SYSTEM, "out of memory for reading a tensor of %zu bytes", largest);
    TRY_GOTO(dev->table->alloc(dev, largest, &staged), done);
    for (int i = 0; i < p->n; i++) {
        const struct param *param = &p->param[i];
        const struct ckpt_slab slab = slab_of(param, "", 0, param->elems, host);
        const struct tensor f32 = tensor_1d(staged, DT_F32, param->elems);
        TRY_GOTO(ckpt_load(folder, &slab, 1), done);
        TRY_GOTO(dev->table->upload(dev, staged, host, tensor_bytes(f32)), done);
        TRY_GOTO(op_copy(dev, tensor_range(model->unit[param->unit], param->offset, param->elems), f32), done);
    }
    TRY_GOTO(model_weights_changed(model), done);
done:
    if (staged) dev->table->free(dev, staged, largest);
    free(host);
    return rc;
}
