/* The ops: what each computes, its shapes, what may alias, and how to call it.
 *
 * Every op is called as op_X(dev, …); the wrapper in kernels/ops.c checks types and shapes (ERR_BUG on a mistake) and
 * dispatches to the device's table. Ops never allocate. An op is deterministic: the same inputs give the same bits on
 * every call, with any number of threads, and a row's result does not depend on the other rows: neither on what they hold
 * nor, but for what a GPU's library computes (matmul, matmul_gelu, matmul_dgelu, attention where it was chosen), on how
 * many there are. Sums are kept in fp32 or better whatever the type of the data.
 *
 * Notation: T tokens (batch × sequence), C model width, V vocabulary, H query heads, K key/value heads, D head size,
 * W = (H + 2K)·D the width of a packed qkv row: H query heads, then K key heads, then K value heads, D elements each.
 * "act" is the compute type, f32 or bf16, the same for all act tensors of one call. Gradients of parameters (dw, db, …)
 * are f32 and are ADDED TO; gradients of activations (dx, …) are act and are overwritten. Tensors do not alias unless
 * said so. Absent optional tensors are TENSOR_NONE. All sizes may be odd; 0 rows is allowed and does nothing.
 *
 *  fill            y[i] = value. Any type but i64 takes a double; i64 takes it truncated.
 *  copy            y = x, converted between f32 and bf16 (round to nearest even), or the same type. Same element count.
 *  embed_fwd       y[T,C] act = wte[tok[t]] (+ wpe[pos[t]]). tok, pos i32[T]; wte act [V,C]; wpe act [S,C] or none.
 *                  pos may be none when wpe is. A token or position out of range is a fault of the caller's data: the
 *                  backend must not read out of bounds (it clamps); the loader guarantees the range.
 *  embed_bwd       dwte[tok[t]] += dy[t]; dwpe[pos[t]] += dy[t]. Sums in the order of t.
 *  pack            packed = b in the backend's own layout, for matmuls that use b with the same tb. packed is a 1-D
 *                  tensor of b's type with device_pack_bytes(dev, b, tb) bytes. Called once after each optimizer step.
 *  matmul          y[M,N] = A·B (+ bias[N]) (+ y). a is [M,K], or [K,M] with MATMUL_TA; b is [K,N], or [N,K] with
 *                  MATMUL_TB. a and b have the same act type; y is f32 or that type. MATMUL_ADD adds to y (y f32 only).
 *                  bias is act, never with MATMUL_ADD. packed: b as made by pack with the same tb, or none; when given,
 *                  b's data is not read. A packed and an unpacked call may differ in rounding; each repeats exactly.
 *  matmul_gelu     x = A·B (+ bias[N]), rounded to act, and y = gelu_fwd of that sum, which a backend takes before or after
 *                  its rounding. a, b, packed and bias as for matmul; x and y act [M,N]; flags MATMUL_TA, MATMUL_TB.
 *  matmul_dgelu    dx = (A·B) times the derivative of gelu_fwd at x[M,N], the backward of gelu over a product's gradient;
 *                  the product may be rounded to act in between. dx act [M,N]; otherwise as matmul without bias.
 *  weight_bwd      The gradients of y = x·w + bias: dw[K,N] += xᵀ·dy and db[N] += column sums of dy, both summed in f32.
 *                  x act [M,K], dy act [M,N].
 *  bias_bwd        db[N] += column sums of dy[M,N].
 *  norm_fwd        sum = x + delta (rounded to act), y = norm(sum)·w (+ b). delta and sum are both given or both none;
 *                  without them y = norm(x)·w (+ b). b given: LayerNorm (Ba et al. 2016), mean subtracted. b none:
 *                  RMSNorm (Zhang & Sennrich 2019). eps is added to the mean square. stat f32[T,2] gets (mean, rstd),
 *                  mean 0 for RMSNorm. Shapes [T,C]; w, b act [C]. sum may alias x.
 *  norm_bwd        dx = dres + gradient of norm at x (x is the forward's sum, or its x without delta); dres may be none,
 *                  and dx may alias dres. dw, db (f32[C], db none for RMSNorm) are added to.
 *  rope_table      table f32[S, D/2, 2] = (cos, sin) of s·theta^(-2i/D), computed in double.
 *  qk_fwd          Per token: optional RMSNorm over each q and k head with weights qw, kw (act [D], both or none), then
 *                  rotate-half RoPE (Su et al. 2021; element i pairs with i + D/2) at position pos[t] with `table`; v is
 *                  copied. y, qkv act [T,W]; rstd f32[T, H+K] when qw is given, else none. y may alias qkv only when qw
 *                  is none. table none: no rotation (then qw must be given).
 *  qk_bwd          dqkv from dy; dqkv may alias dy. qkv is the forward's input (may be none when qw is none).
 *                  dqw, dkw f32[D] are added to (none without qw).
 *  attention_fwd   Causal softmax attention, scale 1/sqrt(D), tiled with an online softmax (FlashAttention-2, Dao 2023):
 *                  token t of a sequence sees tokens start[t]..t of it. qkv act [B·S, W], rotated; start i32[B·S] holds
 *                  positions within the sequence, or none for 0. H is a multiple of K. o act [B·S, H·D];
 *                  lse f32[B, H, S] = log of the sum of exponentials of the scaled scores.
 *  attention_bwd   dqkv act [B·S, W] from dout; delta f32[B, H, S] is scratch (row sums of dout·o).
 *  attention_cached  For sampling: qkv [B·n, W] are n new tokens of each of B sequences, rotated, at positions pos
 *                  i32[B·n], increasing within a sequence. Their k, v are stored in k_cache, v_cache act [B, S, K·D] at
 *                  those positions, then each attends to cache positions 0..pos. A negative pos marks padding: nothing
 *                  is stored and its o row is 0. o act [B·n, H·D].
 *  swiglu_fwd      y[T,F] = silu(x[:, :F]) · x[:, F:], x act [T,2F] (gate first) (Shazeer 2020).
 *  swiglu_bwd      dx[T,2F] from dy[T,F]; dx may alias x.
 *  gelu_fwd        y = 0.5 x (1 + tanh(sqrt(2/π)(x + 0.044715 x³))) (the tanh form of Hendrycks & Gimpel 2016).
 *  gelu_bwd        dx from dy and x; dx may alias dy.
 *  xent            For each row of logits f32[n,V] with target i32[n] ≥ 0: lse = log Σ exp over the first `classes`
 *                  columns; loss f32[n] = lse − logit[target], z f32[n] (or none) = z_loss·lse². dlogits [n,V] (f32 or
 *                  bf16, or none) is the gradient of grad_scale times their sum: grad_scale·(softmax·(1 + 2·z_loss·lse) −
 *                  onehot), 0 in the other columns. A negative target gives losses of 0 and zero gradient. An f32 dlogits
 *                  may alias logits.
 *  adamw           AdamW (Loshchilov & Hutter 2019) over n elements, in the form of PyTorch's: g' = g·clip, with the clip
 *                  of control; master −= lr·weight_decay·master; m, v updated; master −= lr/bias1 · m/(sqrt(v/bias2) +
 *                  eps). w (f32 or bf16) receives the new master rounded; w may alias master when f32. All but w are
 *                  f32[n]. Nothing is changed when control has a fault.
 *  grad_add        acc += g. acc f32: scale and limit are not used. acc i64: acc += round_to_even(g·scale) with the
 *                  scale of control, exact and so independent of order. fault i32[1] is OR-ed with FAULT_OVERFLOW when
 *                  |g·scale| > limit for any element (i64 only; that element counts as 0), and with FAULT_NAN when any
 *                  g is NaN or infinite.
 *  grad_read       g f32[n] = acc·unscale rounded once (i64), with the unscale of control, or acc (f32; g may alias acc).
 *                  For i64, g may use the first half of acc's own bytes (same data pointer).
 *  sum_fixed       acc i64[1] += Σ round_to_even(x[i]·scale); fault |= FAULT_NAN when an x is NaN or infinite or
 *                  |x·scale| > 2^52 (that element counts as 0).
 *  sum_squares     x i64[n]: the exact Σ x² as four limbs of 32 bits, lowest first, ADDED to out i64[4] (so that limbs of
 *                  up to 2^31 ranks may be summed before carrying). x f32[n]: the same of Σ x² · 2^SQUARES_BITS, kept in
 *                  double over fixed blocks in a fixed order and rounded down once; fault is OR-ed with FAULT_NAN when
 *                  that is not below 2^126.
 *  step_sums       Readies what the ranks sum up at the end of a step: sums i64[SUMS_ELEMS] gets the faults of fault i32[1]
 *                  as a 1 each, and loss i64[2]: cross-entropy, z-loss. sums[SUMS_SQUARES…] are left alone: sum_squares
 *                  puts them there.
 *  step_decide     What the step comes to, from the sums over all ranks. A fault (FAULT_STOP alone, where there is one),
 *                  squares that are not finite, or a loss more than spike_sigma standard deviations above the recent mean
 *                  (FAULT_SPIKE), goes into control's fault, which stays until the host clears it; then, and when one was
 *                  there before, nothing else changes. Else: norm = sqrt(squares)/scale (exact; else
 *                  /2^(SQUARES_BITS/2)), clip = min(1, limits.clip/(norm + 1e-6)) (1 when that is 0), unscale = 1/scale,
 *                  scale = step_scale(norm), loss with its mean and variance, z_loss, steps + 1.
 *
 * control is i64[CONTROL_ELEMS], the memory of a struct step_control (step_control.h). */
#ifndef TATARA_OPS_H
#define TATARA_OPS_H

#include "step_control.h"
#include "tensor.h"

enum { MATMUL_TA = 1, MATMUL_TB = 2, MATMUL_ADD = 4 };

struct adamw_args {
    double lr, beta1, beta2, eps, weight_decay;
    double bias1, bias2; /* 1 − beta1^t, 1 − beta2^t with t counting from 1 */
};

/* What multiplies matrices on a CPU, in the order of the words of the option. */
enum product_choice {
    PRODUCT_AUTO,    /* the library, in a build that has it */
    PRODUCT_LIBRARY, /* oneDNN */
    PRODUCT_PORTABLE, /* plain C: one chain of fused multiply-adds along k for each element, the same bits on every CPU */
};

/* What computes attention_fwd and attention_bwd, in the order of the words of the option. */
enum attention_choice {
    ATTENTION_AUTO,
    ATTENTION_FLASH, /* our own kernels */
    ATTENTION_CUDNN, /* NVIDIA's library, on GPUs */
};

/* The calls that a choice is for. */
struct attention_case {
    enum dtype act;
    int64_t sequences;
    int seq_len, heads, kv_heads, head_dim;
    bool document_mask; /* false: start is none or all 0, and need not be read */
};

#define OP_UNPAREN(...) __VA_ARGS__

struct device_graph; /* the backend's own */

/* A backend: its memory and its ops. One constant table each. */
struct device_table {
    const char *name;
    /* Fills dev->state for local device number `index`. */
    int (*open)(struct device *dev, int index);
    void (*close)(struct device *dev);
    void (*describe)(struct device *dev, char *text, size_t text_bytes);
    /* What the bits of results hang on: the kind of device, its instructions, and the libraries' versions. */
    void (*arithmetic)(struct device *dev, char *text, size_t text_bytes);
    /* Devices of this kind that the process may open; 0 when none, and open then says why. Needs no open device. */
    int (*count)(void);
    /* A name that no other device of this node has, whatever the launcher lets this process see. */
    int (*identify)(struct device *dev, char *text, size_t text_bytes);
    /* Bytes of device memory that are free, and that there are; both 0 when the system does not say. */
    int (*memory)(struct device *dev, size_t *free_bytes, size_t *total_bytes);
    /* The queue on which ops run, as libraries of the device want it (cudaStream_t); NULL when ops are done on return. */
    void *(*queue)(struct device *dev);
    /* Device memory, 128-byte aligned, zeroed. */
    int (*alloc)(struct device *dev, size_t bytes, void **data);
    void (*free)(struct device *dev, void *data, size_t bytes);
    /* Copies between host and device, in the order of the ops; on return the host side may be reused. Only a download
     * waits for what was issued before it. */
    int (*upload)(struct device *dev, void *to_device, const void *from_host, size_t bytes);
    int (*download)(struct device *dev, void *to_host, const void *from_device, size_t bytes);
    /* A download for another thread than the one that issues ops, one such thread at a time: on a queue of its own, beside
     * whatever is issued, captured or done meanwhile, and in no order with it. So what it reads must be complete before
     * the call, by a sync of the thread that issues, and may not change or be freed before it returns. It readies the
     * calling thread for the device by itself; errors are those of the calling thread. */
    int (*download_beside)(struct device *dev, void *to_host, const void *from_device, size_t bytes);
    /* Waits until all ops issued so far are done. */
    int (*sync)(struct device *dev);
    /* A stopwatch for what ops take, where they are only queued; NULL where they are done on return. clock_mark(which) notes
     * the moment, 0 or 1, at which all ops issued so far are done; clock_s gives the time from moment 0 to 1, and fails
     * before they are reached. */
    int (*clock_mark)(struct device *dev, int which);
    int (*clock_s)(struct device *dev, double *s);
    /* Bytes that `pack` writes for this b and tb; 0 when the backend reads b as it is. */
    size_t (*pack_bytes)(struct device *dev, struct tensor b, bool tb);
    /* Bytes of dev->workspace that the backend wants, with what attention of that choice may take in calls of shape c;
     * c NULL: nothing will be chosen. Needs no open device: one that is not there is taken to be able to do it all. */
    size_t (*workspace_bytes)(struct device *dev, const struct attention_case *c, enum attention_choice choice);
    /* Sets what computes attention from here on in calls of this shape; others are always flash's. ATTENTION_AUTO becomes
     * the faster one by measurement, flash when the other cannot be used, as where dev->workspace is too small for it.
     * why: one line for a person. Waits for the device; memory that it measures in is given back. ERR_UNSUPPORTED when
     * what is asked for cannot be had. */
    int (*choose_attention)(struct device *dev, const struct attention_case *c, enum attention_choice *choice,
                            char *why, size_t why_bytes);
    /* Graphs: ops that are issued as one, as often as wanted, with the same tensors and scalars each time. All four are
     * NULL where ops are done on return. From capture_begin on, ops are not done but kept; capture_end makes a graph of
     * them, or drops them when graph is NULL, and then always succeeds: it must be called after every successful
     * capture_begin. In between, what waits for the device or takes memory fails: alloc, free, upload, download, sync,
     * and matmul when a shape first comes. A graph takes memory that is in no plan: what CUDA takes for itself. */
    int (*capture_begin)(struct device *dev);
    int (*capture_end)(struct device *dev, struct device_graph **graph);
    int (*graph_launch)(struct device *dev, struct device_graph *graph);
    void (*graph_free)(struct device *dev, struct device_graph *graph);
#define OP(name, params, args) int (*name)(struct device * dev, OP_UNPAREN params);
#include "ops.def"
#undef OP
};

extern const struct device_table cpu_table;
/* The table of kernels/cuda, NULL in a build without it: which, is decided when the program is linked. */
const struct device_table *cuda_backend(void);

/* Opens the device of this kind. threads: OpenMP threads (CPU). Fails with ERR_DEVICE, saying what is missing. */
int device_open(struct device *dev, enum device_kind kind, int index, int threads);
void device_close(struct device *dev);
/* Sets what multiplies from here on; PRODUCT_AUTO after device_open. What was packed before is void. ERR_UNSUPPORTED where
 * the build has no library, and for PRODUCT_PORTABLE on a GPU, where all else changes nothing. */
int device_choose_product(struct device *dev, enum product_choice choice);
/* What the program would tell a person: "CPU, oneDNN 2.6.3, AMX bf16, 2 threads". Written into text. */
void device_describe(struct device *dev, char *text, size_t text_bytes);

#define OP(name, params, args) int op_##name(struct device *dev, OP_UNPAREN params);
#include "ops.def"
#undef OP

#define OP(name, params, args) int cpu_##name(struct device *dev, OP_UNPAREN params);
#include "ops.def"
#undef OP

#endif
