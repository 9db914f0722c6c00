/* Products of tiles, whoever multiplies them, and the loop that runs tasks made of them.
 *
 * Threads: the caller's thread prepares products; OpenMP threads run them, each product whole on one thread, so results
 * do not depend on the number of threads. */
#include "product.h"

#include <omp.h>
#include <stdlib.h>

#include "err.h"

static struct product_table *table_of(const struct device *dev)
{
    const struct cpu_state *state = dev->state;
    return state->products;
}

int cpu_products_open(struct product_table **products, int threads, enum product_choice choice)
{
    *products = NULL;
    struct product_table *table = calloc(1, sizeof *table);
    if (!table) FAIL(ERR_SYSTEM, "no memory for the table of matmul tiles");
    table->threads = threads;
    const bool library = choice == PRODUCT_LIBRARY || (choice == PRODUCT_AUTO && product_library_built());
    const int rc = library ? product_library_open(table) : product_portable_open(table);
    if (rc)
        cpu_products_close(table);
    else
        *products = table;
    return rc;
}

void cpu_products_close(struct product_table *table)
{
    if (table && table->close) table->close(table);
    free(table);
}

const char *cpu_products_name(const struct product_table *table)
{
    return table->name;
}

enum dtype tile_dtype(const struct device *dev, enum dtype act)
{
    return table_of(dev)->tile_dtype[act];
}

struct tile_layout tile_layout_b(const struct device *dev, enum dtype dtype, int64_t lines, int64_t k)
{
    struct tile_layout layout = tile_layout_a(dtype, lines, k);
    const int64_t panel = table_of(dev)->panel[dtype];
    layout.is_b = true;
    layout.lines_pad = tile_pad(lines, TILE_PAD_COLS);
    layout.panel = panel > 0 ? panel : layout.lines_pad;
    return layout;
}

int tile_product_prepare(struct device *dev, struct tile_product product)
{
    struct product_table *table = table_of(dev);
    return table->prepare ? table->prepare(table, product) : 0;
}

int tile_product_run(const struct device *dev, int thread, struct tile_product product, const void *a, const void *b,
                     float *c)
{
    const struct product_table *table = table_of(dev);
    return table->run(table, thread, (char *)cpu_slice(dev, thread) + TILE_SLICE_BYTES, product, a, b, c);
}

int tile_run_tasks(struct device *dev, const char *op, tile_task *task, const void *ctx, int64_t n)
{
    int status = 0;
    ASSERT(dev->threads <= table_of(dev)->threads);
#pragma omp parallel num_threads(dev->threads)
    {
        omp_set_num_threads(1); /* for a library inside; this thread's setting ends with the region */
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < n; i++) {
            const int bad = task(dev, omp_get_thread_num(), ctx, i);
            if (bad) {
#pragma omp atomic write
                status = bad;
            }
        }
    }
    if (status) FAIL(ERR_DEVICE, "oneDNN failed with status %d in %s", status, op);
    return 0;
}
