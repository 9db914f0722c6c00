/* Stands in for dnnl.c in builds without oneDNN. */
#include "../product.h"
#include "err.h"

bool product_library_built(void)
{
    return false;
}

int product_library_open(struct product_table *table)
{
    (void)table;
    FAIL(ERR_UNSUPPORTED,
         "precision.product=library needs oneDNN, which this build has not: install it and configure the "
         "build with TATARA_DNNL=ON, or use product=portable or auto");
}
