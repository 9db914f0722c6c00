/* The CPU device: host memory, and the table of ops made from ops.def. Ops run to their end before they return, so
 * upload, download and sync have nothing to wait for. */
#define _DEFAULT_SOURCE /* for madvise */
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "cpu.h"
#include "err.h"
#include "proc.h"

#define LARGE_PAGE ((size_t)2 << 20) /* of x86-64, and of AArch64 with pages of 4 KiB */

static int device_open_cpu(struct device *dev, int index)
{
    (void)index; /* a rank has one CPU device: its threads */
    struct cpu_state *state = calloc(1, sizeof *state);
    if (!state) FAIL(ERR_SYSTEM, "no memory for the state of the CPU device");
    state->threads = dev->threads;
    const int rc = cpu_products_open(&state->products, state->threads, PRODUCT_AUTO);
    if (rc) {
        free(state);
        return rc;
    }
    omp_set_num_threads(state->threads); /* for the loops of this thread outside the ops, such as initial weights */
    dev->state = state;
    return 0;
}

static void device_close_cpu(struct device *dev)
{
    struct cpu_state *state = dev->state;
    if (!state) return;
    cpu_products_close(state->products);
    free(state);
    dev->state = NULL;
}

int cpu_choose_product(struct device *dev, enum product_choice choice)
{
    struct cpu_state *state = dev->state;
    struct product_table *chosen = NULL;
    TRY(cpu_products_open(&chosen, state->threads, choice));
    cpu_products_close(state->products);
    state->products = chosen;
    return 0;
}

static void device_describe_cpu(struct device *dev, char *text, size_t text_bytes)
{
    const struct cpu_state *state = dev->state;
    snprintf(text, text_bytes, "CPU, %s, %d thread%s", cpu_products_name(state->products), dev->threads,
             dev->threads == 1 ? "" : "s");
}

static void device_arithmetic_cpu(struct device *dev, char *text, size_t text_bytes)
{
    const struct cpu_state *state = dev->state;
    snprintf(text, text_bytes, "CPU, kernels for %s, %s", cpu_isa_compiled(), cpu_products_name(state->products));
}

static int device_count_cpu(void)
{
    return 1;
}

static int device_identify_cpu(struct device *dev, char *text, size_t text_bytes)
{
    (void)dev;
    snprintf(text, text_bytes, "CPU");
    return 0;
}

static int device_memory_cpu(struct device *dev, size_t *free_bytes, size_t *total_bytes)
{
    (void)dev;
    *free_bytes = proc_bytes("/proc/meminfo", "MemAvailable:");
    *total_bytes = proc_bytes("/proc/meminfo", "MemTotal:");
    return 0;
}

static void *device_queue_cpu(struct device *dev)
{
    (void)dev;
    return NULL;
}

/* The first touch of memory, which has the kernel find and clear a page. In large pages, by all threads, and by each in
 * turn, so that the memory of a rank with several NUMA nodes is spread over them. */
static void fill_zero(const struct device *dev, char *data, size_t bytes)
{
    const size_t pieces = (bytes + LARGE_PAGE - 1) / LARGE_PAGE;
#pragma omp parallel for num_threads(dev->threads) schedule(static, 1)
    for (size_t i = 0; i < pieces; i++)
        memset(data + i * LARGE_PAGE, 0, i + 1 < pieces ? LARGE_PAGE : bytes - i * LARGE_PAGE);
}

static int device_alloc(struct device *dev, size_t bytes, void **data)
{
    *data = NULL;
    const size_t padded = (bytes + CPU_ALIGN - 1) / CPU_ALIGN * CPU_ALIGN + (bytes == 0 ? CPU_ALIGN : 0);
    const size_t align = padded < LARGE_PAGE ? CPU_ALIGN : LARGE_PAGE;
    if (padded < bytes || posix_memalign(data, align, padded) != 0) {
        *data = NULL;
        FAIL(ERR_SYSTEM, "cannot get %zu bytes of memory. Use a smaller micro-batch, or more ranks on more nodes.",
             bytes);
    }
    if (align == LARGE_PAGE) (void)madvise(*data, padded, MADV_HUGEPAGE); /* a kernel without them has small ones */
    fill_zero(dev, *data, padded);
    return 0;
}

static void device_free(struct device *dev, void *data, size_t bytes)
{
    (void)dev;
    (void)bytes;
    free(data);
}

static int device_copy(struct device *dev, void *to, const void *from, size_t bytes)
{
    (void)dev;
    if (bytes > 0) memcpy(to, from, bytes);
    return 0;
}

static int device_sync(struct device *dev)
{
    (void)dev;
    return 0;
}

static size_t device_workspace_bytes(struct device *dev, const struct attention_case *c, enum attention_choice choice)
{
    (void)c, (void)choice;
    return (size_t)dev->threads * CPU_SLICE_BYTES;
}

static int device_choose_attention(struct device *dev, const struct attention_case *c, enum attention_choice *choice,
                                   char *why, size_t why_bytes)
{
    (void)dev, (void)c;
    if (*choice == ATTENTION_CUDNN)
        FAIL(ERR_UNSUPPORTED, "attention=cudnn needs a GPU; leave attention out, or use device=cuda");
    snprintf(why, why_bytes, "the CPU's own kernel%s",
             *choice == ATTENTION_FLASH ? "; attention=flash acts on GPUs only" : "");
    return 0;
}

const struct device_table cpu_table = {
    .name = "cpu",
    .open = device_open_cpu,
    .close = device_close_cpu,
    .describe = device_describe_cpu,
    .arithmetic = device_arithmetic_cpu,
    .count = device_count_cpu,
    .identify = device_identify_cpu,
    .memory = device_memory_cpu,
    .queue = device_queue_cpu,
    .alloc = device_alloc,
    .free = device_free,
    .upload = device_copy,
    .download = device_copy,
    .download_beside = device_copy,
    .sync = device_sync,
    .pack_bytes = cpu_pack_bytes,
    .workspace_bytes = device_workspace_bytes,
    .choose_attention = device_choose_attention,
#define OP(name, params, args) .name = cpu_##name,
#include "ops.def"
#undef OP
};
