/* SwiGLU and GELU. Both need the logistic function, here from one vectorised exponential. Parallel over rows. */
#include "cpu.h"

/* Keeps e^-x finite, so that the products below never become 0·∞; there the logistic function is 0 to every purpose. */
static inline float exp_minus(float x)
{
    return cpu_exp(x < -80.0f ? 80.0f : -x);
}

int cpu_swiglu_fwd(struct device *dev, struct tensor y, struct tensor x)
{
    const int64_t rows = y.shape[0], width = y.shape[1];
#pragma omp parallel for num_threads(dev->threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        float gates[CPU_BLOCK], ups[CPU_BLOCK], outs[CPU_BLOCK];
        for (int64_t at = 0; at < width; at += CPU_BLOCK) {
            const int64_t n = cpu_min(CPU_BLOCK, width - at);
            const float *gate = cpu_view(x, 2 * row * width + at, n, gates);
            const float *up = cpu_view(x, (2 * row + 1) * width + at, n, ups);
            float *out = cpu_target(y, row * width + at, outs);
#pragma omp simd
            for (int64_t i = 0; i < n; i++)
                out[i] = gate[i] / (1.0f + exp_minus(gate[i])) * up[i];
            cpu_commit(y, row * width + at, n, out);
        }
    }
    return 0;
}

/* With s the logistic function of the gate g: silu(g) = g·s, and its derivative is s + g·s·(1 − s), where 1 − s is
 * e^-g·s without cancellation. */
int cpu_swiglu_bwd(struct device *dev, struct tensor dx, struct tensor dy, struct tensor x)
{
    const int64_t rows = dy.shape[0], width = dy.shape[1];
#pragma omp parallel for num_threads(dev->threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        float gates[CPU_BLOCK], ups[CPU_BLOCK], douts[CPU_BLOCK], dgates[CPU_BLOCK], dups[CPU_BLOCK];
        for (int64_t at = 0; at < width; at += CPU_BLOCK) {
            const int64_t n = cpu_min(CPU_BLOCK, width - at);
            const int64_t gate_at = 2 * row * width + at, up_at = gate_at + width;
            const float *gate = cpu_view(x, gate_at, n, gates);
            const float *up = cpu_view(x, up_at, n, ups);
            const float *dout = cpu_view(dy, row * width + at, n, douts);
            float *dgate = cpu_target(dx, gate_at, dgates);
            float *dup = cpu_target(dx, up_at, dups);
#pragma omp simd
            for (int64_t i = 0; i < n; i++) {
                const float g = gate[i], u = up[i], d = dout[i];
                const float e = exp_minus(g), s = 1.0f / (1.0f + e);
                dgate[i] = d * u * (s + g * s * (e * s));
                dup[i] = d * g * s;
            }
            cpu_commit(dx, gate_at, n, dgate);
            cpu_commit(dx, up_at, n, dup);
        }
    }
    return 0;
}

/* 0.5 (1 + tanh u) is the logistic function of 2u; this is 2u, with its derivative below. */
static inline float gelu_argument(float x)
{
    return 1.5957691216057308f * (x + 0.044715f * x * x * x); /* 2·sqrt(2/π) */
}

static inline float gelu_argument_derivative(float x)
{
    return 1.5957691216057308f * (1.0f + 0.134145f * x * x);
}

int cpu_gelu_fwd(struct device *dev, struct tensor y, struct tensor x)
{
    const int64_t rows = x.shape[0], width = x.shape[1];
#pragma omp parallel for num_threads(dev->threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        float ins[CPU_BLOCK], outs[CPU_BLOCK];
        for (int64_t at = row * width, end = at + width; at < end; at += CPU_BLOCK) {
            const int64_t n = cpu_min(CPU_BLOCK, end - at);
            const float *in = cpu_view(x, at, n, ins);
            float *out = cpu_target(y, at, outs);
#pragma omp simd
            for (int64_t i = 0; i < n; i++)
                out[i] = in[i] / (1.0f + exp_minus(gelu_argument(in[i])));
            cpu_commit(y, at, n, out);
        }
    }
    return 0;
}

int cpu_gelu_bwd(struct device *dev, struct tensor dx, struct tensor dy, struct tensor x)
{
    const int64_t rows = x.shape[0], width = x.shape[1];
#pragma omp parallel for num_threads(dev->threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        float ins[CPU_BLOCK], douts[CPU_BLOCK], dins[CPU_BLOCK];
        for (int64_t at = row * width, end = at + width; at < end; at += CPU_BLOCK) {
            const int64_t n = cpu_min(CPU_BLOCK, end - at);
            const float *in = cpu_view(x, at, n, ins);
            const float *dout = cpu_view(dy, at, n, douts);
            float *din = cpu_target(dx, at, dins);
#pragma omp simd
            for (int64_t i = 0; i < n; i++) {
                const float e = exp_minus(gelu_argument(in[i])), s = 1.0f / (1.0f + e);
                din[i] = dout[i] * (s + in[i] * s * (e * s) * gelu_argument_derivative(in[i]));
            }
            cpu_commit(dx, at, n, din);
        }
    }
    return 0;
}
