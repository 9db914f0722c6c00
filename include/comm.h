/* Communication between ranks: collectives of a few host values over MPI, and sums and gathers of tensors over what
 * suits the memory they lie in: MPI for the host's, NCCL for GPUs', or MPI through host memory for GPUs that ranks share.
 *
 * Everything here is called by the thread that opened the communicator. "Collective" means: by all ranks of it, in the
 * same order. Errors are ERR_COMM and name the collective. */
#ifndef TATARA_COMM_H
#define TATARA_COMM_H

#include "tensor.h"

/* What control groups leave a rank of their limits: its share, where other ranks of the node are in the same group. */
struct comm_limits {
    double cpus;                 /* processors' worth of time; 0: no limit */
    uint64_t memory_bytes;       /* still free; 0: no limit */
    uint64_t memory_limit_bytes; /* the limit itself */
    char cpus_of[256];           /* the group's folder */
    char memory_of[256];         /* the limit's file */
};

struct comm {
    int rank, ranks;             /* in the data-parallel group: all ranks, for now */
    int local_rank, local_ranks; /* among the ranks on this node */
    int threads; /* for this rank, unless told otherwise: OMP_NUM_THREADS, or its share of the cores it may use, which
                    oversubscribes neither the node nor a quota */
    int allowed_cores; /* that the launcher lets it use */
    int node_cores;    /* that there would be without the launcher */
    int idle_cores;    /* of these, that no rank of the node may use */
    double core_share; /* that share, not rounded: below 1, ranks take turns */
    struct comm_limits limits;
    int node; /* the lowest rank on this node */
    struct comm_state *state;
    const struct comm_transport *transport; /* carries tensors */
    struct device *dev;                     /* whose tensors; NULL: host memory */
    void *transport_state;
};

/* How tensors of a GPU travel. */
enum comm_choice {
    COMM_AUTO, /* NCCL on GPUs, MPI on CPUs */
    COMM_NCCL, /* one GPU a rank */
    COMM_MPI,  /* through host memory; ranks may share a GPU */
};

/* Starts MPI (funnelled threads) and joins all ranks. Collective. A program started without mpirun is rank 0 of 1.
 * After a failure comm_abort and comm_close may still be called. */
int comm_open(struct comm *comm, int *argc, char ***argv);
/* Seconds from the first signal by which the launcher tells its ranks to end until it kills them; INFINITY: not known. Not
 * collective. */
double comm_grace_s(void);
/* Ends MPI after a success, or after a failure that all ranks agreed on. Collective. */
void comm_close(struct comm *comm);
/* Ends the whole job at once with this exit status; for a failure that the other ranks do not know of. */
_Noreturn void comm_abort(struct comm *comm, int status);

/* From here on a collective that takes longer than timeout_s ends the job with ERR_COMM, naming the ranks that did not
 * arrive; each rank leaves a line about where it stood in folder, which is made when it is needed and not there. It may
 * be called again with another time-out, and with a folder once: NULL while none is known. Not collective. */
int comm_watch(struct comm *comm, const char *folder, double timeout_s);
/* Around a wait of this rank that is no collective, such as one for a read: it ends the job in the same way when this
 * thread stands still for so long; when it computes meanwhile, the time begins again. Collectives may lie within, but no
 * other such wait. `what` stays valid for ever. Not collective. */
void comm_wait_enter(struct comm *comm, const char *what);
void comm_wait_leave(struct comm *comm);

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

/* From here on, tensors are those of dev, which stays open until comm_close_transport; before it, they lie in host memory.
 * timeout_s: after so long a collective on a GPU has failed. ERR_CONFIG when ranks would share a GPU under NCCL.
 * Collective. */
int comm_open_transport(struct comm *comm, struct device *dev, enum comm_choice choice, double timeout_s);
/* Before dev is closed. After a failure that other ranks do not know of, it aborts what is under way. Not collective. */
void comm_close_transport(struct comm *comm);
/* "NCCL 2.27.3": for a person. Written into text. */
void comm_describe(struct comm *comm, char *text, size_t text_bytes);

/* The following order work: what was issued on the device before a start is seen by it, and what is issued on the device
 * after a wait sees its result. Neither blocks the host on GPUs with NCCL; only comm_finish does. */

/* Starts a sum over all ranks of data (f32 or i64), in place, and returns at once; data must stay until comm_wait.
 * scatter false: every rank gets the whole sum (all-reduce). scatter true: data's count is a multiple of ranks and rank
 * r gets the sum of the r-th part only, in place; the rest of data is undefined after (reduce-scatter). Collective: the
 * same starts in the same order on all ranks. Sent in segments of bounded size, few in flight, so that the library's
 * own buffers stay small: comm_buffer_bytes says how much. */
int comm_sum_start(struct comm *comm, struct tensor data, bool scatter);
/* Lets started work advance and looks for failures of it; cheap; call it between pieces of computation. Not
 * collective. */
int comm_poll(struct comm *comm);
/* Completes every sum that was started. Collective in effect. */
int comm_wait(struct comm *comm);
/* Starts sending rank r's r-th part of data to all ranks, in place; data's count is a multiple of ranks. Any type.
 * Collective: the same starts in the same order on all ranks, sums included. */
int comm_all_gather_start(struct comm *comm, struct tensor data, int slot);
/* Completes the last gather of this slot: a small number of the caller's choice. One that was never used is complete. */
int comm_all_gather_wait(struct comm *comm, int slot);
/* The host waits until all that was started is done, on the device too. ERR_COMM when another rank failed or did not
 * come within the time-out, naming the collective. To be called before the host waits for the device. Collective in
 * effect. */
int comm_finish(struct comm *comm);
/* Bytes of host memory that the MPI library itself may take for the segments in flight, as measured with Open MPI.
 * Depends on comm->ranks only, so a plan may ask for a number of ranks that it is not running on. */
size_t comm_buffer_bytes(const struct comm *comm);

#endif
