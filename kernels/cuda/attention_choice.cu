/* Which attention runs: our own kernels ("flash"), or cuDNN's for calls of the shape that was chosen for.
 *
 * cuDNN's is tried first, on random tensors of the run's shape: it must agree with ours to what bf16 allows, and must
 * repeat bit for bit, or it is not used. Of the two, auto takes the faster. cuDNN works in dev->workspace, for which
 * cuda_workspace_bytes asks for room. The trial's tensors are memory of their own, given back before the first step. */
#include "attention_library.h"
#include "cuda.cuh"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define THREADS 256
#define TRIALS 5
/* Four roundings to bf16, of 2^-8 each, lie between inputs and a result at most: of probabilities, of scores' gradients, of
 * heads before they are summed, and of the result. */
#define BOUND 0x1p-6
#define LSE_BOUND 1e-3 /* fp32 throughout, but for the exponentials */
#define MIB 1048576.0
#define WORKSPACE_ALIGNMENT 256 /* as cudaMalloc gives it */

/* What one implementation makes of the trial's inputs. */
struct outcome {
    struct tensor o, lse, dqkv;
    float ms; /* of both passes, the shortest */
};

struct trial {
    const struct attention_case *c;
    struct tensor qkv, dout, delta;
    struct outcome flash, library;
    void *memory;
    size_t bytes;
    cudaEvent_t start, stop;
};

/* ---- the library's state ---- */

void cuda_attention_close(struct device *dev)
{
    struct cuda_attention *const kept = &cuda_state_of(dev)->attention;
    if (kept->library) kept->library->close(kept->plans);
    *kept = {};
}

static bool same_shape(const struct attention_case *c, struct tensor qkv, int seq_len, int heads, int kv_heads)
{
    return qkv.dtype == c->act && qkv.shape[0] == c->sequences * c->seq_len && seq_len == c->seq_len &&
           heads == c->heads && kv_heads == c->kv_heads &&
           qkv.shape[1] == (int64_t)(heads + 2 * kv_heads) * c->head_dim;
}

bool cuda_attention_taken(const struct device *dev, struct tensor qkv, int seq_len, int heads, int kv_heads)
{
    const struct cuda_attention *const kept = &cuda_state_of(dev)->attention;
    return kept->used && same_shape(&kept->c, qkv, seq_len, heads, kv_heads) && cuda_aligned(qkv.data);
}

int cuda_attention_taken_fwd(struct device *dev, struct tensor o, struct tensor lse, struct tensor qkv)
{
    const struct cuda_attention *const kept = &cuda_state_of(dev)->attention;
    return kept->library->fwd(kept->plans, kept->workspace, o, lse, qkv);
}

int cuda_attention_taken_bwd(struct device *dev, struct tensor dqkv, struct tensor dout, struct tensor o,
                             struct tensor lse, struct tensor delta, struct tensor qkv)
{
    const struct cuda_attention *const kept = &cuda_state_of(dev)->attention;
    return kept->library->bwd(kept->plans, kept->workspace, dqkv, dout, o, lse, delta, qkv);
}

/* ---- the trial ---- */

/* Uniform in [-1, 1). */
__global__ void fill_random(bf16 *x, int64_t elems, uint64_t seed)
{
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < elems; i += (int64_t)gridDim.x * THREADS)
        x[i] = cuda_from_f32<bf16>((float)(int32_t)(cuda_scramble((uint64_t)i + seed) >> 32) * 0x1p-31f);
}

static int launch_random(struct device *dev, struct tensor x, uint64_t seed)
{
    const int64_t elems = tensor_elems(x);
    return CUDA_LAUNCH(dev, fill_random, cuda_blocks(elems, THREADS), THREADS, 0, cuda_data<bf16>(x), elems,
                       seed << 40);
}

/* The next piece of the trial's memory; without memory, it is only counted. */
static struct tensor take(struct trial *trial, enum dtype dtype, int64_t rows, int64_t cols)
{
    struct tensor t = tensor_2d(NULL, dtype, rows, cols);
    if (trial->memory) t.data = static_cast<char *>(trial->memory) + trial->bytes;
    trial->bytes += (tensor_bytes(t) + 255) / 256 * 256;
    return t;
}

static void take_all(struct trial *trial)
{
    const struct attention_case *const c = trial->c;
    const int64_t rows = c->sequences * c->seq_len, out = (int64_t)c->heads * c->head_dim;
    const int64_t width = out + 2 * (int64_t)c->kv_heads * c->head_dim;
    trial->bytes = 0;
    trial->qkv = take(trial, DT_BF16, rows, width);
    trial->dout = take(trial, DT_BF16, rows, out);
    trial->delta = take(trial, DT_F32, c->sequences * c->heads, c->seq_len);
    for (struct outcome *made : {&trial->flash, &trial->library}) {
        made->o = take(trial, DT_BF16, rows, out);
        made->lse = take(trial, DT_F32, c->sequences * c->heads, c->seq_len);
        made->dqkv = take(trial, DT_BF16, rows, width);
    }
}

/* Both passes, by the library or by our own kernels. */
static int run_once(struct device *dev, const struct trial *trial, const struct outcome *made, bool library)
{
    const struct attention_case *const c = trial->c;
    cuda_state_of(dev)->attention.used = library;
    TRY(cuda_attention_fwd(dev, made->o, made->lse, trial->qkv, {}, c->seq_len, c->heads, c->kv_heads));
    return cuda_attention_bwd(dev, made->dqkv, trial->dout, made->o, made->lse, trial->delta, trial->qkv, {},
                              c->seq_len, c->heads, c->kv_heads);
}

static int run_timed(struct device *dev, const struct trial *trial, struct outcome *made, bool library)
{
    const cudaStream_t stream = cuda_state_of(dev)->stream;
    float ms = 0;
    CHECK_CUDA(cudaEventRecord(trial->start, stream));
    TRY(run_once(dev, trial, made, library));
    CHECK_CUDA(cudaEventRecord(trial->stop, stream));
    CHECK_CUDA(cudaEventSynchronize(trial->stop));
    CHECK_CUDA(cudaEventElapsedTime(&ms, trial->start, trial->stop));
    made->ms = cuda_min(made->ms, ms);
    return 0;
}

/* A tensor's contents on the host; the caller frees them. */
static int fetch(struct device *dev, struct tensor t, void **copy)
{
    *copy = malloc(tensor_bytes(t));
    if (!*copy) FAIL(ERR_SYSTEM, "no memory to compare attention's results");
    return dev->table->download(dev, *copy, t.data, tensor_bytes(t));
}

static double value_of(const void *data, enum dtype dtype, int64_t i)
{
    if (dtype == DT_F32) return (double)static_cast<const float *>(data)[i];
    return (double)__bfloat162float(static_cast<const bf16 *>(data)[i]);
}

/* The worst difference of two tensors, as a part of the bound: over vectors of `width` elements, the length of the
 * difference against that of the vector and of a typical one. 1 or less is agreement; NaN never is. */
static double worst_difference(const void *a, const void *b, struct tensor like, int64_t width, double bound)
{
    const int64_t elems = tensor_elems(like);
    double all = 0, worst = 0;
    for (int64_t i = 0; i < elems; i++)
        all += value_of(a, like.dtype, i) * value_of(a, like.dtype, i);
    const double typical = sqrt(all / (double)elems * (double)width);
    for (int64_t at = 0; at < elems; at += width) {
        double size = 0, difference = 0;
        for (int64_t i = at; i < at + width; i++) {
            const double x = value_of(a, like.dtype, i), d = value_of(b, like.dtype, i) - x;
            size += x * x;
            difference += d * d;
        }
        const double part = sqrt(difference) / (bound * (sqrt(size) + typical));
        if (!(part <= worst)) worst = part;
        if (!(part <= 1)) break;
    }
    return worst;
}

static int check_like(struct device *dev, const char *what, struct tensor ours, struct tensor theirs, int64_t width,
                      double bound)
{
    void *a = NULL, *b = NULL;
    int rc = fetch(dev, ours, &a);
    if (!rc) rc = fetch(dev, theirs, &b);
    const double worst = rc ? 0 : worst_difference(a, b, ours, width, bound);
    free(b);
    free(a);
    if (rc) return rc;
    if (!(worst <= 1))
        FAIL(ERR_UNSUPPORTED, "cuDNN's attention gives another %s than our own kernels: %.3g times the bound", what,
             worst);
    return 0;
}

/* What the library has of the workspace. */
static struct tensor library_workspace(const struct device *dev)
{
    const struct cuda_attention *const kept = &cuda_state_of(dev)->attention;
    const size_t bytes = kept->library->workspace_bytes(kept->plans);
    return tensor_1d(kept->workspace, DT_BF16, (int64_t)(bytes / dtype_bytes(DT_BF16)));
}

/* Runs the library once more, and compares bits. Other ops use the workspace between its calls: NaN stands for theirs. */
static int check_repeats(struct device *dev, struct trial *trial)
{
    void *first = NULL, *again = NULL;
    int rc = fetch(dev, trial->library.dqkv, &first);
    if (!rc) rc = dev->table->fill(dev, library_workspace(dev), NAN);
    if (!rc) rc = run_timed(dev, trial, &trial->library, true);
    if (!rc) rc = fetch(dev, trial->library.dqkv, &again);
    const bool same = !rc && memcmp(first, again, tensor_bytes(trial->library.dqkv)) == 0;
    free(again);
    free(first);
    if (rc) return rc;
    if (!same) FAIL(ERR_UNSUPPORTED, "cuDNN's attention backward does not repeat its results");
    return 0;
}

static int run_trial(struct device *dev, struct trial *trial)
{
    const int64_t head = trial->c->head_dim;
    trial->flash.ms = trial->library.ms = INFINITY;
    TRY(launch_random(dev, trial->qkv, 1));
    TRY(launch_random(dev, trial->dout, 2));
    TRY(run_once(dev, trial, &trial->flash, false));
    TRY(run_once(dev, trial, &trial->library, true));
    TRY(check_like(dev, "output", trial->flash.o, trial->library.o, head, BOUND));
    TRY(check_like(dev, "log-sum-exp", trial->flash.lse, trial->library.lse, 1, LSE_BOUND));
    TRY(check_like(dev, "gradient", trial->flash.dqkv, trial->library.dqkv, head, BOUND));
    for (int i = 0; i < TRIALS; i++) {
        TRY(run_timed(dev, trial, &trial->flash, false));
        TRY(check_repeats(dev, trial));
    }
    return 0;
}

static int try_library(struct device *dev, struct trial *trial)
{
    take_all(trial);
    TRY(dev->table->alloc(dev, trial->bytes, &trial->memory));
    take_all(trial);
    CHECK_CUDA(cudaEventCreateWithFlags(&trial->start, cudaEventDefault));
    CHECK_CUDA(cudaEventCreateWithFlags(&trial->stop, cudaEventDefault));
    return run_trial(dev, trial);
}

static void trial_close(struct trial *trial)
{
    if (trial->stop) (void)cudaEventDestroy(trial->stop);
    if (trial->start) (void)cudaEventDestroy(trial->start);
    if (trial->memory) (void)cudaFree(trial->memory);
}

/* ---- the choice ---- */

/* The compute capability of the device, or of the GPU that would be opened. Where there is none, 9.0: for a plan, one
 * that can do all. */
static void find_capability(const struct device *dev, int *major, int *minor)
{
    struct cudaDeviceProp prop;
    int devices = 0;
    *major = 9;
    *minor = 0;
    if (dev->state) {
        *major = cuda_state_of(dev)->major;
        *minor = cuda_state_of(dev)->minor;
    } else if (cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0 &&
               cudaGetDeviceProperties(&prop, 0) == cudaSuccess) {
        *major = prop.major;
        *minor = prop.minor;
    }
}

static int check_case(const struct device *dev, const struct attention_case *c)
{
    int major = 0, minor = 0;
    find_capability(dev, &major, &minor);
    if (!attention_cudnn()) FAIL(ERR_UNSUPPORTED, "this build has no cuDNN; build with TATARA_CUDNN=ON");
    if (major != 9)
        FAIL(ERR_UNSUPPORTED, "cuDNN's deterministic attention is used on compute capability 9 only, this is %d.%d",
             major, minor);
    if (c->document_mask)
        FAIL(ERR_UNSUPPORTED, "cuDNN's attention is used without a document mask only (data.document_mask)");
    if (c->act != DT_BF16)
        FAIL(ERR_UNSUPPORTED, "cuDNN's attention is used in bf16 only, not in %s", dtype_name(c->act));
    if (c->head_dim != 64 && c->head_dim != 128)
        FAIL(ERR_UNSUPPORTED, "cuDNN's attention is used for heads of 64 and 128 elements only, not %d", c->head_dim);
    return 0;
}

size_t cuda_workspace_bytes(struct device *dev, const struct attention_case *c, enum attention_choice choice)
{
    if (!c || choice == ATTENTION_FLASH) return CUDA_SCRATCH_BYTES;
    if (check_case(dev, c) == 0) {
        const size_t bound = attention_cudnn()->workspace_bound(c);
        return cuda_max(CUDA_SCRATCH_BYTES, bound > 0 ? bound + WORKSPACE_ALIGNMENT : 0);
    }
    err_clear();
    return CUDA_SCRATCH_BYTES;
}

/* Gives the library the workspace, if that is large enough. */
static int take_workspace(struct device *dev, bool named)
{
    struct cuda_attention *const kept = &cuda_state_of(dev)->attention;
    const size_t wanted = kept->library->workspace_bytes(kept->plans), have = dev->workspace_bytes;
    const size_t shift = -reinterpret_cast<uintptr_t>(dev->workspace) % WORKSPACE_ALIGNMENT;
    if (!dev->workspace || wanted > have || shift > have - wanted)
        FAIL(ERR_UNSUPPORTED,
             "cuDNN's attention asks for a workspace of %.1f MiB, and the planned one has %.1f MiB%s",
             (double)wanted / MIB, (double)have / MIB, named ? "; use attention=flash" : "");
    kept->workspace = static_cast<char *>(dev->workspace) + shift;
    return 0;
}

/* Makes the library ready and tries it. named: it was asked for by name. */
static int open_library(struct device *dev, const struct attention_case *c, bool named, struct trial *trial)
{
    struct cuda_attention *const kept = &cuda_state_of(dev)->attention;
    TRY(check_case(dev, c));
    kept->library = attention_cudnn();
    kept->c = *c;
    TRY(kept->library->open(dev, c, &kept->plans));
    TRY(take_workspace(dev, named));
    return try_library(dev, trial);
}

extern "C" int cuda_choose_attention(struct device *dev, const struct attention_case *c,
                                     enum attention_choice *choice, char *why, size_t why_bytes)
{
    struct cuda_attention *const kept = &cuda_state_of(dev)->attention;
    struct trial trial = {};
    const enum attention_choice asked = *choice;
    cuda_attention_close(dev);
    *choice = ATTENTION_FLASH;
    if (asked == ATTENTION_FLASH) {
        snprintf(why, why_bytes, "flash");
        return 0;
    }
    trial.c = c;
    const int rc = open_library(dev, c, asked == ATTENTION_CUDNN, &trial);
    trial_close(&trial);
    kept->used = false;
    if (rc) {
        cuda_attention_close(dev);
        if (asked == ATTENTION_CUDNN) return rc;
        snprintf(why, why_bytes, "flash (auto: %s)", err_message());
        err_clear();
        return 0;
    }
    const double mib = (double)kept->library->workspace_bytes(kept->plans) / MIB;
    const bool faster = trial.library.ms < trial.flash.ms;
    kept->used = asked == ATTENTION_CUDNN || faster;
    snprintf(why, why_bytes, "%s: forward and backward of a layer take %.3f ms by cuDNN, %.3f ms by flash%s",
             kept->used ? "cudnn" : "flash", (double)trial.library.ms, (double)trial.flash.ms,
             kept->used ? "; " : "");
    if (kept->used) {
        *choice = ATTENTION_CUDNN;
        snprintf(why + strlen(why), why_bytes - strlen(why), "it takes %.1f of the workspace's %.1f MiB", mib,
                 (double)dev->workspace_bytes / MIB);
    } else {
        cuda_attention_close(dev);
    }
    return 0;
}
