/* Private to the CPU backend: the state of a device, its workspace, and the conversions and the exponential that the
 * kernels share.
 *
 * Threads: a kernel opens its own `#pragma omp parallel … num_threads(dev->threads)`. Work is cut into pieces that
 * depend on shapes only, and each piece is computed whole by one thread in a fixed order, so results do not depend on
 * the number of threads. Everything inline here is written so that gcc vectorises loops over it. */
#ifndef TATARA_CPU_H
#define TATARA_CPU_H

#include <math.h>
#include <string.h>

#include "ops.h"
#include "tensor.h"

/* Each thread's share of dev->workspace: what one task of the largest kernel needs. A multiple of 4096. */
#define CPU_SLICE_BYTES ((size_t)5 << 20)
#define CPU_ALIGN 128

struct product_table; /* product.h: what multiplies tiles */

struct cpu_state {
    int threads; /* slices in the workspace; dev->threads never exceeds it */
    struct product_table *products;
};

/* The calling thread's part of the workspace, CPU_SLICE_BYTES at a 64-byte boundary or better. */
static inline void *cpu_slice(const struct device *dev, int thread)
{
    return (char *)dev->workspace + (size_t)thread * CPU_SLICE_BYTES;
}

/* product.c */
int cpu_products_open(struct product_table **products, int threads, enum product_choice choice);
void cpu_products_close(struct product_table *table);
/* What multiplies: "oneDNN 2.6.3, AMX bf16", …, "portable product". */
const char *cpu_products_name(const struct product_table *table);

/* matmul.c */
size_t cpu_pack_bytes(struct device *dev, struct tensor b, bool tb);

/* isa.c */
/* Fails with ERR_DEVICE when this CPU lacks instructions that the kernels were compiled for. */
int cpu_isa_check(void);
/* The newest instructions that the kernels were compiled for. */
const char *cpu_isa_compiled(void);

/* device.c */
int cpu_choose_product(struct device *dev, enum product_choice choice);

static inline int64_t cpu_min(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static inline int64_t cpu_max(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

static inline int64_t cpu_div_up(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

static inline float cpu_f32_from_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline uint32_t cpu_bits_from_f32(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float cpu_f32_from_bf16(uint16_t x)
{
    return cpu_f32_from_bits((uint32_t)x << 16);
}

/* Rounds to nearest, ties to even; NaN stays NaN. */
static inline uint16_t cpu_bf16_from_f32(float x)
{
    const uint32_t bits = cpu_bits_from_f32(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t nan = (bits >> 16) | 0x40u;
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

/* Element i of data of type f32 or bf16, as f32. For loops whose speed matters use cpu_load and cpu_store. */
static inline float cpu_get(const void *data, enum dtype dtype, int64_t i)
{
    return dtype == DT_BF16 ? cpu_f32_from_bf16(((const uint16_t *)data)[i]) : ((const float *)data)[i];
}

static inline void cpu_set(void *data, enum dtype dtype, int64_t i, float x)
{
    if (dtype == DT_BF16)
        ((uint16_t *)data)[i] = cpu_bf16_from_f32(x);
    else
        ((float *)data)[i] = x;
}

/* n elements of data (f32 or bf16), from element `begin` on, to f32. */
static inline void cpu_load(float *restrict to, const void *restrict data, enum dtype dtype, int64_t begin, int64_t n)
{
    if (dtype == DT_BF16) {
        const uint16_t *from = (const uint16_t *)data + begin;
        for (int64_t i = 0; i < n; i++)
            to[i] = cpu_f32_from_bf16(from[i]);
    } else {
        memcpy(to, (const float *)data + begin, (size_t)n * sizeof(float));
    }
}

/* n values of f32, rounded to the type of data, to its elements from `begin` on. */
static inline void cpu_store(void *restrict data, enum dtype dtype, int64_t begin, const float *restrict from,
                             int64_t n)
{
    if (dtype == DT_BF16) {
        uint16_t *to = (uint16_t *)data + begin;
        for (int64_t i = 0; i < n; i++)
            to[i] = cpu_bf16_from_f32(from[i]);
    } else {
        memcpy((float *)data + begin, from, (size_t)n * sizeof(float));
    }
}

/* e^x = 2^n·e^r with x = n·ln 2 + r and |r| ≤ ln 2 / 2, ln 2 in two parts (Cody & Waite 1980), e^r by its Taylor series
 * to r^7, without a branch, so that loops over it become vector code. Returns e^r; *n gets the integer, modulo 2^22, as
 * the low bits of a float that the callers below shift into an exponent. */
static inline float cpu_exp_parts(float x, uint32_t *n)
{
    const float magic = 12582912.0f; /* 1.5·2^23: adding it rounds to an integer */
    const float shifted = x * 1.44269504088896341f + magic;
    const float whole = shifted - magic;
    const float r = (x - whole * 0.693145751953125f) - whole * 1.428606820309417e-6f;
    float p = 1.98412698e-4f;
    p = p * r + 1.38888889e-3f;
    p = p * r + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    *n = cpu_bits_from_f32(shifted) - cpu_bits_from_f32(magic);
    return p * (r * r) + r + 1.0f;
}

/* e^x for one float; 2^n in two halves, so that results fade into subnormal numbers. Relative error below 1e-7 where the
 * result is a normal number; 0 below −104, infinity above 88.73, NaN stays NaN. */
static inline float cpu_exp(float x)
{
    uint32_t n;
    const float p = cpu_exp_parts(x < -104.0f ? -104.0f
                                  : x > 89.0f ? 89.0f
                                              : x,
                                  &n); /* NaN passes both comparisons */
    const int32_t exponent = (int32_t)n, half = exponent >> 1;
    const float scale_a = cpu_f32_from_bits((uint32_t)(half + 127) << 23);
    const float scale_b = cpu_f32_from_bits((uint32_t)(exponent - half + 127) << 23);
    return p * scale_a * scale_b;
}

/* The same for x ≤ 0, as in a softmax, in half the time: 0 where the result would not be a normal number. */
static inline float cpu_exp_negative(float x)
{
    uint32_t n;
    const float p = cpu_exp_parts(x, &n);
    const float y = p * cpu_f32_from_bits((n << 23) + (127u << 23));
    return x < -87.0f ? 0.0f : y;
}

/* Elements per step of the elementwise and row kernels: a few such buffers of floats stay in the first-level cache. */
#define CPU_BLOCK 512

/* Σ x in an order that depends on n alone, not on the CPU's vectors: element i goes to lane i modulo 16, and the lanes are
 * added in pairs. */
static inline float cpu_sum(const float *x, int64_t n)
{
    enum { LANES = 16 };
    float lane[LANES] = {0};
    const int64_t whole = n / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES)
#pragma omp simd
        for (int j = 0; j < LANES; j++)
            lane[j] += x[i + j];
    for (int64_t i = whole; i < n; i++)
        lane[i - whole] += x[i];
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int j = 0; j < half; j++)
            lane[j] += lane[j + half];
    return lane[0];
}

/* n ≤ CPU_BLOCK elements of t (f32 or bf16) from element `begin` on, to read as floats: t's own memory when it is f32,
 * else converted into `buffer`. */
static inline const float *cpu_view(struct tensor t, int64_t begin, int64_t n, float *buffer)
{
    if (t.dtype == DT_F32) return (const float *)t.data + begin;
    cpu_load(buffer, t.data, t.dtype, begin, n);
    return buffer;
}

/* Where to write results for t from element `begin` on: t's own memory when it is f32, else `buffer`, which cpu_commit
 * then rounds into t. */
static inline float *cpu_target(struct tensor t, int64_t begin, float *buffer)
{
    return t.dtype == DT_F32 ? (float *)t.data + begin : buffer;
}

static inline void cpu_commit(struct tensor t, int64_t begin, int64_t n, const float *buffer)
{
    if (t.dtype != DT_F32) cpu_store(t.data, t.dtype, begin, buffer, n);
}

#endif
