/* Attention by cuDNN 9, through its C API: operation graphs of its backend, which it knows as scaled dot-product
 * attention and runs as one or a few kernels.
 *
 * THIS HAS NOT RUN ON A GPU YET. cuDNN 9.19 accepts both graphs, on a machine without one; whether it has engines for them,
 * and what they compute, is not known. attention_choice.cu compares its results with our own kernels' before it uses them.
 *
 * Forward: P = softmax(mask(scale·Q·Kᵀ)), O = P·V, and the log of the sum of exponentials. Backward, from that: P again,
 * dV = Pᵀ·dO, dS = P·(dO·Vᵀ − Σ dO·O)·scale, dK = dSᵀ·Q, dQ = dS·K. dQ is asked for as the product itself: then cuDNN
 * keeps dS in its workspace (2 bytes for each pair of tokens of each head), and sums in a fixed order. The other form,
 * with dQ accumulated in fp32, would add by atomics. Engines that are noted as not deterministic are passed over.
 *
 * A tensor is [sequences, heads, rows, columns] with a stride for each, so a packed row of qkv needs no copy: heads are D
 * elements apart, rows W. Results of one step of a graph that the next one reads are virtual: they have no memory.
 *
 * The first call that fails is kept in the graph under construction, and all later ones do nothing, so that a graph reads
 * as its formulas do. */
#include "attention_library.h"

#include "err.h"

#include <cudnn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#define DESCRIPTORS_MAX 192
#define OPS_MAX 32
#define CONFIGS_MAX 16
#define VERSION_MIN 91100 /* 9.11: 9.10 has known faults in attention */
#define WORKSPACE_SLACK_BYTES ((size_t)16 << 20)
#define SEQ_LEN_STEP 128 /* cuDNN up to 9.15 needs a mask for padding otherwise */

typedef cudnnBackendDescriptor_t descriptor;

/* Tensors with memory, by which the data of a call is matched. */
enum {
    UID_Q = 1,
    UID_K,
    UID_V,
    UID_O,
    UID_LSE,
    UID_DO,
    UID_DQ,
    UID_DK,
    UID_DV,
    UID_DELTA,
    UID_SCALE,
    UID_MASKED,
    UID_ONE
};
#define UID_VIRTUAL 100 /* and up */

/* A graph, and the plan made of it. Descriptors live as long as the plan. */
struct graph {
    descriptor made[DESCRIPTORS_MAX];
    int count;
    descriptor ops[OPS_MAX];
    int op_count;
    int64_t virtual_count;
    cudnnStatus_t status; /* of the first call that failed */
    const char *failed;   /* and what it was to make */
    descriptor plan;
    int64_t workspace_bytes;
};

struct plans {
    cudnnHandle_t handle;
    struct attention_case c;
    float scale, masked, one; /* read by cuDNN from here at each call */
    struct graph fwd, bwd;
};

/* Shape and strides, in elements. */
struct layout {
    int64_t dims[4], strides[4];
};

static struct layout transposed(struct layout l)
{
    return (struct layout){{l.dims[0], l.dims[1], l.dims[3], l.dims[2]},
                           {l.strides[0], l.strides[1], l.strides[3], l.strides[2]}};
}

/* All of it lying together, row by row. */
static struct layout packed(int64_t sequences, int64_t heads, int64_t rows, int64_t cols)
{
    return (struct layout){{sequences, heads, rows, cols}, {heads * rows * cols, rows * cols, cols, 1}};
}

/* Heads of rows that are `width` elements apart. */
static struct layout heads_of(const struct attention_case *c, int heads, int64_t width)
{
    return (struct layout){{c->sequences, heads, c->seq_len, c->head_dim},
                           {c->seq_len * width, c->head_dim, width, 1}};
}

/* ---- descriptors ---- */

static descriptor make(struct graph *g, cudnnBackendDescriptorType_t type, const char *what)
{
    descriptor d = NULL;
    if (g->status != CUDNN_STATUS_SUCCESS) return NULL;
    ASSERT(g->count < DESCRIPTORS_MAX);
    g->failed = what;
    g->status = cudnnBackendCreateDescriptor(type, &d);
    if (g->status == CUDNN_STATUS_SUCCESS) g->made[g->count++] = d;
    return d;
}

static void set(struct graph *g, descriptor d, cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type,
                int64_t count, const void *values)
{
    if (g->status == CUDNN_STATUS_SUCCESS) g->status = cudnnBackendSetAttribute(d, name, type, count, values);
}

static void set_descriptor(struct graph *g, descriptor d, cudnnBackendAttributeName_t name, descriptor value)
{
    set(g, d, name, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &value);
}

static void finish(struct graph *g, descriptor d)
{
    if (g->status == CUDNN_STATUS_SUCCESS) g->status = cudnnBackendFinalize(d);
}

static descriptor tensor_of(struct graph *g, int64_t uid, cudnnDataType_t type, struct layout l, bool by_value)
{
    const int64_t alignment = by_value ? (int64_t)sizeof(float) : 16;
    const bool is_virtual = uid >= UID_VIRTUAL;
    descriptor d = make(g, CUDNN_BACKEND_TENSOR_DESCRIPTOR, "a tensor");
    set(g, d, CUDNN_ATTR_TENSOR_DATA_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &type);
    set(g, d, CUDNN_ATTR_TENSOR_DIMENSIONS, CUDNN_TYPE_INT64, 4, l.dims);
    set(g, d, CUDNN_ATTR_TENSOR_STRIDES, CUDNN_TYPE_INT64, 4, l.strides);
    set(g, d, CUDNN_ATTR_TENSOR_UNIQUE_ID, CUDNN_TYPE_INT64, 1, &uid);
    set(g, d, CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, CUDNN_TYPE_INT64, 1, &alignment);
    set(g, d, CUDNN_ATTR_TENSOR_IS_VIRTUAL, CUDNN_TYPE_BOOLEAN, 1, &is_virtual);
    set(g, d, CUDNN_ATTR_TENSOR_IS_BY_VALUE, CUDNN_TYPE_BOOLEAN, 1, &by_value);
    finish(g, d);
    return d;
}

static descriptor bf16_of(struct graph *g, int64_t uid, struct layout l)
{
    return tensor_of(g, uid, CUDNN_DATA_BFLOAT16, l, false);
}

static descriptor float_of(struct graph *g, int64_t uid, struct layout l)
{
    return tensor_of(g, uid, CUDNN_DATA_FLOAT, l, false);
}

/* A number that is given with each call. */
static descriptor number(struct graph *g, int64_t uid)
{
    return tensor_of(g, uid, CUDNN_DATA_FLOAT, packed(1, 1, 1, 1), true);
}

static descriptor virtual_of(struct graph *g, cudnnDataType_t type, struct layout l)
{
    return tensor_of(g, UID_VIRTUAL + g->virtual_count++, type, l, false);
}

/* ---- operations: each is added to the graph, and returns y ---- */

static descriptor add_op(struct graph *g, descriptor op, descriptor y)
{
    finish(g, op);
    ASSERT(g->op_count < OPS_MAX);
    g->ops[g->op_count++] = op;
    return y;
}

static descriptor matmul(struct graph *g, descriptor y, descriptor a, descriptor b)
{
    const cudnnDataType_t compute = CUDNN_DATA_FLOAT;
    descriptor kind = make(g, CUDNN_BACKEND_MATMUL_DESCRIPTOR, "a matrix product");
    set(g, kind, CUDNN_ATTR_MATMUL_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &compute);
    finish(g, kind);
    descriptor op = make(g, CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR, "a matrix product");
    set_descriptor(g, op, CUDNN_ATTR_OPERATION_MATMUL_ADESC, a);
    set_descriptor(g, op, CUDNN_ATTR_OPERATION_MATMUL_BDESC, b);
    set_descriptor(g, op, CUDNN_ATTR_OPERATION_MATMUL_CDESC, y);
    set_descriptor(g, op, CUDNN_ATTR_OPERATION_MATMUL_DESC, kind);
    return add_op(g, op, y);
}

static descriptor pointwise_kind(struct graph *g, cudnnPointwiseMode_t mode, cudnnDataType_t compute, int64_t axis)
{
    descriptor kind = make(g, CUDNN_BACKEND_POINTWISE_DESCRIPTOR, "a pointwise operation");
    set(g, kind, CUDNN_ATTR_POINTWISE_MODE, CUDNN_TYPE_POINTWISE_MODE, 1, &mode);
    set(g, kind, CUDNN_ATTR_POINTWISE_MATH_PREC, CUDNN_TYPE_DATA_TYPE, 1, &compute);
    if (axis >= 0) set(g, kind, CUDNN_ATTR_POINTWISE_AXIS, CUDNN_TYPE_INT64, 1, &axis);
    finish(g, kind);
    return kind;
}

/* y = mode(x, b, t); b and t may be NULL for modes that take fewer. */
static descriptor pointwise_op(struct graph *g, descriptor kind, descriptor y, descriptor x, descriptor b,
                               descriptor t)
{
    descriptor op = make(g, CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR, "a pointwise operation");
    set_descriptor(g, op, CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, kind);
    set_descriptor(g, op, CUDNN_ATTR_OPERATION_POINTWISE_XDESC, x);
    if (b) set_descriptor(g, op, CUDNN_ATTR_OPERATION_POINTWISE_BDESC, b);
    if (t) set_descriptor(g, op, CUDNN_ATTR_OPERATION_POINTWISE_TDESC, t);
    set_descriptor(g, op, CUDNN_ATTR_OPERATION_POINTWISE_YDESC, y);
    return add_op(g, op, y);
}

static descriptor pointwise(struct graph *g, cudnnPointwiseMode_t mode, descriptor y, descriptor x, descriptor b)
{
    return pointwise_op(g, pointwise_kind(g, mode, CUDNN_DATA_FLOAT, -1), y, x, b, NULL);
}

/* Over the columns, or over the heads that share a key head: wherever y has fewer than x. */
static descriptor reduce(struct graph *g, cudnnReduceTensorOp_t how, descriptor y, descriptor x)
{
    const cudnnDataType_t compute = CUDNN_DATA_FLOAT;
    descriptor kind = make(g, CUDNN_BACKEND_REDUCTION_DESCRIPTOR, "a reduction");
    set(g, kind, CUDNN_ATTR_REDUCTION_OPERATOR, CUDNN_TYPE_REDUCTION_OPERATOR_TYPE, 1, &how);
    set(g, kind, CUDNN_ATTR_REDUCTION_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &compute);
    finish(g, kind);
    descriptor op = make(g, CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR, "a reduction");
    set_descriptor(g, op, CUDNN_ATTR_OPERATION_REDUCTION_XDESC, x);
    set_descriptor(g, op, CUDNN_ATTR_OPERATION_REDUCTION_YDESC, y);
    set_descriptor(g, op, CUDNN_ATTR_OPERATION_REDUCTION_DESC, kind);
    return add_op(g, op, y);
}

/* The same elements in y's layout and type. */
static descriptor reshape(struct graph *g, descriptor y, descriptor x)
{
    descriptor op = make(g, CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR, "a reshape");
    set_descriptor(g, op, CUDNN_ATTR_OPERATION_RESHAPE_XDESC, x);
    set_descriptor(g, op, CUDNN_ATTR_OPERATION_RESHAPE_YDESC, y);
    return add_op(g, op, y);
}

/* ---- the two graphs ---- */

/* Scores that a token may not see become −∞. */
static descriptor mask(struct graph *g, const struct attention_case *c, descriptor scores)
{
    const struct layout square = packed(c->sequences, c->heads, c->seq_len, c->seq_len);
    descriptor row = virtual_of(g, CUDNN_DATA_INT32, square), col = virtual_of(g, CUDNN_DATA_INT32, square);
    descriptor seen = virtual_of(g, CUDNN_DATA_BOOLEAN, square), y = virtual_of(g, CUDNN_DATA_FLOAT, square);
    pointwise_op(g, pointwise_kind(g, CUDNN_POINTWISE_GEN_INDEX, CUDNN_DATA_FLOAT, 2), row, scores, NULL, NULL);
    pointwise_op(g, pointwise_kind(g, CUDNN_POINTWISE_GEN_INDEX, CUDNN_DATA_FLOAT, 3), col, scores, NULL, NULL);
    pointwise_op(g, pointwise_kind(g, CUDNN_POINTWISE_CMP_GE, CUDNN_DATA_BOOLEAN, -1), seen, row, col, NULL);
    return pointwise_op(g, pointwise_kind(g, CUDNN_POINTWISE_BINARY_SELECT, CUDNN_DATA_FLOAT, -1), y, scores,
                        number(g, UID_MASKED), seen);
}

static void build_fwd(struct graph *g, const struct attention_case *c)
{
    const int64_t width = (int64_t)(c->heads + 2 * c->kv_heads) * c->head_dim;
    const struct layout square = packed(c->sequences, c->heads, c->seq_len, c->seq_len);
    const struct layout column = packed(c->sequences, c->heads, c->seq_len, 1);
    descriptor q = bf16_of(g, UID_Q, heads_of(c, c->heads, width));
    descriptor kt = bf16_of(g, UID_K, transposed(heads_of(c, c->kv_heads, width)));
    descriptor v = bf16_of(g, UID_V, heads_of(c, c->kv_heads, width));
    descriptor o = bf16_of(g, UID_O, heads_of(c, c->heads, (int64_t)c->heads * c->head_dim));
    descriptor lse = float_of(g, UID_LSE, column);

    descriptor s = matmul(g, virtual_of(g, CUDNN_DATA_FLOAT, square), q, kt);
    s = pointwise(g, CUDNN_POINTWISE_MUL, virtual_of(g, CUDNN_DATA_FLOAT, square), s, number(g, UID_SCALE));
    s = mask(g, c, s);
    descriptor max = reduce(g, CUDNN_REDUCE_TENSOR_MAX, virtual_of(g, CUDNN_DATA_FLOAT, column), s);
    descriptor e = pointwise(g, CUDNN_POINTWISE_SUB, virtual_of(g, CUDNN_DATA_FLOAT, square), s, max);
    e = pointwise(g, CUDNN_POINTWISE_EXP, virtual_of(g, CUDNN_DATA_FLOAT, square), e, NULL);
    descriptor sum = reduce(g, CUDNN_REDUCE_TENSOR_ADD, virtual_of(g, CUDNN_DATA_FLOAT, column), e);
    descriptor log = pointwise(g, CUDNN_POINTWISE_LOG, virtual_of(g, CUDNN_DATA_FLOAT, column), sum, NULL);
    pointwise(g, CUDNN_POINTWISE_ADD, lse, max, log);
    descriptor p = pointwise(g, CUDNN_POINTWISE_DIV, virtual_of(g, CUDNN_DATA_BFLOAT16, square), e, sum);
    matmul(g, o, p, v);
}

/* dk or dv = Pᵀ·x of every query head, summed over the heads that share a key head. */
static void gradient_of_keys(struct graph *g, const struct attention_case *c, descriptor dk, descriptor p,
                             descriptor x)
{
    const struct layout square = packed(c->sequences, c->heads, c->seq_len, c->seq_len);
    const struct layout each = packed(c->sequences, c->heads, c->seq_len, c->head_dim);
    descriptor pt = reshape(g, virtual_of(g, CUDNN_DATA_BFLOAT16, transposed(square)), p);
    if (c->heads == c->kv_heads) {
        matmul(g, dk, pt, x);
    } else {
        descriptor all = matmul(g, virtual_of(g, CUDNN_DATA_BFLOAT16, each), pt, x);
        reduce(g, CUDNN_REDUCE_TENSOR_ADD, dk, all);
    }
}

static void build_bwd(struct graph *g, const struct attention_case *c)
{
    const int64_t width = (int64_t)(c->heads + 2 * c->kv_heads) * c->head_dim;
    const struct layout square = packed(c->sequences, c->heads, c->seq_len, c->seq_len);
    const struct layout column = packed(c->sequences, c->heads, c->seq_len, 1);
    const struct layout q_rows = heads_of(c, c->heads, width), k_rows = heads_of(c, c->kv_heads, width);
    const struct layout o_rows = heads_of(c, c->heads, (int64_t)c->heads * c->head_dim);
    descriptor q = bf16_of(g, UID_Q, q_rows);
    descriptor kt = bf16_of(g, UID_K, transposed(k_rows)), vt = bf16_of(g, UID_V, transposed(k_rows));
    descriptor o = bf16_of(g, UID_O, o_rows), d_o = bf16_of(g, UID_DO, o_rows);
    descriptor lse = float_of(g, UID_LSE, column), delta = float_of(g, UID_DELTA, column);
    descriptor dq = bf16_of(g, UID_DQ, q_rows), dk = bf16_of(g, UID_DK, k_rows), dv = bf16_of(g, UID_DV, k_rows);
    descriptor scale = number(g, UID_SCALE);

    /* delta = Σ dO·O; the factor 1 is part of the pattern that cuDNN knows. */
    const struct layout each = packed(c->sequences, c->heads, c->seq_len, c->head_dim);
    descriptor r = pointwise(g, CUDNN_POINTWISE_MUL, virtual_of(g, CUDNN_DATA_FLOAT, each), d_o, o);
    r = reduce(g, CUDNN_REDUCE_TENSOR_ADD, virtual_of(g, CUDNN_DATA_FLOAT, column), r);
    pointwise(g, CUDNN_POINTWISE_MUL, delta, r, number(g, UID_ONE));

    descriptor p = matmul(g, virtual_of(g, CUDNN_DATA_FLOAT, square), q, kt);
    p = pointwise(g, CUDNN_POINTWISE_MUL, virtual_of(g, CUDNN_DATA_FLOAT, square), p, scale);
    p = pointwise(g, CUDNN_POINTWISE_SUB, virtual_of(g, CUDNN_DATA_FLOAT, square), p, lse);
    p = mask(g, c, p);
    p = pointwise(g, CUDNN_POINTWISE_EXP, virtual_of(g, CUDNN_DATA_FLOAT, square), p, NULL);
    gradient_of_keys(g, c, dv, p, d_o);

    descriptor ds = matmul(g, virtual_of(g, CUDNN_DATA_FLOAT, square), d_o, vt);
    ds = pointwise(g, CUDNN_POINTWISE_SUB, virtual_of(g, CUDNN_DATA_FLOAT, square), ds, delta);
    ds = pointwise(g, CUDNN_POINTWISE_MUL, virtual_of(g, CUDNN_DATA_FLOAT, square), ds, p);
    ds = pointwise(g, CUDNN_POINTWISE_MUL, virtual_of(g, CUDNN_DATA_FLOAT, square), ds, scale);
    gradient_of_keys(g, c, dk, ds, q);
    matmul(g, dq, ds, reshape(g, virtual_of(g, CUDNN_DATA_BFLOAT16, k_rows), kt));
}

/* ---- plans ---- */

/* Whether the configuration's engine repeats its results. */
static bool is_deterministic(struct graph *g, descriptor config)
{
    cudnnBackendNumericalNote_t notes[CUDNN_NUMERICAL_NOTE_TYPE_COUNT];
    int64_t count = 0;
    descriptor engine = make(g, CUDNN_BACKEND_ENGINE_DESCRIPTOR, "an engine");
    if (g->status != CUDNN_STATUS_SUCCESS ||
        cudnnBackendGetAttribute(config, CUDNN_ATTR_ENGINECFG_ENGINE, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &count,
                                 &engine) != CUDNN_STATUS_SUCCESS ||
        cudnnBackendGetAttribute(engine, CUDNN_ATTR_ENGINE_NUMERICAL_NOTE, CUDNN_TYPE_NUMERICAL_NOTE,
                                 CUDNN_NUMERICAL_NOTE_TYPE_COUNT, &count, notes) != CUDNN_STATUS_SUCCESS)
        return false;
    for (int64_t i = 0; i < count; i++)
        if (notes[i] == CUDNN_NUMERICAL_NOTE_NONDETERMINISTIC) return false;
    return true;
}

/* Makes the plan of a configuration; false where it cannot be had. */
static bool take_config(struct graph *g, cudnnHandle_t handle, descriptor config)
{
    int64_t count = 0;
    descriptor plan = make(g, CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR, "a plan");
    set(g, plan, CUDNN_ATTR_EXECUTION_PLAN_HANDLE, CUDNN_TYPE_HANDLE, 1, &handle);
    set_descriptor(g, plan, CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, config);
    if (g->status != CUDNN_STATUS_SUCCESS || cudnnBackendFinalize(plan) != CUDNN_STATUS_SUCCESS) return false;
    if (cudnnBackendGetAttribute(plan, CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE, CUDNN_TYPE_INT64, 1, &count,
                                 &g->workspace_bytes) != CUDNN_STATUS_SUCCESS)
        return false;
    g->plan = plan;
    return true;
}

/* The heuristic's configurations, best first, into `configs`; how many. */
static int64_t find_configs(struct graph *g, cudnnHandle_t handle, descriptor configs[CONFIGS_MAX])
{
    const cudnnBackendHeurMode_t mode = CUDNN_HEUR_MODE_A;
    int64_t count = 0;
    descriptor all = make(g, CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR, "the graph");
    set(g, all, CUDNN_ATTR_OPERATIONGRAPH_HANDLE, CUDNN_TYPE_HANDLE, 1, &handle);
    set(g, all, CUDNN_ATTR_OPERATIONGRAPH_OPS, CUDNN_TYPE_BACKEND_DESCRIPTOR, g->op_count, g->ops);
    finish(g, all);
    descriptor heuristic = make(g, CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR, "the heuristic");
    set_descriptor(g, heuristic, CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, all);
    set(g, heuristic, CUDNN_ATTR_ENGINEHEUR_MODE, CUDNN_TYPE_HEUR_MODE, 1, &mode);
    finish(g, heuristic);
    for (int i = 0; i < CONFIGS_MAX; i++)
        configs[i] = make(g, CUDNN_BACKEND_ENGINECFG_DESCRIPTOR, "a configuration");
    if (g->status == CUDNN_STATUS_SUCCESS)
        g->status = cudnnBackendGetAttribute(heuristic, CUDNN_ATTR_ENGINEHEUR_RESULTS, CUDNN_TYPE_BACKEND_DESCRIPTOR,
                                             CONFIGS_MAX, &count, configs);
    return g->status == CUDNN_STATUS_SUCCESS ? count : 0;
}

/* The first of the heuristic's configurations that is deterministic and can be planned. */
static int plan_graph(struct graph *g, cudnnHandle_t handle, const char *pass)
{
    descriptor configs[CONFIGS_MAX];
    const int64_t count = find_configs(g, handle, configs);
    for (int64_t i = 0; i < count && !g->plan; i++)
        if (is_deterministic(g, configs[i])) (void)take_config(g, handle, configs[i]);
    if (g->status != CUDNN_STATUS_SUCCESS)
        FAIL(ERR_UNSUPPORTED, "cuDNN %zu refuses %s of its attention %s: %s", cudnnGetVersion(), g->failed, pass,
             cudnnGetErrorString(g->status));
    if (!g->plan)
        FAIL(ERR_UNSUPPORTED, "cuDNN %zu has no deterministic attention %s for these shapes", cudnnGetVersion(),
             pass);
    return 0;
}

static void graph_free(struct graph *g)
{
    while (g->count > 0)
        (void)cudnnBackendDestroyDescriptor(g->made[--g->count]);
}

static void cudnn_close(void *state)
{
    struct plans *plans = state;
    if (!plans) return;
    graph_free(&plans->bwd);
    graph_free(&plans->fwd);
    if (plans->handle) (void)cudnnDestroy(plans->handle);
    free(plans);
}

static int check_case(const struct attention_case *c)
{
    if (cudnnGetVersion() < VERSION_MIN)
        FAIL(ERR_UNSUPPORTED, "cuDNN %zu is too old, %d is the least", cudnnGetVersion(), VERSION_MIN);
    if (c->seq_len % SEQ_LEN_STEP != 0)
        FAIL(ERR_UNSUPPORTED, "cuDNN's attention is used for sequences of a multiple of %d tokens, not %d",
             SEQ_LEN_STEP, c->seq_len);
    return 0;
}

static int open_plans(struct plans *plans, struct device *dev)
{
    const cudnnStatus_t created = cudnnCreate(&plans->handle);
    if (created != CUDNN_STATUS_SUCCESS) FAIL(ERR_DEVICE, "cuDNN does not start: %s", cudnnGetErrorString(created));
    const cudnnStatus_t status = cudnnSetStream(plans->handle, dev->table->queue(dev));
    if (status != CUDNN_STATUS_SUCCESS) FAIL(ERR_DEVICE, "cuDNN: no stream: %s", cudnnGetErrorString(status));
    build_fwd(&plans->fwd, &plans->c);
    build_bwd(&plans->bwd, &plans->c);
    TRY(plan_graph(&plans->fwd, plans->handle, "forward"));
    return plan_graph(&plans->bwd, plans->handle, "backward");
}

static int cudnn_open(struct device *dev, const struct attention_case *c, void **state)
{
    *state = NULL;
    TRY(check_case(c));
    struct plans *plans = calloc(1, sizeof *plans);
    if (!plans) FAIL(ERR_SYSTEM, "no memory for the plans of cuDNN");
    plans->c = *c;
    plans->scale = 1.0f / sqrtf((float)c->head_dim);
    plans->masked = -INFINITY;
    plans->one = 1;
    const int rc = open_plans(plans, dev);
    if (rc) {
        cudnn_close(plans);
        return rc;
    }
    *state = plans;
    return 0;
}

/* Made up of what backward may have to keep besides its inputs and results, as a flash algorithm has no other use for
 * memory; forward needs less. For each row of each query head:
 *   - dS in bf16, which is nearly all of it: S elements. NVIDIA gives the same figure for Hopper's deterministic backward
 *     (cudnn-frontend, pull request 398); without determinism it would not be there.
 *   - dQ, dK and dV in fp32: a sum of dQ that is rounded at the end, and each query head's share in its key head's
 *     gradients. 3·D elements.
 *   - two sums in fp32, of the softmax and delta.
 * And a constant for counters and alignment. All sequences here are whole tiles of every engine, so none is padded. */
static size_t cudnn_workspace_bound(const struct attention_case *c)
{
    const size_t rows = (size_t)c->sequences * (size_t)c->heads * (size_t)c->seq_len;
    const size_t scores = (size_t)c->seq_len * dtype_bytes(DT_BF16);
    const size_t sums = (3 * (size_t)c->head_dim + 2) * sizeof(float);
    if (check_case(c) == 0) return rows * (scores + sums) + WORKSPACE_SLACK_BYTES;
    err_clear();
    return 0;
}

static size_t cudnn_workspace_bytes(const void *state)
{
    const struct plans *plans = state;
    const int64_t fwd = plans->fwd.workspace_bytes, bwd = plans->bwd.workspace_bytes;
    return (size_t)(fwd > bwd ? fwd : bwd);
}

/* ---- calls ---- */

static int run_plan(const struct plans *plans, const struct graph *g, void *workspace, int64_t count,
                    const int64_t *uids, void *const *data)
{
    descriptor pack = NULL;
    cudnnStatus_t status = cudnnBackendCreateDescriptor(CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR, &pack);
    if (status == CUDNN_STATUS_SUCCESS)
        status = cudnnBackendSetAttribute(pack, CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, CUDNN_TYPE_INT64, count, uids);
    if (status == CUDNN_STATUS_SUCCESS)
        status =
            cudnnBackendSetAttribute(pack, CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, CUDNN_TYPE_VOID_PTR, count, data);
    if (status == CUDNN_STATUS_SUCCESS)
        status =
            cudnnBackendSetAttribute(pack, CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR, 1, &workspace);
    if (status == CUDNN_STATUS_SUCCESS) status = cudnnBackendFinalize(pack);
    if (status == CUDNN_STATUS_SUCCESS) status = cudnnBackendExecute(plans->handle, g->plan, pack);
    if (pack) (void)cudnnBackendDestroyDescriptor(pack);
    if (status != CUDNN_STATUS_SUCCESS) FAIL(ERR_DEVICE, "cuDNN's attention: %s", cudnnGetErrorString(status));
    return 0;
}

/* Element `at` of a bf16 tensor. */
static void *element(struct tensor t, int64_t at)
{
    return (char *)t.data + (size_t)at * dtype_bytes(DT_BF16);
}

static int cudnn_fwd(void *state, void *workspace, struct tensor o, struct tensor lse, struct tensor qkv)
{
    struct plans *plans = state;
    const int64_t k = (int64_t)plans->c.heads * plans->c.head_dim;
    const int64_t v = k + (int64_t)plans->c.kv_heads * plans->c.head_dim;
    const int64_t uids[] = {UID_Q, UID_K, UID_V, UID_O, UID_LSE, UID_SCALE, UID_MASKED};
    void *const data[] = {qkv.data, element(qkv, k), element(qkv, v), o.data,
                          lse.data, &plans->scale,   &plans->masked};
    return run_plan(plans, &plans->fwd, workspace, sizeof uids / sizeof *uids, uids, data);
}

static int cudnn_bwd(void *state, void *workspace, struct tensor dqkv, struct tensor dout, struct tensor o,
                     struct tensor lse, struct tensor delta, struct tensor qkv)
{
    struct plans *plans = state;
    const int64_t k = (int64_t)plans->c.heads * plans->c.head_dim;
    const int64_t v = k + (int64_t)plans->c.kv_heads * plans->c.head_dim;
    const int64_t uids[] = {UID_Q,  UID_K,  UID_V,     UID_O,     UID_LSE,    UID_DO, UID_DQ,
                            UID_DK, UID_DV, UID_DELTA, UID_SCALE, UID_MASKED, UID_ONE};
    void *const data[] = {qkv.data,      element(qkv, k), element(qkv, v),  o.data,           lse.data,
                          dout.data,     dqkv.data,       element(dqkv, k), element(dqkv, v), delta.data,
                          &plans->scale, &plans->masked,  &plans->one};
    return run_plan(plans, &plans->bwd, workspace, sizeof uids / sizeof *uids, uids, data);
}

const struct attention_library *attention_cudnn(void)
{
    static const struct attention_library library = {.name = "cuDNN",
                                                     .version = cudnnGetVersion,
                                                     .open = cudnn_open,
                                                     .close = cudnn_close,
                                                     .workspace_bound = cudnn_workspace_bound,
                                                     .workspace_bytes = cudnn_workspace_bytes,
                                                     .fwd = cudnn_fwd,
                                                     .bwd = cudnn_bwd};
    return &library;
}
