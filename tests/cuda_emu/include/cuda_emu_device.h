/* CUDA's device functions, for the emulation: those that our kernels call. Included by cuda_runtime.h. */
#ifndef CUDA_EMU_DEVICE_H
#define CUDA_EMU_DEVICE_H

#define CUDA_EMU_HERE                      \
    {                                      \
        __builtin_FILE(), __builtin_LINE() \
    }

/* ---- barriers, votes and shuffles ---- */

inline void __syncthreads(cuda_emu_place place = CUDA_EMU_HERE)
{
    cuda_emu_barrier(place);
}

inline void __syncwarp(unsigned mask = 0xffffffffu, cuda_emu_place place = CUDA_EMU_HERE)
{
    cuda_emu_meet(
        "__syncwarp", mask, nullptr, [](void *const *, unsigned) {}, place);
}

/* One lane's part in a shuffle: it offers a value, and takes that of the lane `from`. */
template <class T> struct cuda_emu_shuffle {
    T value, taken;
    int from;
};

template <class T> T cuda_emu_exchange(const char *what, unsigned mask, T value, int from, cuda_emu_place place)
{
    cuda_emu_shuffle<T> lane = {value, value, from};
    if (!(mask >> from & 1))
        cuda_emu_fault("%s:%d: %s from lane %d, which the mask does not name", place.file, place.line, what, from);
    cuda_emu_meet(
        what, mask, &lane,
        [](void *const *args, unsigned lanes) {
            for (int i = 0; i < warpSize; i++) {
                if (!(lanes >> i & 1)) continue;
                cuda_emu_shuffle<T> *one = static_cast<cuda_emu_shuffle<T> *>(args[i]);
                one->taken = static_cast<cuda_emu_shuffle<T> *>(args[one->from])->value;
            }
        },
        place);
    return lane.taken;
}

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = warpSize, cuda_emu_place place = CUDA_EMU_HERE)
{
    const int first = cuda_emu_lane() / width * width;
    return cuda_emu_exchange("__shfl_sync", mask, value, first + (from & (width - 1)), place);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize, cuda_emu_place place = CUDA_EMU_HERE)
{
    const int lane = cuda_emu_lane(), from = lane ^ bits;
    return cuda_emu_exchange("__shfl_xor_sync", mask, value, from / width > lane / width ? lane : from, place);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, int distance, int width = warpSize, cuda_emu_place place = CUDA_EMU_HERE)
{
    const int lane = cuda_emu_lane(), from = lane + distance;
    return cuda_emu_exchange("__shfl_down_sync", mask, value, from / width > lane / width ? lane : from, place);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, int distance, int width = warpSize, cuda_emu_place place = CUDA_EMU_HERE)
{
    const int lane = cuda_emu_lane();
    return cuda_emu_exchange("__shfl_up_sync", mask, value, lane % width < distance ? lane : lane - distance, place);
}

/* One lane's part in a vote: its own bit, and then the bits of all. */
struct cuda_emu_vote {
    bool bit;
    unsigned bits;
};

inline unsigned __ballot_sync(unsigned mask, bool bit, cuda_emu_place place = CUDA_EMU_HERE)
{
    cuda_emu_vote lane = {bit, 0};
    cuda_emu_meet(
        "__ballot_sync", mask, &lane,
        [](void *const *args, unsigned lanes) {
            unsigned bits = 0;
            for (int i = 0; i < warpSize; i++)
                if (lanes >> i & 1) bits |= (unsigned)static_cast<cuda_emu_vote *>(args[i])->bit << i;
            for (int i = 0; i < warpSize; i++)
                if (lanes >> i & 1) static_cast<cuda_emu_vote *>(args[i])->bits = bits;
        },
        place);
    return lane.bits;
}

inline bool __any_sync(unsigned mask, bool bit, cuda_emu_place place = CUDA_EMU_HERE)
{
    return __ballot_sync(mask, bit, place) != 0;
}

inline bool __all_sync(unsigned mask, bool bit, cuda_emu_place place = CUDA_EMU_HERE)
{
    return __ballot_sync(mask, bit, place) == mask;
}

/* ---- memory: one thread runs at a time, so every operation is atomic and seen by all at once ---- */

inline void __threadfence()
{
}

inline void __threadfence_block()
{
}

template <class T> T __ldg(const T *from)
{
    return *from;
}

template <class T> T cuda_emu_swap(T *at, T value)
{
    const T old = *at;
    *at = value;
    return old;
}

inline int atomicAdd(int *at, int x)
{
    return cuda_emu_swap(at, (int)((unsigned)*at + (unsigned)x));
}

inline unsigned atomicAdd(unsigned *at, unsigned x)
{
    return cuda_emu_swap(at, *at + x);
}

inline unsigned long long atomicAdd(unsigned long long *at, unsigned long long x)
{
    return cuda_emu_swap(at, *at + x);
}

inline int atomicOr(int *at, int x)
{
    return cuda_emu_swap(at, *at | x);
}

inline unsigned atomicOr(unsigned *at, unsigned x)
{
    return cuda_emu_swap(at, *at | x);
}

inline int atomicMax(int *at, int x)
{
    return cuda_emu_swap(at, *at > x ? *at : x);
}

inline unsigned atomicCAS(unsigned *at, unsigned compare, unsigned value)
{
    return cuda_emu_swap(at, *at == compare ? value : *at);
}

/* ---- numbers ---- */

template <class To, class From> To cuda_emu_bits(From from)
{
    static_assert(sizeof(To) == sizeof(From), "a change of type keeps all bits");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

inline float __uint_as_float(unsigned bits)
{
    return cuda_emu_bits<float>(bits);
}

inline unsigned __float_as_uint(float x)
{
    return cuda_emu_bits<unsigned>(x);
}

inline float __int_as_float(int bits)
{
    return cuda_emu_bits<float>(bits);
}

inline int __float_as_int(float x)
{
    return cuda_emu_bits<int>(x);
}

inline long long __double_as_longlong(double x)
{
    return cuda_emu_bits<long long>(x);
}

inline double __longlong_as_double(long long bits)
{
    return cuda_emu_bits<double>(bits);
}

inline float rsqrtf(float x)
{
    return 1.0f / sqrtf(x);
}

/* The C library declares functions of these names for itself. */
#define __expf(x) expf(x)
#define __logf(x) logf(x)

inline float __fdividef(float x, float y)
{
    return x / y;
}

inline float __frcp_rn(float x)
{
    return 1.0f / x;
}

inline float __fadd_rn(float x, float y)
{
    return x + y;
}

inline float __fmul_rn(float x, float y)
{
    return x * y;
}

inline float __fmaf_rn(float x, float y, float z)
{
    return fmaf(x, y, z);
}

inline float __fdiv_rn(float x, float y)
{
    return x / y;
}

inline float __fsqrt_rn(float x)
{
    return sqrtf(x);
}

inline double __dmul_rn(double x, double y)
{
    return x * y;
}

inline double __dadd_rn(double x, double y)
{
    return x + y;
}

inline double __fma_rn(double x, double y, double z)
{
    return fma(x, y, z);
}

inline long long __double2ll_rn(double x)
{
    return llrint(x);
}

inline long long __float2ll_rn(float x)
{
    return llrintf(x);
}

inline float __ll2float_rn(long long x)
{
    return (float)x;
}

inline unsigned __umulhi(unsigned x, unsigned y)
{
    return (unsigned)((unsigned long long)x * y >> 32);
}

__extension__ typedef unsigned __int128 cuda_emu_u128;

inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y)
{
    return (unsigned long long)((cuda_emu_u128)x * y >> 64);
}

inline int __popc(unsigned x)
{
    return __builtin_popcount(x);
}

inline int __clz(int x)
{
    return x == 0 ? 32 : __builtin_clz((unsigned)x);
}

inline int __ffs(int x)
{
    return __builtin_ffs(x);
}

#endif
