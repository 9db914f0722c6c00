/* Matrix multiplication by oneDNN, and the packing of weights for it.
 *
 * The result must be the same bits for any number of threads, so oneDNN never divides work: the output is cut into tiles
 * of at most 256 × 256 and k into blocks of 2 KiB a line, by the shape alone, and every tile is computed by one thread
 * with single-threaded primitives, its k blocks in order, into an f32 tile in the workspace that is then added to,
 * biased or rounded into y. How tiles are grouped into tasks may depend on the threads; the bits do not.
 *
 * oneDNN 2.6.3 uses its fast kernel only where A is contiguous and B is in the layout of tile.h; everything else falls
 * to one three to five times slower. So tiles are filled into that form in the workspace: A where k is blocked or A is
 * transposed, and B unless it was packed. One core of a Xeon with AMX at 256 × 256 × 1024: 1500 GFLOP/s in bf16, against
 * 340 with A or B strided in place; 137 GFLOP/s in f32, against 95. Without AVX-512 BF16 oneDNN has no fast bf16 kernel
 * (and none at all below AVX-512): there the tiles are filled as f32, the rest stays the same.
 *
 * Tiles are padded to multiples of 16 × 64 × 64 bytes, which bounds the primitives that can exist: they lie in a table
 * indexed by the padded shape, made at a shape's first use, none after. oneDNN itself takes and returns some hundred
 * bytes of heap within each call.
 *
 * Threads: the caller's thread makes primitives; OpenMP threads run them, each with its own memory objects, stream and
 * workspace slice. */
#include <omp.h>
#include <oneapi/dnnl/dnnl.h>
#include <stdlib.h>

#include "cpu.h"
#include "err.h"
#include "tile.h"

enum {
    TILE_ROWS = 256,
    TILE_COLS = 256,
    TILE_K_BYTES = 2048,
    PAD_ROWS = 16,
    PAD_COLS = 64,
    PAD_K_BYTES = 64,
    GROUP_ROWS = 2, /* tiles of a task at most */
    GROUP_COLS = 4,
    TASKS_PER_THREAD = 4, /* below that, tasks are not grouped further */
};
#define ROW_SIZES (TILE_ROWS / PAD_ROWS)
#define COL_SIZES (TILE_COLS / PAD_COLS)
#define K_SIZES (TILE_K_BYTES / PAD_K_BYTES)

/* A thread's workspace slice: one tile of A, GROUP_COLS of B, GROUP_ROWS·GROUP_COLS of C, oneDNN's scratchpad. */
#define A_BYTES ((size_t)TILE_ROWS * TILE_K_BYTES)
#define B_BYTES ((size_t)TILE_COLS * TILE_K_BYTES)
#define C_BYTES ((size_t)TILE_ROWS * TILE_COLS * sizeof(float))
#define SCRATCH_BYTES ((size_t)512 << 10)
_Static_assert(A_BYTES + GROUP_COLS * B_BYTES + GROUP_ROWS * GROUP_COLS * C_BYTES + SCRATCH_BYTES <= CPU_SLICE_BYTES,
               "a matmul task must fit into a thread's slice");

enum { ARG_A, ARG_B, ARG_C, ARG_SCRATCH, ARGS };

struct primitive {
    dnnl_primitive_t run;
    dnnl_memory_t *memory; /* ARGS for each thread */
};

struct matmul_cache {
    int threads;
    dnnl_engine_t engine;
    dnnl_stream_t *stream;           /* one for each thread */
    enum dtype tile_dtype[DT_COUNT]; /* of f32 and of bf16 matrices */
    bool panels[DT_COUNT];           /* whether oneDNN has a kernel for B in panels, by the type of the tile */
    struct primitive primitive[2][2][ROW_SIZES][COL_SIZES][K_SIZES]; /* [bf16][adds][rows][columns][k] */
};

/* One length cut into tiles. */
struct split {
    int64_t n, tile, count, pad;
};

/* One matmul: shapes, cuts, operands. */
struct plan {
    struct matmul_cache *cache;
    struct split m, n, k;
    enum dtype dtype; /* of tiles */
    struct tile_source a, b;
    const char *packed; /* NULL: fill B from its source */
    struct tensor y, bias;
    bool add, a_in_place;
    int64_t group_m, group_n, tasks_n, tasks;
};

/* Fails with oneDNN's status. */
#define CHECK_DNNL(call, label)                                                                                 \
    do {                                                                                                        \
        const int dnnl_rc_ = (int)(call);                                                                       \
        if (dnnl_rc_ != 0) FAIL_GOTO(label, ERR_DEVICE, "oneDNN failed with status %d in %s", dnnl_rc_, #call); \
    } while (0)

static int64_t round_up(int64_t n, int64_t to)
{
    return cpu_div_up(n, to) * to;
}

/* Even tiles of at most `most`, multiples of `pad`. */
static struct split split_evenly(int64_t n, int64_t most, int64_t pad)
{
    struct split s = {.n = n, .tile = pad, .pad = pad};
    if (n == 0) return s;
    s.tile = round_up(cpu_div_up(n, cpu_div_up(n, most)), pad);
    s.count = cpu_div_up(n, s.tile);
    return s;
}

static int64_t split_len(const struct split *s, int64_t i)
{
    return cpu_min(s->tile, s->n - i * s->tile);
}

static int64_t split_padded(const struct split *s, int64_t i)
{
    return round_up(split_len(s, i), s->pad);
}

static dnnl_data_type_t dnnl_type(enum dtype dtype)
{
    return dtype == DT_BF16 ? dnnl_bf16 : dnnl_f32;
}

/* The descriptors of C[m,n] (+)= A[m,k]·B[k,n]. */
static int describe(dnnl_primitive_desc_t *pd, struct matmul_cache *cache, enum dtype dtype, bool adds,
                    const dnnl_dim_t mnk[3])
{
    int rc = 0;
    dnnl_memory_desc_t a, b, c;
    dnnl_matmul_desc_t op;
    dnnl_primitive_attr_t attr = NULL;
    dnnl_post_ops_t post = NULL;
    const dnnl_dims_t a_dims = {mnk[0], mnk[2]}, b_dims = {mnk[2], mnk[1]}, c_dims = {mnk[0], mnk[1]};
    const dnnl_format_tag_t panels = dtype == DT_BF16 ? dnnl_BA16a64b2a : dnnl_BA16a64b;
    CHECK_DNNL(dnnl_memory_desc_init_by_tag(&a, 2, a_dims, dnnl_type(dtype), dnnl_ab), done);
    CHECK_DNNL(dnnl_memory_desc_init_by_tag(&b, 2, b_dims, dnnl_type(dtype), cache->panels[dtype] ? panels : dnnl_ab),
               done);
    CHECK_DNNL(dnnl_memory_desc_init_by_tag(&c, 2, c_dims, dnnl_f32, dnnl_ab), done);
    CHECK_DNNL(dnnl_matmul_desc_init(&op, &a, &b, NULL, &c), done);
    CHECK_DNNL(dnnl_primitive_attr_create(&attr), done);
    CHECK_DNNL(dnnl_primitive_attr_set_scratchpad_mode(attr, dnnl_scratchpad_mode_user), done);
    if (adds) {
        CHECK_DNNL(dnnl_post_ops_create(&post), done);
        CHECK_DNNL(dnnl_post_ops_append_sum(post, 1.0F), done);
        CHECK_DNNL(dnnl_primitive_attr_set_post_ops(attr, post), done);
    }
    CHECK_DNNL(dnnl_primitive_desc_create(pd, &op, attr, cache->engine, NULL), done);
done:
    if (post) dnnl_post_ops_destroy(post);
    if (attr) dnnl_primitive_attr_destroy(attr);
    return rc;
}

/* Makes the primitive and each thread's memory objects for it; its tiles' addresses are set at each run. */
static int make_primitive(struct primitive *p, struct matmul_cache *cache, enum dtype dtype, bool adds,
                          const dnnl_dim_t mnk[3])
{
    int rc = 0;
    static const dnnl_query_t query[ARGS] = {dnnl_query_src_md, dnnl_query_weights_md, dnnl_query_dst_md,
                                             dnnl_query_scratchpad_md};
    dnnl_primitive_desc_t pd = NULL;
    TRY_GOTO(describe(&pd, cache, dtype, adds, mnk), done);
    const size_t scratch_bytes = dnnl_memory_desc_get_size(dnnl_primitive_desc_query_md(pd, query[ARG_SCRATCH], 0));
    if (scratch_bytes > SCRATCH_BYTES)
        FAIL_GOTO(done, ERR_DEVICE,
                  "oneDNN wants a scratchpad of %zu bytes for a matmul tile, more than the %zu kept for it",
                  scratch_bytes, SCRATCH_BYTES);
    p->memory = calloc((size_t)cache->threads * ARGS, sizeof *p->memory);
    if (!p->memory) FAIL_GOTO(done, ERR_SYSTEM, "no memory for a matmul primitive");
    for (int i = 0; i < cache->threads * ARGS; i++)
        CHECK_DNNL(dnnl_memory_create(&p->memory[i], dnnl_primitive_desc_query_md(pd, query[i % ARGS], 0),
                                      cache->engine, DNNL_MEMORY_NONE),
                   done);
    CHECK_DNNL(dnnl_primitive_create(&p->run, pd), done);
done:
    if (pd) dnnl_primitive_desc_destroy(pd);
    return rc;
}

static struct primitive *find_primitive(struct matmul_cache *cache, enum dtype dtype, bool adds, int64_t m, int64_t n,
                                        int64_t k)
{
    const int64_t k_index = k * (int64_t)dtype_bytes(dtype) / PAD_K_BYTES - 1;
    return &cache->primitive[dtype == DT_BF16][adds][m / PAD_ROWS - 1][n / PAD_COLS - 1][k_index];
}

/* Makes what is missing of the primitives that the plan needs: whole and last tiles in each direction. oneDNN looks at
 * the number of OpenMP threads when a primitive is made, so it is 1 meanwhile. */
static int prepare_primitives(const struct plan *plan)
{
    int rc = 0;
    const int threads = omp_get_max_threads();
    omp_set_num_threads(1);
    for (int i = 0; i < 16 && plan->k.count > 0; i++) {
        const bool adds = i & 8;
        if (adds && plan->k.count == 1) break;
        const dnnl_dim_t mnk[3] = {split_padded(&plan->m, i & 1 ? plan->m.count - 1 : 0),
                                   split_padded(&plan->n, i & 2 ? plan->n.count - 1 : 0),
                                   split_padded(&plan->k, i & 4 ? plan->k.count - 1 : 0)};
        struct primitive *p = find_primitive(plan->cache, plan->dtype, adds, mnk[0], mnk[1], mnk[2]);
        if (!p->run) TRY_GOTO(make_primitive(p, plan->cache, plan->dtype, adds, mnk), done);
    }
done:
    omp_set_num_threads(threads);
    return rc;
}

/* Whether oneDNN has its fast kernel ("brgemm") for B in panels of this type on this CPU. */
static bool has_panel_kernel(struct matmul_cache *cache, enum dtype dtype)
{
    static const dnnl_dim_t mnk[3] = {PAD_ROWS, PAD_COLS, PAD_K_BYTES};
    dnnl_primitive_desc_t pd = NULL;
    const char *name = "";
    cache->panels[dtype] = true;
    const bool fast = describe(&pd, cache, dtype, false, mnk) == 0 &&
                      dnnl_primitive_desc_query(pd, dnnl_query_impl_info_str, 0, (void *)&name) == dnnl_success &&
                      strncmp(name, "brg", 3) == 0;
    if (pd) dnnl_primitive_desc_destroy(pd);
    err_clear();
    return fast;
}

int cpu_matmul_open(struct matmul_cache **out, int threads)
{
    int rc = 0;
    struct matmul_cache *cache = calloc(1, sizeof *cache);
    if (!cache) FAIL(ERR_SYSTEM, "no memory for the table of matmul primitives");
    cache->threads = threads;
    cache->stream = calloc((size_t)threads, sizeof(dnnl_stream_t));
    if (!cache->stream) FAIL_GOTO(done, ERR_SYSTEM, "no memory for the streams of %d threads", threads);
    CHECK_DNNL(dnnl_engine_create(&cache->engine, dnnl_cpu, 0), done);
    for (int i = 0; i < threads; i++)
        CHECK_DNNL(dnnl_stream_create(&cache->stream[i], cache->engine, dnnl_stream_default_flags), done);
    cache->panels[DT_F32] = has_panel_kernel(cache, DT_F32);
    cache->panels[DT_BF16] = has_panel_kernel(cache, DT_BF16);
    cache->tile_dtype[DT_F32] = DT_F32;
    cache->tile_dtype[DT_BF16] = cache->panels[DT_BF16] ? DT_BF16 : DT_F32;
done:
    if (rc) {
        cpu_matmul_close(cache);
        cache = NULL;
    }
    *out = cache;
    return rc;
}

void cpu_matmul_close(struct matmul_cache *cache)
{
    if (!cache) return;
    struct primitive *all = &cache->primitive[0][0][0][0][0];
    for (size_t i = 0; i < sizeof cache->primitive / sizeof *all; i++) {
        if (all[i].run) dnnl_primitive_destroy(all[i].run);
        for (int j = 0; all[i].memory && j < cache->threads * ARGS; j++)
            if (all[i].memory[j]) dnnl_memory_destroy(all[i].memory[j]);
        free(all[i].memory);
    }
    for (int i = 0; cache->stream && i < cache->threads; i++)
        if (cache->stream[i]) dnnl_stream_destroy(cache->stream[i]);
    free(cache->stream);
    if (cache->engine) dnnl_engine_destroy(cache->engine);
    free(cache);
}

static struct matmul_cache *cache_of(const struct device *dev)
{
    const struct cpu_state *state = dev->state;
    return state->matmul;
}

/* How B of [k,n] is cut, for pack and matmul alike. */
static void plan_b(struct plan *plan, enum dtype dtype, int64_t n, int64_t k)
{
    plan->dtype = plan->cache->tile_dtype[dtype];
    const int64_t bytes = (int64_t)dtype_bytes(plan->dtype);
    plan->n = split_evenly(n, TILE_COLS, PAD_COLS);
    plan->k = split_evenly(k, TILE_K_BYTES / bytes, PAD_K_BYTES / bytes);
}

static struct tile_source source_of_b(struct tensor b, bool tb)
{
    return (struct tile_source){.data = b.data, .dtype = b.dtype, .ld = b.shape[1], .k_down = !tb};
}

/* Bytes from one packed tile to the next; tile (n, k) is at (n·k.count + k) of them. */
static size_t packed_stride(const struct plan *plan)
{
    return (size_t)(plan->n.tile * plan->k.tile) * dtype_bytes(plan->dtype);
}

static void fill_a(const struct plan *plan, void *to, int64_t mi, int64_t ki)
{
    const struct tile_layout layout = {.dtype = plan->dtype,
                                       .lines = split_len(&plan->m, mi),
                                       .k = split_len(&plan->k, ki),
                                       .lines_pad = split_padded(&plan->m, mi),
                                       .k_pad = split_padded(&plan->k, ki)};
    tile_fill(to, layout, plan->a, mi * plan->m.tile, ki * plan->k.tile);
}

static void fill_b(const struct plan *plan, void *to, int64_t ni, int64_t ki)
{
    const int64_t cols_pad = split_padded(&plan->n, ni);
    const struct tile_layout layout = {.dtype = plan->dtype,
                                       .is_b = true,
                                       .panel = plan->cache->panels[plan->dtype] ? PAD_COLS : cols_pad,
                                       .lines = split_len(&plan->n, ni),
                                       .k = split_len(&plan->k, ki),
                                       .lines_pad = cols_pad,
                                       .k_pad = split_padded(&plan->k, ki)};
    tile_fill(to, layout, plan->b, ni * plan->n.tile, ki * plan->k.tile);
}

size_t cpu_pack_bytes(struct device *dev, struct tensor b, bool tb)
{
    struct plan plan = {.cache = cache_of(dev)};
    plan_b(&plan, b.dtype, b.shape[tb ? 0 : 1], b.shape[tb ? 1 : 0]);
    return (size_t)(plan.n.count * plan.k.count) * packed_stride(&plan);
}

int cpu_pack(struct device *dev, struct tensor packed, struct tensor b, bool tb)
{
    struct plan plan = {.cache = cache_of(dev), .b = source_of_b(b, tb)};
    plan_b(&plan, b.dtype, b.shape[tb ? 0 : 1], b.shape[tb ? 1 : 0]);
    const size_t stride = packed_stride(&plan);
#pragma omp parallel for num_threads(dev->threads) schedule(static)
    for (int64_t i = 0; i < plan.n.count * plan.k.count; i++)
        fill_b(&plan, (char *)packed.data + (size_t)i * stride, i / plan.k.count, i % plan.k.count);
    return 0;
}

/* C tile (+)= A tile · B tile. oneDNN only reads a and b. */
static int run_primitive(const struct plan *plan, int thread, char *scratch, const int64_t index[3], const void *a,
                         const void *b, float *c)
{
    const struct primitive *p =
        find_primitive(plan->cache, plan->dtype, index[2] > 0, split_padded(&plan->m, index[0]),
                       split_padded(&plan->n, index[1]), split_padded(&plan->k, index[2]));
    dnnl_memory_t *memory = p->memory + (ptrdiff_t)thread * ARGS;
    const dnnl_exec_arg_t args[ARGS] = {{DNNL_ARG_SRC, memory[ARG_A]},
                                        {DNNL_ARG_WEIGHTS, memory[ARG_B]},
                                        {DNNL_ARG_DST, memory[ARG_C]},
                                        {DNNL_ARG_SCRATCHPAD, memory[ARG_SCRATCH]}};
    int bad = (int)dnnl_memory_set_data_handle(memory[ARG_A], (void *)(uintptr_t)a);
    if (!bad) bad = (int)dnnl_memory_set_data_handle(memory[ARG_B], (void *)(uintptr_t)b);
    if (!bad) bad = (int)dnnl_memory_set_data_handle(memory[ARG_C], c);
    if (!bad) bad = (int)dnnl_memory_set_data_handle(memory[ARG_SCRATCH], scratch);
    if (!bad) bad = (int)dnnl_primitive_execute(p->run, plan->cache->stream[thread], ARGS, args);
    return bad;
}

/* The C tile (zeros when there was no k) into y: added, or biased and rounded. */
static void write_tile(const struct plan *plan, float *c, int64_t mi, int64_t ni)
{
    const int64_t cols = split_len(&plan->n, ni), stride = split_padded(&plan->n, ni), col0 = ni * plan->n.tile;
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

/* One task: a group of C tiles, by this thread alone. Returns oneDNN's status. */
static int run_task(const struct plan *plan, const struct device *dev, int64_t task)
{
    const int thread = omp_get_thread_num();
    char *a_area = cpu_slice(dev, thread), *b_area = a_area + A_BYTES, *c_area = b_area + GROUP_COLS * B_BYTES;
    char *scratch = c_area + GROUP_ROWS * GROUP_COLS * C_BYTES;
    const int64_t m0 = task / plan->tasks_n * plan->group_m, n0 = task % plan->tasks_n * plan->group_n;
    const int64_t ms = cpu_min(plan->group_m, plan->m.count - m0), ns = cpu_min(plan->group_n, plan->n.count - n0);
    for (int64_t ki = 0; ki < plan->k.count; ki++) {
        for (int64_t j = 0; j < ns && !plan->packed; j++)
            fill_b(plan, b_area + (size_t)j * B_BYTES, n0 + j, ki);
        for (int64_t i = 0; i < ms; i++) {
            const char *a = a_area;
            if (plan->a_in_place)
                a = (const char *)plan->a.data +
                    (size_t)((m0 + i) * plan->m.tile * plan->a.ld) * dtype_bytes(plan->dtype);
            else
                fill_a(plan, a_area, m0 + i, ki);
            for (int64_t j = 0; j < ns; j++) {
                const char *b = plan->packed
                                    ? plan->packed + (size_t)((n0 + j) * plan->k.count + ki) * packed_stride(plan)
                                    : b_area + (size_t)j * B_BYTES;
                float *c = (float *)(void *)(c_area + (size_t)(i * GROUP_COLS + j) * C_BYTES);
                const int bad = run_primitive(plan, thread, scratch, (int64_t[3]){m0 + i, n0 + j, ki}, a, b, c);
                if (bad) return bad;
            }
        }
    }
    for (int64_t i = 0; i < ms; i++)
        for (int64_t j = 0; j < ns; j++)
            write_tile(plan, (float *)(void *)(c_area + (size_t)(i * GROUP_COLS + j) * C_BYTES), m0 + i, n0 + j);
    return 0;
}

/* Larger tasks fill fewer tiles twice; they are made as large as leaves enough of them for the threads. */
static void plan_tasks(struct plan *plan, int threads)
{
    plan->group_m = plan->group_n = 1;
    const int64_t enough = threads > 1 ? (int64_t)threads * TASKS_PER_THREAD : 1;
    while (plan->group_n < GROUP_COLS && plan->m.count * cpu_div_up(plan->n.count, 2 * plan->group_n) >= enough)
        plan->group_n *= 2;
    while (plan->group_m < GROUP_ROWS &&
           cpu_div_up(plan->m.count, 2 * plan->group_m) * cpu_div_up(plan->n.count, plan->group_n) >= enough)
        plan->group_m *= 2;
    plan->tasks_n = cpu_div_up(plan->n.count, plan->group_n);
    plan->tasks = cpu_div_up(plan->m.count, plan->group_m) * plan->tasks_n;
}

int cpu_matmul(struct device *dev, struct tensor y, struct tensor a, struct tensor b, struct tensor packed,
               struct tensor bias, unsigned flags)
{
    const bool ta = flags & MATMUL_TA, tb = flags & MATMUL_TB;
    const int64_t rows = y.shape[0], cols = y.shape[1], k = a.shape[ta ? 0 : 1];
    if (rows == 0 || cols == 0) return 0;
    struct plan plan = {
        .cache = cache_of(dev),
        .m = split_evenly(rows, TILE_ROWS, PAD_ROWS),
        .a = {.data = a.data, .dtype = a.dtype, .ld = a.shape[1], .k_down = ta},
        .b = source_of_b(b, tb),
        .packed = tensor_given(packed) ? packed.data : NULL,
        .y = y,
        .bias = bias,
        .add = flags & MATMUL_ADD,
    };
    ASSERT(dev->threads <= plan.cache->threads);
    plan_b(&plan, a.dtype, cols, k);
    plan.a_in_place = !ta && a.dtype == plan.dtype && plan.k.count == 1 && k == plan.k.tile && rows % PAD_ROWS == 0;
    plan_tasks(&plan, dev->threads);
    TRY(prepare_primitives(&plan));
    int status = 0;
#pragma omp parallel num_threads(dev->threads)
    {
        omp_set_num_threads(1); /* for oneDNN inside; this thread's setting ends with the region */
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < plan.tasks; task++) {
            const int bad = run_task(&plan, dev, task);
            if (bad) {
#pragma omp atomic write
                status = bad;
            }
        }
    }
    if (status) FAIL(ERR_DEVICE, "oneDNN failed with status %d in a matmul", status);
    return 0;
}
