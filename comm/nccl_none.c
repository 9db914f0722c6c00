/* Stands in for nccl.c in builds without CUDA. */
#include "transport.h"

const struct comm_transport *nccl_transport(void)
{
    return NULL;
}
