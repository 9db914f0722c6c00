/* Products of tiles by single-threaded oneDNN primitives.
 *
 * oneDNN 2.6.3 uses its fast kernel only where A is contiguous and B is contiguous or in the layout of tile.h. One core
 * of a Xeon with AMX multiplies 256 × 256 × 1024 in bf16 with 1500 GFLOP/s from such tiles, with 1150 when oneDNN has to
 * bring B into that layout itself, and with 700 to 800 when A is strided or transposed or B strided, where it takes
 * another kernel. In f32 it is 138 against 110. Without AVX-512 BF16 oneDNN has no fast bf16 kernel, and none at all
 * below AVX-512: there tiles are filled as f32.
 *
 * Padding bounds the products that can exist: their primitives lie in a table indexed by the padded shape, are made at a
 * shape's first use and never again. oneDNN itself takes and returns some hundred bytes of heap within each call.
 *
 * Threads: the caller's thread makes primitives; OpenMP threads run them, each with its own memory objects, stream and
 * workspace slice, so oneDNN never divides work and results do not depend on the number of threads. */
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>

#include "../product.h"
#include "err.h"
#include "version.h"

#define ROW_SIZES (TILE_ROWS / TILE_PAD_ROWS)
#define COL_SIZES (TILE_COLS / TILE_PAD_COLS)
#define K_SIZES (TILE_K_BYTES / TILE_PAD_K_BYTES)

enum { ARG_A, ARG_B, ARG_C, ARG_SCRATCH, ARGS };

struct primitive {
    dnnl_primitive_t run;
    dnnl_memory_t *memory; /* ARGS for each thread */
};

struct dnnl_state {
    dnnl_engine_t engine;
    dnnl_stream_t *stream;                                           /* one for each thread */
    struct primitive primitive[2][2][ROW_SIZES][COL_SIZES][K_SIZES]; /* [bf16][adds][rows][columns][k] */
};

/* Fails with oneDNN's status. */
#define CHECK_DNNL(call, label)                                                                                 \
    do {                                                                                                        \
        const int dnnl_rc_ = (int)(call);                                                                       \
        if (dnnl_rc_ != 0) FAIL_GOTO(label, ERR_DEVICE, "oneDNN failed with status %d in %s", dnnl_rc_, #call); \
    } while (0)

/* The primitive descriptor of a product. */
static int describe(dnnl_primitive_desc_t *pd, const struct product_table *table, struct tile_product p)
{
    int rc = 0;
    const struct dnnl_state *state = table->state;
    dnnl_primitive_attr_t attr = NULL;
    dnnl_post_ops_t post = NULL;
    const dnnl_format_tag_t panels = p.dtype == DT_BF16 ? dnnl_BA16a64b2a : dnnl_BA16a64b;
    const struct dnnl_matmul matmul = {.a = {p.m, p.k},
                                       .b = {p.k, p.n},
                                       .c = {p.m, p.n},
                                       .type = p.dtype == DT_BF16 ? dnnl_bf16 : dnnl_f32,
                                       .b_tag = table->panel[p.dtype] > 0 ? panels : dnnl_ab};
    CHECK_DNNL(dnnl_primitive_attr_create(&attr), done);
    CHECK_DNNL(dnnl_primitive_attr_set_scratchpad_mode(attr, dnnl_scratchpad_mode_user), done);
    if (p.adds) {
        CHECK_DNNL(dnnl_post_ops_create(&post), done);
        CHECK_DNNL(append_sum(post), done);
        CHECK_DNNL(dnnl_primitive_attr_set_post_ops(attr, post), done);
    }
    CHECK_DNNL(describe_matmul(pd, state->engine, &matmul, attr), done);
done:
    if (post) dnnl_post_ops_destroy(post);
    if (attr) dnnl_primitive_attr_destroy(attr);
    return rc;
}

static void free_primitive(struct primitive *p, int threads)
{
    if (p->run) dnnl_primitive_destroy(p->run);
    for (int i = 0; p->memory && i < threads * ARGS; i++)
        if (p->memory[i]) dnnl_memory_destroy(p->memory[i]);
    free((void *)p->memory);
    *p = (struct primitive){NULL, NULL};
}

/* Makes the primitive and each thread's memory objects for it; the tiles' addresses are set at each run. */
static int make_primitive(struct primitive *to, const struct product_table *table, struct tile_product p)
{
    int rc = 0;
    static const dnnl_query_t query[ARGS] = {dnnl_query_src_md, dnnl_query_weights_md, dnnl_query_dst_md,
                                             dnnl_query_scratchpad_md};
    const struct dnnl_state *state = table->state;
    dnnl_primitive_desc_t pd = NULL;
    TRY_GOTO(describe(&pd, table, p), done);
    const size_t scratch_bytes = dnnl_memory_desc_get_size(dnnl_primitive_desc_query_md(pd, query[ARG_SCRATCH], 0));
    if (scratch_bytes > TILE_SCRATCH_BYTES)
        FAIL_GOTO(done, ERR_DEVICE,
                  "oneDNN wants a scratchpad of %zu bytes for a matmul tile, more than the %zu kept for it",
                  scratch_bytes, TILE_SCRATCH_BYTES);
    to->memory = calloc((size_t)table->threads * ARGS, sizeof(dnnl_memory_t));
    if (!to->memory) FAIL_GOTO(done, ERR_SYSTEM, "no memory for a matmul primitive");
    for (int i = 0; i < table->threads * ARGS; i++)
        CHECK_DNNL(dnnl_memory_create(&to->memory[i], dnnl_primitive_desc_query_md(pd, query[i % ARGS], 0),
                                      state->engine, DNNL_MEMORY_NONE),
                   done);
    CHECK_DNNL(dnnl_primitive_create(&to->run, pd), done);
done:
    if (pd) dnnl_primitive_desc_destroy(pd);
    if (rc) free_primitive(to, table->threads);
    return rc;
}

static struct primitive *find_primitive(const struct product_table *table, struct tile_product p)
{
    const int64_t row = p.m / TILE_PAD_ROWS - 1, col = p.n / TILE_PAD_COLS - 1, k = p.k / tile_k_pad(p.dtype) - 1;
    ASSERT(row >= 0 && row < ROW_SIZES && col >= 0 && col < COL_SIZES && k >= 0 && k < K_SIZES);
    return &((struct dnnl_state *)table->state)->primitive[p.dtype == DT_BF16][p.adds][row][col][k];
}

/* Whether oneDNN has its fast kernel ("brgemm") for tiles of this type on this CPU; then B lies in panels. */
static bool has_fast_kernel(struct product_table *table, enum dtype dtype)
{
    const struct tile_product p = {.dtype = dtype, .m = TILE_PAD_ROWS, .n = TILE_PAD_COLS, .k = tile_k_pad(dtype)};
    dnnl_primitive_desc_t pd = NULL;
    const char *name = "";
    table->panel[dtype] = TILE_PAD_COLS;
    const bool fast = describe(&pd, table, p) == 0 &&
                      dnnl_primitive_desc_query(pd, dnnl_query_impl_info_str, 0, (void *)&name) == dnnl_success &&
                      strncmp(name, "brg", 3) == 0;
    if (pd) dnnl_primitive_desc_destroy(pd);
    err_clear();
    if (!fast) table->panel[dtype] = 0;
    return fast;
}

/* oneDNN looks at the number of OpenMP threads when a primitive is made, so it is 1 meanwhile. */
static int dnnl_prepare(struct product_table *table, struct tile_product product)
{
    struct primitive *p = find_primitive(table, product);
    if (p->run) return 0;
    const int threads = omp_get_max_threads();
    omp_set_num_threads(1);
    const int rc = make_primitive(p, table, product);
    omp_set_num_threads(threads);
    return rc;
}

static int dnnl_run(const struct product_table *table, int thread, void *scratch, struct tile_product product,
                    const void *a, const void *b, float *c)
{
    const struct dnnl_state *state = table->state;
    const struct primitive *p = find_primitive(table, product);
    dnnl_memory_t *memory = p->memory + (ptrdiff_t)thread * ARGS;
    const dnnl_exec_arg_t args[ARGS] = {{DNNL_ARG_SRC, memory[ARG_A]},
                                        {DNNL_ARG_WEIGHTS, memory[ARG_B]},
                                        {DNNL_ARG_DST, memory[ARG_C]},
                                        {DNNL_ARG_SCRATCHPAD, memory[ARG_SCRATCH]}};
    int bad = (int)dnnl_memory_set_data_handle(memory[ARG_A], (void *)a);
    if (!bad) bad = (int)dnnl_memory_set_data_handle(memory[ARG_B], (void *)b);
    if (!bad) bad = (int)dnnl_memory_set_data_handle(memory[ARG_C], c);
    if (!bad) bad = (int)dnnl_memory_set_data_handle(memory[ARG_SCRATCH], scratch);
    if (!bad) bad = (int)dnnl_primitive_execute(p->run, state->stream[thread], ARGS, args);
    return bad;
}

static void dnnl_close(struct product_table *table)
{
    struct dnnl_state *state = table->state;
    if (!state) return;
    struct primitive *all = &state->primitive[0][0][0][0][0];
    for (size_t i = 0; i < sizeof state->primitive / sizeof *all; i++)
        free_primitive(&all[i], table->threads);
    for (int i = 0; state->stream && i < table->threads; i++)
        if (state->stream[i]) dnnl_stream_destroy(state->stream[i]);
    free((void *)state->stream);
    if (state->engine) dnnl_engine_destroy(state->engine);
    free(state);
}

/* The best instructions that oneDNN uses here. */
static const char *isa_name(void)
{
    static const struct {
        dnnl_cpu_isa_t isa; /* all of its bits are set where it is used */
        const char *name;
    } names[] = {{dnnl_cpu_isa_avx512_core_amx, "AMX bf16"},
                 {dnnl_cpu_isa_avx512_core_bf16, "AVX-512 bf16"},
                 {dnnl_cpu_isa_avx512_core, "AVX-512"},
                 {dnnl_cpu_isa_avx2, "AVX2"},
                 {dnnl_cpu_isa_avx, "AVX"},
                 {dnnl_cpu_isa_sse41, "no AVX"}};
    const unsigned isa = (unsigned)dnnl_get_effective_cpu_isa();
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if ((isa & (unsigned)names[i].isa) == (unsigned)names[i].isa) return names[i].name;
    return "its own choice of instructions"; /* of other makes of CPU it does not tell */
}

bool product_library_built(void)
{
    return true;
}

int product_library_open(struct product_table *table)
{
    int rc = 0;
    struct dnnl_state *state = calloc(1, sizeof *state);
    if (!state) FAIL(ERR_SYSTEM, "no memory for the table of matmul primitives");
    table->state = state;
    table->close = dnnl_close;
    table->prepare = dnnl_prepare;
    table->run = dnnl_run;
    const dnnl_version_t *version = dnnl_version();
    snprintf(table->name, sizeof table->name, "oneDNN %d.%d.%d, %s", version->major, version->minor, version->patch,
             isa_name());
    state->stream = calloc((size_t)table->threads, sizeof(dnnl_stream_t));
    if (!state->stream) FAIL(ERR_SYSTEM, "no memory for the streams of %d threads", table->threads);
    CHECK_DNNL(dnnl_engine_create(&state->engine, dnnl_cpu, 0), done);
    for (int i = 0; i < table->threads; i++)
        CHECK_DNNL(dnnl_stream_create(&state->stream[i], state->engine, dnnl_stream_default_flags), done);
    table->tile_dtype[DT_F32] = DT_F32;
    (void)has_fast_kernel(table, DT_F32);
    table->tile_dtype[DT_BF16] = has_fast_kernel(table, DT_BF16) ? DT_BF16 : DT_F32;
done:
    return rc;
}
