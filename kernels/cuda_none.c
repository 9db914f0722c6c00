/* Stands in for kernels/cuda/ in builds without CUDA. */
#include "ops.h"

const struct device_table *cuda_backend(void)
{
    return NULL;
}
