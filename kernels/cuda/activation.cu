/* SwiGLU and GELU. A thread takes a piece of 8 columns of a row, and reads all of it before it writes, so that
 * gradients may lie on inputs. */
#include "cuda.cuh"

#define THREADS 256

/* e^-x, kept finite, so that the products below never become 0·∞; there the logistic function is 0 to every purpose. */
__device__ static inline float exp_minus(float x)
{
    return expf(x < -80.0f ? 80.0f : -x);
}

/* ---- SwiGLU (Shazeer 2020) ---- */

/* Row by row: gates lie in the first half of a row of x, factors in the second. Grid: tiles of columns × rows. */
template <class T>
__global__ void __launch_bounds__(THREADS) swiglu(T *y, const T *x, int64_t rows, int64_t width, bool aligned)
{
    const int64_t at = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * CUDA_PIECE;
    for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
        float gate[CUDA_PIECE], up[CUDA_PIECE];
        cuda_load(gate, x + 2 * row * width, at, width, aligned);
        cuda_load(up, x + (2 * row + 1) * width, at, width, aligned);
#pragma unroll
        for (int i = 0; i < CUDA_PIECE; i++)
            up[i] *= __fdividef(gate[i], 1.0f + exp_minus(gate[i]));
        cuda_store(y + row * width, up, at, width, aligned);
    }
}

extern "C" int cuda_swiglu_fwd(struct device *dev, struct tensor y, struct tensor x)
{
    const int64_t rows = y.shape[0], width = y.shape[1];
    if (rows == 0 || width == 0) return 0;
    const bool aligned = width % CUDA_PIECE == 0 && cuda_aligned(y.data, x.data);
    CUDA_BY_TYPE(x.dtype, T,
                 TRY(CUDA_LAUNCH(dev, swiglu<T>, cuda_row_grid(rows, width, THREADS), THREADS, 0, cuda_data<T>(y),
                                 cuda_data<T>(x), rows, width, aligned)));
    return 0;
}

/* With s the logistic function of the gate g: silu(g) = g·s, and its derivative is s + g·s·(1 − s), where 1 − s is
 * e^-g·s without cancellation. */
template <class T>
__global__ void __launch_bounds__(THREADS)
    swiglu_bwd(T *dx, const T *dy, const T *x, int64_t rows, int64_t width, bool aligned)
{
    const int64_t at = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * CUDA_PIECE;
    for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
        float gate[CUDA_PIECE], up[CUDA_PIECE], dout[CUDA_PIECE];
        cuda_load(gate, x + 2 * row * width, at, width, aligned);
        cuda_load(up, x + (2 * row + 1) * width, at, width, aligned);
        cuda_load(dout, dy + row * width, at, width, aligned);
#pragma unroll
        for (int i = 0; i < CUDA_PIECE; i++) {
            const float g = gate[i], u = up[i], d = dout[i];
            const float e = exp_minus(g), s = __fdividef(1.0f, 1.0f + e);
            gate[i] = d * u * (s + g * s * (e * s));
            up[i] = d * g * s;
        }
        cuda_store(dx + 2 * row * width, gate, at, width, aligned);
        cuda_store(dx + (2 * row + 1) * width, up, at, width, aligned);
    }
}

extern "C" int cuda_swiglu_bwd(struct device *dev, struct tensor dx, struct tensor dy, struct tensor x)
{
    const int64_t rows = dy.shape[0], width = dy.shape[1];
    if (rows == 0 || width == 0) return 0;
    const bool aligned = width % CUDA_PIECE == 0 && cuda_aligned(dx.data, dy.data, x.data);
    CUDA_BY_TYPE(x.dtype, T,
                 TRY(CUDA_LAUNCH(dev, swiglu_bwd<T>, cuda_row_grid(rows, width, THREADS), THREADS, 0,
                                 cuda_data<T>(dx), cuda_data<T>(dy), cuda_data<T>(x), rows, width, aligned)));
    return 0;
}

/* ---- GELU, the tanh form of Hendrycks & Gimpel 2016 ---- */

/* 0.5 (1 + tanh u) is the logistic function of 2u; this is 2u, with its derivative below. */
__device__ static inline float gelu_argument(float x)
{
    return 1.5957691216057308f * (x + 0.044715f * x * x * x); /* 2·sqrt(2/π) */
}

__device__ static inline float gelu_argument_derivative(float x)
{
    return 1.5957691216057308f * (1.0f + 0.134145f * x * x);
}

template <class T> __global__ void __launch_bounds__(THREADS) gelu(T *y, const T *x, int64_t elems, bool aligned)
{
    const int64_t step = (int64_t)gridDim.x * THREADS * CUDA_PIECE;
    for (int64_t at = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * CUDA_PIECE; at < elems; at += step) {
        float values[CUDA_PIECE];
        cuda_load(values, x, at, elems, aligned);
#pragma unroll
        for (int i = 0; i < CUDA_PIECE; i++)
            values[i] = __fdividef(values[i], 1.0f + exp_minus(gelu_argument(values[i])));
        cuda_store(y, values, at, elems, aligned);
    }
}

extern "C" int cuda_gelu_fwd(struct device *dev, struct tensor y, struct tensor x)
{
    const int64_t elems = tensor_elems(x);
    if (elems == 0) return 0;
    CUDA_BY_TYPE(x.dtype, T,
                 TRY(CUDA_LAUNCH(dev, gelu<T>, cuda_blocks(elems, THREADS * CUDA_PIECE), THREADS, 0, cuda_data<T>(y),
                                 cuda_data<T>(x), elems, cuda_aligned(y.data, x.data))));
    return 0;
}

template <class T>
__global__ void __launch_bounds__(THREADS) gelu_bwd(T *dx, const T *dy, const T *x, int64_t elems, bool aligned)
{
    const int64_t step = (int64_t)gridDim.x * THREADS * CUDA_PIECE;
    for (int64_t at = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * CUDA_PIECE; at < elems; at += step) {
        float values[CUDA_PIECE], dout[CUDA_PIECE];
        cuda_load(values, x, at, elems, aligned);
        cuda_load(dout, dy, at, elems, aligned);
#pragma unroll
        for (int i = 0; i < CUDA_PIECE; i++) {
            const float v = values[i];
            const float e = exp_minus(gelu_argument(v)), s = __fdividef(1.0f, 1.0f + e);
            dout[i] *= s + v * s * (e * s) * gelu_argument_derivative(v);
        }
        cuda_store(dx, dout, at, elems, aligned);
    }
}

extern "C" int cuda_gelu_bwd(struct device *dev, struct tensor dx, struct tensor dy, struct tensor x)
{
    const int64_t elems = tensor_elems(x);
    if (elems == 0) return 0;
    CUDA_BY_TYPE(
        x.dtype, T,
        TRY(CUDA_LAUNCH(dev, gelu_bwd<T>, cuda_blocks(elems, THREADS * CUDA_PIECE), THREADS, 0, cuda_data<T>(dx),
                        cuda_data<T>(dy), cuda_data<T>(x), elems, cuda_aligned(dx.data, dy.data, x.data))));
    return 0;
}
