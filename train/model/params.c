/* The layout of parameters, made from params.def, and their initial values. */
#include "model/params.h"

#include "err.h"
#include "mix.h"
#include "model/normal.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Parameters and shards begin at multiples of so many elements: 64 bytes of bf16, 128 of f32. */
#define PARAM_ALIGN 32
/* Rows of logits begin at 128 bytes of bf16: where they begin at odd places, as they would with GPT-2's 50,257 tokens,
 * tensor cores cannot be fed in pieces of 16 bytes, and products take several times as long. */
#define CLASSIFIER_ALIGN 64

static int64_t round_up(int64_t n, int64_t to)
{
    return (n + to - 1) / to * to;
}

int64_t params_classifier_rows(int64_t vocab_size)
{
    return round_up(vocab_size, CLASSIFIER_ALIGN);
}

enum unit_kind { UNIT_EMBED, UNIT_LAYER, UNIT_HEAD };

struct param_row {
    enum unit_kind unit;
    bool joins;
    const char *name;
    struct param param;
};

/* The rows of params.def that this model has, evaluated for its sizes. Returns how many; NULL rows only counts. */
static int rows_of_model(const struct config *cfg, int64_t vocab_size, struct param_row *rows)
{
    const struct config_model *m = &cfg->model;
    const bool llama = m->arch == ARCH_LLAMA, gpt2 = m->arch == ARCH_GPT2, qk_norm = m->qk_norm;
    const bool untied = !m->tie_embeddings;
    const int64_t V = vocab_size, S = m->seq_len, C = m->hidden, D = m->head_dim, F = m->ffn_hidden;
    const int64_t QD = m->heads * D, KD = m->kv_heads * D;
    int n = 0;
#define PARAM(pid, unit_, when, name_, rows_, cols_, joins_, tp, decay_, init_)            \
    if (when) {                                                                            \
        if (rows) {                                                                        \
            rows[n] = (struct param_row){UNIT_##unit_,                                     \
                                         joins_,                                           \
                                         name_,                                            \
                                         {.id = PARAM_##pid,                               \
                                          .ndim = (cols_) ? 2 : 1,                         \
                                          .decay = (decay_),                               \
                                          .shape = {(rows_), (cols_) ? (cols_) : 1, 1, 1}, \
                                          .init = INIT_##init_}};                          \
        }                                                                                  \
        n++;                                                                               \
    }
#include "model/params.def"
#undef PARAM
    return n;
}

/* Appends the rows of one kind as the next unit; `layer` fills the %d of their names. */
static void append_unit(struct params *p, const struct param_row *rows, int n, enum unit_kind kind, int layer)
{
    struct unit *unit = &p->unit[p->n_units];
    *unit = (struct unit){.first = p->n};
    for (int i = 0; i < n; i++) {
        if (rows[i].unit != kind) continue;
        struct param *param = &p->param[p->n++];
        *param = rows[i].param;
        param->unit = p->n_units;
        const char *number = strstr(rows[i].name, "%d");
        if (number) {
            snprintf(param->name, sizeof param->name, "%.*s%d%s", (int)(number - rows[i].name), rows[i].name, layer,
                     number + 2);
        } else {
            snprintf(param->name, sizeof param->name, "%s", rows[i].name);
        }
        param->offset = rows[i].joins ? unit->elems : round_up(unit->elems, PARAM_ALIGN);
        param->elems = param->shape[0] * param->shape[1];
        unit->elems =
            param->offset +
            (param->id == p->classifier ? params_classifier_rows(param->shape[0]) * param->shape[1] : param->elems);
        unit->count++;
        p->elems += param->elems;
        for (const char *c = param->name; *c; c++)
            p->id = mix64(p->id ^ (uint64_t)*c);
        p->id = mix64(p->id ^ (uint64_t)param->shape[0]);
        p->id = mix64(p->id ^ (uint64_t)param->shape[1]);
    }
    unit->elems = round_up(unit->elems, (int64_t)PARAM_ALIGN * p->shards);
    if (kind == UNIT_LAYER && unit->elems > p->unit_max) p->unit_max = unit->elems;
    p->n_units++;
}

int params_open(struct params *p, const struct config *cfg, int64_t vocab_size, int shards)
{
    int rc = 0;
    const int layers = (int)cfg->model.layers;
    const int n = rows_of_model(cfg, vocab_size, NULL);
    *p = (struct params){.shards = shards, .seed = (uint64_t)cfg->run.seed, .init_std = cfg->model.init_std};
    p->classifier = cfg->model.tie_embeddings ? PARAM_WTE : PARAM_LM_HEAD;
    p->init_output_std = cfg->model.init_std / sqrt(2.0 * (double)layers);
    struct param_row *rows = calloc((size_t)n, sizeof *rows);
    p->param = calloc((size_t)n * (size_t)layers, sizeof *p->param);
    p->unit = calloc((size_t)layers + 2, sizeof *p->unit);
    if (!rows || !p->param || !p->unit) FAIL_GOTO(done, ERR_SYSTEM, "out of memory for the table of parameters");
    rows_of_model(cfg, vocab_size, rows);
    append_unit(p, rows, n, UNIT_EMBED, 0);
    for (int layer = 0; layer < layers; layer++)
        append_unit(p, rows, n, UNIT_LAYER, layer);
    append_unit(p, rows, n, UNIT_HEAD, 0);
done:
    free(rows);
    if (rc != 0) params_close(p);
    return rc;
}

void params_close(struct params *p)
{
    free(p->param);
    free(p->unit);
    *p = (struct params){0};
}

const struct param *params_find(const struct params *p, int unit, enum param_id id)
{
    for (int i = 0; i < p->unit[unit].count; i++) {
        const struct param *param = &p->param[p->unit[unit].first + i];
        if (param->id == id) return param;
    }
    return NULL;
}

struct tensor params_view(const struct param *param, struct tensor unit)
{
    struct tensor t = tensor_range(unit, param->offset, param->elems);
    t.ndim = param->ndim;
    memcpy(t.shape, param->shape, sizeof t.shape);
    return t;
}

int64_t params_shard(const struct params *p, int unit)
{
    return p->unit[unit].elems / p->shards;
}

/* Elements [from, to) of the stream, times std. */
static void fill_normal(uint64_t key, double std, int64_t from, int64_t to, float *out)
{
#pragma omp parallel for schedule(static)
    for (int64_t first = from / 2; first < (to + 1) / 2; first += NORMAL_PAIRS) {
        float deviate[2 * NORMAL_PAIRS];
        normal_pairs(key, first, deviate);
        const int64_t begin = 2 * first > from ? 2 * first : from;
        const int64_t last = 2 * (first + NORMAL_PAIRS), end = last < to ? last : to;
        for (int64_t i = begin; i < end; i++)
            out[i - from] = (float)(std * deviate[i - 2 * first]);
    }
}

void params_init(const struct params *p, int unit, int64_t begin, int64_t end, float *out)
{
    memset(out, 0, (size_t)(end - begin) * sizeof *out);
    for (int k = 0; k < p->unit[unit].count; k++) {
        const int index = p->unit[unit].first + k;
        const struct param *param = &p->param[index];
        const uint64_t key = mix64(p->seed ^ mix64((uint64_t)index + 1));
        const double std = param->init == INIT_OUTPUT ? p->init_output_std : p->init_std;
        const int64_t from = begin > param->offset ? begin : param->offset;
        const int64_t last = param->offset + param->elems, to = end < last ? end : last;
        if (param->init == INIT_ZERO || from >= to) continue;
        if (param->init != INIT_ONE) {
            fill_normal(key, std, from - param->offset, to - param->offset, out + (from - begin));
            continue;
        }
        for (int64_t i = from; i < to; i++)
            out[i - begin] = 1.0F;
    }
}
