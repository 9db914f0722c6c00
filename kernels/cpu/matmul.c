/* Matrix multiplication of any size from products of tiles, and the packing of weights into tiles.
 *
 * The output is cut into tiles of at most 256 × 256 and k into blocks of at most 2 KiB a line, by the shape alone. Every
 * tile of the output is computed by one thread, its k blocks in order, into an f32 tile in the workspace, which is then
 * added to y, or biased and rounded into it. How tiles are grouped into tasks may depend on the threads; the bits do not.
 *
 * A is copied into tiles where k is blocked or A is transposed, B unless it was packed; a task of several tiles copies
 * each once. Packing pays: 0.4 ms for 1024 × 1024 in bf16, which saves 7 of 18 ms of a product with 4096 rows (one core
 * of a Xeon with AMX). */
#include "err.h"
#include "tile.h"

enum {
    GROUP_TILES = 8,     /* of C in a task, at most */
    GROUP_COLS = 4,      /* columns of them, at most */
    TASKS_PER_THREAD = 4 /* below that, tasks are not grouped further */
};

/* A thread's slice holds one tile of A, GROUP_COLS of B, GROUP_TILES of C. */
#define A_BYTES ((size_t)TILE_ROWS * TILE_K_BYTES)
#define B_BYTES ((size_t)TILE_COLS * TILE_K_BYTES)
#define C_BYTES ((size_t)TILE_ROWS * TILE_COLS * sizeof(float))
_Static_assert(A_BYTES + GROUP_COLS * B_BYTES + GROUP_TILES * C_BYTES <= TILE_SLICE_BYTES,
               "a matmul task must fit into a thread's slice");

/* One length cut into tiles. */
struct split {
    int64_t n, tile, count;
};

/* One matmul: shapes, cuts, operands. */
struct plan {
    const struct device *dev;
    enum dtype dtype; /* of tiles */
    struct split m, n, k;
    struct tile_source a, b;
    const char *packed; /* NULL: fill B from its source */
    struct tensor y, bias;
    bool add, a_in_place;
    int64_t group_m, group_n, tasks_n, tasks;
};

/* Even tiles of at most `most`, multiples of `pad`. */
static struct split split_evenly(int64_t n, int64_t most, int64_t pad)
{
    struct split s = {.n = n, .tile = pad};
    if (n == 0) return s;
    s.tile = tile_pad(cpu_div_up(n, cpu_div_up(n, most)), pad);
    s.count = cpu_div_up(n, s.tile);
    return s;
}

static int64_t split_len(const struct split *s, int64_t i)
{
    return cpu_min(s->tile, s->n - i * s->tile);
}

/* How B of [k,n] is cut, for pack and matmul alike. */
static void plan_b(struct plan *plan, struct tensor b, bool tb)
{
    plan->dtype = tile_dtype(plan->dev, b.dtype);
    plan->n = split_evenly(b.shape[tb ? 0 : 1], TILE_COLS, TILE_PAD_COLS);
    plan->k = split_evenly(b.shape[tb ? 1 : 0], tile_k_max(plan->dtype), tile_k_pad(plan->dtype));
    plan->b = (struct tile_source){.data = b.data, .dtype = b.dtype, .ld = b.shape[1], .k_down = !tb};
}

/* Bytes from one packed tile to the next; tile (n, k) is at (n·k.count + k) of them. */
static size_t packed_stride(const struct plan *plan)
{
    return (size_t)(plan->n.tile * plan->k.tile) * dtype_bytes(plan->dtype);
}

static void fill_a(const struct plan *plan, void *to, int64_t mi, int64_t ki)
{
    const struct tile_layout layout = tile_layout_a(plan->dtype, split_len(&plan->m, mi), split_len(&plan->k, ki));
    tile_fill(to, layout, plan->a, mi * plan->m.tile, ki * plan->k.tile);
}

static void fill_b(const struct plan *plan, void *to, int64_t ni, int64_t ki)
{
    const struct tile_layout layout =
        tile_layout_b(plan->dev, plan->dtype, split_len(&plan->n, ni), split_len(&plan->k, ki));
    tile_fill(to, layout, plan->b, ni * plan->n.tile, ki * plan->k.tile);
}

size_t cpu_pack_bytes(struct device *dev, struct tensor b, bool tb)
{
    struct plan plan = {.dev = dev};
    plan_b(&plan, b, tb);
    return (size_t)(plan.n.count * plan.k.count) * packed_stride(&plan);
}

int cpu_pack(struct device *dev, struct tensor packed, struct tensor b, bool tb)
{
    struct plan plan = {.dev = dev};
    plan_b(&plan, b, tb);
    const size_t stride = packed_stride(&plan);
#pragma omp parallel for num_threads(dev->threads) schedule(static)
    for (int64_t i = 0; i < plan.n.count * plan.k.count; i++)
        fill_b(&plan, (char *)packed.data + (size_t)i * stride, i / plan.k.count, i % plan.k.count);
    return 0;
}

/* The product of tile (mi, ni) of the output with k block ki; the first block overwrites. */
static struct tile_product product_of(const struct plan *plan, int64_t mi, int64_t ni, int64_t ki)
{
    return (struct tile_product){.dtype = plan->dtype,
                                 .adds = ki > 0,
                                 .m = tile_pad(split_len(&plan->m, mi), TILE_PAD_ROWS),
                                 .n = tile_pad(split_len(&plan->n, ni), TILE_PAD_COLS),
                                 .k = tile_pad(split_len(&plan->k, ki), tile_k_pad(plan->dtype))};
}

/* Prepares whole and last tiles of each direction, with a first, a middle and a last block of k. */
static int prepare_products(struct device *dev, const struct plan *plan)
{
    const int64_t ks[3] = {0, cpu_min(1, plan->k.count - 1), plan->k.count - 1};
    for (int i = 0; i < 12 && plan->k.count > 0; i++)
        TRY(tile_product_prepare(
            dev, product_of(plan, i & 1 ? plan->m.count - 1 : 0, i & 2 ? plan->n.count - 1 : 0, ks[i / 4])));
    return 0;
}

/* The C tile (zeros when there was no k) into y: added, or biased and rounded. */
static void write_tile(const struct plan *plan, float *c, int64_t mi, int64_t ni)
{
    const int64_t cols = split_len(&plan->n, ni), stride = tile_pad(cols, TILE_PAD_COLS), col0 = ni * plan->n.tile;
    float bias[TILE_COLS] = {0};
    if (tensor_given(plan->bias)) cpu_load(bias, plan->bias.data, plan->bias.dtype, col0, cols);
    for (int64_t row = 0; row < split_len(&plan->m, mi); row++) {
        float *from = c + row * stride;
        const int64_t at = (mi * plan->m.tile + row) * plan->n.n + col0;
        if (plan->k.count == 0) memset(from, 0, (size_t)cols * sizeof *from);
        if (plan->add) {
            float *to = (float *)plan->y.data + at;
            for (int64_t j = 0; j < cols; j++)
                to[j] += from[j];
            continue;
        }
        for (int64_t j = 0; j < cols; j++)
            from[j] += bias[j];
        cpu_store(plan->y.data, plan->y.dtype, at, from, cols);
    }
}

/* One group of tiles of the output. */
static int matmul_task(const struct device *dev, int thread, const void *ctx, int64_t task)
{
    const struct plan *plan = ctx;
    char *slice = cpu_slice(dev, thread), *b_area = slice + A_BYTES, *c_area = b_area + GROUP_COLS * B_BYTES;
    const int64_t m0 = task / plan->tasks_n * plan->group_m, n0 = task % plan->tasks_n * plan->group_n;
    const int64_t ms = cpu_min(plan->group_m, plan->m.count - m0), ns = cpu_min(plan->group_n, plan->n.count - n0);
    for (int64_t ki = 0; ki < plan->k.count; ki++) {
        for (int64_t j = 0; j < ns && !plan->packed; j++)
            fill_b(plan, b_area + (size_t)j * B_BYTES, n0 + j, ki);
        for (int64_t i = 0; i < ms; i++) {
            const size_t a_at = (size_t)((m0 + i) * plan->m.tile * plan->a.ld) * dtype_bytes(plan->dtype);
            const char *a = plan->a_in_place ? (const char *)plan->a.data + a_at : slice;
            if (!plan->a_in_place) fill_a(plan, slice, m0 + i, ki);
            for (int64_t j = 0; j < ns; j++) {
                const size_t b_at = (size_t)((n0 + j) * plan->k.count + ki) * packed_stride(plan);
                const char *b = plan->packed ? plan->packed + b_at : b_area + (size_t)j * B_BYTES;
                float *c = (float *)(void *)(c_area + (size_t)(i * ns + j) * C_BYTES);
                const int bad = tile_product_run(dev, thread, product_of(plan, m0 + i, n0 + j, ki), a, b, c);
                if (bad) return bad;
            }
        }
    }
    for (int64_t i = 0; i < ms; i++)
        for (int64_t j = 0; j < ns; j++)
            write_tile(plan, (float *)(void *)(c_area + (size_t)(i * ns + j) * C_BYTES), m0 + i, n0 + j);
    return 0;
}

/* A task of several columns fills A once for them, one of several rows fills B once; tasks grow as long as that saves
 * something and enough of them remain for the threads. */
static void plan_tasks(struct plan *plan, int threads)
{
    plan->group_m = plan->group_n = 1;
    const int64_t enough = threads > 1 ? (int64_t)threads * TASKS_PER_THREAD : 1;
    while (!plan->a_in_place && plan->group_n < GROUP_COLS &&
           plan->m.count * cpu_div_up(plan->n.count, 2 * plan->group_n) >= enough)
        plan->group_n *= 2;
    while (!plan->packed && plan->group_m * plan->group_n < GROUP_TILES &&
           cpu_div_up(plan->m.count, 2 * plan->group_m) * cpu_div_up(plan->n.count, plan->group_n) >= enough)
        plan->group_m *= 2;
    plan->tasks_n = cpu_div_up(plan->n.count, plan->group_n);
    plan->tasks = cpu_div_up(plan->m.count, plan->group_m) * plan->tasks_n;
}

int cpu_matmul(struct device *dev, struct tensor y, struct tensor a, struct tensor b, struct tensor packed,
               struct tensor bias, unsigned flags)
{
    const bool ta = flags & MATMUL_TA;
    const int64_t rows = y.shape[0], k = a.shape[ta ? 0 : 1];
    if (rows == 0 || y.shape[1] == 0) return 0;
    struct plan plan = {
        .dev = dev,
        .m = split_evenly(rows, TILE_ROWS, TILE_PAD_ROWS),
        .a = {.data = a.data, .dtype = a.dtype, .ld = a.shape[1], .k_down = ta},
        .packed = tensor_given(packed) ? packed.data : NULL,
        .y = y,
        .bias = bias,
        .add = flags & MATMUL_ADD,
    };
    plan_b(&plan, b, flags & MATMUL_TB);
    plan.a_in_place =
        !ta && a.dtype == plan.dtype && plan.k.count == 1 && k == plan.k.tile && rows % TILE_PAD_ROWS == 0;
    plan_tasks(&plan, dev->threads);
    TRY(prepare_products(dev, &plan));
    return tile_run_tasks(dev, "matmul", matmul_task, &plan, plan.tasks);
}

/* The rest of a product's work follows it in a pass of its own: the product is most of the time here. */

int cpu_matmul_gelu(struct device *dev, struct tensor y, struct tensor x, struct tensor a, struct tensor b,
                    struct tensor packed, struct tensor bias, unsigned flags)
{
    TRY(cpu_matmul(dev, x, a, b, packed, bias, flags));
    return cpu_gelu_fwd(dev, y, x);
}

int cpu_matmul_dgelu(struct device *dev, struct tensor dx, struct tensor a, struct tensor b, struct tensor packed,
                     struct tensor x, unsigned flags)
{
    TRY(cpu_matmul(dev, dx, a, b, packed, TENSOR_NONE, flags));
    return cpu_gelu_bwd(dev, dx, dx, x);
}

int cpu_weight_bwd(struct device *dev, struct tensor dw, struct tensor db, struct tensor x, struct tensor dy)
{
    TRY(cpu_bias_bwd(dev, db, dy));
    return cpu_matmul(dev, dw, x, dy, TENSOR_NONE, TENSOR_NONE, MATMUL_TA | MATMUL_ADD);
}
