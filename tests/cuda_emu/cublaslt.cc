/* cuBLASLt's matmul for the emulation: D = epilogue(alpha·op(A)·op(B) + beta·C), queued on a stream like any kernel.
 *
 * The heuristic offers two algorithms, which differ in their last bits as real ones do: the second sums two halves of k
 * apart and wants some workspace. So a caller that does not keep to one algorithm does not repeat its results. What is
 * in the workspace is overwritten by both.
 *
 * Threads: one host thread. */
#include <cublasLt.h>
#include <cuda_bf16.h>

#include <algorithm>
#include <vector>

enum { GELU_BIT = 32, DGELU_BIT = 64, AUX_BIT = 128, BIAS_BIT = 4, BGRAD_BIT = 16, PANEL = 64 };
static const size_t split_workspace_bytes = 4096;

struct cuda_emu_blas {
    size_t version;
};

struct cuda_emu_matmul {
    cublasOperation_t op_a = CUBLAS_OP_N, op_b = CUBLAS_OP_N;
    cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    void *bias = nullptr;
    void *aux = nullptr;
    int64_t aux_ld = 0;
    int32_t bias_type = -1; /* as D's */
};

struct cuda_emu_layout {
    cudaDataType_t type;
    int64_t rows, cols, ld;
    cublasLtOrder_t order = CUBLASLT_ORDER_COL;
    int32_t batches = 1;
    int64_t batch_stride = 0;
};

struct cuda_emu_preference {
    uint64_t workspace_bytes = 0;
    uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE; /* those that an algorithm may use */
};

/* A matrix in memory. */
struct matrix {
    cuda_emu_layout layout;
    char *data;
};

/* All that a call was given, kept until its stream gets there. */
struct matmul {
    cuda_emu_matmul desc;
    matrix a, b, c, d;
    float alpha, beta;
    bool split;
    void *workspace;
    size_t workspace_bytes;
};

/* ---- elements ---- */

static float load(const void *data, cudaDataType_t type, int64_t i)
{
    return type == CUDA_R_16BF ? __bfloat162float(static_cast<const __nv_bfloat16 *>(data)[i])
                               : static_cast<const float *>(data)[i];
}

static void store(void *data, cudaDataType_t type, int64_t i, float x)
{
    if (type == CUDA_R_16BF)
        static_cast<__nv_bfloat16 *>(data)[i] = __float2bfloat16_rn(x);
    else
        static_cast<float *>(data)[i] = x;
}

static int64_t place_of(const cuda_emu_layout &layout, int batch, int64_t row, int64_t col)
{
    const int64_t within = layout.order == CUBLASLT_ORDER_COL ? col * layout.ld + row : row * layout.ld + col;
    return batch * layout.batch_stride + within;
}

/* op(m) of one batch, row-major, as floats. */
static std::vector<float> gather(const matrix &m, int batch, cublasOperation_t op)
{
    const int64_t rows = m.layout.rows, cols = m.layout.cols;
    std::vector<float> values((size_t)(rows * cols));
    for (int64_t row = 0; row < rows; row++)
        for (int64_t col = 0; col < cols; col++) {
            const int64_t to = op == CUBLAS_OP_N ? row * cols + col : col * rows + row;
            values[(size_t)to] = load(m.data, m.layout.type, place_of(m.layout, batch, row, col));
        }
    return values;
}

/* ---- the product ---- */

/* The tanh form, and its derivative. */
static float gelu(float x)
{
    return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
}

static float gelu_derivative(float x)
{
    const float t = tanhf(0.79788456f * (x + 0.044715f * x * x * x));
    return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * 0.79788456f * (1.0f + 0.134145f * x * x);
}

/* b, k × n, by panels of 64 columns: element (at, col) lies at [col / 64][at][col % 64], and zeros beyond n. The sums of
 * a panel's columns fit in registers. */
static std::vector<float> panels_of(const std::vector<float> &b, int64_t k, int64_t n)
{
    std::vector<float> panels((size_t)((n + PANEL - 1) / PANEL * PANEL * k));
    for (int64_t at = 0; at < k; at++)
        for (int64_t col = 0; col < n; col++)
            panels[(size_t)((col / PANEL * k + at) * PANEL + col % PANEL)] = b[(size_t)(at * n + col)];
    return panels;
}

/* sums[i] += Σ over k in [begin, end) of a[k]·panel[k][i]. It reads nothing but what was gathered here, so sanitizers, who
 * would make it thirty times slower, need not watch it. */
__attribute__((no_sanitize("address", "undefined"))) static void
add_products(float *sums, const float *a, const float *panel, int64_t begin, int64_t end)
{
    float parts[PANEL] = {};
    for (int64_t k = begin; k < end; k++)
        for (int i = 0; i < PANEL; i++)
            parts[i] += a[k] * panel[k * PANEL + i];
    for (int i = 0; i < PANEL; i++)
        sums[i] += parts[i];
}

/* A panel's part of a row of D, from its sums. */
static void finish_row(const matmul &call, int batch, int64_t row, int64_t first, const float *sums)
{
    const cuda_emu_matmul &desc = call.desc;
    const int epilogue = desc.epilogue;
    for (int64_t col = first; col < std::min(first + PANEL, call.d.layout.cols); col++) {
        const int64_t aux_at = col * desc.aux_ld + row;
        float x = call.alpha * sums[col - first];
        if (call.beta != 0)
            x += call.beta * load(call.c.data, call.c.layout.type, place_of(call.c.layout, batch, row, col));
        if (epilogue & BIAS_BIT) x += load(desc.bias, call.d.layout.type, row);
        if (epilogue & GELU_BIT) {
            if (epilogue & AUX_BIT) store(desc.aux, call.d.layout.type, aux_at, x);
            x = gelu(x);
        }
        if (epilogue & DGELU_BIT) x *= gelu_derivative(load(desc.aux, call.d.layout.type, aux_at));
        store(call.d.data, call.d.layout.type, place_of(call.d.layout, batch, row, col), x);
    }
}

/* The gradient of a bias: sums over k of op(A) or op(B), or over the columns of D. */
static void bias_gradient(const matmul &call, const std::vector<float> &a, const std::vector<float> &b)
{
    const int64_t m = call.d.layout.rows, n = call.d.layout.cols, k = (int64_t)a.size() / m;
    const int epilogue = call.desc.epilogue;
    for (int64_t i = 0; i < (epilogue == CUBLASLT_EPILOGUE_BGRADB ? n : m); i++) {
        float sum = 0;
        for (int64_t at = 0; at < (epilogue & BGRAD_BIT ? n : k); at++)
            sum += epilogue & BGRAD_BIT ? load(call.d.data, call.d.layout.type, place_of(call.d.layout, 0, i, at))
                   : epilogue == CUBLASLT_EPILOGUE_BGRADA ? a[(size_t)(i * k + at)]
                                                          : b[(size_t)(at * n + i)];
        store(call.desc.bias, call.d.layout.type, i, sum);
    }
}

static bool run(const matmul &call)
{
    const int64_t m = call.d.layout.rows, n = call.d.layout.cols;
    const int bias_gradients = BGRAD_BIT | CUBLASLT_EPILOGUE_BGRADA | CUBLASLT_EPILOGUE_BGRADB;
    if (call.workspace) memset(call.workspace, 0xff, call.workspace_bytes);
    for (int batch = 0; batch < call.d.layout.batches; batch++) {
        const std::vector<float> a = gather(call.a, batch, call.desc.op_a), b = gather(call.b, batch, call.desc.op_b);
        const int64_t k = (int64_t)a.size() / m, half = call.split ? k / 2 : 0;
        const std::vector<float> panels = panels_of(b, k, n);
        for (int64_t first = 0; first < n; first += PANEL)
            for (int64_t row = 0; row < m; row++) {
                const float *const a_row = &a[(size_t)(row * k)], *const panel = &panels[(size_t)(first * k)];
                float sums[PANEL] = {};
                add_products(sums, a_row, panel, 0, half);
                add_products(sums, a_row, panel, half, k);
                finish_row(call, batch, row, first, sums);
            }
        if (call.desc.epilogue & bias_gradients) bias_gradient(call, a, b);
    }
    return true;
}

/* ---- what is checked ---- */

static bool layout_valid(const cuda_emu_layout &layout)
{
    const int64_t least = layout.order == CUBLASLT_ORDER_COL ? layout.rows : layout.cols;
    return layout.rows > 0 && layout.cols > 0 && layout.ld >= least && layout.batches > 0;
}

static bool shapes_fit(const cuda_emu_matmul &desc, const cuda_emu_layout &a, const cuda_emu_layout &b,
                       const cuda_emu_layout &c, const cuda_emu_layout &d)
{
    const bool ta = desc.op_a == CUBLAS_OP_T, tb = desc.op_b == CUBLAS_OP_T;
    return layout_valid(a) && layout_valid(b) && layout_valid(c) && layout_valid(d) && a.type == b.type &&
           c.type == d.type && (ta ? a.cols : a.rows) == d.rows && (tb ? b.rows : b.cols) == d.cols &&
           (ta ? a.rows : a.cols) == (tb ? b.cols : b.rows) && c.rows == d.rows && c.cols == d.cols &&
           a.batches == d.batches && b.batches == d.batches && c.batches == d.batches;
}

/* Epilogues beyond the plain one work on column-major results of one batch here, and a bias has D's type, as in CUDA.
 * GELU's input has a leading dimension of 8 elements. Gradients of a bias are refused for products in bf16 whose rows are
 * no multiple of 8: CUDA does not say which it has not, and callers must do without some. */
static bool epilogue_fits(const cuda_emu_matmul &desc, const cuda_emu_layout &a, const cuda_emu_layout &d)
{
    const int bias_gradients = BGRAD_BIT | CUBLASLT_EPILOGUE_BGRADA | CUBLASLT_EPILOGUE_BGRADB;
    if (desc.epilogue == CUBLASLT_EPILOGUE_DEFAULT) return true;
    if (desc.epilogue & AUX_BIT && desc.aux_ld % 8 != 0) return false;
    if (desc.epilogue & bias_gradients && a.type == CUDA_R_16BF && d.rows % 8 != 0) return false;
    return d.order == CUBLASLT_ORDER_COL && d.batches == 1 && (desc.bias_type == -1 || desc.bias_type == d.type);
}

static bool pointers_given(const cuda_emu_matmul &desc, const cuda_emu_layout &d)
{
    if (desc.epilogue == CUBLASLT_EPILOGUE_DEFAULT) return true;
    const bool biased = desc.epilogue & ~(GELU_BIT | DGELU_BIT | AUX_BIT);
    return (!biased || desc.bias) && (!(desc.epilogue & AUX_BIT) || (desc.aux && desc.aux_ld >= d.rows));
}

/* ---- the interface ---- */

#define STATUSES(X)                   \
    X(CUBLAS_STATUS_SUCCESS)          \
    X(CUBLAS_STATUS_NOT_INITIALIZED)  \
    X(CUBLAS_STATUS_ALLOC_FAILED)     \
    X(CUBLAS_STATUS_INVALID_VALUE)    \
    X(CUBLAS_STATUS_EXECUTION_FAILED) \
    X(CUBLAS_STATUS_NOT_SUPPORTED)

const char *cublasLtGetStatusName(cublasStatus_t status)
{
#define X(name) \
    if (status == name) return #name;
    STATUSES(X)
#undef X
    return "unknown status";
}

const char *cublasLtGetStatusString(cublasStatus_t status)
{
    return cublasLtGetStatusName(status);
}

size_t cublasLtGetVersion()
{
    return 130000;
}

cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle)
{
    *handle = new cuda_emu_blas{cublasLtGetVersion()};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle)
{
    delete handle;
    return CUBLAS_STATUS_SUCCESS;
}

/* Reads an attribute's value, whose size must be right. */
template <class T> static cublasStatus_t take(T &to, const void *value, size_t bytes)
{
    if (bytes != sizeof(T)) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(&to, value, bytes);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *desc, cublasComputeType_t, cudaDataType_t scale)
{
    if (scale != CUDA_R_32F) return CUBLAS_STATUS_NOT_SUPPORTED;
    *desc = new cuda_emu_matmul;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc)
{
    delete desc;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attribute,
                                              const void *value, size_t bytes)
{
    switch (attribute) {
    case CUBLASLT_MATMUL_DESC_TRANSA:
        return take(desc->op_a, value, bytes);
    case CUBLASLT_MATMUL_DESC_TRANSB:
        return take(desc->op_b, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE:
        return take(desc->epilogue, value, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER:
        return take(desc->bias, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER:
        return take(desc->aux, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD:
        return take(desc->aux_ld, value, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE:
        return take(desc->bias_type, value, bytes);
    }
    return CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *layout, cudaDataType_t type, uint64_t rows,
                                          uint64_t cols, int64_t ld)
{
    *layout = new cuda_emu_layout{type, (int64_t)rows, (int64_t)cols, ld};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout)
{
    delete layout;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                cublasLtMatrixLayoutAttribute_t attribute, const void *value,
                                                size_t bytes)
{
    switch (attribute) {
    case CUBLASLT_MATRIX_LAYOUT_ORDER:
        return take(layout->order, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT:
        return take(layout->batches, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET:
        return take(layout->batch_stride, value, bytes);
    }
    return CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *preference)
{
    *preference = new cuda_emu_preference;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference)
{
    delete preference;
    return CUBLAS_STATUS_SUCCESS;
}

/* Alignments are read and change nothing: every algorithm here takes any. */
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute, const void *value,
                                                    size_t bytes)
{
    uint32_t alignment = 0;
    switch (attribute) {
    case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES:
        return take(preference->workspace_bytes, value, bytes);
    case CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK:
        return take(preference->reductions, value, bytes);
    default:
        return take(alignment, value, bytes);
    }
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a,
                                              cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c,
                                              cublasLtMatrixLayout_t d, cublasLtMatmulPreference_t preference,
                                              int wanted, cublasLtMatmulHeuristicResult_t *results, int *found)
{
    *found = 0;
    if (wanted < 1 || !shapes_fit(*desc, *a, *b, *c, *d)) return CUBLAS_STATUS_INVALID_VALUE;
    if (!epilogue_fits(*desc, *a, *d)) return CUBLAS_STATUS_NOT_SUPPORTED;
    const bool splits = preference->reductions & CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    const int offered = splits && preference->workspace_bytes >= split_workspace_bytes ? 2 : 1;
    *found = std::min(wanted, offered);
    for (int i = 0; i < *found; i++) {
        results[i] = {};
        results[i].algo.data[0] = (uint64_t)i;
        results[i].workspaceSize = i == 0 ? 0 : split_workspace_bytes;
        results[i].wavesCount = 1;
    }
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t desc, const void *alpha, const void *a,
                              cublasLtMatrixLayout_t a_layout, const void *b, cublasLtMatrixLayout_t b_layout,
                              const void *beta, const void *c, cublasLtMatrixLayout_t c_layout, void *d,
                              cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t *algo, void *workspace,
                              size_t workspace_bytes, cudaStream_t stream)
{
    const bool split = algo && algo->data[0] == 1;
    if (!shapes_fit(*desc, *a_layout, *b_layout, *c_layout, *d_layout) ||
        !epilogue_fits(*desc, *a_layout, *d_layout) || !pointers_given(*desc, *d_layout) ||
        (split && (!workspace || workspace_bytes < split_workspace_bytes)))
        return CUBLAS_STATUS_INVALID_VALUE;
    const matmul call = {*desc,
                         {*a_layout, static_cast<char *>(const_cast<void *>(a))},
                         {*b_layout, static_cast<char *>(const_cast<void *>(b))},
                         {*c_layout, static_cast<char *>(const_cast<void *>(c))},
                         {*d_layout, static_cast<char *>(d)},
                         *static_cast<const float *>(alpha),
                         *static_cast<const float *>(beta),
                         split,
                         workspace,
                         workspace_bytes};
    const cudaError_t queued = cuda_emu_queue(stream, [call] { return run(call); });
    return queued == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}
