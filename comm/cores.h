/* What a rank may take of its node without getting in its neighbours' way: cores, and what control groups leave. */
#ifndef TATARA_CORES_H
#define TATARA_CORES_H

#include "comm.h"

#include <mpi.h>

/* Fills comm->threads and the fields about cores and limits. root: as for cgroup_levels. Collective over `node`, the ranks of
 * this node. */
int cores_count(struct comm *comm, MPI_Comm node, const char *root);

#endif
