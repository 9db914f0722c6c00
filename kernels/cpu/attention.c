/* Attention forward, over whole sequences and over a cache of keys and values, as in FlashAttention-2 (Dao 2023).
 *
 * A task is one tile of queries of one head. It walks over the tiles of keys that its queries see, keeps each row's
 * running maximum and sum, and scales the output so far when the maximum rises. A query's own range of visible keys is
 * honoured inside the tile, and tiles that nobody sees are skipped. Tasks share nothing, so the number of threads does
 * not matter. Memory: five areas of the thread's slice; rows of padding in them hold anything and are not written out. */
#include "attention.h"

#include "err.h"

/* A forward pass: where q, k, v come from and where the result goes. */
struct forward {
    struct attention at;
    struct tensor q, k, v; /* rows of q_width, and of kv_width elements */
    int64_t q_width, kv_width;
    int64_t k_column, v_column; /* where the heads of k and v begin in their rows */
    struct tensor o, lse;       /* lse may be absent */
};

/* The rows of one tile of queries while its keys are walked over. */
struct rows {
    float max[ATTENTION_TILE]; /* of the scaled scores so far */
    float sum[ATTENTION_TILE]; /* of exp(score − max) */
};

int attention_init(struct attention *at, const struct device *dev, struct tensor qkv, int64_t queries, int64_t keys,
                   int heads, int kv_heads)
{
    const int64_t head_dim = qkv.shape[1] / (heads + 2 * (int64_t)kv_heads);
    if (head_dim > ATTENTION_HEAD_MAX)
        FAIL(ERR_UNSUPPORTED, "heads of %lld elements: attention on the CPU takes up to %d", (long long)head_dim,
             ATTENTION_HEAD_MAX);
    *at = (struct attention){.dtype = tile_dtype(dev, qkv.dtype),
                             .sequences = queries > 0 ? qkv.shape[0] / queries : 0,
                             .queries = queries,
                             .keys = keys,
                             .heads = heads,
                             .kv_heads = kv_heads,
                             .head_dim = head_dim,
                             .scale = 1.0F / sqrtf((float)head_dim)};
    return 0;
}

/* The length of the first (i = 0) or last (i = 1) tile. */
static int64_t tile_len(int64_t n, int i)
{
    return i == 0 ? cpu_min(n, ATTENTION_TILE) : n - (cpu_div_up(n, ATTENTION_TILE) - 1) * ATTENTION_TILE;
}

int attention_prepare(struct device *dev, const struct attention *at)
{
    for (int i = 0; i < 4; i++) {
        const int64_t rows = tile_len(at->queries, i & 1), keys = tile_len(at->keys, i >> 1);
        TRY(tile_product_prepare(dev, attention_scores(at, rows, keys)));
        TRY(tile_product_prepare(dev, attention_mix(at, rows, keys)));
    }
    return 0;
}

struct attention_span attention_span(const struct attention *at, int64_t sequence, int64_t begin, int64_t n)
{
    struct attention_span span = {.first = at->keys, .last = 0};
    for (int64_t i = 0; i < n; i++) {
        const int64_t row = sequence * at->queries + begin + i;
        const int64_t hi = at->pos ? cpu_min(at->pos[row], at->keys - 1) + 1 : begin + i + 1;
        const int64_t lo = at->start ? cpu_max(0, cpu_min(at->start[row], hi - 1)) : 0;
        if (hi <= 0) continue;
        span.lo[i] = (int32_t)lo;
        span.hi[i] = (int32_t)hi;
        span.first = cpu_min(span.first, lo);
        span.last = cpu_max(span.last, hi);
    }
    return span;
}

/* One row of scores s becomes probabilities relative to the new running maximum: exp(scale·s − max) for lo ≤ j < hi, 0
 * elsewhere. Returns what the row's earlier outputs are to be multiplied with. */
static float softmax_row(float *s, int64_t n, int64_t lo, int64_t hi, float scale, float *max, float *sum)
{
    if (hi <= lo) {
        memset(s, 0, (size_t)n * sizeof *s);
        return 1;
    }
    float top = s[lo];
#pragma omp simd reduction(max : top)
    for (int64_t j = lo; j < hi; j++)
        top = s[j] > top ? s[j] : top;
    const float now = scale * top > *max ? scale * top : *max;
    const float factor = cpu_exp_negative(*max - now);
#pragma omp simd
    for (int64_t j = lo; j < hi; j++)
        s[j] = cpu_exp_negative(scale * s[j] - now);
    memset(s, 0, (size_t)lo * sizeof *s);
    memset(s + hi, 0, (size_t)(n - hi) * sizeof *s);
    *max = now;
    *sum = *sum * factor + cpu_sum(s + lo, hi - lo);
    return factor;
}

/* Turns the tile of scores of keys from key0 on into a tile of A of probabilities, and rescales the output so far. */
static void softmax_tile(const struct attention *at, const struct attention_span *span, struct rows *rows, int64_t n,
                         int64_t key0, int64_t keys, float *s, void *p, float *o)
{
    const int64_t s_width = tile_pad(keys, TILE_PAD_COLS), p_width = tile_pad(keys, tile_k_pad(at->dtype));
    const int64_t o_width = tile_pad(at->head_dim, TILE_PAD_COLS);
    for (int64_t i = 0; i < n; i++) {
        float *row = s + i * s_width;
        const int64_t lo = cpu_max(0, span->lo[i] - key0), hi = cpu_min(keys, span->hi[i] - key0);
        const float factor = softmax_row(row, p_width, lo, hi, at->scale, &rows->max[i], &rows->sum[i]);
        cpu_store(p, at->dtype, i * p_width, row, p_width);
        if (factor == 1) continue;
        for (int64_t d = 0; d < o_width; d++)
            o[i * o_width + d] *= factor;
    }
}

/* Divides by the sums and rounds into o; a query that sees nothing gets 0. */
static void write_rows(const struct forward *f, const struct rows *rows, int64_t sequence, int64_t head,
                       int64_t begin, int64_t n, const float *o)
{
    const struct attention *at = &f->at;
    const int64_t width = tile_pad(at->head_dim, TILE_PAD_COLS);
    for (int64_t i = 0; i < n; i++) {
        float row[ATTENTION_HEAD_MAX];
        const float sum = rows->sum[i];
        for (int64_t d = 0; d < at->head_dim; d++)
            row[d] = sum == 0 ? 0 : o[i * width + d] / sum;
        const int64_t token = sequence * at->queries + begin + i;
        cpu_store(f->o.data, f->o.dtype, (token * at->heads + head) * at->head_dim, row, at->head_dim);
        if (tensor_given(f->lse))
            ((float *)f->lse.data)[(sequence * at->heads + head) * at->queries + begin + i] =
                rows->max[i] + logf(sum);
    }
}

/* One tile of queries of one head of one sequence; the last tiles, which see most, come first. */
static int forward_task(const struct device *dev, int thread, const void *ctx, int64_t index)
{
    const struct forward *f = ctx;
    const struct attention *at = &f->at;
    const int64_t tiles = cpu_div_up(at->queries, ATTENTION_TILE);
    const int64_t begin = (tiles - 1 - index % tiles) * ATTENTION_TILE;
    const int64_t head = index / tiles % at->heads, sequence = index / tiles / at->heads;
    const int64_t kv_head = head / (at->heads / at->kv_heads), n = cpu_min(ATTENTION_TILE, at->queries - begin);
    char *q = cpu_slice(dev, thread), *b = q + ATTENTION_AREA, *p = b + ATTENTION_AREA;
    float *s = (float *)(void *)(p + ATTENTION_AREA), *o = (float *)(void *)(p + 2 * ATTENTION_AREA);
    const struct tile_source from_q =
        attention_source(f->q, sequence * at->queries + begin, f->q_width, head * at->head_dim, false);
    const struct attention_span span = attention_span(at, sequence, begin, n);
    struct rows rows;
    for (int i = 0; i < ATTENTION_TILE; i++) {
        rows.max[i] = -INFINITY;
        rows.sum[i] = 0;
    }
    memset(o, 0, ATTENTION_AREA);
    tile_fill(q, tile_layout_a(at->dtype, n, at->head_dim), from_q, 0, 0);
    for (int64_t key0 = span.first / ATTENTION_TILE * ATTENTION_TILE; key0 < span.last; key0 += ATTENTION_TILE) {
        const int64_t keys = cpu_min(ATTENTION_TILE, at->keys - key0), row = sequence * at->keys + key0;
        const struct tile_source k =
            attention_source(f->k, row, f->kv_width, f->k_column + kv_head * at->head_dim, false);
        const struct tile_source v =
            attention_source(f->v, row, f->kv_width, f->v_column + kv_head * at->head_dim, true);
        struct tile_layout layout = tile_layout_b(dev, at->dtype, keys, at->head_dim);
        layout.lines = cpu_min(keys, span.last - key0); /* what nobody sees is not read */
        tile_fill(b, layout, k, 0, 0);
        int bad = tile_product_run(dev, thread, attention_scores(at, n, keys), q, b, s);
        if (bad) return bad;
        softmax_tile(at, &span, &rows, n, key0, keys, s, p, o);
        layout = tile_layout_b(dev, at->dtype, at->head_dim, keys);
        layout.k = cpu_min(keys, span.last - key0);
        tile_fill(b, layout, v, 0, 0);
        bad = tile_product_run(dev, thread, attention_mix(at, n, keys), p, b, o);
        if (bad) return bad;
    }
    write_rows(f, &rows, sequence, head, begin, n, o);
    return 0;
}

static int run_forward(struct device *dev, const char *op, const struct forward *f)
{
    const struct attention *at = &f->at;
    if (at->sequences == 0) return 0;
    TRY(attention_prepare(dev, at));
    return tile_run_tasks(dev, op, forward_task, f,
                          at->sequences * at->heads * cpu_div_up(at->queries, ATTENTION_TILE));
}

int cpu_attention_fwd(struct device *dev, struct tensor o, struct tensor lse, struct tensor qkv, struct tensor start,
                      int seq_len, int heads, int kv_heads)
{
    struct forward f = {.q = qkv, .k = qkv, .v = qkv, .o = o, .lse = lse};
    TRY(attention_init(&f.at, dev, qkv, seq_len, seq_len, heads, kv_heads));
    f.at.start = start.data;
    f.q_width = f.kv_width = qkv.shape[1];
    f.k_column = heads * f.at.head_dim;
    f.v_column = f.k_column + kv_heads * f.at.head_dim;
    return run_forward(dev, "attention_fwd", &f);
}

/* Stores the keys and values of new tokens in the cache. */
static void store_kv(const struct device *dev, const struct forward *f, struct tensor k_cache, struct tensor v_cache)
{
    const struct attention *at = &f->at;
    const size_t element = dtype_bytes(f->q.dtype), bytes = (size_t)f->kv_width * element;
#pragma omp parallel for num_threads(dev->threads) schedule(static)
    for (int64_t row = 0; row < at->sequences * at->queries; row++) {
        if (at->pos[row] < 0) continue;
        ASSERT(at->pos[row] < at->keys);
        const char *k = (const char *)f->q.data + (size_t)(row * f->q_width + at->heads * at->head_dim) * element;
        const size_t to = (size_t)(row / at->queries * at->keys + at->pos[row]) * bytes;
        memcpy((char *)k_cache.data + to, k, bytes);
        memcpy((char *)v_cache.data + to, k + bytes, bytes);
    }
}

int cpu_attention_cached(struct device *dev, struct tensor o, struct tensor k_cache, struct tensor v_cache,
                         struct tensor qkv, struct tensor pos, int heads, int kv_heads)
{
    struct forward f = {.q = qkv, .k = k_cache, .v = v_cache, .o = o, .lse = TENSOR_NONE};
    const int64_t queries = k_cache.shape[0] > 0 ? qkv.shape[0] / k_cache.shape[0] : 0;
    TRY(attention_init(&f.at, dev, qkv, queries, k_cache.shape[1], heads, kv_heads));
    f.at.pos = pos.data;
    f.q_width = qkv.shape[1];
    f.kv_width = kv_heads * f.at.head_dim;
    store_kv(dev, &f, k_cache, v_cache);
    return run_forward(dev, "attention_cached", &f);
}
