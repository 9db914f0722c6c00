/* Private to the CUDA backend: the state of a device, launching, and the small device functions that kernels share.
 *
 * The same sources are compiled twice: by nvcc for GPUs, and by g++ against tests/cuda_emu/include, where threads are
 * fibers on the CPU, for the tests. So kernels keep to a few rules:
 *   - they are launched with CUDA_LAUNCH only, and their shared memory is declared with CUDA_SHARED or
 *     CUDA_SHARED_DYNAMIC;
 *   - inline PTX lies in ptx.cuh, where each function has a host version;
 *   - every thread of a block reaches every __syncthreads: no thread returns before the last one;
 *   - all lanes that a mask names reach the same warp primitive;
 *   - a launch has at least one block: an op with nothing to do returns before it.
 * Results do not depend on the number of SMs, nor on which block runs first: no floating-point atomics, and sums are cut
 * by shapes alone.
 *
 * Threads: one host thread uses a device. All work of a device is queued on its one stream, in the order of calls. Only
 * download_beside is for a second thread, and has a stream of its own. */
#ifndef TATARA_CUDA_CUH
#define TATARA_CUDA_CUH

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <math.h>
#include <stdint.h>

extern "C" {
#include "err.h"
#include "ops.h"

#define OP(name, params, args) int cuda_##name(struct device *dev, OP_UNPAREN params);
#include "ops.def"
#undef OP
}

typedef __nv_bfloat16 bf16;

/* ---- the device, on the host's side ---- */

struct cuda_matmul; /* matmul.cu: cuBLASLt's handle and the algorithms chosen so far */

/* A piece of pinned host memory that copies pass through. */
struct cuda_slot {
    void *host;
    cudaEvent_t used; /* reached when the last copy from or to it is done */
};

#define CUDA_SLOTS 4
#define CUDA_SLOT_BYTES ((size_t)4 << 20)

/* Slots for the copies that are queued on one stream, taken in turn. */
struct cuda_ring {
    cudaStream_t stream;
    struct cuda_slot slot[CUDA_SLOTS];
    int next;
};

/* What ops and cuBLASLt use of dev->workspace, which is larger where a library's attention wants more: enough for
 * cuBLASLt on Hopper, and for the partial sums of every op. The same on all GPUs and for all attention, since how sums are
 * cut, and what algorithm a product gets, depend on it. */
#define CUDA_SCRATCH_BYTES ((size_t)64 << 20)

struct attention_library; /* attention_library.h */

/* Attention by a library, for calls of one shape (attention_choice.cu). */
struct cuda_attention {
    const struct attention_library *library; /* NULL: none is open */
    void *plans, *workspace;                 /* the latter within dev->workspace */
    struct attention_case c;
    bool used; /* else calls go to our own kernels */
};

struct cuda_state {
    int index; /* of the GPU among those of this process */
    int sms;
    int major, minor;        /* compute capability */
    size_t shared_max_bytes; /* dynamic shared memory that a block may ask for */
    cudaStream_t stream;
    struct cuda_ring ring;   /* on that stream */
    struct cuda_ring beside; /* of download_beside, on a stream that no other waits for */
    cudaEvent_t clock[2];
    struct cuda_matmul *matmul;
    struct cuda_attention attention;
    char name[256];
};

static inline struct cuda_state *cuda_state_of(const struct device *dev)
{
    return (struct cuda_state *)dev->state;
}

/* matmul.cu */
int cuda_matmul_open(struct cuda_matmul **matmul);
void cuda_matmul_close(struct cuda_matmul *matmul); /* NULL is let pass */
size_t cuda_pack_bytes(struct device *dev, struct tensor b, bool tb);

/* attention_choice.cu */
extern "C" int cuda_choose_attention(struct device *dev, const struct attention_case *c,
                                     enum attention_choice *choice, char *why, size_t why_bytes);
void cuda_attention_close(struct device *dev);
size_t cuda_workspace_bytes(struct device *dev, const struct attention_case *c, enum attention_choice choice);
/* Whether a call of this shape, with tokens that see their whole sequences so far, is the library's. */
bool cuda_attention_taken(const struct device *dev, struct tensor qkv, int seq_len, int heads, int kv_heads);
int cuda_attention_taken_fwd(struct device *dev, struct tensor o, struct tensor lse, struct tensor qkv);
int cuda_attention_taken_bwd(struct device *dev, struct tensor dqkv, struct tensor dout, struct tensor o,
                             struct tensor lse, struct tensor delta, struct tensor qkv);

/* graph.cu */
int cuda_capture_begin(struct device *dev);
int cuda_capture_end(struct device *dev, struct device_graph **graph);
int cuda_graph_launch(struct device *dev, struct device_graph *graph);
void cuda_graph_free(struct device *dev, struct device_graph *graph);

/* device.cu: raises ERR_DEVICE naming the call, and CUDA's own words. */
int cuda_failed(const char *file, int line, const char *call, cudaError_t error);

/* Fails the calling function when a function of the CUDA runtime fails. */
#define CHECK_CUDA(call)                                                                            \
    do {                                                                                            \
        const cudaError_t cuda_error_ = (call);                                                     \
        if (cuda_error_ != cudaSuccess) return cuda_failed(__FILE__, __LINE__, #call, cuda_error_); \
    } while (0)

/* What a launch came to, as the house's error code. Faults inside the kernel come later, with the next sync. */
static inline int cuda_launched(const char *file, int line, const char *kernel)
{
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? 0 : cuda_failed(file, line, kernel, error);
}

/* CUDA_LAUNCH(dev, kernel, grid, block, shared_bytes, args…): queues a kernel on the device's stream; an int, 0 or an
 * error, to be used as TRY(CUDA_LAUNCH(…)). A kernel with several template arguments goes in parentheses:
 * (norm_fwd<T, true>). More than 48 KiB of shared_bytes needs cuda_allow_shared before it. */
#ifdef __CUDACC__
/* clang-format does not know <<< in a macro. */
/* clang-format off */
#define CUDA_LAUNCH(dev, kernel, grid, block, shared_bytes, ...)                             \
    ((kernel)<<<(grid), (block), (shared_bytes), cuda_state_of(dev)->stream>>>(__VA_ARGS__), \
     cuda_launched(__FILE__, __LINE__, #kernel))
/* clang-format on */
#else
#define CUDA_LAUNCH(dev, kernel, grid, block, shared_bytes, ...)                                                   \
    (cuda_emu_launch((kernel), #kernel, (grid), (block), (shared_bytes), cuda_state_of(dev)->stream, __VA_ARGS__), \
     cuda_launched(__FILE__, __LINE__, #kernel))
#endif

/* Lets the kernel be launched with this much dynamic shared memory. */
template <class... Params> static inline int cuda_allow_shared(void (*kernel)(Params...), size_t bytes)
{
    CHECK_CUDA(cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel),
                                    cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
    return 0;
}

/* Runs the statement with T as the C++ type of `dtype`, f32 or bf16:
 *     CUDA_BY_TYPE(x.dtype, T, TRY(CUDA_LAUNCH(dev, gelu_fwd<T>, blocks, threads, 0, cuda_data<T>(y), …))); */
#define CUDA_BY_TYPE(dtype_, T, ...) \
    do {                             \
        if ((dtype_) == DT_BF16) {   \
            typedef bf16 T;          \
            __VA_ARGS__;             \
        } else {                     \
            typedef float T;         \
            __VA_ARGS__;             \
        }                            \
    } while (0)

template <class T> static inline T *cuda_data(struct tensor t)
{
    return static_cast<T *>(t.data);
}

/* ---- sizes, on both sides ---- */

template <class T> __host__ __device__ inline T cuda_min(T a, T b)
{
    return a < b ? a : b;
}

template <class T> __host__ __device__ inline T cuda_max(T a, T b)
{
    return a > b ? a : b;
}

__host__ __device__ inline int64_t cuda_div_up(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

/* True when every pointer given may be read and written 16 bytes at a time. */
template <class... Pointers> __host__ __device__ inline bool cuda_aligned(const Pointers *...pointers)
{
    return ((reinterpret_cast<uintptr_t>(pointers) | ... | 0) & 15) == 0;
}

/* Blocks for `items` at `per_block` each, in kernels whose blocks take turns (a grid-stride loop): enough to fill any
 * GPU, few enough that starting them costs nothing. At least one. */
static inline unsigned cuda_blocks(int64_t items, int64_t per_block)
{
    const int64_t most = 8192;
    return (unsigned)cuda_max((int64_t)1, cuda_min(cuda_div_up(items, per_block), most));
}

/* ---- shared memory ---- */

/* CUDA_SHARED(float, tile, [32][33]); declares static shared memory. CUDA_SHARED_DYNAMIC(bf16, keys); points at the
 * block's dynamic shared memory, 128-byte aligned. */
#ifdef __CUDACC__
#define CUDA_SHARED(type, name, dims) __shared__ __align__(16) type name dims
#define CUDA_SHARED_DYNAMIC(type, name)                                   \
    extern __shared__ __align__(128) unsigned char cuda_dynamic_shared[]; \
    type *const name = reinterpret_cast<type *>(cuda_dynamic_shared)
#else
#define CUDA_SHARED(type, name, dims)                   \
    typedef type name##_type dims;                      \
    static cuda_emu_shared<name##_type> name##_storage; \
    name##_type &name = name##_storage.enter(#name)
#define CUDA_SHARED_DYNAMIC(type, name) type *const name = static_cast<type *>(cuda_emu_dynamic_shared())
#endif

/* ---- numbers ---- */

__device__ inline float cuda_to_f32(float x)
{
    return x;
}

__device__ inline float cuda_to_f32(bf16 x)
{
    return __bfloat162float(x);
}

/* x rounded to T, to nearest even. */
template <class T> __device__ inline T cuda_from_f32(float x);

template <> __device__ inline float cuda_from_f32<float>(float x)
{
    return x;
}

template <> __device__ inline bf16 cuda_from_f32<bf16>(float x)
{
    return __float2bfloat16_rn(x);
}

/* The finaliser of MurmurHash3 (Appleby 2011), a bijection of 64 bits. */
__device__ inline uint64_t cuda_scramble(uint64_t x)
{
    x = (x ^ x >> 33) * 0xff51afd7ed558ccdu;
    x = (x ^ x >> 33) * 0xc4ceb9fe1a85ec53u;
    return x ^ x >> 33;
}

/* ---- pieces of 8 elements: 16 bytes of bf16, 32 of f32 ---- */

#define CUDA_PIECE 8

/* The grid of a kernel whose threads take a piece of a row each: tiles of columns × rows, which take turns. */
static inline dim3 cuda_row_grid(int64_t rows, int64_t width, int64_t threads)
{
    return dim3((unsigned)cuda_div_up(width, threads * CUDA_PIECE), (unsigned)cuda_min(rows, (int64_t)65535));
}

/* Two bf16 in a 32-bit word, the first one in the low half, as floats. */
__device__ inline void cuda_unpack_bf16(float &low, float &high, unsigned word)
{
    low = __uint_as_float(word << 16);
    high = __uint_as_float(word & 0xffff0000u);
}

__device__ inline unsigned cuda_pack_bf16(float low, float high)
{
    return (unsigned)__bfloat16_as_ushort(__float2bfloat16_rn(low)) |
           (unsigned)__bfloat16_as_ushort(__float2bfloat16_rn(high)) << 16;
}

/* A whole piece at a 16-byte boundary. */
__device__ inline void cuda_load_piece(float (&to)[CUDA_PIECE], const float *from)
{
    const float4 a = reinterpret_cast<const float4 *>(from)[0], b = reinterpret_cast<const float4 *>(from)[1];
    to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w;
    to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
}

__device__ inline void cuda_load_piece(float (&to)[CUDA_PIECE], const bf16 *from)
{
    const uint4 words = *reinterpret_cast<const uint4 *>(from);
    cuda_unpack_bf16(to[0], to[1], words.x);
    cuda_unpack_bf16(to[2], to[3], words.y);
    cuda_unpack_bf16(to[4], to[5], words.z);
    cuda_unpack_bf16(to[6], to[7], words.w);
}

__device__ inline void cuda_store_piece(float *to, const float (&from)[CUDA_PIECE])
{
    reinterpret_cast<float4 *>(to)[0] = make_float4(from[0], from[1], from[2], from[3]);
    reinterpret_cast<float4 *>(to)[1] = make_float4(from[4], from[5], from[6], from[7]);
}

__device__ inline void cuda_store_piece(bf16 *to, const float (&from)[CUDA_PIECE])
{
    *reinterpret_cast<uint4 *>(to) = make_uint4(cuda_pack_bf16(from[0], from[1]), cuda_pack_bf16(from[2], from[3]),
                                                cuda_pack_bf16(from[4], from[5]), cuda_pack_bf16(from[6], from[7]));
}

/* The elements [at, min(at + 8, end)) as floats, zeros after them. `aligned`: element `at` lies at a 16-byte
 * boundary, as it does where the base is and at is a multiple of 8. */
template <class T>
__device__ inline void cuda_load(float (&to)[CUDA_PIECE], const T *from, int64_t at, int64_t end, bool aligned)
{
    if (aligned && at + CUDA_PIECE <= end) {
        cuda_load_piece(to, from + at);
        return;
    }
#pragma unroll
    for (int i = 0; i < CUDA_PIECE; i++)
        to[i] = at + i < end ? cuda_to_f32(from[at + i]) : 0.0f;
}

/* The same elements, rounded to T and written. */
template <class T>
__device__ inline void cuda_store(T *to, const float (&from)[CUDA_PIECE], int64_t at, int64_t end, bool aligned)
{
    if (aligned && at + CUDA_PIECE <= end) {
        cuda_store_piece(to + at, from);
        return;
    }
#pragma unroll
    for (int i = 0; i < CUDA_PIECE; i++)
        if (at + i < end) to[at + i] = cuda_from_f32<T>(from[i]);
}

/* ---- sums and maxima over a warp or a block, the same bits in every lane ---- */

#define CUDA_WARP 32
#define CUDA_ALL_LANES 0xffffffffu

__device__ inline float cuda_warp_sum(float x)
{
#pragma unroll
    for (int distance = CUDA_WARP / 2; distance > 0; distance /= 2)
        x += __shfl_xor_sync(CUDA_ALL_LANES, x, distance);
    return x;
}

__device__ inline float cuda_warp_max(float x)
{
#pragma unroll
    for (int distance = CUDA_WARP / 2; distance > 0; distance /= 2)
        x = fmaxf(x, __shfl_xor_sync(CUDA_ALL_LANES, x, distance));
    return x;
}

/* Over a one-dimensional block of whole warps, all of whose threads call it together. May be called again at once. */
__device__ inline float cuda_block_sum(float x)
{
    CUDA_SHARED(float, parts, [CUDA_WARP]);
    const int warp = (int)threadIdx.x / CUDA_WARP, lane = (int)threadIdx.x % CUDA_WARP;
    const int warps = (int)blockDim.x / CUDA_WARP;
    x = cuda_warp_sum(x);
    if (lane == 0) parts[warp] = x;
    __syncthreads();
    x = cuda_warp_sum(lane < warps ? parts[lane] : 0.0f);
    __syncthreads();
    return x;
}

__device__ inline float cuda_block_max(float x)
{
    CUDA_SHARED(float, parts, [CUDA_WARP]);
    const int warp = (int)threadIdx.x / CUDA_WARP, lane = (int)threadIdx.x % CUDA_WARP;
    const int warps = (int)blockDim.x / CUDA_WARP;
    x = cuda_warp_max(x);
    if (lane == 0) parts[warp] = x;
    __syncthreads();
    x = cuda_warp_max(lane < warps ? parts[lane] : -INFINITY);
    __syncthreads();
    return x;
}

/* ---- shared between families ---- */

/* elementwise.cu: out[i] += Σ over `rows` of parts[row·width + i], in their order. parts lies in the workspace. */
int cuda_add_rows(struct device *dev, float *out, const float *parts, int64_t rows, int64_t width);

/* norm.cu: the same, many rows at a time, in an order that depends on the number of rows alone. */
int cuda_add_columns(struct device *dev, float *out, const float *parts, int64_t rows, int64_t width);

#endif
