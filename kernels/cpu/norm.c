/* LayerNorm and RMSNorm with the residual addition before them, and the column sums of their backward pass.
 *
 * Rows are parallel; the sums of a row are taken in blocks, in order. Gradients of the parameters are sums over all rows:
 * each block of columns belongs to one thread, which adds the rows in order, ROW_BLOCK at a time, so that the result
 * does not depend on the threads, long sums keep their precision, and the rows are still in the cache from dx. */
#include "cpu.h"

#define ROW_BLOCK 128
#define COLUMN_BLOCK 64

/* sum = x + delta for one row, rounded to the type. */
static void add_row(struct tensor sum, struct tensor x, struct tensor delta, int64_t row, int64_t width)
{
    float xs[CPU_BLOCK], deltas[CPU_BLOCK], sums[CPU_BLOCK];
    for (int64_t at = row * width, end = at + width; at < end; at += CPU_BLOCK) {
        const int64_t n = cpu_min(CPU_BLOCK, end - at);
        const float *a = cpu_view(x, at, n, xs);
        const float *b = cpu_view(delta, at, n, deltas);
        float *out = cpu_target(sum, at, sums);
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            out[i] = a[i] + b[i];
        cpu_commit(sum, at, n, out);
    }
}

/* Σ x of one row. */
static double row_sum(struct tensor x, int64_t row, int64_t width)
{
    float xs[CPU_BLOCK];
    double total = 0;
    for (int64_t at = row * width, end = at + width; at < end; at += CPU_BLOCK) {
        const int64_t n = cpu_min(CPU_BLOCK, end - at);
        const float *in = cpu_view(x, at, n, xs);
        total += (double)cpu_sum(in, n);
    }
    return total;
}

/* Σ (x − mean)² of one row. */
static double row_squares(struct tensor x, int64_t row, int64_t width, float mean)
{
    float xs[CPU_BLOCK], squares[CPU_BLOCK];
    double total = 0;
    for (int64_t at = row * width, end = at + width; at < end; at += CPU_BLOCK) {
        const int64_t n = cpu_min(CPU_BLOCK, end - at);
        const float *in = cpu_view(x, at, n, xs);
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            squares[i] = (in[i] - mean) * (in[i] - mean);
        total += (double)cpu_sum(squares, n);
    }
    return total;
}

int cpu_norm_fwd(struct device *dev, struct tensor y, struct tensor sum, struct tensor stat, struct tensor x,
                 struct tensor delta, struct tensor w, struct tensor b, double eps)
{
    const int64_t rows = x.shape[0], width = x.shape[1];
    const bool centre = tensor_given(b);
    const struct tensor in = tensor_given(delta) ? sum : x;
    float *stats = stat.data;
#pragma omp parallel for num_threads(dev->threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        if (tensor_given(delta)) add_row(sum, x, delta, row, width);
        const float mean = centre ? (float)(row_sum(in, row, width) / (double)width) : 0.0f;
        const float rstd = (float)(1.0 / sqrt(row_squares(in, row, width, mean) / (double)width + eps));
        stats[2 * row] = mean;
        stats[2 * row + 1] = rstd;
        float xs[CPU_BLOCK], ws[CPU_BLOCK], bs[CPU_BLOCK] = {0}, ys[CPU_BLOCK];
        for (int64_t at = 0; at < width; at += CPU_BLOCK) {
            const int64_t n = cpu_min(CPU_BLOCK, width - at);
            const float *value = cpu_view(in, row * width + at, n, xs);
            const float *weight = cpu_view(w, at, n, ws);
            const float *bias = centre ? cpu_view(b, at, n, bs) : bs;
            float *out = cpu_target(y, row * width + at, ys);
#pragma omp simd
            for (int64_t i = 0; i < n; i++)
                out[i] = (value[i] - mean) * rstd * weight[i] + bias[i];
            cpu_commit(y, row * width + at, n, out);
        }
    }
    return 0;
}

/* The means over a row of g = dy·w and of g·x̂. */
static void gradient_means(struct tensor dy, struct tensor x, struct tensor w, int64_t row, int64_t width, float mean,
                           float rstd, double *mean_g, double *mean_gx)
{
    float dys[CPU_BLOCK], xs[CPU_BLOCK], ws[CPU_BLOCK], g[CPU_BLOCK], gx[CPU_BLOCK];
    double sum_g = 0, sum_gx = 0;
    for (int64_t at = 0; at < width; at += CPU_BLOCK) {
        const int64_t n = cpu_min(CPU_BLOCK, width - at);
        const float *dout = cpu_view(dy, row * width + at, n, dys);
        const float *value = cpu_view(x, row * width + at, n, xs);
        const float *weight = cpu_view(w, at, n, ws);
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            g[i] = dout[i] * weight[i];
            gx[i] = g[i] * ((value[i] - mean) * rstd);
        }
        sum_g += (double)cpu_sum(g, n);
        sum_gx += (double)cpu_sum(gx, n);
    }
    *mean_g = sum_g / (double)width;
    *mean_gx = sum_gx / (double)width;
}

/* dx of one row: rstd·(g − mean(g) − x̂·mean(g·x̂)), without mean(g) for RMSNorm, whose mean is no function of x. */
static void norm_row_bwd(struct tensor dx, struct tensor dy, struct tensor dres, struct tensor x, struct tensor w,
                         int64_t row, const float *stat, bool centre)
{
    const int64_t width = x.shape[1];
    const float mean = stat[0], rstd = stat[1];
    float dys[CPU_BLOCK], xs[CPU_BLOCK], ws[CPU_BLOCK], residuals[CPU_BLOCK] = {0}, dxs[CPU_BLOCK];
    double mean_g, mean_gx;
    gradient_means(dy, x, w, row, width, mean, rstd, &mean_g, &mean_gx);
    const float offset = centre ? (float)mean_g : 0.0f, slope = (float)mean_gx;
    for (int64_t at = 0; at < width; at += CPU_BLOCK) {
        const int64_t n = cpu_min(CPU_BLOCK, width - at), begin = row * width + at;
        const float *dout = cpu_view(dy, begin, n, dys);
        const float *value = cpu_view(x, begin, n, xs);
        const float *weight = cpu_view(w, at, n, ws);
        const float *residual = tensor_given(dres) ? cpu_view(dres, begin, n, residuals) : residuals;
        float *din = cpu_target(dx, begin, dxs);
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            const float normed = (value[i] - mean) * rstd;
            din[i] = residual[i] + rstd * (dout[i] * weight[i] - offset - normed * slope);
        }
        cpu_commit(dx, begin, n, din);
    }
}

/* dw += Σ dy·x̂ and db += Σ dy over rows [begin, end), for the n ≤ COLUMN_BLOCK columns from `at` on. */
static void norm_columns_bwd(float *dw, float *db, struct tensor dy, struct tensor x, const float *stat,
                             int64_t begin, int64_t end, int64_t at, int64_t n)
{
    const int64_t width = x.shape[1];
    float dys[COLUMN_BLOCK], xs[COLUMN_BLOCK], dw_part[COLUMN_BLOCK] = {0}, db_part[COLUMN_BLOCK] = {0};
    for (int64_t row = begin; row < end; row++) {
        const float *dout = cpu_view(dy, row * width + at, n, dys);
        const float *value = cpu_view(x, row * width + at, n, xs);
        const float mean = stat[2 * row], rstd = stat[2 * row + 1];
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            dw_part[i] += dout[i] * ((value[i] - mean) * rstd);
            db_part[i] += dout[i];
        }
    }
    for (int64_t i = 0; i < n; i++) {
        dw[at + i] += dw_part[i];
        if (db) db[at + i] += db_part[i];
    }
}

int cpu_norm_bwd(struct device *dev, struct tensor dx, struct tensor dw, struct tensor db, struct tensor dy,
                 struct tensor dres, struct tensor x, struct tensor stat, struct tensor w)
{
    const int64_t rows = x.shape[0], width = x.shape[1];
    const float *stats = stat.data;
    const bool centre = tensor_given(db);
#pragma omp parallel num_threads(dev->threads)
    for (int64_t begin = 0; begin < rows; begin += ROW_BLOCK) {
        const int64_t end = cpu_min(begin + ROW_BLOCK, rows);
        /* A thread need not wait for the others' dx: the sums below read only what the caller gave. */
#pragma omp for schedule(static) nowait
        for (int64_t row = begin; row < end; row++)
            norm_row_bwd(dx, dy, dres, x, w, row, stats + 2 * row, centre);
#pragma omp for schedule(static) nowait
        for (int64_t at = 0; at < width; at += COLUMN_BLOCK)
            norm_columns_bwd(dw.data, db.data, dy, x, stats, begin, end, at, cpu_min(COLUMN_BLOCK, width - at));
    }
    return 0;
}
