/* A training state in and out of checkpoints. */
#include "state.h"

#include "err.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The tensors of one parameter: its master weights under its own name, and AdamW's two moments. */
static const char *const prefixes[] = {"", "optim/exp_avg/", "optim/exp_avg_sq/"};
enum { KINDS = sizeof prefixes / sizeof *prefixes };

static int check_model(const struct params *params, const char *folder, const struct ckpt_meta *meta)
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

/* What this rank writes (its shard) or reads (its part), as slabs in host memory: on a CPU the state itself, else a copy
 * of it. There are KINDS slabs of every parameter. */
struct snapshot {
    struct device *dev;
    struct ckpt_slab *slab;
    float **device; /* where each slab's data lies on the device */
    float *copy;    /* NULL on a CPU */
    int n;
};

static void snapshot_close(struct snapshot *s)
{
    free(s->slab);
    free(s->device);
    free(s->copy);
}

static size_t slab_bytes(const struct ckpt_slab *slab)
{
    return (size_t)(slab->end - slab->begin) * sizeof *slab->data;
}

/* Gives every slab room in one piece of host memory. */
static int snapshot_room(struct snapshot *s)
{
    size_t bytes = 0;
    for (int i = 0; i < s->n; i++)
        bytes += slab_bytes(&s->slab[i]);
    s->copy = malloc(bytes > 0 ? bytes : 1);
    if (!s->copy) FAIL(ERR_SYSTEM, "out of memory for a copy of the training state of %zu bytes", bytes);
    float *at = s->copy;
    for (int i = 0; i < s->n; i++) {
        s->slab[i].data = at;
        at += s->slab[i].end - s->slab[i].begin;
    }
    return 0;
}

static int snapshot_open(struct snapshot *s, const struct zero *z, bool saving)
{
    const struct params *p = z->params;
    *s = (struct snapshot){.dev = z->dev};
    s->slab = calloc((size_t)p->n * KINDS, sizeof *s->slab);
    s->device = calloc((size_t)p->n * KINDS, sizeof *s->device);
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
            float *data = some ? (float *)state[k][param->unit].data + (from - part) : NULL;
            s->device[s->n] = data;
            s->slab[s->n++] =
                slab_of(param, prefixes[k], some ? from - param->offset : 0, some ? to - param->offset : 0, data);
        }
    }
    return s->dev->kind == DEVICE_CPU ? 0 : snapshot_room(s);
}

static int snapshot_download(const struct snapshot *s)
{
    for (int i = 0; s->copy && i < s->n; i++)
        TRY(s->dev->table->download(s->dev, s->slab[i].data, s->device[i], slab_bytes(&s->slab[i])));
    return 0;
}

static int snapshot_upload(const struct snapshot *s)
{
    for (int i = 0; s->copy && i < s->n; i++)
        TRY(s->dev->table->upload(s->dev, s->device[i], s->slab[i].data, slab_bytes(&s->slab[i])));
    return 0;
}

int state_save(struct step *step, const struct ckpt_run *run, const struct ckpt_meta *meta, int64_t keep)
{
    struct snapshot s;
    TRY(comm_finish(step->comm));
    int rc = snapshot_open(&s, &step->zero, true);
    if (rc == 0) rc = snapshot_download(&s);
    TRY_GOTO(comm_agree(step->comm, rc), done);
    TRY_GOTO(ckpt_save(step->comm, run, meta, s.slab, s.n, keep), done);
done:
    snapshot_close(&s);
    return rc;
}

int state_load(struct step *step, const char *folder, const struct ckpt_meta *meta)
{
    int rc = 0;
    struct snapshot s = {0};
    TRY_GOTO(check_model(&step->params, folder, meta), done);
    TRY_GOTO(snapshot_open(&s, &step->zero, false), done);
    TRY_GOTO(ckpt_load(folder, s.slab, s.n), done);
    TRY_GOTO(snapshot_upload(&s), done);
done:
    snapshot_close(&s);
    TRY(comm_agree(step->comm, rc));
    TRY(step_resume(step, meta->step, meta->grad_norm));
    TRY(zero_gather(&step->zero));
    return model_weights_changed(&step->model);
}

int state_load_weights(struct model *model, const char *folder, const struct ckpt_meta *meta)
{
    int rc = 0;
    const struct params *p = model->params;
    struct device *dev = model->dev;
    void *staged = NULL;
    float *host = NULL;
    size_t largest = 0;
    TRY(check_model(p, folder, meta));
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
