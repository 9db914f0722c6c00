/* The model: Llama and GPT-2 as settings of one forward and one backward pass over the ops.
 *
 * Notation as in ops.h: T = micro·seq_len tokens of a micro-batch, C width, W packed qkv width. All memory comes from an
 * arena: model_layout is run once over a measuring arena and once over the real one. A model never allocates. */
#ifndef TATARA_MODEL_H
#define TATARA_MODEL_H

#include "arena.h"
#include "config.h"
#include "model/params.h"
#include "ops.h"

/* Losses are summed as integers of this many per nat, so that the sum has no order. */
#define MODEL_LOSS_SCALE 0x1p24

enum model_use {
    MODEL_TRAIN,  /* forward and backward over micro-batches; also evaluates */
    MODEL_SAMPLE, /* model_decode with a key/value cache, no gradients */
};

/* A weight matrix in the layout its architecture stores, and the backend's packed forms of it for both passes. */
struct linear {
    struct tensor w, b;               /* b none for Llama */
    struct tensor dw, db;             /* f32, views into the gradients of its unit */
    struct tensor pack_fwd, pack_bwd; /* none when the backend packs nothing */
    bool in_out;                      /* stored [in, out] (GPT-2's Conv1D) instead of [out, in] */
};

struct norm {
    struct tensor w, b, dw, db;
};

/* Weights of one block and what its forward keeps for its backward. With recompute, blocks share some of these. */
struct block {
    struct norm norm1, norm2;
    struct linear qkv, out, up, down;
    struct tensor q_norm, k_norm, dq_norm, dk_norm;
    struct tensor res;              /* [T,C] residual stream at the block's entrance */
    struct tensor stat1, n1;        /* [T,2], [T,C] */
    struct tensor qkv_raw, rstd;    /* [T,W] before QK-norm, [T,H+K]; raw is qkv itself without QK-norm */
    struct tensor qkv_act;          /* [T,W] rotated */
    struct tensor o, lse;           /* [T,H·D], [B,H,S] */
    struct tensor res2, stat2, n2;  /* as res, stat1, n1, in the middle of the block */
    struct tensor up_act, h;        /* [T,2F or F], [T,F] */
    struct tensor k_cache, v_cache; /* sampling: [B,S,K·D] */
};

/* Called before a pass uses a unit's weights, which may still be on their way from other ranks. */
typedef int (*model_unit_need)(void *context, int unit);

struct model {
    struct config_model cfg;
    int64_t vocab_size;
    enum model_use use;
    struct device *dev;
    const struct params *params;
    enum dtype act;
    int64_t sequences;    /* per micro-batch (training) or prompts at once (sampling) */
    int64_t tokens;       /* in this pass: sequences times tokens of each */
    int64_t tokens_max;   /* what there is room for */
    model_unit_need need; /* NULL: all weights are always there */
    void *need_context;

    struct tensor *unit;      /* the parameters, one flat act tensor per unit */
    struct tensor *unit_grad; /* f32; all layers share one */
    struct block *block;
    struct tensor wte, wpe, dwte, dwpe;
    struct linear head; /* the classifier; its w is wte when tied */
    struct norm normf;

    struct tensor tok, target, start, pos; /* i32 [T], the micro-batch */
    struct tensor rope;
    struct tensor resf, statf, nf;        /* final residual and norm */
    struct tensor delta;                  /* [T,C] a block's output not yet added to the residual stream */
    struct tensor dres, dout, dqkv, dsum; /* backward: [T,C], [T,H·D], [T,W], [B,H,S] */
    int64_t chunk;                        /* rows of logits that exist at once */
    struct tensor logits, dlogits;        /* [chunk,V padded] f32 and act */
    struct tensor last, nf_last;          /* sampling: [B] row of each sequence's last token, [B,C] its final norm */
    struct tensor loss, z_loss;           /* f32 [T]; z_loss none where the configuration has none */
    struct tensor loss_sum;               /* i64 [2], of both, added to by every forward: nats × MODEL_LOSS_SCALE */
    struct tensor fault;                  /* i32 [1], FAULT_ bits OR-ed in by every pass */
};

/* What the training step does with a unit's gradients once its backward is complete: called in the order head, last layer
 * … first layer, embeddings (the order is the same for every micro-batch). grads is f32, padded, reused afterwards. */
typedef int (*model_unit_done)(void *context, int unit, struct tensor grads);

/* Lays the model out. Over a measuring arena the tensors have NULL data and only sizes count. sequences: micro-batch
 * (training), or prompts at once (sampling, with max_new tokens of each per call). Fails with ERR_SYSTEM. */
int model_layout(struct model *model, const struct config *cfg, const struct params *params, int64_t vocab_size,
                 struct device *dev, struct arena *arena, enum model_use use, int64_t sequences, int64_t tokens_each);
/* Computes tables; call once after the real layout. */
int model_start(struct model *model);
/* Must follow every change of the weights: lets the backend refresh its packed forms. */
int model_weights_changed(struct model *model);
/* Copies a micro-batch of host arrays i32[T] to the device. */
int model_load_batch(struct model *model, const int32_t *tok, const int32_t *target, const int32_t *start,
                     const int32_t *pos);
/* Forward pass and loss of the loaded micro-batch, added to loss_sum. train: also the z-loss, and the gradient of the sum of
 * both times grad_scale with respect to the classifier and its input, which model_backward continues from. */
int model_forward(struct model *model, bool train, double grad_scale);
/* Backward pass of the micro-batch that model_forward(train) has just done. */
int model_backward(struct model *model, model_unit_done done, void *context);
/* Sampling: n new tokens of each sequence at the given positions (negative: padding), host arrays i32 [sequences·n].
 * logits: host f32 [sequences, V], of each sequence's last token that is not padding. */
int model_decode(struct model *model, const int32_t *tok, const int32_t *pos, int64_t n, float *logits);
/* Floating-point operations of forward and backward per token: 6 per weight of a matrix product, and attention's. */
double model_flops_per_token(const struct config_model *cfg, int64_t vocab_size);
void model_close(struct model *model);

#endif
