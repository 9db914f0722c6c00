/* The optimizer step and the gradient accumulators, in floats and in fixed point.
 *
 * Everything here is cut at fixed places, so no result depends on threads. Beyond that, an element of adamw must not
 * depend on where in the tensor it lies, because ZeRO cuts the same parameters at other places on other numbers of
 * ranks: all elements pass through one loop of fixed length, the last ones in a padded copy. */
#include "cpu.h"

/* Elements per thread's piece. */
#define PIECE 16384

/* ---- AdamW (Loshchilov & Hutter 2019) ---- */

struct adamw_factors {
    float beta1, beta2, new1, new2; /* new = 1 − beta */
    float grad_scale, decay, rate, root, eps;
};

/* CPU_BLOCK elements, whose code is the same for each. */
static void adamw_block(float *restrict master, float *restrict m, float *restrict v, const float *restrict g,
                        const struct adamw_factors *f)
{
    const struct adamw_factors k = *f;
#pragma omp simd
    for (int i = 0; i < CPU_BLOCK; i++) {
        const float scaled = g[i] * k.grad_scale;
        const float mean = k.beta1 * m[i] + k.new1 * scaled;
        const float square = k.beta2 * v[i] + k.new2 * (scaled * scaled);
        const float decayed = master[i] - k.decay * master[i];
        m[i] = mean;
        v[i] = square;
        master[i] = decayed - k.rate * (mean / (sqrtf(square) * k.root + k.eps));
    }
}

/* The n < CPU_BLOCK elements at the end: the same loop over copies. */
static void adamw_tail(float *master, float *m, float *v, const float *g, int64_t n, const struct adamw_factors *f)
{
    float copies[4][CPU_BLOCK] = {{0}};
    const size_t bytes = (size_t)n * sizeof(float);
    memcpy(copies[0], master, bytes);
    memcpy(copies[1], m, bytes);
    memcpy(copies[2], v, bytes);
    memcpy(copies[3], g, bytes);
    adamw_block(copies[0], copies[1], copies[2], copies[3], f);
    memcpy(master, copies[0], bytes);
    memcpy(m, copies[1], bytes);
    memcpy(v, copies[2], bytes);
}

int cpu_adamw(struct device *dev, struct tensor w, struct tensor master, struct tensor m, struct tensor v,
              struct tensor g, struct tensor control, struct adamw_args args)
{
    const int64_t elems = tensor_elems(master);
    const struct step_control *state = control.data;
    if (state->fault) return 0;
    const struct adamw_factors factors = {
        .beta1 = (float)args.beta1,
        .beta2 = (float)args.beta2,
        .new1 = (float)(1.0 - args.beta1),
        .new2 = (float)(1.0 - args.beta2),
        .grad_scale = (float)state->clip,
        .decay = (float)(args.lr * args.weight_decay),
        .rate = (float)(args.lr / args.bias1),
        .root = (float)(1.0 / sqrt(args.bias2)),
        .eps = (float)args.eps,
    };
    float *masters = master.data, *means = m.data, *squares = v.data;
    const float *grads = g.data;
#pragma omp parallel for num_threads(dev->threads) schedule(static)
    for (int64_t at = 0; at < elems; at += CPU_BLOCK) {
        const int64_t n = cpu_min(CPU_BLOCK, elems - at);
        if (n == CPU_BLOCK)
            adamw_block(masters + at, means + at, squares + at, grads + at, &factors);
        else
            adamw_tail(masters + at, means + at, squares + at, grads + at, n, &factors);
        if (w.data != master.data) cpu_store(w.data, w.dtype, at, masters + at, n);
    }
    return 0;
}

/* ---- accumulating gradients ---- */

/* acc += round(g·scale) for n elements, or the faults that prevent it. The product is exact in double, and rounding it
 * in the current mode, to nearest even, is the only rounding there is. Faults are gathered without branches: the
 * largest product (of NaN none is larger), and a sum of zeros that NaN and infinity make NaN. */
static int add_fixed(int64_t *acc, const float *g, int64_t n, double scale, double limit)
{
    double largest = 0, poison = 0;
#pragma omp simd reduction(max : largest) reduction(+ : poison)
    for (int64_t i = 0; i < n; i++) {
        const double scaled = (double)g[i] * scale, size = fabs(scaled);
        const double rounded = rint(size <= limit ? scaled : 0.0);
        acc[i] +=
            (int64_t)(rounded + 0.0); /* the sum keeps gcc from making one instruction of both, for scalars only */
        largest = size > largest ? size : largest;
        poison += scaled * 0.0;
    }
    return (largest > limit ? FAULT_OVERFLOW : 0) | (isnan(poison) ? FAULT_NAN : 0);
}

static int add_float(float *acc, const float *g, int64_t n)
{
    float poison = 0;
#pragma omp simd reduction(+ : poison)
    for (int64_t i = 0; i < n; i++) {
        acc[i] += g[i];
        poison += g[i] * 0.0f;
    }
    return isnan(poison) ? FAULT_NAN : 0;
}

int cpu_grad_add(struct device *dev, struct tensor acc, struct tensor g, struct tensor control, double limit,
                 struct tensor fault)
{
    const double scale = ((const struct step_control *)control.data)->scale;
    const int64_t elems = tensor_elems(g);
    const float *grads = g.data;
    int faults = 0;
#pragma omp parallel for num_threads(dev->threads) schedule(static) reduction(| : faults)
    for (int64_t at = 0; at < elems; at += PIECE) {
        const int64_t n = cpu_min(PIECE, elems - at);
        faults |= acc.dtype == DT_F32 ? add_float((float *)acc.data + at, grads + at, n)
                                      : add_fixed((int64_t *)acc.data + at, grads + at, n, scale, limit);
    }
    *(int32_t *)fault.data |= faults;
    return 0;
}

/* g[i] = acc[i]·inverse for n elements through a buffer, since g may lie on the memory of acc. The conversion rounds;
 * the product with a power of two does not. */
static void read_fixed(float *g, const int64_t *acc, int64_t n, float inverse)
{
    float values[CPU_BLOCK];
    for (int64_t at = 0; at < n; at += CPU_BLOCK) {
        const int64_t count = cpu_min(CPU_BLOCK, n - at);
        for (int64_t i = 0; i < count; i++)
            values[i] = (float)acc[at + i] * inverse;
        memcpy(g + at, values, (size_t)count * sizeof(float));
    }
}

int cpu_grad_read(struct device *dev, struct tensor g, struct tensor acc, struct tensor control)
{
    if (acc.dtype == DT_F32) return g.data == acc.data ? 0 : cpu_copy(dev, g, acc);
    const int64_t elems = tensor_elems(g);
    const int64_t *from = acc.data;
    float *to = g.data;
    const float inverse = (float)((const struct step_control *)control.data)->unscale;
    read_fixed(to, from, cpu_min(PIECE, elems), inverse);
    /* When g lies on the first half of acc, the floats [n, 2n) overwrite the integers [n/2, n), which are done: ranges
     * that double can be worked on in parallel, each after the one before. */
    for (int64_t begin = PIECE; begin < elems; begin *= 2) {
        const int64_t end = cpu_min(2 * begin, elems);
#pragma omp parallel for num_threads(dev->threads) schedule(static)
        for (int64_t at = begin; at < end; at += PIECE)
            read_fixed(to + at, from + at, cpu_min(PIECE, end - at), inverse);
    }
    return 0;
}

/* ---- sums ---- */

int cpu_sum_fixed(struct device *dev, struct tensor acc, struct tensor x, double scale, struct tensor fault)
{
    const int64_t elems = tensor_elems(x);
    const float *values = x.data;
    int64_t total = 0;
    int faults = 0;
#pragma omp parallel for num_threads(dev->threads) schedule(static) reduction(+ : total) reduction(| : faults)
    for (int64_t at = 0; at < elems; at += CPU_BLOCK) {
        const int64_t n = cpu_min(CPU_BLOCK, elems - at);
        int64_t rounded[CPU_BLOCK] = {0};
        faults |= add_fixed(rounded, values + at, n, scale, 0x1p52);
        for (int64_t i = 0; i < n; i++)
            total += rounded[i];
    }
    *(int64_t *)acc.data += total;
    if (faults) *(int32_t *)fault.data |= FAULT_NAN;
    return 0;
}

/* The exact Σ x² of n ≤ PIECE integers, added to four limbs of 32 bits that are not yet carried: with |x| = h·2^32 + l,
 * x² = l² + 2·h·l·2^32 + h²·2^64. The limbs have room for 2^30 elements. */
static void add_squares(uint64_t limbs[4], const int64_t *x, int64_t n)
{
    const uint64_t low32 = 0xffffffffu;
    uint64_t limb0 = 0, limb1 = 0, limb2 = 0, limb3 = 0, cross1 = 0, cross2 = 0;
#pragma omp simd reduction(+ : limb0, limb1, limb2, limb3, cross1, cross2)
    for (int64_t i = 0; i < n; i++) {
        const uint64_t sign = x[i] < 0 ? ~(uint64_t)0 : 0;
        const uint64_t size = ((uint64_t)x[i] ^ sign) - sign;
        const uint64_t low = size & low32, high = size >> 32;
        const uint64_t low_low = low * low, cross = low * high, high_high = high * high;
        limb0 += low_low & low32;
        limb1 += low_low >> 32;
        cross1 += cross & low32;
        cross2 += cross >> 32;
        limb2 += high_high & low32;
        limb3 += high_high >> 32;
    }
    limbs[0] += limb0;
    limbs[1] += limb1 + 2 * cross1;
    limbs[2] += limb2 + 2 * cross2;
    limbs[3] += limb3;
}

static void sum_squares_fixed(struct device *dev, int64_t out[4], const int64_t *x, int64_t elems)
{
    uint64_t total[4] = {0};
#pragma omp parallel for num_threads(dev->threads) schedule(static) reduction(+ : total)
    for (int64_t at = 0; at < elems; at += PIECE) {
        uint64_t limbs[4] = {0};
        add_squares(limbs, x + at, cpu_min(PIECE, elems - at));
        for (int i = 0; i < 4; i++) { /* carried, so that the total has room for 2^32 pieces */
            total[i] += i < 3 ? limbs[i] & 0xffffffffu : limbs[i];
            if (i < 3) limbs[i + 1] += limbs[i] >> 32;
        }
    }
    for (int i = 0; i < 4; i++) {
        out[i] += (int64_t)(i < 3 ? total[i] & 0xffffffffu : total[i]);
        if (i < 3) total[i + 1] += total[i] >> 32;
    }
}

/* One piece at a time is ready to be added, in their order. */
static double sum_squares_float(struct device *dev, const float *x, int64_t elems)
{
    double total = 0;
#pragma omp parallel for num_threads(dev->threads) ordered schedule(static, 1)
    for (int64_t at = 0; at < elems; at += PIECE) {
        const int64_t end = cpu_min(at + PIECE, elems);
        double part = 0;
#pragma omp simd reduction(+ : part)
        for (int64_t i = at; i < end; i++)
            part += (double)x[i] * (double)x[i];
#pragma omp ordered
        total += part;
    }
    return total;
}

int cpu_sum_squares(struct device *dev, struct tensor out, struct tensor x, struct tensor fault)
{
    if (x.dtype == DT_I64) {
        sum_squares_fixed(dev, out.data, x.data, tensor_elems(x));
    } else if (!step_squares(out.data, sum_squares_float(dev, x.data, tensor_elems(x)))) {
        *(int32_t *)fault.data |= FAULT_NAN;
    }
    return 0;
}

/* ---- a step as a whole ---- */

int cpu_step_sums(struct device *dev, struct tensor sums, struct tensor fault, struct tensor loss)
{
    (void)dev;
    step_sums(sums.data, *(const int32_t *)fault.data, loss.data);
    return 0;
}

int cpu_step_decide(struct device *dev, struct tensor control, struct tensor sums, bool exact,
                    struct step_limits limits)
{
    (void)dev;
    step_decide(control.data, sums.data, exact, limits);
    return 0;
}
