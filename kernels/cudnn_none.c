/* Stands in for kernels/cuda/attention_cudnn.c in builds without cuDNN. */
#include "cuda/attention_library.h"

const struct attention_library *attention_cudnn(void)
{
    return NULL;
}
