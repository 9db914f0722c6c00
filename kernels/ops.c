/* The ops as callers see them: op_X checks the types and shapes of its arguments and dispatches to the device's
 * table.
 *
 * The wrappers are made from ops.def; what is written here is one check_X per op. A wrong argument is a mistake in
 * Tatara, never bad input, so every message is an ERR_BUG that names op and argument. Contents (token numbers,
 * faults) are the backend's business. Devices are opened and closed here, too. */
#include "ops.h"

#include <math.h>
#include <stdio.h>

#include "cpu/cpu.h"
#include "err.h"

/* ---- devices ---- */

const char *dtype_name(enum dtype dtype)
{
    static const char *const names[DT_COUNT] = {"f32", "bf16", "i32", "i64"};
    return (unsigned)dtype < DT_COUNT ? names[dtype] : "?";
}

int device_open(struct device *dev, enum device_kind kind, int index, int threads)
{
    const struct device_table *table = kind == DEVICE_CUDA ? cuda_backend() : &cpu_table;
    *dev = (struct device){.kind = kind};
    if (!table) FAIL(ERR_DEVICE, "this build has no CUDA backend; build with TATARA_CUDA=ON, or use device=cpu");
    TRY(cpu_isa_check()); /* first of all, before any vector instruction */
    if (threads < 1) FAIL(ERR_BUG, "device_open: %d threads", threads);
    dev->table = table;
    dev->threads = threads;
    TRY(dev->table->open(dev, index));
    return 0;
}

void device_close(struct device *dev)
{
    if (dev->table) dev->table->close(dev);
    *dev = (struct device){.kind = dev->kind};
}

int device_choose_product(struct device *dev, enum product_choice choice)
{
    if (dev->kind == DEVICE_CPU) return cpu_choose_product(dev, choice);
    if (choice == PRODUCT_PORTABLE)
        FAIL(ERR_UNSUPPORTED, "precision.product=portable computes on a CPU: use it with device=cpu");
    return 0;
}

void device_describe(struct device *dev, char *text, size_t text_bytes)
{
    dev->table->describe(dev, text, text_bytes);
}

/* ---- checks ---- */

enum { F32 = 1 << DT_F32, BF16 = 1 << DT_BF16, I32 = 1 << DT_I32, I64 = 1 << DT_I64, ACT = F32 | BF16, ANY = 15 };

#define FREE (-1) /* any size */
#define DIMS(...) ((const int64_t[TENSOR_MAX_DIMS]){__VA_ARGS__})
#define SHAPE_TEXT_MAX 96

/* "f32 [3, 5]", with * for any size. */
static void shape_text(char *text, const char *type, int ndim, const int64_t *shape)
{
    int used = snprintf(text, SHAPE_TEXT_MAX, "%s [", type);
    for (int i = 0; i < ndim; i++) {
        const char *comma = i > 0 ? ", " : "";
        const size_t left = SHAPE_TEXT_MAX - (size_t)used;
        used += shape[i] == FREE ? snprintf(text + used, left, "%s*", comma)
                                 : snprintf(text + used, left, "%s%lld", comma, (long long)shape[i]);
    }
    snprintf(text + used, SHAPE_TEXT_MAX - (size_t)used, "]");
}

static int refuse(const char *op, const char *name, struct tensor t, const char *types, int ndim,
                  const int64_t *shape)
{
    char got[SHAPE_TEXT_MAX], wanted[SHAPE_TEXT_MAX];
    shape_text(got, dtype_name(t.dtype), t.ndim, t.shape);
    shape_text(wanted, types, ndim, shape);
    if (!tensor_given(t)) snprintf(got, sizeof got, "absent");
    FAIL(ERR_BUG, "%s: %s is %s, expected %s", op, name, got, wanted);
}

/* t has one of the types, exactly this shape (entries may be FREE) and memory. */
static int want(const char *op, const char *name, struct tensor t, unsigned types, int ndim, const int64_t *shape)
{
    bool good = t.ndim == ndim && (types >> t.dtype & 1u);
    for (int i = 0; i < ndim && good; i++)
        good = t.shape[i] >= 0 && (shape[i] == FREE || t.shape[i] == shape[i]);
    if (!good) {
        const char *names = types == ACT           ? "f32 or bf16"
                            : types == F32         ? "f32"
                            : types == BF16        ? "bf16"
                            : types == I32         ? "i32"
                            : types == I64         ? "i64"
                            : types == (F32 | I64) ? "f32 or i64"
                                                   : "any type";
        return refuse(op, name, t, names, ndim, shape);
    }
    if (!t.data && tensor_elems(t) > 0) FAIL(ERR_BUG, "%s: %s has no memory", op, name);
    return 0;
}

static int want_1d(const char *op, const char *name, struct tensor t, unsigned types, int64_t n)
{
    return want(op, name, t, types, 1, DIMS(n));
}

static int want_2d(const char *op, const char *name, struct tensor t, unsigned types, int64_t rows, int64_t cols)
{
    return want(op, name, t, types, 2, DIMS(rows, cols));
}

/* t has one of the types and as many elements as `like`, in any shape. */
static int want_count(const char *op, const char *name, struct tensor t, unsigned types, struct tensor like)
{
    if (!tensor_given(t) || tensor_elems(t) != tensor_elems(like))
        return refuse(op, name, t, "like", like.ndim, like.shape);
    return want(op, name, t, types, t.ndim, DIMS(FREE, FREE, FREE, FREE));
}

/* t has the type and shape of `like`. */
static int want_like(const char *op, const char *name, struct tensor t, struct tensor like)
{
    return want(op, name, t, 1u << like.dtype, like.ndim, like.shape);
}

/* Tensors that come together or not at all. */
static int want_both(const char *op, const char *names, struct tensor a, struct tensor b)
{
    if (tensor_given(a) != tensor_given(b)) FAIL(ERR_BUG, "%s: %s must be given together or not at all", op, names);
    return 0;
}

/* A power of two whose inverse is as far from the end of the range of floats. */
static int want_power_of_two(const char *op, double scale)
{
    int exponent = 0;
    if (!(frexp(scale, &exponent) == 0.5) || exponent > 100 || exponent < -100) {
        FAIL(ERR_BUG, "%s: scale %g is not a power of two between 2^-100 and 2^100", op, scale);
    }
    return 0;
}

static int want_heads(const char *op, int heads, int kv_heads, int64_t width)
{
    if (heads < 1 || kv_heads < 1 || width % (heads + 2 * kv_heads) != 0) {
        FAIL(ERR_BUG, "%s: a row of %lld elements cannot hold %d query and 2 × %d key and value heads", op,
             (long long)width, heads, kv_heads);
    }
    return 0;
}

/* ---- one check per op, in the order of ops.def ---- */

static int check_fill(struct device *dev, struct tensor y, double value)
{
    (void)dev, (void)value;
    return want_count("fill", "y", y, ANY, y);
}

static int check_copy(struct device *dev, struct tensor y, struct tensor x)
{
    (void)dev;
    TRY(want_count("copy", "x", x, ANY, x));
    return want_count("copy", "y", y, x.dtype == DT_F32 || x.dtype == DT_BF16 ? ACT : 1u << x.dtype, x);
}

static int check_embed_fwd(struct device *dev, struct tensor y, struct tensor tok, struct tensor pos,
                           struct tensor wte, struct tensor wpe)
{
    (void)dev;
    TRY(want_2d("embed_fwd", "wte", wte, ACT, FREE, FREE));
    TRY(want_2d("embed_fwd", "y", y, 1u << wte.dtype, FREE, wte.shape[1]));
    TRY(want_1d("embed_fwd", "tok", tok, I32, y.shape[0]));
    if (tensor_given(wpe)) {
        TRY(want_2d("embed_fwd", "wpe", wpe, 1u << wte.dtype, FREE, wte.shape[1]));
        TRY(want_1d("embed_fwd", "pos", pos, I32, y.shape[0]));
    }
    return 0;
}

static int check_embed_bwd(struct device *dev, struct tensor dwte, struct tensor dwpe, struct tensor dy,
                           struct tensor tok, struct tensor pos)
{
    (void)dev;
    TRY(want_2d("embed_bwd", "dy", dy, ACT, FREE, FREE));
    TRY(want_2d("embed_bwd", "dwte", dwte, F32, FREE, dy.shape[1]));
    TRY(want_1d("embed_bwd", "tok", tok, I32, dy.shape[0]));
    if (tensor_given(dwpe)) {
        TRY(want_2d("embed_bwd", "dwpe", dwpe, F32, FREE, dy.shape[1]));
        TRY(want_1d("embed_bwd", "pos", pos, I32, dy.shape[0]));
    }
    return 0;
}

static int check_pack(struct device *dev, struct tensor packed, struct tensor b, bool tb)
{
    TRY(want_2d("pack", "b", b, ACT, FREE, FREE));
    const size_t bytes = dev->table->pack_bytes(dev, b, tb);
    return want_1d("pack", "packed", packed, 1u << b.dtype, (int64_t)(bytes / dtype_bytes(b.dtype)));
}

static int check_matmul(struct device *dev, struct tensor y, struct tensor a, struct tensor b, struct tensor packed,
                        struct tensor bias, unsigned flags)
{
    const bool ta = flags & MATMUL_TA, tb = flags & MATMUL_TB;
    TRY(want_2d("matmul", "a", a, ACT, FREE, FREE));
    const int64_t rows = a.shape[ta ? 1 : 0], inner = a.shape[ta ? 0 : 1];
    const unsigned type = 1u << a.dtype;
    if (tensor_given(packed)) {
        struct tensor shape_only = b;
        shape_only.data = packed.data; /* b's data is not read, it may be absent */
        TRY(want_2d("matmul", "b", shape_only, type, tb ? FREE : inner, tb ? inner : FREE));
        const size_t bytes = dev->table->pack_bytes(dev, b, tb);
        TRY(want_1d("matmul", "packed", packed, type, (int64_t)(bytes / dtype_bytes(b.dtype))));
    } else {
        TRY(want_2d("matmul", "b", b, type, tb ? FREE : inner, tb ? inner : FREE));
    }
    TRY(want_2d("matmul", "y", y, flags & MATMUL_ADD ? F32 : F32 | type, rows, b.shape[tb ? 0 : 1]));
    if (tensor_given(bias)) {
        if (flags & MATMUL_ADD) FAIL(ERR_BUG, "matmul: bias is given together with MATMUL_ADD");
        TRY(want_1d("matmul", "bias", bias, type, y.shape[1]));
    }
    return 0;
}

static int check_matmul_gelu(struct device *dev, struct tensor y, struct tensor x, struct tensor a, struct tensor b,
                             struct tensor packed, struct tensor bias, unsigned flags)
{
    if (flags & MATMUL_ADD) FAIL(ERR_BUG, "matmul_gelu: MATMUL_ADD is given");
    TRY(check_matmul(dev, x, a, b, packed, bias, flags));
    TRY(want_2d("matmul_gelu", "x", x, 1u << a.dtype, x.shape[0], x.shape[1]));
    return want_like("matmul_gelu", "y", y, x);
}

static int check_matmul_dgelu(struct device *dev, struct tensor dx, struct tensor a, struct tensor b,
                              struct tensor packed, struct tensor x, unsigned flags)
{
    if (flags & MATMUL_ADD) FAIL(ERR_BUG, "matmul_dgelu: MATMUL_ADD is given");
    TRY(check_matmul(dev, dx, a, b, packed, TENSOR_NONE, flags));
    TRY(want_2d("matmul_dgelu", "dx", dx, 1u << a.dtype, dx.shape[0], dx.shape[1]));
    return want_like("matmul_dgelu", "x", x, dx);
}

static int check_weight_bwd(struct device *dev, struct tensor dw, struct tensor db, struct tensor x, struct tensor dy)
{
    (void)dev;
    TRY(want_2d("weight_bwd", "x", x, ACT, FREE, FREE));
    TRY(want_2d("weight_bwd", "dy", dy, 1u << x.dtype, x.shape[0], FREE));
    TRY(want_2d("weight_bwd", "dw", dw, F32, x.shape[1], dy.shape[1]));
    return want_1d("weight_bwd", "db", db, F32, dy.shape[1]);
}

static int check_bias_bwd(struct device *dev, struct tensor db, struct tensor dy)
{
    (void)dev;
    TRY(want_2d("bias_bwd", "dy", dy, ACT, FREE, FREE));
    return want_1d("bias_bwd", "db", db, F32, dy.shape[1]);
}

static int check_norm_fwd(struct device *dev, struct tensor y, struct tensor sum, struct tensor stat, struct tensor x,
                          struct tensor delta, struct tensor w, struct tensor b, double eps)
{
    (void)dev;
    TRY(want_2d("norm_fwd", "x", x, ACT, FREE, FREE));
    TRY(want_like("norm_fwd", "y", y, x));
    TRY(want_2d("norm_fwd", "stat", stat, F32, x.shape[0], 2));
    TRY(want_both("norm_fwd", "delta and sum", delta, sum));
    if (tensor_given(delta)) {
        TRY(want_like("norm_fwd", "delta", delta, x));
        TRY(want_like("norm_fwd", "sum", sum, x));
    }
    TRY(want_1d("norm_fwd", "w", w, 1u << x.dtype, x.shape[1]));
    if (tensor_given(b)) TRY(want_1d("norm_fwd", "b", b, 1u << x.dtype, x.shape[1]));
    if (!(eps >= 0)) FAIL(ERR_BUG, "norm_fwd: eps is %g", eps);
    return 0;
}

static int check_norm_bwd(struct device *dev, struct tensor dx, struct tensor dw, struct tensor db, struct tensor dy,
                          struct tensor dres, struct tensor x, struct tensor stat, struct tensor w)
{
    (void)dev;
    TRY(want_2d("norm_bwd", "x", x, ACT, FREE, FREE));
    TRY(want_like("norm_bwd", "dx", dx, x));
    TRY(want_like("norm_bwd", "dy", dy, x));
    if (tensor_given(dres)) TRY(want_like("norm_bwd", "dres", dres, x));
    TRY(want_2d("norm_bwd", "stat", stat, F32, x.shape[0], 2));
    TRY(want_1d("norm_bwd", "w", w, 1u << x.dtype, x.shape[1]));
    TRY(want_1d("norm_bwd", "dw", dw, F32, x.shape[1]));
    if (tensor_given(db)) TRY(want_1d("norm_bwd", "db", db, F32, x.shape[1]));
    return 0;
}

static int check_rope_table(struct device *dev, struct tensor table, double theta)
{
    (void)dev;
    if (!(theta > 0)) FAIL(ERR_BUG, "rope_table: theta is %g", theta);
    return want("rope_table", "table", table, F32, 3, DIMS(FREE, FREE, 2));
}

/* What qk_fwd and qk_bwd share: the rows y (or dy), the optional norm with its weights and rstd, and the rotation. */
static int check_qk(const char *op, struct tensor rows, struct tensor rstd, struct tensor qw, struct tensor kw,
                    struct tensor pos, struct tensor table, int heads, int kv_heads)
{
    TRY(want_heads(op, heads, kv_heads, rows.shape[1]));
    TRY(want_both(op, "qw and kw", qw, kw));
    TRY(want_both(op, "qw and rstd", qw, rstd));
    const int64_t head = rows.shape[1] / (heads + 2 * kv_heads);
    if (tensor_given(qw)) {
        TRY(want_1d(op, "qw", qw, 1u << rows.dtype, head));
        TRY(want_1d(op, "kw", kw, 1u << rows.dtype, head));
        TRY(want_2d(op, "rstd", rstd, F32, rows.shape[0], heads + kv_heads));
    }
    if (tensor_given(table)) {
        if (head % 2 != 0)
            FAIL(ERR_BUG, "%s: heads of %lld elements cannot be rotated in pairs", op, (long long)head);
        TRY(want(op, "table", table, F32, 3, DIMS(FREE, head / 2, 2)));
        TRY(want_1d(op, "pos", pos, I32, rows.shape[0]));
    } else if (!tensor_given(qw)) {
        FAIL(ERR_BUG, "%s: neither qw nor table is given", op);
    }
    return 0;
}

static int check_qk_fwd(struct device *dev, struct tensor y, struct tensor rstd, struct tensor qkv, struct tensor qw,
                        struct tensor kw, struct tensor pos, struct tensor table, int heads, int kv_heads, double eps)
{
    (void)dev, (void)eps;
    TRY(want_2d("qk_fwd", "qkv", qkv, ACT, FREE, FREE));
    TRY(want_like("qk_fwd", "y", y, qkv));
    if (tensor_given(qw) && y.data == qkv.data && y.data) FAIL(ERR_BUG, "qk_fwd: y aliases qkv, with qw given");
    return check_qk("qk_fwd", y, rstd, qw, kw, pos, table, heads, kv_heads);
}

static int check_qk_bwd(struct device *dev, struct tensor dqkv, struct tensor dqw, struct tensor dkw,
                        struct tensor dy, struct tensor rstd, struct tensor qkv, struct tensor qw, struct tensor kw,
                        struct tensor pos, struct tensor table, int heads, int kv_heads)
{
    (void)dev;
    TRY(want_2d("qk_bwd", "dy", dy, ACT, FREE, FREE));
    TRY(want_like("qk_bwd", "dqkv", dqkv, dy));
    TRY(check_qk("qk_bwd", dy, rstd, qw, kw, pos, table, heads, kv_heads));
    if (tensor_given(qw)) {
        TRY(want_like("qk_bwd", "qkv", qkv, dy));
        TRY(want_1d("qk_bwd", "dqw", dqw, F32, qw.shape[0]));
        TRY(want_1d("qk_bwd", "dkw", dkw, F32, qw.shape[0]));
    }
    return 0;
}

/* What the attention ops share: B·rows rows of qkv and of o. */
static int check_attention(const char *op, struct tensor o, struct tensor qkv, int heads, int kv_heads)
{
    TRY(want_2d(op, "qkv", qkv, ACT, FREE, FREE));
    TRY(want_heads(op, heads, kv_heads, qkv.shape[1]));
    if (heads % kv_heads != 0) FAIL(ERR_BUG, "%s: %d heads are not a multiple of %d kv_heads", op, heads, kv_heads);
    const int64_t head = qkv.shape[1] / (heads + 2 * kv_heads);
    return want_2d(op, "o", o, 1u << qkv.dtype, qkv.shape[0], head * heads);
}

static int check_attention_fwd(struct device *dev, struct tensor o, struct tensor lse, struct tensor qkv,
                               struct tensor start, int seq_len, int heads, int kv_heads)
{
    (void)dev;
    TRY(check_attention("attention_fwd", o, qkv, heads, kv_heads));
    if (seq_len < 1 || qkv.shape[0] % seq_len != 0) {
        FAIL(ERR_BUG, "attention_fwd: %lld rows are not sequences of %d", (long long)qkv.shape[0], seq_len);
    }
    TRY(want("attention_fwd", "lse", lse, F32, 3, DIMS(qkv.shape[0] / seq_len, heads, seq_len)));
    if (tensor_given(start)) TRY(want_1d("attention_fwd", "start", start, I32, qkv.shape[0]));
    return 0;
}

static int check_attention_bwd(struct device *dev, struct tensor dqkv, struct tensor dout, struct tensor o,
                               struct tensor lse, struct tensor delta, struct tensor qkv, struct tensor start,
                               int seq_len, int heads, int kv_heads)
{
    TRY(check_attention_fwd(dev, o, lse, qkv, start, seq_len, heads, kv_heads));
    TRY(want_like("attention_bwd", "dqkv", dqkv, qkv));
    TRY(want_like("attention_bwd", "dout", dout, o));
    return want_like("attention_bwd", "delta", delta, lse);
}

static int check_attention_cached(struct device *dev, struct tensor o, struct tensor k_cache, struct tensor v_cache,
                                  struct tensor qkv, struct tensor pos, int heads, int kv_heads)
{
    (void)dev;
    TRY(check_attention("attention_cached", o, qkv, heads, kv_heads));
    const int64_t head = o.shape[1] / heads;
    TRY(want("attention_cached", "k_cache", k_cache, 1u << qkv.dtype, 3, DIMS(FREE, FREE, head * kv_heads)));
    TRY(want_like("attention_cached", "v_cache", v_cache, k_cache));
    if (k_cache.shape[0] < 1 || qkv.shape[0] % k_cache.shape[0] != 0) {
        FAIL(ERR_BUG, "attention_cached: %lld rows are not new tokens of %lld sequences", (long long)qkv.shape[0],
             (long long)k_cache.shape[0]);
    }
    return want_1d("attention_cached", "pos", pos, I32, qkv.shape[0]);
}

static int check_swiglu_fwd(struct device *dev, struct tensor y, struct tensor x)
{
    (void)dev;
    TRY(want_2d("swiglu_fwd", "y", y, ACT, FREE, FREE));
    return want_2d("swiglu_fwd", "x", x, 1u << y.dtype, y.shape[0], 2 * y.shape[1]);
}

static int check_swiglu_bwd(struct device *dev, struct tensor dx, struct tensor dy, struct tensor x)
{
    (void)dev;
    TRY(want_2d("swiglu_bwd", "dy", dy, ACT, FREE, FREE));
    TRY(want_2d("swiglu_bwd", "x", x, 1u << dy.dtype, dy.shape[0], 2 * dy.shape[1]));
    return want_like("swiglu_bwd", "dx", dx, x);
}

static int check_gelu_fwd(struct device *dev, struct tensor y, struct tensor x)
{
    (void)dev;
    TRY(want_2d("gelu_fwd", "x", x, ACT, FREE, FREE));
    return want_like("gelu_fwd", "y", y, x);
}

static int check_gelu_bwd(struct device *dev, struct tensor dx, struct tensor dy, struct tensor x)
{
    (void)dev;
    TRY(want_2d("gelu_bwd", "x", x, ACT, FREE, FREE));
    TRY(want_like("gelu_bwd", "dy", dy, x));
    return want_like("gelu_bwd", "dx", dx, x);
}

static int check_xent(struct device *dev, struct tensor loss, struct tensor z, struct tensor dlogits,
                      struct tensor logits, struct tensor target, int64_t classes, double grad_scale, double z_loss)
{
    (void)dev, (void)grad_scale, (void)z_loss;
    TRY(want_2d("xent", "logits", logits, F32, FREE, FREE));
    TRY(want_1d("xent", "loss", loss, F32, logits.shape[0]));
    if (tensor_given(z)) TRY(want_1d("xent", "z", z, F32, logits.shape[0]));
    TRY(want_1d("xent", "target", target, I32, logits.shape[0]));
    if (classes < 1 || classes > logits.shape[1])
        FAIL(ERR_BUG, "xent: %lld classes in %lld columns", (long long)classes, (long long)logits.shape[1]);
    if (tensor_given(dlogits)) TRY(want_2d("xent", "dlogits", dlogits, ACT, logits.shape[0], logits.shape[1]));
    return 0;
}

static int check_adamw(struct device *dev, struct tensor w, struct tensor master, struct tensor m, struct tensor v,
                       struct tensor g, struct tensor control, struct adamw_args args)
{
    (void)dev;
    TRY(want_1d("adamw", "control", control, I64, CONTROL_ELEMS));
    TRY(want_count("adamw", "master", master, F32, master));
    TRY(want_count("adamw", "w", w, ACT, master));
    TRY(want_count("adamw", "m", m, F32, master));
    TRY(want_count("adamw", "v", v, F32, master));
    TRY(want_count("adamw", "g", g, F32, master));
    if (!(args.bias1 > 0) || !(args.bias2 > 0)) FAIL(ERR_BUG, "adamw: bias1 %g, bias2 %g", args.bias1, args.bias2);
    return 0;
}

static int check_grad_add(struct device *dev, struct tensor acc, struct tensor g, struct tensor control, double limit,
                          struct tensor fault)
{
    (void)dev;
    TRY(want_1d("grad_add", "control", control, I64, CONTROL_ELEMS));
    TRY(want_count("grad_add", "g", g, F32, g));
    TRY(want_count("grad_add", "acc", acc, F32 | I64, g));
    TRY(want_1d("grad_add", "fault", fault, I32, 1));
    if (acc.dtype == DT_F32) return 0;
    if (!(limit >= 0) || limit > 0x1p62) FAIL(ERR_BUG, "grad_add: limit %g is not between 0 and 2^62", limit);
    return 0;
}

static int check_grad_read(struct device *dev, struct tensor g, struct tensor acc, struct tensor control)
{
    (void)dev;
    TRY(want_1d("grad_read", "control", control, I64, CONTROL_ELEMS));
    TRY(want_count("grad_read", "acc", acc, F32 | I64, acc));
    return want_count("grad_read", "g", g, F32, acc);
}

static int check_sum_fixed(struct device *dev, struct tensor acc, struct tensor x, double scale, struct tensor fault)
{
    (void)dev;
    TRY(want_count("sum_fixed", "x", x, F32, x));
    TRY(want_1d("sum_fixed", "acc", acc, I64, 1));
    TRY(want_1d("sum_fixed", "fault", fault, I32, 1));
    return want_power_of_two("sum_fixed", scale);
}

static int check_sum_squares(struct device *dev, struct tensor out, struct tensor x, struct tensor fault)
{
    (void)dev;
    TRY(want_count("sum_squares", "x", x, F32 | I64, x));
    TRY(want_1d("sum_squares", "fault", fault, I32, 1));
    return want_1d("sum_squares", "out", out, I64, 4);
}

static int check_step_sums(struct device *dev, struct tensor sums, struct tensor fault, struct tensor loss)
{
    (void)dev;
    TRY(want_1d("step_sums", "sums", sums, I64, SUMS_ELEMS));
    TRY(want_1d("step_sums", "fault", fault, I32, 1));
    return want_1d("step_sums", "loss", loss, I64, 2);
}

static int check_step_decide(struct device *dev, struct tensor control, struct tensor sums, bool exact,
                             struct step_limits limits)
{
    (void)dev, (void)exact;
    TRY(want_1d("step_decide", "control", control, I64, CONTROL_ELEMS));
    TRY(want_1d("step_decide", "sums", sums, I64, SUMS_ELEMS));
    if (!(limits.clip >= 0) || !(limits.spike_sigma >= 0))
        FAIL(ERR_BUG, "step_decide: clip %g, spike_sigma %g", limits.clip, limits.spike_sigma);
    return 0;
}

/* ---- the wrappers ---- */

#define OP(name, params, args)                           \
    int op_##name(struct device *dev, OP_UNPAREN params) \
    {                                                    \
        TRY(check_##name(dev, OP_UNPAREN args));         \
        TRY(dev->table->name(dev, OP_UNPAREN args));     \
        return 0;                                        \
    }
#include "ops.def"
#undef OP
