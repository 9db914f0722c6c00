/* Where a model's tensors lie: the part of model.h that takes memory.
 *
 * Written once and run twice, over a measuring arena and over the real one, so that `tatara plan` cannot disagree with
 * what training takes. */
#include "model/model.h"

#include "err.h"

#include <stdlib.h>

/* Logits of one chunk take about so much; on a CPU larger chunks gain nothing. But each chunk reads the whole classifier
 * and adds to its whole gradient, so fewer rows than these would only move memory: a GPU computes some hundred times as
 * many operations as it moves bytes. */
#define LOGITS_BYTES_CPU ((int64_t)32 << 20)
#define LOGITS_BYTES_GPU ((int64_t)1 << 30)
#define LOGITS_ROWS_MIN 256

static struct tensor weight_view(const struct model *m, int unit, enum param_id id)
{
    const struct param *param = params_find(m->params, unit, id);
    return param ? params_view(param, m->unit[unit]) : TENSOR_NONE;
}

static struct tensor grad_view(const struct model *m, int unit, enum param_id id)
{
    const struct param *param = params_find(m->params, unit, id);
    return param && m->use == MODEL_TRAIN ? params_view(param, m->unit_grad[unit]) : TENSOR_NONE;
}

static struct norm norm_view(const struct model *m, int unit, enum param_id w, enum param_id b)
{
    return (struct norm){weight_view(m, unit, w), weight_view(m, unit, b), grad_view(m, unit, w),
                         grad_view(m, unit, b)};
}

static struct tensor take_packed(struct model *m, struct arena *arena, struct tensor w, bool tb)
{
    const size_t bytes = m->dev->table->pack_bytes(m->dev, w, tb);
    if (bytes == 0) return TENSOR_NONE;
    return arena_tensor(arena, ARENA_PARAMS, w.dtype,
                        (int64_t)((bytes + dtype_bytes(w.dtype) - 1) / dtype_bytes(w.dtype)), 0, 0);
}

/* A linear layer over a weight that stands alone, or is the first of several that lie together, or has padding behind it
 * (rows of them all). */
static struct linear linear_view(struct model *m, struct arena *arena, int unit, enum param_id w, enum param_id b,
                                 int64_t rows)
{
    struct linear l = {.w = weight_view(m, unit, w),
                       .b = weight_view(m, unit, b),
                       .dw = grad_view(m, unit, w),
                       .db = grad_view(m, unit, b),
                       /* The classifier is [V, C] in both architectures. */
                       .in_out = m->cfg.arch == ARCH_GPT2 && w != PARAM_WTE && w != PARAM_LM_HEAD};
    if (rows > 0) {
        l.w.shape[0] = rows;
        if (tensor_given(l.dw)) l.dw.shape[0] = rows;
    }
    l.pack_fwd = take_packed(m, arena, l.w, !l.in_out);
    l.pack_bwd = m->use == MODEL_TRAIN ? take_packed(m, arena, l.w, l.in_out) : TENSOR_NONE;
    return l;
}

static void block_weights(struct model *m, struct arena *arena, struct block *b, int unit)
{
    const bool llama = m->cfg.arch == ARCH_LLAMA;
    const int64_t qkv_rows = (m->cfg.heads + 2 * m->cfg.kv_heads) * m->cfg.head_dim;
    b->norm1 = norm_view(m, unit, PARAM_NORM1_W, PARAM_NORM1_B);
    b->norm2 = norm_view(m, unit, PARAM_NORM2_W, PARAM_NORM2_B);
    b->qkv = linear_view(m, arena, unit, PARAM_Q_W, PARAM_QKV_B, llama ? qkv_rows : 0);
    b->out = linear_view(m, arena, unit, PARAM_O_W, PARAM_O_B, 0);
    b->up =
        linear_view(m, arena, unit, llama ? PARAM_GATE_W : PARAM_UP_W, PARAM_UP_B, llama ? 2 * m->cfg.ffn_hidden : 0);
    b->down = linear_view(m, arena, unit, PARAM_DOWN_W, PARAM_DOWN_B, 0);
    b->q_norm = weight_view(m, unit, PARAM_Q_NORM_W);
    b->k_norm = weight_view(m, unit, PARAM_K_NORM_W);
    b->dq_norm = grad_view(m, unit, PARAM_Q_NORM_W);
    b->dk_norm = grad_view(m, unit, PARAM_K_NORM_W);
}

static struct tensor take_act(struct model *m, struct arena *arena, int64_t cols)
{
    return arena_tensor(arena, ARENA_ACTS, m->act, m->tokens, cols, 0);
}

static struct tensor take_f32(struct arena *arena, int64_t rows, int64_t cols, int64_t depth)
{
    return arena_tensor(arena, ARENA_ACTS, DT_F32, rows, cols, depth);
}

/* What the attention half of a block keeps. What is cheap to compute again is shared with `cheap`, if that is given. */
static void take_attention(struct model *m, struct arena *arena, struct block *b, const struct block *cheap)
{
    const struct config_model *c = &m->cfg;
    const int64_t width = (c->heads + 2 * c->kv_heads) * c->head_dim;
    b->stat1 = take_f32(arena, m->tokens, 2, 0);
    b->n1 = cheap ? cheap->n1 : take_act(m, arena, c->hidden);
    b->qkv_act = take_act(m, arena, width);
    b->qkv_raw = c->qk_norm ? take_act(m, arena, width) : b->qkv_act;
    b->rstd = c->qk_norm ? take_f32(arena, m->tokens, c->heads + c->kv_heads, 0) : TENSOR_NONE;
    b->o = take_act(m, arena, c->heads * c->head_dim);
    b->lse = m->use == MODEL_TRAIN ? take_f32(arena, m->sequences, c->heads, c->seq_len) : TENSOR_NONE;
}

/* What the feed-forward half keeps. GELU's output is never made again, since it may come from a matrix product's epilogue,
 * with other bits. */
static void take_ffn(struct model *m, struct arena *arena, struct block *b, const struct block *cheap)
{
    const struct config_model *c = &m->cfg;
    b->res2 = take_act(m, arena, c->hidden);
    b->stat2 = take_f32(arena, m->tokens, 2, 0);
    b->n2 = cheap ? cheap->n2 : take_act(m, arena, c->hidden);
    b->up_act = take_act(m, arena, c->arch == ARCH_LLAMA ? 2 * c->ffn_hidden : c->ffn_hidden);
    b->h = cheap && c->arch == ARCH_LLAMA ? cheap->h : take_act(m, arena, c->ffn_hidden);
}

static void share_attention(struct block *b, const struct block *from)
{
    b->stat1 = from->stat1;
    b->n1 = from->n1;
    b->qkv_act = from->qkv_act;
    b->qkv_raw = from->qkv_raw;
    b->rstd = from->rstd;
    b->o = from->o;
    b->lse = from->lse;
}

static void share_ffn(struct block *b, const struct block *from)
{
    b->res2 = from->res2;
    b->stat2 = from->stat2;
    b->n2 = from->n2;
    b->up_act = from->up_act;
    b->h = from->h;
}

/* Activations of all blocks: those that the backward pass computes again are shared by all, and in sampling, which has
 * no backward pass, everything but the caches is. */
static void blocks_take(struct model *m, struct arena *arena)
{
    const bool sampling = m->use == MODEL_SAMPLE;
    const bool again = m->cfg.recompute >= RECOMPUTE_ATTENTION || sampling;
    const bool again_ffn = m->cfg.recompute == RECOMPUTE_BLOCK || sampling;
    for (int l = 0; l < m->cfg.layers; l++) {
        struct block *b = &m->block[l];
        const struct block *const cheap = m->cfg.recompute == RECOMPUTE_ELEMENTWISE && l > 0 ? &m->block[0] : NULL;
        b->res = sampling && l > 0 ? m->block[0].res : take_act(m, arena, m->cfg.hidden);
        if (again && l > 0) {
            share_attention(b, &m->block[0]);
        } else {
            take_attention(m, arena, b, cheap);
        }
        if (again_ffn && l > 0) {
            share_ffn(b, &m->block[0]);
        } else {
            take_ffn(m, arena, b, cheap);
        }
        b->k_cache = b->v_cache = TENSOR_NONE;
        if (!sampling) continue;
        const int64_t kd = m->cfg.kv_heads * m->cfg.head_dim;
        b->k_cache = arena_tensor(arena, ARENA_ACTS, m->act, m->sequences, m->cfg.seq_len, kd);
        b->v_cache = arena_tensor(arena, ARENA_ACTS, m->act, m->sequences, m->cfg.seq_len, kd);
    }
}

static void units_take(struct model *m, struct arena *arena)
{
    const struct params *p = m->params;
    for (int u = 0; u < p->n_units; u++) {
        m->unit[u] = arena_tensor(arena, ARENA_PARAMS, m->act, p->unit[u].elems, 0, 0);
    }
    if (m->use != MODEL_TRAIN) return;
    const struct tensor layer = arena_tensor(arena, ARENA_GRADS, DT_F32, p->unit_max, 0, 0);
    for (int u = 0; u < p->n_units; u++) {
        const bool is_layer = u > 0 && u < p->n_units - 1;
        m->unit_grad[u] = is_layer ? tensor_range(layer, 0, p->unit[u].elems)
                                   : arena_tensor(arena, ARENA_GRADS, DT_F32, p->unit[u].elems, 0, 0);
    }
}

/* The classifier: chunks of logits, and in training their gradient (in place when f32). */
static void head_take(struct model *m, struct arena *arena)
{
    const int64_t bytes = m->dev->kind == DEVICE_CPU ? LOGITS_BYTES_CPU : LOGITS_BYTES_GPU;
    const int64_t width = m->head.w.shape[0];
    ASSERT(width > 0);
    int64_t rows = bytes / (int64_t)sizeof(float) / width;
    rows = rows < LOGITS_ROWS_MIN ? LOGITS_ROWS_MIN : rows / LOGITS_ROWS_MIN * LOGITS_ROWS_MIN;
    m->chunk = m->use == MODEL_SAMPLE ? m->sequences : rows < m->tokens ? rows : m->tokens;
    m->logits = arena_tensor(arena, ARENA_WORK, DT_F32, m->chunk, width, 0);
    m->dlogits = TENSOR_NONE;
    if (m->use != MODEL_TRAIN) return;
    m->dlogits = m->act == DT_F32 ? m->logits : arena_tensor(arena, ARENA_WORK, m->act, m->chunk, width, 0);
}

int model_layout(struct model *m, const struct config *cfg, const struct params *params, int64_t vocab_size,
                 struct device *dev, struct arena *arena, enum model_use use, int64_t sequences, int64_t tokens_each)
{
    *m = (struct model){.cfg = cfg->model,
                        .vocab_size = vocab_size,
                        .use = use,
                        .dev = dev,
                        .params = params,
                        .act = cfg->precision.compute == COMPUTE_FP32 ? DT_F32 : DT_BF16,
                        .sequences = sequences,
                        .tokens = sequences * tokens_each};
    m->tokens_max = m->tokens;
    const struct config_model *c = &m->cfg;
    const int last = params->n_units - 1;
    m->unit = calloc((size_t)params->n_units, sizeof *m->unit);
    m->unit_grad = calloc((size_t)params->n_units, sizeof *m->unit_grad);
    m->block = calloc((size_t)c->layers, sizeof *m->block);
    if (!m->unit || !m->unit_grad || !m->block) {
        model_close(m);
        FAIL(ERR_SYSTEM, "out of memory for the table of %d blocks", (int)c->layers);
    }
    units_take(m, arena);
    for (int l = 0; l < c->layers; l++)
        block_weights(m, arena, &m->block[l], l + 1);
    m->wte = weight_view(m, 0, PARAM_WTE);
    m->wpe = weight_view(m, 0, PARAM_WPE);
    m->dwte = grad_view(m, 0, PARAM_WTE);
    m->dwpe = grad_view(m, 0, PARAM_WPE);
    m->normf = norm_view(m, last, PARAM_NORMF_W, PARAM_NORMF_B);
    m->head = linear_view(m, arena, c->tie_embeddings ? 0 : last, params->classifier, PARAM_IDS,
                          use == MODEL_TRAIN ? params_classifier_rows(vocab_size) : 0);

    m->tok = arena_tensor(arena, ARENA_ACTS, DT_I32, m->tokens, 0, 0);
    m->pos = arena_tensor(arena, ARENA_ACTS, DT_I32, m->tokens, 0, 0);
    m->rope = c->arch == ARCH_LLAMA ? take_f32(arena, c->seq_len, c->head_dim / 2, 2) : TENSOR_NONE;
    blocks_take(m, arena);
    m->delta = take_act(m, arena, c->hidden);
    m->resf = take_act(m, arena, c->hidden);
    m->statf = take_f32(arena, m->tokens, 2, 0);
    m->nf = take_act(m, arena, c->hidden);
    head_take(m, arena);
    if (use == MODEL_SAMPLE) {
        m->last = arena_tensor(arena, ARENA_ACTS, DT_I32, sequences, 0, 0);
        m->nf_last = arena_tensor(arena, ARENA_ACTS, m->act, sequences, c->hidden, 0);
        return 0;
    }
    m->target = arena_tensor(arena, ARENA_ACTS, DT_I32, m->tokens, 0, 0);
    m->start = arena_tensor(arena, ARENA_ACTS, DT_I32, m->tokens, 0, 0);
    m->dres = take_act(m, arena, c->hidden);
    m->dout = take_act(m, arena, c->heads * c->head_dim);
    m->dqkv = take_act(m, arena, (c->heads + 2 * c->kv_heads) * c->head_dim);
    m->dsum = take_f32(arena, sequences, c->heads, c->seq_len);
    m->loss = take_f32(arena, m->tokens, 0, 0);
    m->z_loss = m->cfg.z_loss > 0 ? take_f32(arena, m->tokens, 0, 0) : TENSOR_NONE;
    m->loss_sum = arena_tensor(arena, ARENA_ACTS, DT_I64, 2, 0, 0);
    m->fault = arena_tensor(arena, ARENA_ACTS, DT_I32, 1, 0, 0);
    return 0;
}

void model_close(struct model *m)
{
    free(m->unit);
    free(m->unit_grad);
    free(m->block);
    *m = (struct model){0};
}
