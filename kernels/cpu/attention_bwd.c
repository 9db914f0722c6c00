/* Attention backward, as in FlashAttention-2 (Dao 2023), without atomics and with memory of one tile.
 *
 * With P = exp(scale·q·k − lse), dP = dout·v and dS = P·(dP − delta)·scale: dv = Pᵀ·dout, dk = dSᵀ·q, dq = dS·k. One
 * pass of tasks makes dk and dv: a task is a tile of keys of one key head and walks over the query heads of its group
 * and their tiles, with scores held keys × queries. Another makes dq: a task is a tile of queries of one head and walks
 * over tiles of keys. P and dS are so computed twice, which buys a fixed order of every sum, whatever the number of
 * threads, and tasks enough for long sequences. Rows of padding in tiles hold anything; what comes of them is not
 * written out. */
#include "attention.h"

#include "err.h"

/* Areas of a slice. */
enum { FIRST, SECOND, RIGHT, SCORES, DPROBS, PROBS, DSCORES, OUT_FIRST, OUT_SECOND, AREAS };
_Static_assert(AREAS *ATTENTION_AREA <= TILE_SLICE_BYTES, "an attention task must fit into a thread's slice");

struct backward {
    struct attention at;
    struct tensor dqkv, dout, qkv, lse, delta;
    int64_t width; /* of rows of qkv */
};

/* What a task works with: its thread and its areas. */
struct worker {
    const struct device *dev;
    const struct attention *at;
    int thread;
    char *slice;
};

static float *area(const struct worker *w, int i)
{
    return (float *)(void *)(w->slice + (size_t)i * ATTENTION_AREA);
}

/* Area c = area a · sourceᵀ: `columns` rows of the source against the tile of A of `rows` rows. */
static int scores(const struct worker *w, int c, int a, int64_t rows, struct tile_source source, int64_t columns)
{
    tile_fill(area(w, RIGHT), tile_layout_b(w->dev, w->at->dtype, columns, w->at->head_dim), source, 0, 0);
    return tile_product_run(w->dev, w->thread, attention_scores(w->at, rows, columns), area(w, a), area(w, RIGHT),
                            area(w, c));
}

/* Area c += area a · source: k rows of the source. */
static int mix(const struct worker *w, int c, int a, int64_t rows, struct tile_source source, int64_t k)
{
    source.k_down = true;
    tile_fill(area(w, RIGHT), tile_layout_b(w->dev, w->at->dtype, w->at->head_dim, k), source, 0, 0);
    return tile_product_run(w->dev, w->thread, attention_mix(w->at, rows, k), area(w, a), area(w, RIGHT), area(w, c));
}

/* Rounds rows of a C tile into columns of dqkv. */
static void write_gradient(const struct backward *g, const float *from, int64_t row0, int64_t rows, int64_t column)
{
    const int64_t stride = tile_pad(g->at.head_dim, TILE_PAD_COLS);
    for (int64_t i = 0; i < rows; i++)
        cpu_store(g->dqkv.data, g->dqkv.dtype, (row0 + i) * g->width + column, from + i * stride, g->at.head_dim);
}

static const float *head_values(struct tensor t, const struct attention *at, int64_t sequence, int64_t head)
{
    return (const float *)t.data + (sequence * at->heads + head) * at->queries;
}

/* dS of one query: columns are keys, visible for lo ≤ j < hi. */
static void query_row(float *restrict ds, const float *restrict s, const float *restrict dp, int64_t n, int64_t lo,
                      int64_t hi, float scale, float lse, float delta)
{
    memset(ds, 0, (size_t)n * sizeof *ds);
    for (int64_t j = lo; j < hi; j++)
        ds[j] = cpu_exp_negative(scale * s[j] - lse) * (dp[j] - delta) * scale;
}

/* P and dS of one key: columns are queries, visible where lo[i] ≤ key < hi[i]. */
static void key_row(float *restrict p, float *restrict ds, const float *restrict s, const float *restrict dp,
                    int64_t n, const struct attention_span *restrict span, int32_t key, float scale,
                    const float *restrict lse, const float *restrict delta)
{
    for (int64_t i = 0; i < n; i++) {
        const float probability = cpu_exp_negative(scale * s[i] - lse[i]);
        const bool visible = span->lo[i] <= key && key < span->hi[i];
        p[i] = visible ? probability : 0;
        ds[i] = visible ? probability * (dp[i] - delta[i]) * scale : 0;
    }
}

/* dq of one tile of queries of one head; the last tiles, which see most, come first. */
static int dq_task(const struct device *dev, int thread, const void *ctx, int64_t index)
{
    const struct backward *g = ctx;
    const struct attention *at = &g->at;
    const struct worker w = {dev, at, thread, cpu_slice(dev, thread)};
    const int64_t tiles = cpu_div_up(at->queries, ATTENTION_TILE), d = at->head_dim;
    const int64_t begin = (tiles - 1 - index % tiles) * ATTENTION_TILE;
    const int64_t head = index / tiles % at->heads, sequence = index / tiles / at->heads;
    const int64_t k_column = (at->heads + head / (at->heads / at->kv_heads)) * d,
                  v_column = k_column + at->kv_heads * d;
    const int64_t n = cpu_min(ATTENTION_TILE, at->queries - begin), row0 = sequence * at->queries + begin;
    const float *lse = head_values(g->lse, at, sequence, head) + begin;
    const float *delta = head_values(g->delta, at, sequence, head) + begin;
    const struct attention_span span = attention_span(at, sequence, begin, n);
    const struct tile_layout layout = tile_layout_a(at->dtype, n, d);
    tile_fill(area(&w, FIRST), layout, attention_source(g->qkv, row0, g->width, head * d, false), 0, 0);
    tile_fill(area(&w, SECOND), layout, attention_source(g->dout, row0, at->heads * d, head * d, false), 0, 0);
    memset(area(&w, OUT_FIRST), 0, ATTENTION_AREA);
    for (int64_t key0 = span.first / ATTENTION_TILE * ATTENTION_TILE; key0 < span.last; key0 += ATTENTION_TILE) {
        const int64_t keys = cpu_min(ATTENTION_TILE, at->keys - key0), key_row0 = sequence * at->keys + key0;
        const int64_t c_width = tile_pad(keys, TILE_PAD_COLS), a_width = tile_pad(keys, tile_k_pad(at->dtype));
        const struct tile_source k = attention_source(g->qkv, key_row0, g->width, k_column, false);
        const struct tile_source v = attention_source(g->qkv, key_row0, g->width, v_column, false);
        int bad = scores(&w, SCORES, FIRST, n, k, keys);
        if (!bad) bad = scores(&w, DPROBS, SECOND, n, v, keys);
        for (int64_t i = 0; i < n; i++) {
            float row[ATTENTION_TILE];
            query_row(row, area(&w, SCORES) + i * c_width, area(&w, DPROBS) + i * c_width, a_width,
                      cpu_max(0, span.lo[i] - key0), cpu_min(keys, span.hi[i] - key0), at->scale, lse[i], delta[i]);
            cpu_store(area(&w, DSCORES), at->dtype, i * a_width, row, a_width);
        }
        if (!bad) bad = mix(&w, OUT_FIRST, DSCORES, n, k, keys);
        if (bad) return bad;
    }
    write_gradient(g, area(&w, OUT_FIRST), row0, n, head * d);
    return 0;
}

/* Adds to dk and dv of a tile of keys what one tile of queries of one head gives. */
static int add_queries(const struct worker *w, const struct backward *g, int64_t sequence, int64_t head, int64_t key0,
                       int64_t keys, int64_t begin)
{
    const struct attention *at = &g->at;
    const int64_t n = cpu_min(ATTENTION_TILE, at->queries - begin), row0 = sequence * at->queries + begin;
    const int64_t c_width = tile_pad(n, TILE_PAD_COLS), a_width = tile_pad(n, tile_k_pad(at->dtype));
    const struct tile_source q = attention_source(g->qkv, row0, g->width, head * at->head_dim, false);
    const struct tile_source dout =
        attention_source(g->dout, row0, at->heads * at->head_dim, head * at->head_dim, false);
    const struct attention_span span = attention_span(at, sequence, begin, n);
    if (span.first >= key0 + keys) return 0; /* all of them begin after these keys */
    float lse[ATTENTION_TILE] = {0}, delta[ATTENTION_TILE] = {0};
    memcpy(lse, head_values(g->lse, at, sequence, head) + begin, (size_t)n * sizeof *lse);
    memcpy(delta, head_values(g->delta, at, sequence, head) + begin, (size_t)n * sizeof *delta);
    int bad = scores(w, SCORES, FIRST, keys, q, n);
    if (!bad) bad = scores(w, DPROBS, SECOND, keys, dout, n);
    for (int64_t j = 0; j < keys; j++) {
        float p[ATTENTION_TILE], ds[ATTENTION_TILE];
        key_row(p, ds, area(w, SCORES) + j * c_width, area(w, DPROBS) + j * c_width, a_width, &span,
                (int32_t)(key0 + j), at->scale, lse, delta);
        cpu_store(area(w, PROBS), at->dtype, j * a_width, p, a_width);
        cpu_store(area(w, DSCORES), at->dtype, j * a_width, ds, a_width);
    }
    if (!bad) bad = mix(w, OUT_FIRST, DSCORES, keys, q, n);
    if (!bad) bad = mix(w, OUT_SECOND, PROBS, keys, dout, n);
    return bad;
}

/* dk and dv of one tile of keys of one key head; the first tiles, which most see, come first. */
static int dkv_task(const struct device *dev, int thread, const void *ctx, int64_t index)
{
    const struct backward *g = ctx;
    const struct attention *at = &g->at;
    const struct worker w = {dev, at, thread, cpu_slice(dev, thread)};
    const int64_t tiles = cpu_div_up(at->keys, ATTENTION_TILE), group = at->heads / at->kv_heads, d = at->head_dim;
    const int64_t key0 = index % tiles * ATTENTION_TILE, kv_head = index / tiles % at->kv_heads;
    const int64_t sequence = index / tiles / at->kv_heads, keys = cpu_min(ATTENTION_TILE, at->keys - key0);
    const int64_t row0 = sequence * at->keys + key0;
    const int64_t k_column = (at->heads + kv_head) * d, v_column = k_column + at->kv_heads * d;
    const struct tile_layout layout = tile_layout_a(at->dtype, keys, d);
    tile_fill(area(&w, FIRST), layout, attention_source(g->qkv, row0, g->width, k_column, false), 0, 0);
    tile_fill(area(&w, SECOND), layout, attention_source(g->qkv, row0, g->width, v_column, false), 0, 0);
    memset(area(&w, OUT_FIRST), 0, 2 * ATTENTION_AREA); /* and OUT_SECOND */
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++)
        for (int64_t begin = key0; begin < at->queries; begin += ATTENTION_TILE) {
            const int bad = add_queries(&w, g, sequence, head, key0, keys, begin);
            if (bad) return bad;
        }
    write_gradient(g, area(&w, OUT_FIRST), row0, keys, k_column);
    write_gradient(g, area(&w, OUT_SECOND), row0, keys, v_column);
    return 0;
}

/* delta = row sums of dout·o, for each head. */
static void sum_delta(const struct device *dev, const struct backward *g, struct tensor o)
{
    const struct attention *at = &g->at;
    float *delta = g->delta.data;
#pragma omp parallel for num_threads(dev->threads) schedule(static)
    for (int64_t i = 0; i < at->sequences * at->queries * at->heads; i++) {
        const int64_t row = i / at->heads, head = i % at->heads;
        float a[ATTENTION_HEAD_MAX], b[ATTENTION_HEAD_MAX];
        cpu_load(a, g->dout.data, g->dout.dtype, i * at->head_dim, at->head_dim);
        cpu_load(b, o.data, o.dtype, i * at->head_dim, at->head_dim);
#pragma omp simd
        for (int64_t j = 0; j < at->head_dim; j++)
            a[j] *= b[j];
        delta[(row / at->queries * at->heads + head) * at->queries + row % at->queries] = cpu_sum(a, at->head_dim);
    }
}

int cpu_attention_bwd(struct device *dev, struct tensor dqkv, struct tensor dout, struct tensor o, struct tensor lse,
                      struct tensor delta, struct tensor qkv, struct tensor start, int seq_len, int heads,
                      int kv_heads)
{
    struct backward g = {.dqkv = dqkv, .dout = dout, .qkv = qkv, .lse = lse, .delta = delta, .width = qkv.shape[1]};
    TRY(attention_init(&g.at, dev, qkv, seq_len, seq_len, heads, kv_heads));
    g.at.start = start.data;
    const int64_t tiles = cpu_div_up(g.at.queries, ATTENTION_TILE);
    if (g.at.sequences == 0) return 0;
    TRY(attention_prepare(dev, &g.at));
    sum_delta(dev, &g, o);
    TRY(tile_run_tasks(dev, "attention_bwd", dkv_task, &g, g.at.sequences * kv_heads * tiles));
    return tile_run_tasks(dev, "attention_bwd", dq_task, &g, g.at.sequences * heads * tiles);
}
