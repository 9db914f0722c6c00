/* Private to comm: the table of collectives on tensors that each way of carrying them implements. The contracts are those
 * of comm.h's functions of the same names; none is called with one rank. */
#ifndef TATARA_TRANSPORT_H
#define TATARA_TRANSPORT_H

#include "comm.h"

struct comm_transport {
    /* Collective; comm->dev is set. On failure close is called. */
    int (*open)(struct comm *comm, double timeout_s);
    void (*close)(struct comm *comm);
    void (*describe)(struct comm *comm, char *text, size_t text_bytes);
    int (*sum_start)(struct comm *comm, struct tensor data, bool scatter);
    int (*poll)(struct comm *comm);
    int (*wait)(struct comm *comm);
    int (*all_gather_start)(struct comm *comm, struct tensor data, int slot);
    int (*all_gather_wait)(struct comm *comm, int slot);
    int (*finish)(struct comm *comm);
};

extern const struct comm_transport mpi_transport;    /* host memory */
extern const struct comm_transport staged_transport; /* any device's memory, through the host's and mpi_transport */
/* A GPU's memory; NULL in a build without CUDA: which, is decided when the program is linked. */
const struct comm_transport *nccl_transport(void);

#endif
