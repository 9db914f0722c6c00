/* Which cores a rank may use without getting in its neighbours' way. */
#ifndef TATARA_CORES_H
#define TATARA_CORES_H

#include "comm.h"

#include <mpi.h>

/* Fills comm->cores, allowed_cores and node_cores from the affinity of the ranks of this node. Collective over `node`. */
int cores_count(struct comm *comm, MPI_Comm node);

#endif
