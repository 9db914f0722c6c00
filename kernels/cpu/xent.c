/* Softmax cross-entropy with its gradient, for one chunk of tokens over the whole vocabulary.
 *
 * A row is one thread's. It is read once for its maximum and its sum of exponentials (kept relative to the largest logit
 * so far and rescaled when that grows: Milakov & Gimelshein 2018) and, for the gradient, a second time while it is
 * still in the cache. */
#include "cpu.h"

struct softmax {
    float max;
    double sum; /* Σ exp(logit − max) */
};

static float block_max(const float *x, int64_t n)
{
    float max = -INFINITY;
#pragma omp simd reduction(max : max)
    for (int64_t i = 0; i < n; i++)
        max = x[i] > max ? x[i] : max;
    return max;
}

static float block_exp_sum(const float *x, int64_t n, float max)
{
    float terms[CPU_BLOCK];
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
        terms[i] = cpu_exp_negative(x[i] - max);
    return cpu_sum(terms, n);
}

/* NaN in a row comes out as a sum of NaN, and infinity too. */
static struct softmax row_softmax(const float *logits, int64_t classes)
{
    struct softmax row = {.max = -INFINITY, .sum = 0};
    for (int64_t at = 0; at < classes; at += CPU_BLOCK) {
        const int64_t n = cpu_min(CPU_BLOCK, classes - at);
        const float max = block_max(logits + at, n);
        if (max > row.max) {
            row.sum *= exp((double)row.max - (double)max);
            row.max = max;
        }
        row.sum += (double)block_exp_sum(logits + at, n, row.max);
    }
    return row;
}

/* Zeros in the columns of a row from `column` on. */
static void clear_from(struct tensor dlogits, int64_t row, int64_t column)
{
    const size_t elem = dtype_bytes(dlogits.dtype);
    const int64_t width = dlogits.shape[1];
    memset((char *)dlogits.data + (size_t)(row * width + column) * elem, 0, (size_t)(width - column) * elem);
}

/* dlogits = factor·exp(logits − max) for row `row`. */
static void row_gradient(struct tensor dlogits, const float *logits, int64_t row, int64_t classes, float max,
                         float factor)
{
    const int64_t begin = row * dlogits.shape[1];
    float outs[CPU_BLOCK];
    for (int64_t at = 0; at < classes; at += CPU_BLOCK) {
        const int64_t n = cpu_min(CPU_BLOCK, classes - at);
        float *out = cpu_target(dlogits, begin + at, outs);
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            out[i] = factor * cpu_exp_negative(logits[at + i] - max);
        cpu_commit(dlogits, begin + at, n, out);
    }
    clear_from(dlogits, row, classes);
}

/* One row with a target; returns its loss, and in *z its z-loss. */
static double xent_row(struct tensor dlogits, const float *logits, int64_t row, int64_t classes, int64_t target,
                       double grad_scale, double z_loss, double *z)
{
    const struct softmax s = row_softmax(logits, classes);
    const double lse = (double)s.max + log(s.sum), at_target = (double)logits[target];
    if (tensor_given(dlogits)) {
        const double factor = grad_scale * (1.0 + 2.0 * z_loss * lse) / s.sum;
        const double gradient = factor * exp(at_target - (double)s.max) - grad_scale;
        row_gradient(dlogits, logits, row, classes, s.max, (float)factor);
        cpu_set(dlogits.data, dlogits.dtype, row * dlogits.shape[1] + target, (float)gradient);
    }
    *z = z_loss * lse * lse;
    return log(s.sum) + ((double)s.max - at_target);
}

int cpu_xent(struct device *dev, struct tensor loss, struct tensor z, struct tensor dlogits, struct tensor logits,
             struct tensor target, int64_t classes, double grad_scale, double z_loss)
{
    const int64_t rows = logits.shape[0], width = logits.shape[1];
    const int32_t *targets = target.data;
    const float *all = logits.data;
    float *losses = loss.data, *z_losses = z.data;
#pragma omp parallel for num_threads(dev->threads) schedule(dynamic, 1)
    for (int64_t row = 0; row < rows; row++) {
        double row_loss = 0, row_z = 0;
        if (targets[row] >= 0) {
            const int64_t wanted = cpu_min(targets[row], classes - 1); /* never out of bounds, whatever the data */
            row_loss = xent_row(dlogits, all + row * width, row, classes, wanted, grad_scale, z_loss, &row_z);
        } else if (tensor_given(dlogits)) {
            clear_from(dlogits, row, 0);
        }
        losses[row] = (float)row_loss;
        if (z_losses) z_losses[row] = (float)row_z;
    }
    return 0;
}
