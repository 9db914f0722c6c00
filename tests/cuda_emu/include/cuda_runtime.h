/* Stands in for the header of the same name of CUDA when g++ compiles the files of kernels/cuda for the tests: exactly
 * what those use, with the meaning that NVIDIA's documentation gives it, on the CPU (cuda_emu.h says how). */
#ifndef CUDA_EMU_CUDA_RUNTIME_H
#define CUDA_EMU_CUDA_RUNTIME_H

#include <cuda_runtime_api.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

/* ---- vectors ---- */

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_)
    {
    }
};

#define CUDA_EMU_VECTORS(type, name, n)                                  \
    struct alignas(2 * sizeof(type)) name##2                             \
    {                                                                    \
        type x, y;                                                       \
    };                                                                   \
    struct alignas(sizeof(type) < 8 ? 4 * sizeof(type) : 16) name##4     \
    {                                                                    \
        type x, y, z, w;                                                 \
    };                                                                   \
    static inline name##2 make_##name##2(type x, type y)                 \
    {                                                                    \
        return {x, y};                                                   \
    }                                                                    \
    static inline name##4 make_##name##4(type x, type y, type z, type w) \
    {                                                                    \
        return {x, y, z, w};                                             \
    }
CUDA_EMU_VECTORS(float, float, )
CUDA_EMU_VECTORS(double, double, )
CUDA_EMU_VECTORS(int, int, )
CUDA_EMU_VECTORS(unsigned, uint, )
CUDA_EMU_VECTORS(long long, longlong, )
#undef CUDA_EMU_VECTORS

/* ---- the calling thread of the grid ---- */

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

#include "cuda_emu.h"

#include "cuda_emu_device.h"

#endif
