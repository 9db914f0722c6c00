/* Private to the CPU backend: what multiplies tiles (tile.h). A library's kernels or plain C, behind the same functions. */
#ifndef TATARA_CPU_PRODUCT_H
#define TATARA_CPU_PRODUCT_H

#include "tile.h"

/* Filled by product_library_open or product_portable_open, and fixed until it is closed. */
struct product_table {
    int threads;                     /* that may run products at once */
    char name[64];                   /* what multiplies, for people */
    enum dtype tile_dtype[DT_COUNT]; /* of f32 and of bf16 matrices */
    int64_t panel[DT_COUNT];         /* columns of a panel of B, by the type of the tile; 0: one panel holds all */
    /* As tile_product_prepare and tile_product_run; scratch has TILE_SCRATCH_BYTES. prepare may be NULL: there is nothing
     * to make. */
    int (*prepare)(struct product_table *table, struct tile_product product);
    int (*run)(const struct product_table *table, int thread, void *scratch, struct tile_product product,
               const void *a, const void *b, float *c);
    void (*close)(struct product_table *table); /* frees `state`; NULL: there is none */
    void *state;
};

/* oneDNN's (dnnl/dnnl.c). ERR_UNSUPPORTED in a build without it. */
int product_library_open(struct product_table *table);
/* Whether this build has a library: product_library_open does not fail with ERR_UNSUPPORTED. */
bool product_library_built(void);
/* Plain C: portable.c. */
int product_portable_open(struct product_table *table);

#endif
