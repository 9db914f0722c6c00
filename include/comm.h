/* Communication between ranks: one table of collectives, over MPI for host memory (and later NCCL for device memory).
 *
 * Everything here is called by the thread that opened the communicator. "Collective" means: by all ranks of it, in the
 * same order. Errors are ERR_COMM and name the collective. */
#ifndef TATARA_COMM_H
#define TATARA_COMM_H

#include "tensor.h"

struct comm {
    int rank, ranks;             /* in the data-parallel group: all ranks, for now */
    int local_rank, local_ranks; /* among the ranks on this node */
    int cores; /* this rank's share of the cores it may use: threads that do not oversubscribe the node */
    int allowed_cores, node_cores; /* cores that the launcher lets it use; cores of the node */
    struct comm_state *state;
};

/* Starts MPI (funnelled threads) and joins all ranks. Collective. A program started without mpirun is rank 0 of 1.
 * After a failure comm_abort and comm_close may still be called. */
int comm_open(struct comm *comm, int *argc, char ***argv);
/* Ends MPI after a success, or after a failure that all ranks agreed on. Collective. */
void comm_close(struct comm *comm);
/* Ends the whole job at once with this exit status; for a failure that the other ranks do not know of. */
_Noreturn void comm_abort(struct comm *comm, int status);

/* The ranks agree on the outcome of a phase: 0 when rc is 0 on all ranks; else the code of the lowest failing rank, on
 * every rank. Only that rank keeps its message, so that one rank reports. Collective. */
int comm_agree(struct comm *comm, int rc);
int comm_barrier(struct comm *comm);
/* Bytes from rank `root` to all. Collective. */
int comm_bcast(struct comm *comm, void *data, size_t bytes, int root);
/* Sums (or maxima) over all ranks, in place, of n host values. Collective. */
int comm_sum_i64(struct comm *comm, int64_t *values, int n);
int comm_max_i64(struct comm *comm, int64_t *values, int n);
int comm_sum_f64(struct comm *comm, double *values, int n);
int comm_max_f64(struct comm *comm, double *values, int n); /* may lose a NaN: carry those with a sum */
/* Each rank's `bytes` to rank 0, in rank order into `all` (ranks·bytes, used on rank 0 only). Collective. */
int comm_gather(struct comm *comm, const void *mine, void *all, size_t bytes);

/* Starts a sum over all ranks of data (f32 or i64), in place, and returns at once; data must stay until comm_wait.
 * scatter false: every rank gets the whole sum (all-reduce). scatter true: data's count is a multiple of ranks and rank
 * r gets the sum of the r-th part only, in place; the rest of data is undefined after (reduce-scatter). Collective: the
 * same starts in the same order on all ranks. Sent in segments of bounded size, few in flight, so that the library's
 * own buffers stay small: comm_buffer_bytes says how much. */
int comm_sum_start(struct comm *comm, struct tensor data, bool scatter);
/* Lets started work advance; cheap; call it between pieces of computation. Not collective. */
int comm_poll(struct comm *comm);
/* Completes everything that was started. Collective in effect. */
int comm_wait(struct comm *comm);
/* Rank r's r-th part of data to all ranks, in place; data's count is a multiple of ranks. Any type. Collective. */
int comm_all_gather(struct comm *comm, struct tensor data);
/* Bytes that the MPI library itself may take for the segments in flight, as measured with Open MPI. Depends on
 * comm->ranks only, so a plan may ask for a number of ranks that it is not running on. */
size_t comm_buffer_bytes(const struct comm *comm);
/* Seconds this rank has spent inside comm_wait and comm_all_gather since the last call. */
double comm_take_wait_s(struct comm *comm);

#endif
