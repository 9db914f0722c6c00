/* The optimizer step and the gradient accumulators, in floats and in fixed point.
 *
 * An element of adamw must not depend on where in the tensor it lies, because ZeRO cuts the same parameters at other
 * places on other numbers of ranks: all its operations are written out as intrinsics, which the compiler may neither fuse
 * nor reorder. What concerns integers gives the very bits of the CPU backend. */
#include "cuda.cuh"

#define THREADS 256
#define WARPS (THREADS / CUDA_WARP)

/* Grid-stride over pieces: a thread's first element, and how far it is to its next. */
__device__ static inline int64_t first_piece()
{
    return ((int64_t)blockIdx.x * THREADS + threadIdx.x) * CUDA_PIECE;
}

__device__ static inline int64_t piece_step()
{
    return (int64_t)gridDim.x * THREADS * CUDA_PIECE;
}

/* ---- AdamW (Loshchilov & Hutter 2019) ---- */

struct adamw_factors {
    float beta1, beta2, new1, new2; /* new = 1 − beta */
    float decay, rate, root, eps;
};

/* One element. */
__device__ static inline void adamw_element(float &master, float &m, float &v, float g, float clip,
                                            const adamw_factors &k)
{
    const float scaled = __fmul_rn(g, clip);
    m = __fmaf_rn(k.beta1, m, __fmul_rn(k.new1, scaled));
    v = __fmaf_rn(k.beta2, v, __fmul_rn(k.new2, __fmul_rn(scaled, scaled)));
    const float decayed = __fmaf_rn(-k.decay, master, master);
    const float size = __fmaf_rn(__fsqrt_rn(v), k.root, k.eps);
    master = __fmaf_rn(-k.rate, __fdiv_rn(m, size), decayed);
}

/* w may be master's own memory: then it gets the same values twice. */
template <class T>
__global__ void __launch_bounds__(THREADS)
    adamw(T *w, float *master, float *m, float *v, const float *g, const step_control *control, int64_t elems,
          adamw_factors k, bool aligned)
{
    const float clip = (float)control->clip;
    if (control->fault) elems = 0;
    for (int64_t at = first_piece(); at < elems; at += piece_step()) {
        float weight[CUDA_PIECE], mean[CUDA_PIECE], square[CUDA_PIECE], gradient[CUDA_PIECE];
        cuda_load(weight, master, at, elems, aligned);
        cuda_load(mean, m, at, elems, aligned);
        cuda_load(square, v, at, elems, aligned);
        cuda_load(gradient, g, at, elems, aligned);
#pragma unroll
        for (int i = 0; i < CUDA_PIECE; i++)
            adamw_element(weight[i], mean[i], square[i], gradient[i], clip, k);
        cuda_store(master, weight, at, elems, aligned);
        cuda_store(m, mean, at, elems, aligned);
        cuda_store(v, square, at, elems, aligned);
        if ((const void *)w != (const void *)master) cuda_store(w, weight, at, elems, aligned);
    }
}

extern "C" int cuda_adamw(struct device *dev, struct tensor w, struct tensor master, struct tensor m, struct tensor v,
                          struct tensor g, struct tensor control, struct adamw_args args)
{
    const int64_t elems = tensor_elems(master);
    if (elems == 0) return 0;
    adamw_factors factors;
    factors.beta1 = (float)args.beta1;
    factors.beta2 = (float)args.beta2;
    factors.new1 = (float)(1.0 - args.beta1);
    factors.new2 = (float)(1.0 - args.beta2);
    factors.decay = (float)(args.lr * args.weight_decay);
    factors.rate = (float)(args.lr / args.bias1);
    factors.root = (float)(1.0 / sqrt(args.bias2));
    factors.eps = (float)args.eps;
    const bool aligned = cuda_aligned(w.data, master.data, m.data, v.data, g.data);
    CUDA_BY_TYPE(w.dtype, T,
                 TRY(CUDA_LAUNCH(dev, adamw<T>, cuda_blocks(elems, THREADS * CUDA_PIECE), THREADS, 0, cuda_data<T>(w),
                                 cuda_data<float>(master), cuda_data<float>(m), cuda_data<float>(v),
                                 cuda_data<float>(g), cuda_data<step_control>(control), elems, factors, aligned)));
    return 0;
}

/* ---- integers, a piece of 8 as four times 16 bytes ---- */

__device__ static inline void load_integers(int64_t (&to)[CUDA_PIECE], const int64_t *from, int64_t at, int64_t end,
                                            bool aligned)
{
    if (aligned && at + CUDA_PIECE <= end) {
#pragma unroll
        for (int i = 0; i < CUDA_PIECE; i += 2) {
            const longlong2 two = *reinterpret_cast<const longlong2 *>(from + at + i);
            to[i] = two.x;
            to[i + 1] = two.y;
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < CUDA_PIECE; i++)
        to[i] = at + i < end ? from[at + i] : 0;
}

__device__ static inline void store_integers(int64_t *to, const int64_t (&from)[CUDA_PIECE], int64_t at, int64_t end,
                                             bool aligned)
{
    if (aligned && at + CUDA_PIECE <= end) {
#pragma unroll
        for (int i = 0; i < CUDA_PIECE; i += 2)
            *reinterpret_cast<longlong2 *>(to + at + i) = make_longlong2(from[i], from[i + 1]);
        return;
    }
#pragma unroll
    for (int i = 0; i < CUDA_PIECE; i++)
        if (at + i < end) to[at + i] = from[i];
}

/* ---- accumulating gradients ---- */

__global__ void __launch_bounds__(THREADS)
    add_float(float *acc, const float *g, int64_t elems, int *fault, bool aligned)
{
    bool finite = true;
    for (int64_t at = first_piece(); at < elems; at += piece_step()) {
        float sums[CUDA_PIECE], gradient[CUDA_PIECE];
        cuda_load(sums, acc, at, elems, aligned);
        cuda_load(gradient, g, at, elems, aligned);
#pragma unroll
        for (int i = 0; i < CUDA_PIECE; i++) {
            sums[i] += gradient[i];
            finite = finite && fabsf(gradient[i]) < INFINITY;
        }
        cuda_store(acc, sums, at, elems, aligned);
    }
    if (!finite) atomicOr(fault, FAULT_NAN);
}

/* The product with a power of two is exact in double, and rounding it, to nearest even, is the only rounding there
 * is. */
__global__ void __launch_bounds__(THREADS) add_fixed(int64_t *acc, const float *g, const step_control *control,
                                                     int64_t elems, double limit, int *fault, bool aligned)
{
    const double scale = control->scale;
    int faults = 0;
    for (int64_t at = first_piece(); at < elems; at += piece_step()) {
        int64_t sums[CUDA_PIECE];
        float gradient[CUDA_PIECE];
        load_integers(sums, acc, at, elems, aligned);
        cuda_load(gradient, g, at, elems, aligned);
#pragma unroll
        for (int i = 0; i < CUDA_PIECE; i++) {
            const double scaled = (double)gradient[i] * scale, size = fabs(scaled);
            sums[i] += __double2ll_rn(size <= limit ? scaled : 0.0); /* false for NaN */
            if (size > limit) faults |= FAULT_OVERFLOW;
            if (!(size < (double)INFINITY)) faults |= FAULT_NAN;
        }
        store_integers(acc, sums, at, elems, aligned);
    }
    if (faults) atomicOr(fault, faults);
}

extern "C" int cuda_grad_add(struct device *dev, struct tensor acc, struct tensor g, struct tensor control,
                             double limit, struct tensor fault)
{
    const int64_t elems = tensor_elems(g);
    if (elems == 0) return 0;
    const unsigned blocks = cuda_blocks(elems, THREADS * CUDA_PIECE);
    const bool aligned = cuda_aligned(acc.data, g.data);
    if (acc.dtype == DT_F32)
        return CUDA_LAUNCH(dev, add_float, blocks, THREADS, 0, cuda_data<float>(acc), cuda_data<float>(g), elems,
                           cuda_data<int>(fault), aligned);
    return CUDA_LAUNCH(dev, add_fixed, blocks, THREADS, 0, cuda_data<int64_t>(acc), cuda_data<float>(g),
                       cuda_data<step_control>(control), elems, limit, cuda_data<int>(fault), aligned);
}

/* g = acc·inverse for the elements [begin, end). A block reads all that it takes at a time before it writes any of it.
 * The conversion rounds; the product with a power of two does not. */
__global__ void __launch_bounds__(THREADS)
    read_fixed(float *g, const int64_t *acc, const step_control *control, int64_t begin, int64_t end, bool aligned)
{
    const float inverse = (float)control->unscale;
    for (int64_t block = blockIdx.x * (int64_t)(THREADS * CUDA_PIECE); begin + block < end; block += piece_step()) {
        const int64_t at = begin + block + threadIdx.x * CUDA_PIECE;
        int64_t sums[CUDA_PIECE];
        float values[CUDA_PIECE];
        load_integers(sums, acc, at, end, aligned);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < CUDA_PIECE; i++)
            values[i] = __ll2float_rn(sums[i]) * inverse;
        cuda_store(g, values, at, end, aligned);
    }
}

/* When g lies on the first half of acc, the floats [n, 2n) overwrite the integers [n/2, n): so one block does the first
 * elements, and then each launch the double of what is done, whose floats reach only what earlier launches have read. */
extern "C" int cuda_grad_read(struct device *dev, struct tensor g, struct tensor acc, struct tensor control)
{
    if (acc.dtype == DT_F32) return cuda_copy(dev, g, acc);
    const int64_t elems = tensor_elems(g), one_block = THREADS * CUDA_PIECE;
    const bool over = g.data == acc.data, aligned = cuda_aligned(g.data, acc.data);
    for (int64_t begin = 0, end; begin < elems; begin = end) {
        end = cuda_min(elems, !over ? elems : begin == 0 ? one_block : 2 * begin);
        TRY(CUDA_LAUNCH(dev, read_fixed, cuda_blocks(end - begin, one_block), THREADS, 0, cuda_data<float>(g),
                        cuda_data<int64_t>(acc), cuda_data<step_control>(control), begin, end, aligned));
    }
    return 0;
}

/* ---- sums ---- */

/* The sum over the block, in its first thread, in a fixed order: a block of THREADS. */
template <class T> __device__ static T block_total(T x)
{
    CUDA_SHARED(T, parts, [WARPS]);
    const int warp = (int)threadIdx.x / CUDA_WARP, lane = (int)threadIdx.x % CUDA_WARP;
#pragma unroll
    for (int distance = CUDA_WARP / 2; distance > 0; distance /= 2)
        x += __shfl_xor_sync(CUDA_ALL_LANES, x, distance);
    if (lane == 0) parts[warp] = x;
    __syncthreads();
    for (int i = 1; threadIdx.x == 0 && i < WARPS; i++)
        x += parts[i];
    __syncthreads();
    return x;
}

typedef unsigned long long limb; /* as CUDA's atomics have it */

__global__ void __launch_bounds__(THREADS)
    total_fixed(limb *acc, const float *x, int64_t elems, double scale, int *fault, bool aligned)
{
    limb total = 0;
    bool bad = false;
    for (int64_t at = first_piece(); at < elems; at += piece_step()) {
        float values[CUDA_PIECE];
        cuda_load(values, x, at, elems, aligned);
#pragma unroll
        for (int i = 0; i < CUDA_PIECE; i++) {
            const double scaled = (double)values[i] * scale;
            const bool fits = fabs(scaled) <= 0x1p52;
            total += (limb)__double2ll_rn(fits ? scaled : 0.0);
            bad = bad || !fits;
        }
    }
    total = block_total(total);
    if (threadIdx.x == 0) atomicAdd(acc, total); /* of integers: any order gives the same */
    if (bad) atomicOr(fault, FAULT_NAN);
}

extern "C" int cuda_sum_fixed(struct device *dev, struct tensor acc, struct tensor x, double scale,
                              struct tensor fault)
{
    const int64_t elems = tensor_elems(x);
    if (elems == 0) return 0;
    return CUDA_LAUNCH(dev, total_fixed, cuda_blocks(elems, THREADS * CUDA_PIECE), THREADS, 0, cuda_data<limb>(acc),
                       cuda_data<float>(x), elems, scale, cuda_data<int>(fault), cuda_aligned(x.data));
}

/* Moves what exceeds 32 bits of the three lower limbs upwards. */
__device__ static inline void carry(limb (&limbs)[4])
{
#pragma unroll
    for (int i = 0; i < 3; i++) {
        limbs[i + 1] += limbs[i] >> 32;
        limbs[i] &= 0xffffffffu;
    }
}

/* limbs += x², not carried: with |x| = h·2^32 + l, x² = l² + 2·h·l·2^32 + h²·2^64. There is room for 2^30 squares. */
__device__ static inline void add_square(limb (&limbs)[4], int64_t x)
{
    const limb size = x < 0 ? 0 - (limb)x : (limb)x, low = size & 0xffffffffu, high = size >> 32;
    const limb low_low = low * low, cross = low * high, high_high = high * high;
    limbs[0] += low_low & 0xffffffffu;
    limbs[1] += (low_low >> 32) + 2 * (cross & 0xffffffffu);
    limbs[2] += (high_high & 0xffffffffu) + 2 * (cross >> 32);
    limbs[3] += high_high >> 32;
}

/* The block's sum of the limbs, carried, in its first thread. */
__device__ static void block_limbs(limb (&limbs)[4])
{
    carry(limbs);
#pragma unroll
    for (int i = 0; i < 4; i++)
        limbs[i] = block_total(limbs[i]);
    carry(limbs);
}

/* parts[block] = four limbs. */
__global__ void __launch_bounds__(THREADS) squares_fixed(limb *parts, const int64_t *x, int64_t elems, bool aligned)
{
    limb limbs[4] = {};
    for (int64_t at = first_piece(); at < elems; at += piece_step()) {
        int64_t values[CUDA_PIECE];
        load_integers(values, x, at, elems, aligned);
#pragma unroll
        for (int i = 0; i < CUDA_PIECE; i++)
            add_square(limbs, values[i]);
    }
    block_limbs(limbs);
    for (int i = 0; threadIdx.x == 0 && i < 4; i++)
        parts[4 * blockIdx.x + i] = limbs[i];
}

/* out += the sum of the parts, each of its limbs carried first. One block. */
__global__ void __launch_bounds__(THREADS) finish_fixed(limb *out, const limb *parts, unsigned blocks)
{
    limb limbs[4] = {};
    for (unsigned block = threadIdx.x; block < blocks; block += THREADS)
        for (int i = 0; i < 4; i++)
            limbs[i] += parts[4 * block + i];
    block_limbs(limbs);
    for (int i = 0; threadIdx.x == 0 && i < 4; i++)
        out[i] += limbs[i];
}

__global__ void __launch_bounds__(THREADS) squares_float(double *parts, const float *x, int64_t elems, bool aligned)
{
    double total = 0;
    for (int64_t at = first_piece(); at < elems; at += piece_step()) {
        float values[CUDA_PIECE];
        cuda_load(values, x, at, elems, aligned);
#pragma unroll
        for (int i = 0; i < CUDA_PIECE; i++)
            total += (double)values[i] * (double)values[i];
    }
    total = block_total(total);
    if (threadIdx.x == 0) parts[blockIdx.x] = total;
}

/* One block. */
__global__ void __launch_bounds__(THREADS)
    finish_float(int64_t *out, const double *parts, unsigned blocks, int *fault)
{
    double total = 0;
    for (unsigned block = threadIdx.x; block < blocks; block += THREADS)
        total += parts[block];
    total = block_total(total);
    if (threadIdx.x == 0 && !step_squares(out, total)) atomicOr(fault, FAULT_NAN);
}

extern "C" int cuda_sum_squares(struct device *dev, struct tensor out, struct tensor x, struct tensor fault)
{
    const int64_t elems = tensor_elems(x);
    const unsigned blocks = cuda_blocks(elems, THREADS * CUDA_PIECE);
    if (elems == 0) return 0;
    if (CUDA_SCRATCH_BYTES < blocks * 4 * sizeof(limb)) FAIL(ERR_BUG, "sum_squares: the workspace is too small");
    if (x.dtype == DT_I64) {
        limb *const parts = static_cast<limb *>(dev->workspace);
        TRY(CUDA_LAUNCH(dev, squares_fixed, blocks, THREADS, 0, parts, cuda_data<int64_t>(x), elems,
                        cuda_aligned(x.data)));
        return CUDA_LAUNCH(dev, finish_fixed, 1, THREADS, 0, cuda_data<limb>(out), parts, blocks);
    }
    double *const parts = static_cast<double *>(dev->workspace);
    TRY(CUDA_LAUNCH(dev, squares_float, blocks, THREADS, 0, parts, cuda_data<float>(x), elems, cuda_aligned(x.data)));
    return CUDA_LAUNCH(dev, finish_float, 1, THREADS, 0, cuda_data<int64_t>(out), parts, blocks,
                       cuda_data<int>(fault));
}

/* ---- a step as a whole, by one thread ---- */

__global__ void gather_sums(int64_t *sums, const int *fault, const int64_t *loss)
{
    step_sums(sums, *fault, loss);
}

extern "C" int cuda_step_sums(struct device *dev, struct tensor sums, struct tensor fault, struct tensor loss)
{
    return CUDA_LAUNCH(dev, gather_sums, 1, 1, 0, cuda_data<int64_t>(sums), cuda_data<int>(fault),
                       cuda_data<int64_t>(loss));
}

__global__ void decide(step_control *control, const int64_t *sums, bool exact, step_limits limits)
{
    step_decide(control, sums, exact, limits);
}

extern "C" int cuda_step_decide(struct device *dev, struct tensor control, struct tensor sums, bool exact,
                                struct step_limits limits)
{
    return CUDA_LAUNCH(dev, decide, 1, 1, 0, cuda_data<step_control>(control), cuda_data<int64_t>(sums), exact,
                       limits);
}
