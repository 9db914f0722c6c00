/* Matrix products by cuBLASLt, with sums in fp32: fp32 inputs are multiplied as fp32, never as TF32.
 *
 * cuBLASLt's matrices are column-major, and a row-major matrix is the column-major one of its transpose; so y = A·B is
 * asked for as yᵀ = Bᵀ·Aᵀ, b first, and nothing is transposed in memory. b is read as it is: pack has nothing to do.
 *
 * How a product is computed is a plan, made when its shape first comes and kept until the device closes. cuBLASLt's
 * heuristic offers algorithms, of which those that sum parts of k with atomics, or in less than fp32, are not asked
 * for. The first one sets the bits of the result: it is the same for the same shapes, GPU and library. Of the others,
 * only those that give the same bits on matrices made to tell orders of summation apart are kept, and the fastest of
 * these is taken. So a clock decides how long a product takes, but never what comes out: another process, on another
 * rank or after a resume, gets the same bits whatever its measurements were.
 *
 * GELU, its gradient and the gradient of a bias are epilogues of a product in bf16: GELU_AUX keeps GELU's input, DGELU
 * reads it, BGRADA sums dy, the first of the two factors for cuBLASLt, over k, into a row of the workspace that is then
 * added to db. cuBLASLt has them for some shapes only; for the others, and in fp32, where its GELU is not as exact as the
 * type, the product is followed by the plain kernels. Which it is, types, shapes, GPU and library decide, as above.
 *
 * A row's bits may depend on how many rows there are, since another shape is another plan; the other ops promise more
 * (ops.h). */
#include "cuda.cuh"

#include <cublasLt.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

#define THREADS 256
#define CANDIDATES 8
#define TIMED_RUNS 4
#define SCRATCH_ALIGNMENT ((size_t)256)
#define AUX_ALIGNMENT 8 /* cuBLASLt: rows of GELU's input are a multiple of so many elements */

/* The epilogues, by what they read or write beside the product. */
static bool takes_bias(uint32_t epilogue)
{
    return epilogue == CUBLASLT_EPILOGUE_BIAS || epilogue == CUBLASLT_EPILOGUE_GELU_AUX_BIAS;
}

static bool takes_aux(uint32_t epilogue)
{
    return epilogue == CUBLASLT_EPILOGUE_GELU_AUX || epilogue == CUBLASLT_EPILOGUE_GELU_AUX_BIAS ||
           epilogue == CUBLASLT_EPILOGUE_DGELU;
}

/* Those without which a product can be computed in other ways. */
static bool is_optional(uint32_t epilogue)
{
    return takes_aux(epilogue) || epilogue == CUBLASLT_EPILOGUE_BGRADA;
}

/* What makes two calls the same product. No padding: keys are compared as bytes. */
struct matmul_key {
    int64_t m, n, k;
    uint32_t act, y_type;               /* dtypes */
    uint32_t flags, epilogue;           /* MATMUL_…, a cublasLtEpilogue_t */
    uint32_t align_y, align_a, align_b; /* bytes that the data's addresses are multiples of, 16 at most */
    uint32_t align_bias;
};

struct matmul_plan {
    struct matmul_key key;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t a, b, y;
    cublasLtMatmulAlgo_t algo;
    size_t workspace_bytes; /* that the algorithm uses */
    bool exists;            /* cuBLASLt has an algorithm */
};

struct cuda_matmul {
    cublasLtHandle_t lt;
    struct matmul_plan *plans;
    int count, room;
};

/* The data of one call. */
struct operands {
    void *y;
    const void *a, *b;
    void *bias; /* or its gradient, which is written */
    void *aux;  /* GELU's input */
};

static int cublas_failed(const char *file, int line, const char *call, cublasStatus_t status)
{
    return err_raise(ERR_DEVICE, file, line, "cuBLASLt: %s: %s", call, cublasLtGetStatusString(status));
}

#define CHECK_CUBLAS(call)                                                   \
    do {                                                                     \
        const cublasStatus_t cublas_status_ = (call);                        \
        if (cublas_status_ != CUBLAS_STATUS_SUCCESS)                         \
            return cublas_failed(__FILE__, __LINE__, #call, cublas_status_); \
    } while (0)

int cuda_matmul_open(struct cuda_matmul **matmul)
{
    *matmul = static_cast<struct cuda_matmul *>(calloc(1, sizeof **matmul));
    if (!*matmul) FAIL(ERR_SYSTEM, "no memory for the state of matmul");
    CHECK_CUBLAS(cublasLtCreate(&(*matmul)->lt));
    return 0;
}

static void plan_free(struct matmul_plan *plan)
{
    if (plan->y) (void)cublasLtMatrixLayoutDestroy(plan->y);
    if (plan->b) (void)cublasLtMatrixLayoutDestroy(plan->b);
    if (plan->a) (void)cublasLtMatrixLayoutDestroy(plan->a);
    if (plan->desc) (void)cublasLtMatmulDescDestroy(plan->desc);
}

void cuda_matmul_close(struct cuda_matmul *matmul)
{
    if (!matmul) return;
    for (int i = 0; i < matmul->count; i++)
        plan_free(&matmul->plans[i]);
    free(matmul->plans);
    if (matmul->lt) (void)cublasLtDestroy(matmul->lt);
    free(matmul);
}

/* ---- small kernels ---- */

/* Fills a matrix [rows, cols], whose rows (or columns) go along k, with pseudo-random numbers that repeat in the second
 * half of k backwards, there times `sign`. With sign −1 for one factor of a product and 1 for the other, every element of
 * the product is 0 but for its rounding errors: which they are, the order of summation decides, and no rounding of the
 * result hides it. Magnitudes span some powers of two, so that there are such errors. */
template <class T> __global__ void fill_cancelling(T *x, int64_t rows, int64_t cols, bool k_is_row, float sign)
{
    const int64_t k = k_is_row ? rows : cols;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < rows * cols;
         i += (int64_t)gridDim.x * THREADS) {
        const int64_t at = k_is_row ? i / cols : i % cols, other = k_is_row ? i % cols : i / cols;
        const bool second = at >= k - k / 2, middle = !second && at >= k / 2;
        const uint64_t bits = cuda_scramble((uint64_t)(second ? k - 1 - at : at) << 32 ^ (uint64_t)other);
        const float value = ldexpf((float)(int32_t)(bits >> 32), -31 - (int)(bits & 7));
        x[i] = cuda_from_f32<T>(middle ? 0.0f : second ? sign * value : value);
    }
}

/* Every second element 0, the others in [-4, 4): where GELU is not a straight line. */
template <class T> __global__ void fill_spread(T *x, int64_t elems)
{
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < elems; i += (int64_t)gridDim.x * THREADS)
        x[i] = cuda_from_f32<T>(i % 2 == 0 ? 0.0f : ldexpf((float)(int32_t)(cuda_scramble((uint64_t)i) >> 32), -29));
}

/* *digest += a sum over all elements' bits and places; integers, so in any order. */
template <class T> __global__ void add_digest(unsigned long long *digest, const T *x, int64_t elems)
{
    unsigned long long sum = 0;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < elems; i += (int64_t)gridDim.x * THREADS)
        sum += cuda_scramble(((uint64_t)i << 32) ^ __float_as_uint(cuda_to_f32(x[i])));
    atomicAdd(digest, sum);
}

/* y[row, column] += bias[column]. */
template <class Y, class T> __global__ void add_bias(Y *y, const T *bias, int64_t elems, int64_t width)
{
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < elems; i += (int64_t)gridDim.x * THREADS)
        y[i] = cuda_from_f32<Y>(cuda_to_f32(y[i]) + cuda_to_f32(bias[i % width]));
}

static int launch_add_bias(struct device *dev, struct tensor y, struct tensor bias)
{
    const int64_t elems = tensor_elems(y), width = y.shape[1];
    CUDA_BY_TYPE(y.dtype, Y,
                 CUDA_BY_TYPE(bias.dtype, T,
                              TRY(CUDA_LAUNCH(dev, (add_bias<Y, T>), cuda_blocks(elems, THREADS), THREADS, 0,
                                              cuda_data<Y>(y), cuda_data<T>(bias), elems, width))));
    return 0;
}

/* ---- plans ---- */

static cudaDataType_t cublas_type(uint32_t dtype)
{
    return dtype == DT_BF16 ? CUDA_R_16BF : CUDA_R_32F;
}

static uint32_t alignment(const void *data)
{
    const uintptr_t bits = reinterpret_cast<uintptr_t>(data) | 16;
    return (uint32_t)(bits & (~bits + 1));
}

static size_t padded(size_t bytes)
{
    return (bytes + SCRATCH_ALIGNMENT - 1) / SCRATCH_ALIGNMENT * SCRATCH_ALIGNMENT;
}

/* The row at the workspace's beginning that a gradient of a bias takes. */
static size_t row_bytes(const struct matmul_key *key)
{
    return key->epilogue == CUBLASLT_EPILOGUE_BGRADA ? padded((size_t)key->n * sizeof(float)) : 0;
}

static void plan_take(struct matmul_plan *plan, const cublasLtMatmulHeuristicResult_t *result)
{
    plan->exists = true;
    plan->algo = result->algo;
    plan->workspace_bytes = result->workspaceSize;
}

/* Gives the epilogue its data. */
static cublasStatus_t plan_point(const struct matmul_plan *plan, struct operands data)
{
    const uint32_t epilogue = plan->key.epilogue;
    cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
    if (takes_bias(epilogue) || epilogue == CUBLASLT_EPILOGUE_BGRADA)
        status = cublasLtMatmulDescSetAttribute(plan->desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &data.bias,
                                                sizeof data.bias);
    if (status == CUBLAS_STATUS_SUCCESS && takes_aux(epilogue))
        status = cublasLtMatmulDescSetAttribute(plan->desc, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &data.aux,
                                                sizeof data.aux);
    return status;
}

/* Queues the product. */
static cublasStatus_t plan_run(const struct device *dev, const struct matmul_plan *plan, struct operands data)
{
    const float alpha = 1, beta = plan->key.flags & MATMUL_ADD ? 1 : 0;
    const struct cuda_state *state = cuda_state_of(dev);
    char *const workspace = static_cast<char *>(dev->workspace) + row_bytes(&plan->key);
    const cublasStatus_t status = plan_point(plan, data);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    return cublasLtMatmul(state->matmul->lt, plan->desc, &alpha, data.b, plan->b, data.a, plan->a, &beta, data.y,
                          plan->y, data.y, plan->y, &plan->algo, workspace, plan->workspace_bytes, state->stream);
}

/* Describes the product to cuBLASLt, with the first call's data for the epilogue; all later ones are aligned as it is. */
static int plan_describe(struct matmul_plan *plan, struct operands data)
{
    const struct matmul_key key = plan->key;
    const bool ta = key.flags & MATMUL_TA, tb = key.flags & MATMUL_TB;
    const cublasOperation_t op_a = ta ? CUBLAS_OP_T : CUBLAS_OP_N, op_b = tb ? CUBLAS_OP_T : CUBLAS_OP_N;
    const cublasLtEpilogue_t epilogue = (cublasLtEpilogue_t)key.epilogue;
    const cudaDataType_t act = cublas_type(key.act);
    const int64_t a_cols = ta ? key.m : key.k, b_cols = tb ? key.k : key.n; /* of the row-major matrices */
    CHECK_CUBLAS(cublasLtMatmulDescCreate(&plan->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    CHECK_CUBLAS(cublasLtMatmulDescSetAttribute(plan->desc, CUBLASLT_MATMUL_DESC_TRANSA, &op_b, sizeof op_b));
    CHECK_CUBLAS(cublasLtMatmulDescSetAttribute(plan->desc, CUBLASLT_MATMUL_DESC_TRANSB, &op_a, sizeof op_a));
    CHECK_CUBLAS(
        cublasLtMatmulDescSetAttribute(plan->desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue));
    if (takes_aux(key.epilogue))
        CHECK_CUBLAS(
            cublasLtMatmulDescSetAttribute(plan->desc, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &key.n, sizeof key.n));
    CHECK_CUBLAS(plan_point(plan, data));
    CHECK_CUBLAS(cublasLtMatrixLayoutCreate(&plan->a, act, (uint64_t)a_cols, (uint64_t)(ta ? key.k : key.m), a_cols));
    CHECK_CUBLAS(cublasLtMatrixLayoutCreate(&plan->b, act, (uint64_t)b_cols, (uint64_t)(tb ? key.n : key.k), b_cols));
    CHECK_CUBLAS(
        cublasLtMatrixLayoutCreate(&plan->y, cublas_type(key.y_type), (uint64_t)key.n, (uint64_t)key.m, key.n));
    return 0;
}

/* What an algorithm may use, and the addresses it must do with. */
static int set_preference(cublasLtMatmulPreference_t preference, const struct matmul_key *key)
{
    const uint64_t workspace = CUDA_SCRATCH_BYTES - row_bytes(key);
    const uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE; /* or none */
    CHECK_CUBLAS(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                      &workspace, sizeof workspace));
    CHECK_CUBLAS(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                                                      &reductions, sizeof reductions));
    CHECK_CUBLAS(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                                                      &key->align_b, sizeof key->align_b));
    CHECK_CUBLAS(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                                                      &key->align_a, sizeof key->align_a));
    CHECK_CUBLAS(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                                                      &key->align_y, sizeof key->align_y));
    CHECK_CUBLAS(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
                                                      &key->align_y, sizeof key->align_y));
    return 0;
}

/* The heuristic's algorithms that may be taken, best first; *found of them, 0 only where the epilogue is optional. */
static int find_algorithms(const struct device *dev, const struct matmul_plan *plan,
                           cublasLtMatmulHeuristicResult_t *results, int *found)
{
    cublasLtMatmulPreference_t preference = NULL;
    CHECK_CUBLAS(cublasLtMatmulPreferenceCreate(&preference));
    const int rc = set_preference(preference, &plan->key);
    cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
    *found = 0;
    if (!rc)
        status = cublasLtMatmulAlgoGetHeuristic(cuda_state_of(dev)->matmul->lt, plan->desc, plan->b, plan->a, plan->y,
                                                plan->y, preference, CANDIDATES, results, found);
    (void)cublasLtMatmulPreferenceDestroy(preference);
    if (rc) return rc;
    int good = 0;
    for (int i = 0; i < *found && status == CUBLAS_STATUS_SUCCESS; i++)
        if (results[i].state == CUBLAS_STATUS_SUCCESS) results[good++] = results[i];
    *found = good;
    if (*found == 0 && !is_optional(plan->key.epilogue)) {
        const struct matmul_key key = plan->key;
        FAIL(ERR_UNSUPPORTED, "cuBLASLt has no algorithm for [%lld, %lld] · [%lld, %lld], flags %u: %s",
             (long long)key.m, (long long)key.k, (long long)key.k, (long long)key.n, (unsigned)key.flags,
             cublasLtGetStatusString(status));
    }
    return 0;
}

/* ---- choosing by measurement ---- */

/* Matrices to try algorithms on, in memory of their own: a call's own y may be added to only once. */
struct trial {
    char *memory;
    struct operands data;
    unsigned long long *digests; /* one for each candidate */
    cudaEvent_t start, stop;
};

/* Makes the memory and events of a trial; *got is false when the GPU has no memory left for it. */
static int trial_open(const struct matmul_key *key, struct trial *trial, bool *got)
{
    const size_t a_bytes = padded((size_t)(key->m * key->k) * dtype_bytes((enum dtype)key->act));
    const size_t b_bytes = padded((size_t)(key->k * key->n) * dtype_bytes((enum dtype)key->act));
    const size_t y_bytes = padded((size_t)(key->m * key->n) * dtype_bytes((enum dtype)key->y_type));
    const size_t aux_bytes = takes_aux(key->epilogue) ? y_bytes : 0;
    const size_t bias_bytes = padded((size_t)key->n * dtype_bytes((enum dtype)key->y_type));
    const size_t digest_bytes = padded(CANDIDATES * sizeof *trial->digests);
    const cudaError_t error = cudaMalloc(reinterpret_cast<void **>(&trial->memory),
                                         a_bytes + b_bytes + y_bytes + aux_bytes + bias_bytes + digest_bytes);
    *got = error == cudaSuccess;
    if (error == cudaErrorMemoryAllocation) {
        (void)cudaGetLastError(); /* else the next launch would report it */
        return 0;
    }
    CHECK_CUDA(error);
    trial->data.a = trial->memory;
    trial->data.b = trial->memory + a_bytes;
    trial->data.y = trial->memory + a_bytes + b_bytes;
    trial->data.aux = trial->memory + a_bytes + b_bytes + y_bytes;
    trial->data.bias = trial->memory + a_bytes + b_bytes + y_bytes + aux_bytes;
    trial->digests =
        reinterpret_cast<unsigned long long *>(trial->memory + a_bytes + b_bytes + y_bytes + aux_bytes + bias_bytes);
    CHECK_CUDA(cudaEventCreateWithFlags(&trial->start, cudaEventDefault));
    CHECK_CUDA(cudaEventCreateWithFlags(&trial->stop, cudaEventDefault));
    return 0;
}

static void trial_close(struct trial *trial)
{
    if (trial->stop) (void)cudaEventDestroy(trial->stop);
    if (trial->start) (void)cudaEventDestroy(trial->start);
    if (trial->memory) (void)cudaFree(trial->memory);
}

/* The matrices: factors whose product cancels, so that y shows the order of summation, and, where y is a function of
 * more than the product, a bias or GELU's input that leaves half of y like that and shows the function in the other. */
static int trial_fill(struct device *dev, const struct matmul_key key, const struct trial *trial)
{
    const bool ta = key.flags & MATMUL_TA, tb = key.flags & MATMUL_TB;
    const int64_t y_elems = key.m * key.n;
    CUDA_BY_TYPE(key.act, T, {
        T *const a = reinterpret_cast<T *>(trial->memory);
        T *const b = static_cast<T *>(const_cast<void *>(trial->data.b));
        TRY(CUDA_LAUNCH(dev, fill_cancelling<T>, cuda_blocks(key.m * key.k, THREADS), THREADS, 0, a,
                        ta ? key.k : key.m, ta ? key.m : key.k, ta, 1.0f));
        TRY(CUDA_LAUNCH(dev, fill_cancelling<T>, cuda_blocks(key.k * key.n, THREADS), THREADS, 0, b,
                        tb ? key.n : key.k, tb ? key.k : key.n, !tb, -1.0f));
    });
    CUDA_BY_TYPE(key.y_type, T, {
        if (takes_bias(key.epilogue))
            TRY(CUDA_LAUNCH(dev, fill_spread<T>, cuda_blocks(key.n, THREADS), THREADS, 0,
                            static_cast<T *>(trial->data.bias), key.n));
        if (takes_aux(key.epilogue))
            TRY(CUDA_LAUNCH(dev, fill_spread<T>, cuda_blocks(y_elems, THREADS), THREADS, 0,
                            static_cast<T *>(trial->data.aux), y_elems));
    });
    return 0;
}

/* Digests of all that each candidate makes of the same matrices, on the host; 0 for one that does not run. */
static int trial_digest(struct device *dev, struct matmul_plan *plan, const struct trial *trial,
                        const cublasLtMatmulHeuristicResult_t *results, int found, unsigned long long *digests)
{
    const cudaStream_t stream = cuda_state_of(dev)->stream;
    const struct matmul_key key = plan->key;
    const struct {
        const void *data;
        int64_t elems;
    } made[] = {{trial->data.y, key.m * key.n},
                {trial->data.aux, takes_aux(key.epilogue) ? key.m * key.n : 0},
                {trial->data.bias, key.epilogue == CUBLASLT_EPILOGUE_BGRADA ? key.n : 0}};
    TRY(trial_fill(dev, key, trial));
    CHECK_CUDA(cudaMemsetAsync(trial->digests, 0, CANDIDATES * sizeof *trial->digests, stream));
    for (int i = 0; i < found; i++) {
        plan_take(plan, &results[i]);
        CHECK_CUDA(
            cudaMemsetAsync(trial->data.y, 0, (size_t)(key.m * key.n) * dtype_bytes((enum dtype)key.y_type), stream));
        if (plan_run(dev, plan, trial->data) != CUBLAS_STATUS_SUCCESS) continue;
        for (const auto &part : made) {
            if (part.elems == 0) continue;
            CUDA_BY_TYPE(key.y_type, T,
                         TRY(CUDA_LAUNCH(dev, add_digest<T>, cuda_blocks(part.elems, THREADS), THREADS, 0,
                                         trial->digests + i, static_cast<const T *>(part.data), part.elems)));
        }
    }
    CHECK_CUDA(
        cudaMemcpyAsync(digests, trial->digests, CANDIDATES * sizeof *digests, cudaMemcpyDeviceToHost, stream));
    CHECK_CUDA(cudaStreamSynchronize(stream));
    return 0;
}

/* Milliseconds that the plan's algorithm takes. */
static int trial_time(const struct device *dev, const struct matmul_plan *plan, const struct trial *trial, float *ms)
{
    const cudaStream_t stream = cuda_state_of(dev)->stream;
    CHECK_CUDA(cudaEventRecord(trial->start, stream));
    for (int i = 0; i < TIMED_RUNS; i++)
        CHECK_CUBLAS(plan_run(dev, plan, trial->data));
    CHECK_CUDA(cudaEventRecord(trial->stop, stream));
    CHECK_CUDA(cudaEventSynchronize(trial->stop));
    CHECK_CUDA(cudaEventElapsedTime(ms, trial->start, trial->stop));
    return 0;
}

/* The fastest of the algorithms that give the first one's bits; *best is its number. */
static int trial_run(struct device *dev, struct matmul_plan *plan, const struct trial *trial,
                     const cublasLtMatmulHeuristicResult_t *results, int found, int *best)
{
    unsigned long long digests[CANDIDATES];
    float best_ms = INFINITY;
    TRY(trial_digest(dev, plan, trial, results, found, digests));
    for (int i = 0; i < found; i++) {
        float ms = 0;
        if (digests[i] != digests[0]) continue;
        plan_take(plan, &results[i]);
        TRY(trial_time(dev, plan, trial, &ms));
        if (ms >= best_ms) continue;
        best_ms = ms;
        *best = i;
    }
    return 0;
}

/* Chooses the plan's algorithm. Waits for the device; where it has no memory to spare for trials, the first is taken,
 * with the same results. */
static int plan_choose(struct device *dev, struct matmul_plan *plan)
{
    cublasLtMatmulHeuristicResult_t results[CANDIDATES];
    struct trial trial = {};
    int found = 0, best = 0;
    bool got = false;
    TRY(find_algorithms(dev, plan, results, &found));
    int rc = found > 1 ? trial_open(&plan->key, &trial, &got) : 0;
    if (!rc && got) rc = trial_run(dev, plan, &trial, results, found, &best);
    trial_close(&trial);
    plan->exists = false; /* whatever was tried */
    if (found > 0) plan_take(plan, &results[best]);
    return rc;
}

/* The plan of a product, made if it is not there. Valid until the next call. */
static int plan_of(struct device *dev, const struct matmul_key *key, struct operands data,
                   const struct matmul_plan **plan)
{
    struct cuda_matmul *const matmul = cuda_state_of(dev)->matmul;
    for (int i = 0; i < matmul->count; i++)
        if (memcmp(&matmul->plans[i].key, key, sizeof *key) == 0) {
            *plan = &matmul->plans[i];
            return 0;
        }
    if (matmul->count == matmul->room) {
        const int room = matmul->room > 0 ? 2 * matmul->room : 64;
        void *const plans = realloc(matmul->plans, (size_t)room * sizeof *matmul->plans);
        if (!plans) FAIL(ERR_SYSTEM, "no memory for the plans of %d matrix products", room);
        matmul->plans = static_cast<struct matmul_plan *>(plans);
        matmul->room = room;
    }
    struct matmul_plan made = {};
    made.key = *key;
    int rc = plan_describe(&made, data);
    if (!rc) rc = plan_choose(dev, &made);
    if (rc) {
        plan_free(&made);
        return rc;
    }
    matmul->plans[matmul->count] = made;
    *plan = &matmul->plans[matmul->count++];
    return 0;
}

/* ---- the ops ---- */

size_t cuda_pack_bytes(struct device *dev, struct tensor b, bool tb)
{
    (void)dev, (void)b, (void)tb;
    return 0;
}

extern "C" int cuda_pack(struct device *dev, struct tensor packed, struct tensor b, bool tb)
{
    (void)dev, (void)packed, (void)b, (void)tb;
    return 0;
}

/* Queues y = A·B with an epilogue; no side is 0. *done is false where cuBLASLt has no algorithm for an optional one. */
static int run_product(struct device *dev, struct tensor y, struct tensor a, struct tensor b, unsigned flags,
                       cublasLtEpilogue_t epilogue, void *bias, void *aux, bool *done)
{
    const int64_t m = y.shape[0], n = y.shape[1], k = a.shape[flags & MATMUL_TA ? 0 : 1];
    const struct operands data = {y.data, a.data, b.data, bias, aux};
    const struct matmul_plan *plan = NULL;
    if (m > INT32_MAX || n > INT32_MAX || k > INT32_MAX)
        FAIL(ERR_UNSUPPORTED, "matmul: [%lld, %lld, %lld] has a side of more than 2^31 − 1", (long long)m,
             (long long)n, (long long)k);
    const struct matmul_key key = {m,
                                   n,
                                   k,
                                   (uint32_t)a.dtype,
                                   (uint32_t)y.dtype,
                                   flags,
                                   (uint32_t)epilogue,
                                   alignment(y.data),
                                   alignment(a.data),
                                   alignment(b.data),
                                   bias ? alignment(bias) : 0};
    TRY(plan_of(dev, &key, data, &plan));
    *done = plan->exists;
    if (plan->exists) CHECK_CUBLAS(plan_run(dev, plan, data));
    return 0;
}

extern "C" int cuda_matmul(struct device *dev, struct tensor y, struct tensor a, struct tensor b,
                           struct tensor packed, struct tensor bias, unsigned flags)
{
    (void)packed;
    const int64_t k = a.shape[flags & MATMUL_TA ? 0 : 1];
    /* The epilogue's bias must have y's type; of another, it is added afterwards. */
    const bool biased = tensor_given(bias) && bias.dtype == y.dtype && k > 0;
    bool done = false;
    if (tensor_elems(y) == 0) return 0;
    if (k > 0) {
        TRY(run_product(dev, y, a, b, flags, biased ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT,
                        biased ? bias.data : NULL, NULL, &done));
    } else if (!(flags & MATMUL_ADD)) {
        CHECK_CUDA(cudaMemsetAsync(y.data, 0, tensor_bytes(y), cuda_state_of(dev)->stream));
    }
    return tensor_given(bias) && !biased ? launch_add_bias(dev, y, bias) : 0;
}

/* True where GELU may be an epilogue, given its input or where that goes. */
static bool gelu_fits(struct tensor x, struct tensor a)
{
    return x.dtype == DT_BF16 && x.shape[1] % AUX_ALIGNMENT == 0 && cuda_aligned(x.data) && tensor_elems(x) > 0 &&
           tensor_elems(a) > 0;
}

extern "C" int cuda_matmul_gelu(struct device *dev, struct tensor y, struct tensor x, struct tensor a,
                                struct tensor b, struct tensor packed, struct tensor bias, unsigned flags)
{
    const bool biased = tensor_given(bias);
    bool done = false;
    if (gelu_fits(x, a))
        TRY(run_product(dev, y, a, b, flags, biased ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_AUX,
                        biased ? bias.data : NULL, x.data, &done));
    if (done) return 0;
    TRY(cuda_matmul(dev, x, a, b, packed, bias, flags));
    return cuda_gelu_fwd(dev, y, x);
}

extern "C" int cuda_matmul_dgelu(struct device *dev, struct tensor dx, struct tensor a, struct tensor b,
                                 struct tensor packed, struct tensor x, unsigned flags)
{
    bool done = false;
    if (gelu_fits(x, a)) TRY(run_product(dev, dx, a, b, flags, CUBLASLT_EPILOGUE_DGELU, NULL, x.data, &done));
    if (done) return 0;
    TRY(cuda_matmul(dev, dx, a, b, packed, {}, flags));
    return cuda_gelu_bwd(dev, dx, dx, x);
}

extern "C" int cuda_weight_bwd(struct device *dev, struct tensor dw, struct tensor db, struct tensor x,
                               struct tensor dy)
{
    const unsigned flags = MATMUL_TA | MATMUL_ADD;
    bool done = false;
    if (x.dtype == DT_BF16 && tensor_elems(x) > 0 && tensor_elems(dy) > 0) {
        float *const row = static_cast<float *>(dev->workspace);
        TRY(run_product(dev, dw, x, dy, flags, CUBLASLT_EPILOGUE_BGRADA, row, NULL, &done));
        if (done) return cuda_add_rows(dev, cuda_data<float>(db), row, 1, dy.shape[1]);
    }
    TRY(cuda_bias_bwd(dev, db, dy));
    return cuda_matmul(dev, dw, x, dy, {}, {}, flags);
}
