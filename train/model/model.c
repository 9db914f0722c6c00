/* Forward and backward of the whole model, each backward below its forward.
 *
 * The residual stream is never added to in a pass of its own: a half block leaves its output in `delta`, and the next
 * norm adds it while it reads (norm_fwd's sum). Backward, `dres` is the gradient of both the stream and the delta.
 *
 * A buffer whose forward value is no longer needed takes the gradient that replaces it: h takes dh, up_act takes its own
 * gradient, n2 and n1 take theirs, so that the backward pass adds little to the memory of the forward. */
#include "model/model.h"

#include "err.h"

#include <string.h>

/* The rows of t that this pass uses (sampling may use fewer than there are). */
static struct tensor rows(const struct model *m, struct tensor t)
{
    return tensor_given(t) ? tensor_rows(t, 0, m->tokens) : t;
}

static int linear_fwd(struct model *m, const struct linear *l, struct tensor y, struct tensor x)
{
    return op_matmul(m->dev, y, x, l->w, l->pack_fwd, l->b, l->in_out ? 0 : MATMUL_TB);
}

/* The gradients of the weights. Only weights stored [in, out] have a bias. */
static int linear_bwd_w(struct model *m, const struct linear *l, struct tensor dy, struct tensor x)
{
    if (tensor_given(l->db)) return op_weight_bwd(m->dev, l->dw, l->db, x, dy);
    return op_matmul(m->dev, l->dw, l->in_out ? x : dy, l->in_out ? dy : x, TENSOR_NONE, TENSOR_NONE,
                     MATMUL_TA | MATMUL_ADD);
}

/* dx and the gradients of the weights. dx may be x: x is read first. */
static int linear_bwd(struct model *m, const struct linear *l, struct tensor dx, struct tensor dy, struct tensor x)
{
    TRY(linear_bwd_w(m, l, dy, x));
    return op_matmul(m->dev, dx, dy, l->w, l->pack_bwd, TENSOR_NONE, l->in_out ? MATMUL_TB : 0);
}

/* The first half of a block up to the attention's output o. x and delta: the stream before it, or none when the
 * stream's sum already lies in b->res (the first block, and recomputation). */
static int attention_half_fwd(struct model *m, struct block *b, struct tensor x, struct tensor delta)
{
    const struct config_model *c = &m->cfg;
    const int heads = (int)c->heads, kv_heads = (int)c->kv_heads;
    const bool sum = tensor_given(delta);
    TRY(op_norm_fwd(m->dev, rows(m, b->n1), sum ? rows(m, b->res) : TENSOR_NONE, rows(m, b->stat1),
                    sum ? x : rows(m, b->res), delta, b->norm1.w, b->norm1.b, c->norm_eps));
    TRY(linear_fwd(m, &b->qkv, rows(m, b->qkv_raw), rows(m, b->n1)));
    if (c->arch == ARCH_LLAMA) {
        TRY(op_qk_fwd(m->dev, rows(m, b->qkv_act), rows(m, b->rstd), rows(m, b->qkv_raw), b->q_norm, b->k_norm,
                      rows(m, m->pos), m->rope, heads, kv_heads, c->norm_eps));
    }
    if (m->use == MODEL_SAMPLE) {
        return op_attention_cached(m->dev, rows(m, b->o), b->k_cache, b->v_cache, rows(m, b->qkv_act),
                                   rows(m, m->pos), heads, kv_heads);
    }
    return op_attention_fwd(m->dev, b->o, b->lse, b->qkv_act, m->start, (int)c->seq_len, heads, kv_heads);
}

/* Gradient from dres (of the half's output) through to dres (of its input). */
static int attention_half_bwd(struct model *m, struct block *b)
{
    const struct config_model *c = &m->cfg;
    const int heads = (int)c->heads, kv_heads = (int)c->kv_heads;
    TRY(linear_bwd(m, &b->out, m->dout, m->dres, b->o));
    TRY(op_attention_bwd(m->dev, m->dqkv, m->dout, b->o, b->lse, m->dsum, b->qkv_act, m->start, (int)c->seq_len,
                         heads, kv_heads));
    if (c->arch == ARCH_LLAMA) {
        TRY(op_qk_bwd(m->dev, m->dqkv, b->dq_norm, b->dk_norm, m->dqkv, b->rstd,
                      c->qk_norm ? b->qkv_raw : TENSOR_NONE, b->q_norm, b->k_norm, m->pos, m->rope, heads, kv_heads));
    }
    TRY(linear_bwd(m, &b->qkv, b->n1, m->dqkv, b->n1));
    return op_norm_bwd(m->dev, m->dres, b->norm1.dw, b->norm1.db, b->n1, m->dres, b->res, b->stat1, b->norm1.w);
}

/* The attention's output projection, the second norm, and the feed-forward part up to h. */
static int ffn_half_fwd(struct model *m, struct block *b)
{
    TRY(linear_fwd(m, &b->out, rows(m, m->delta), rows(m, b->o)));
    TRY(op_norm_fwd(m->dev, rows(m, b->n2), rows(m, b->res2), rows(m, b->stat2), rows(m, b->res), rows(m, m->delta),
                    b->norm2.w, b->norm2.b, m->cfg.norm_eps));
    if (m->cfg.arch == ARCH_GPT2)
        return op_matmul_gelu(m->dev, rows(m, b->h), rows(m, b->up_act), rows(m, b->n2), b->up.w, b->up.pack_fwd,
                              b->up.b, 0);
    TRY(linear_fwd(m, &b->up, rows(m, b->up_act), rows(m, b->n2)));
    return op_swiglu_fwd(m->dev, rows(m, b->h), rows(m, b->up_act));
}

/* Gradient from dres (of the block's output) to dres (of the feed-forward half's input). */
static int ffn_half_bwd(struct model *m, struct block *b)
{
    const bool llama = m->cfg.arch == ARCH_LLAMA;
    const struct tensor dup = llama ? b->up_act : b->h;
    if (llama) {
        TRY(linear_bwd(m, &b->down, b->h, m->dres, b->h));
        TRY(op_swiglu_bwd(m->dev, dup, b->h, b->up_act));
    } else {
        TRY(linear_bwd_w(m, &b->down, m->dres, b->h));
        TRY(op_matmul_dgelu(m->dev, dup, m->dres, b->down.w, b->down.pack_bwd, b->up_act, MATMUL_TB));
    }
    TRY(linear_bwd(m, &b->up, b->n2, dup, b->n2));
    return op_norm_bwd(m->dev, m->dres, b->norm2.dw, b->norm2.db, b->n2, m->dres, b->res2, b->stat2, b->norm2.w);
}

static int need(const struct model *m, int unit)
{
    return m->need ? m->need(m->need_context, unit) : 0;
}

/* Embeddings, all blocks and the final norm, into nf. */
static int trunk_fwd(struct model *m)
{
    struct tensor x = TENSOR_NONE, delta = TENSOR_NONE;
    TRY(need(m, 0));
    TRY(op_embed_fwd(m->dev, rows(m, m->block[0].res), rows(m, m->tok), rows(m, m->pos), m->wte, m->wpe));
    for (int l = 0; l < m->cfg.layers; l++) {
        struct block *b = &m->block[l];
        TRY(need(m, l + 1));
        TRY(attention_half_fwd(m, b, x, delta));
        TRY(ffn_half_fwd(m, b));
        TRY(linear_fwd(m, &b->down, rows(m, m->delta), rows(m, b->h)));
        x = rows(m, b->res2);
        delta = rows(m, m->delta);
    }
    TRY(need(m, m->params->n_units - 1));
    return op_norm_fwd(m->dev, rows(m, m->nf), rows(m, m->resf), rows(m, m->statf), x, delta, m->normf.w, m->normf.b,
                       m->cfg.norm_eps);
}

/* The classifier and its loss, a chunk of tokens at a time: logits of a chunk are turned into their own gradient and
 * used up before the next chunk's exist. train: nf takes its gradient. */
static int head_fwd_bwd(struct model *m, bool train, double grad_scale)
{
    const bool with_z = train && tensor_given(m->z_loss);
    ASSERT(m->logits.dtype == DT_F32); /* in evaluation too, whatever the device and the type of activations */
    for (int64_t at = 0; at < m->tokens; at += m->chunk) {
        const int64_t n = m->tokens - at < m->chunk ? m->tokens - at : m->chunk;
        const struct tensor nf = tensor_rows(m->nf, at, n), logits = tensor_rows(m->logits, 0, n);
        const struct tensor dlogits = train ? tensor_rows(m->dlogits, 0, n) : TENSOR_NONE;
        TRY(linear_fwd(m, &m->head, logits, nf));
        TRY(op_xent(m->dev, tensor_range(m->loss, at, n), with_z ? tensor_range(m->z_loss, at, n) : TENSOR_NONE,
                    dlogits, logits, tensor_range(m->target, at, n), m->vocab_size, grad_scale, m->cfg.z_loss));
        if (train) TRY(linear_bwd(m, &m->head, nf, dlogits, nf));
    }
    if (with_z) TRY(op_sum_fixed(m->dev, tensor_range(m->loss_sum, 1, 1), m->z_loss, MODEL_LOSS_SCALE, m->fault));
    return op_sum_fixed(m->dev, tensor_range(m->loss_sum, 0, 1), m->loss, MODEL_LOSS_SCALE, m->fault);
}

int model_forward(struct model *m, bool train, double grad_scale)
{
    if (train) {
        TRY(op_fill(m->dev, m->unit_grad[0], 0));
        TRY(op_fill(m->dev, m->unit_grad[m->params->n_units - 1], 0));
    }
    TRY(trunk_fwd(m));
    return head_fwd_bwd(m, train, grad_scale);
}

static int elementwise_recompute(struct model *m, const struct block *b)
{
    const double eps = m->cfg.norm_eps;
    TRY(op_norm_fwd(m->dev, b->n1, TENSOR_NONE, b->stat1, b->res, TENSOR_NONE, b->norm1.w, b->norm1.b, eps));
    TRY(op_norm_fwd(m->dev, b->n2, TENSOR_NONE, b->stat2, b->res2, TENSOR_NONE, b->norm2.w, b->norm2.b, eps));
    return m->cfg.arch == ARCH_LLAMA ? op_swiglu_fwd(m->dev, b->h, b->up_act) : 0;
}

/* Brings back what the forward pass did not keep of a block. The last block's values are still there. */
static int block_recompute(struct model *m, int layer)
{
    struct block *b = &m->block[layer];
    if (m->cfg.recompute == RECOMPUTE_NONE || layer == m->cfg.layers - 1) return 0;
    if (m->cfg.recompute == RECOMPUTE_ELEMENTWISE) return elementwise_recompute(m, b);
    TRY(attention_half_fwd(m, b, TENSOR_NONE, TENSOR_NONE));
    return m->cfg.recompute == RECOMPUTE_BLOCK ? ffn_half_fwd(m, b) : 0;
}

int model_backward(struct model *m, model_unit_done done, void *context)
{
    const int head = m->params->n_units - 1;
    TRY(op_norm_bwd(m->dev, m->dres, m->normf.dw, m->normf.db, m->nf, TENSOR_NONE, m->resf, m->statf, m->normf.w));
    TRY(done(context, head, m->unit_grad[head]));
    for (int l = (int)m->cfg.layers - 1; l >= 0; l--) {
        TRY(op_fill(m->dev, m->unit_grad[l + 1], 0));
        TRY(block_recompute(m, l));
        TRY(ffn_half_bwd(m, &m->block[l]));
        TRY(attention_half_bwd(m, &m->block[l]));
        TRY(done(context, l + 1, m->unit_grad[l + 1]));
    }
    TRY(op_embed_bwd(m->dev, m->dwte, m->dwpe, m->dres, m->tok, m->pos));
    return done(context, 0, m->unit_grad[0]);
}

int model_load_batch(struct model *m, const int32_t *tok, const int32_t *target, const int32_t *start,
                     const int32_t *pos)
{
    const struct {
        struct tensor to;
        const int32_t *from;
    } copies[] = {{m->tok, tok}, {m->target, target}, {m->start, start}, {m->pos, pos}};
    for (size_t i = 0; i < sizeof copies / sizeof *copies; i++) {
        TRY(m->dev->table->upload(m->dev, copies[i].to.data, copies[i].from, tensor_bytes(copies[i].to)));
    }
    return 0;
}

int model_decode(struct model *m, const int32_t *tok, const int32_t *pos, int64_t n, float *logits)
{
    struct device *dev = m->dev;
    const size_t bytes = (size_t)(m->sequences * n) * sizeof *tok;
    m->tokens = m->sequences * n;
    ASSERT(m->tokens <= m->tokens_max);
    TRY(dev->table->upload(dev, m->tok.data, tok, bytes));
    TRY(dev->table->upload(dev, m->pos.data, pos, bytes));
    for (int64_t s = 0; s < m->sequences; s++) {
        int64_t row = n - 1;
        while (row > 0 && pos[s * n + row] < 0)
            row--;
        const int32_t at = (int32_t)(s * n + row);
        TRY(dev->table->upload(dev, tensor_range(m->last, s, 1).data, &at, sizeof at));
    }
    TRY(trunk_fwd(m));
    /* Picking rows of nf is what an embedding does. */
    TRY(op_embed_fwd(dev, m->nf_last, m->last, TENSOR_NONE, rows(m, m->nf), TENSOR_NONE));
    TRY(linear_fwd(m, &m->head, m->logits, m->nf_last));
    return dev->table->download(dev, logits, m->logits.data, tensor_bytes(m->logits));
}

static int linear_pack(struct model *m, const struct linear *l)
{
    if (tensor_given(l->pack_fwd)) TRY(op_pack(m->dev, l->pack_fwd, l->w, !l->in_out));
    if (tensor_given(l->pack_bwd)) TRY(op_pack(m->dev, l->pack_bwd, l->w, l->in_out));
    return 0;
}

int model_weights_changed(struct model *m)
{
    if (!tensor_given(m->head.pack_fwd)) return 0; /* this backend packs nothing */
    for (int u = 0; u < m->params->n_units; u++)
        TRY(need(m, u));
    for (int l = 0; l < m->cfg.layers; l++) {
        const struct block *b = &m->block[l];
        TRY(linear_pack(m, &b->qkv));
        TRY(linear_pack(m, &b->out));
        TRY(linear_pack(m, &b->up));
        TRY(linear_pack(m, &b->down));
    }
    return linear_pack(m, &m->head);
}

int model_start(struct model *m)
{
    return tensor_given(m->rope) ? op_rope_table(m->dev, m->rope, m->cfg.rope_theta) : 0;
}

double model_flops_per_token(const struct config_model *c, int64_t vocab_size)
{
    const double q = (double)(c->heads * c->head_dim), kv = (double)(c->kv_heads * c->head_dim);
    const double width = (double)c->hidden, ffn = (double)c->ffn_hidden * (c->arch == ARCH_LLAMA ? 3 : 2);
    const double weights = (double)c->layers * width * (2 * q + 2 * kv + ffn) + width * (double)vocab_size;
    /* Causal attention: half of the square, two products of 2 operations each, and twice that again backward. */
    const double attention = 6.0 * (double)c->layers * q * (double)c->seq_len;
    return 6.0 * weights + attention;
}
