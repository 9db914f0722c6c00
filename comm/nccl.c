/* The collectives over NCCL, for the memory of GPUs, one a rank.
 *
 * All collectives of a rank run on one stream of their own, in the order in which they were started. Events order them
 * with the stream on which the ops run: each waits for what was issued on it before the start, and it waits for them in
 * comm_wait and comm_all_gather_wait. So the host never waits, but in comm_finish, and communication and computation
 * overlap as far as their data allows.
 *
 * Every collective has a number, counted alike on all ranks, and an event that is reached when it is done. While the host
 * waits, it looks for errors that NCCL found by itself (ncclCommGetAsyncError) and at the clock. In both cases the
 * communicator is aborted, so that this GPU stops waiting, and the message names the oldest collective not done.
 *
 * Threads: the one that opened the device and MPI. */
#include "clock.h"
#include "err.h"
#include "ops.h"
#include "transport.h"

#include <cuda_runtime_api.h>
#include <nccl.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define FLIGHTS 256 /* collectives that are remembered; older ones are done, or their names forgotten */
#define LOOK_NS 20000

struct flight {
    cudaEvent_t done;
    const char *what;
    size_t bytes;
};

struct nccl {
    ncclComm_t comm;
    cudaStream_t stream, compute;
    cudaEvent_t issued; /* recorded on `compute` at a start */
    struct flight flight[FLIGHTS];
    uint64_t started, done; /* collectives; flight[i % FLIGHTS] is that of number i */
    uint64_t last_sum;      /* number of the last sum, plus 1; 0: none */
    uint64_t *slot;         /* the same of the last gather of each slot */
    int slots;
    double timeout_s;
};

static struct nccl *nccl_of(const struct comm *comm)
{
    return comm->transport_state;
}

static int cuda_failed(const char *file, int line, const char *call, cudaError_t error)
{
    return err_raise(ERR_DEVICE, file, line, "CUDA: %s: %s", call, cudaGetErrorString(error));
}

#define CHECK_CUDA(call)                                                                            \
    do {                                                                                            \
        const cudaError_t cuda_error_ = (call);                                                     \
        if (cuda_error_ != cudaSuccess) return cuda_failed(__FILE__, __LINE__, #call, cuda_error_); \
    } while (0)

static int nccl_failed(const char *file, int line, const struct comm *comm, const char *call, ncclResult_t result)
{
    const struct nccl *s = nccl_of(comm);
    return err_raise(ERR_COMM, file, line, "NCCL on rank %d: %s: %s (%s). NCCL_DEBUG=WARN tells more", comm->rank,
                     call, ncclGetErrorString(result), s->comm ? ncclGetLastError(s->comm) : "no communicator");
}

#define CHECK_NCCL(comm, call)                                                   \
    do {                                                                         \
        const ncclResult_t nccl_result_ = (call);                                \
        if (nccl_result_ != ncclSuccess && nccl_result_ != ncclInProgress)       \
            return nccl_failed(__FILE__, __LINE__, (comm), #call, nccl_result_); \
    } while (0)

/* ---- what is under way ---- */

/* Advances `done` over the collectives that are; *idle says whether it reached them all. */
static int look(struct nccl *s, bool *idle)
{
    if (s->started - s->done > FLIGHTS) s->done = s->started - FLIGHTS;
    for (; s->done < s->started; s->done++) {
        const cudaError_t error = cudaEventQuery(s->flight[s->done % FLIGHTS].done);
        if (error == cudaErrorNotReady) break;
        CHECK_CUDA(error);
    }
    *idle = s->done == s->started;
    return 0;
}

/* Gives the communicator up and says why. */
static int give_up(struct comm *comm, const char *why)
{
    struct nccl *s = nccl_of(comm);
    const struct flight *flight = &s->flight[s->done % FLIGHTS];
    const bool any = s->done < s->started;
    ncclComm_t aborted = s->comm;
    s->comm = NULL;
    (void)ncclCommAbort(aborted);
    FAIL(ERR_COMM,
         "NCCL on rank %d: %s number %llu (%zu bytes): %s. Look for the earliest error of any rank, then resume from "
         "the "
         "last checkpoint",
         comm->rank, any ? flight->what : "after collective", (unsigned long long)(any ? s->done : s->started),
         any ? flight->bytes : 0, why);
}

static int check_async(struct comm *comm)
{
    struct nccl *s = nccl_of(comm);
    ncclResult_t result = ncclSuccess;
    if (!s->comm) FAIL(ERR_COMM, "NCCL on rank %d: the communicator was aborted before", comm->rank);
    CHECK_NCCL(comm, ncclCommGetAsyncError(s->comm, &result));
    return result == ncclSuccess || result == ncclInProgress ? 0 : give_up(comm, ncclGetErrorString(result));
}

static int nccl_poll(struct comm *comm)
{
    return check_async(comm);
}

static int nccl_finish(struct comm *comm)
{
    static const struct timespec pause = {.tv_nsec = LOOK_NS};
    struct nccl *s = nccl_of(comm);
    uint64_t seen = s->done;
    double since_s = now_s();
    bool idle = false;
    while (true) {
        TRY(look(s, &idle));
        TRY(check_async(comm)); /* what was given up is idle, too */
        if (idle) return 0;
        if (s->done != seen) {
            seen = s->done;
            since_s = now_s();
        } else if (now_s() - since_s > s->timeout_s) {
            char why[128];
            snprintf(why, sizeof why, "not done after %.0f s (run.hang_timeout_s): another rank did not come",
                     s->timeout_s);
            return give_up(comm, why);
        }
        nanosleep(&pause, NULL);
    }
}

/* ---- opening and closing ---- */

static int open_streams(struct nccl *s)
{
    int least = 0, greatest = 0;
    CHECK_CUDA(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    /* Collectives first: they take few SMs, and others wait for them. */
    CHECK_CUDA(cudaStreamCreateWithPriority(&s->stream, cudaStreamNonBlocking, greatest));
    CHECK_CUDA(cudaEventCreateWithFlags(&s->issued, cudaEventDisableTiming));
    for (int i = 0; i < FLIGHTS; i++)
        CHECK_CUDA(cudaEventCreateWithFlags(&s->flight[i].done, cudaEventDisableTiming));
    return 0;
}

/* What may fail on one rank alone, before the ranks meet. */
static int open_alone(struct comm *comm, double timeout_s, ncclUniqueId *id)
{
    struct nccl *s = comm->transport_state = calloc(1, sizeof *s);
    if (!s) FAIL(ERR_SYSTEM, "no memory for the communicator");
    s->timeout_s = timeout_s;
    s->compute = (cudaStream_t)comm->dev->table->queue(comm->dev);
    TRY(open_streams(s));
    if (comm->rank == 0) CHECK_NCCL(comm, ncclGetUniqueId(id));
    return 0;
}

static int nccl_open(struct comm *comm, double timeout_s)
{
    ncclUniqueId id = {{0}};
    TRY(comm_agree(comm, open_alone(comm, timeout_s, &id)));
    TRY(comm_bcast(comm, &id, sizeof id, 0));
    CHECK_NCCL(comm, ncclCommInitRank(&nccl_of(comm)->comm, comm->ranks, id, comm->rank));
    return 0;
}

static void nccl_close(struct comm *comm)
{
    struct nccl *s = nccl_of(comm);
    bool idle = false;
    if (!s) return;
    if (s->comm) (void)(look(s, &idle) == 0 && idle ? ncclCommDestroy(s->comm) : ncclCommAbort(s->comm));
    for (int i = 0; i < FLIGHTS; i++)
        if (s->flight[i].done) (void)cudaEventDestroy(s->flight[i].done);
    if (s->issued) (void)cudaEventDestroy(s->issued);
    if (s->stream) (void)cudaStreamDestroy(s->stream);
    free(s->slot);
    free(s);
    comm->transport_state = NULL;
}

static void nccl_describe(struct comm *comm, char *text, size_t text_bytes)
{
    int version = 0;
    (void)comm;
    (void)ncclGetVersion(&version);
    snprintf(text, text_bytes, "NCCL %d.%d.%d", version / 10000, version / 100 % 100, version % 100);
}

/* ---- collectives ---- */

/* Lets the collective that is issued next wait for the ops issued so far. */
static int before(struct nccl *s)
{
    CHECK_CUDA(cudaEventRecord(s->issued, s->compute));
    CHECK_CUDA(cudaStreamWaitEvent(s->stream, s->issued, 0));
    return 0;
}

/* Notes the collective that was just issued; returns its number, plus 1, in *number. */
static int after(struct nccl *s, const char *what, size_t bytes, uint64_t *number)
{
    struct flight *flight = &s->flight[s->started % FLIGHTS];
    flight->what = what;
    flight->bytes = bytes;
    CHECK_CUDA(cudaEventRecord(flight->done, s->stream));
    *number = ++s->started;
    return 0;
}

/* Ops issued from here on wait for the collective of this number, plus 1. When its event has been used again, for a later
 * one, they wait for that. */
static int wait_for(struct nccl *s, uint64_t number)
{
    if (number > 0) CHECK_CUDA(cudaStreamWaitEvent(s->compute, s->flight[(number - 1) % FLIGHTS].done, 0));
    return 0;
}

static int nccl_sum_start(struct comm *comm, struct tensor data, bool scatter)
{
    struct nccl *s = nccl_of(comm);
    const ncclDataType_t type = data.dtype == DT_I64 ? ncclInt64 : ncclFloat32;
    const size_t n = (size_t)tensor_elems(data), part = n / (size_t)comm->ranks;
    TRY(check_async(comm));
    TRY(before(s));
    if (scatter) {
        char *const mine = (char *)data.data + (size_t)comm->rank * part * dtype_bytes(data.dtype);
        CHECK_NCCL(comm, ncclReduceScatter(data.data, mine, part, type, ncclSum, s->comm, s->stream));
    } else {
        CHECK_NCCL(comm, ncclAllReduce(data.data, data.data, n, type, ncclSum, s->comm, s->stream));
    }
    return after(s, scatter ? "reduce-scatter" : "all-reduce", tensor_bytes(data), &s->last_sum);
}

static int nccl_wait(struct comm *comm)
{
    return wait_for(nccl_of(comm), nccl_of(comm)->last_sum);
}

/* Makes room for the slot. */
static int slot_room(struct nccl *s, int slot)
{
    if (slot < s->slots) return 0;
    uint64_t *larger = realloc(s->slot, (size_t)(slot + 1) * sizeof *larger);
    if (!larger) FAIL(ERR_SYSTEM, "no memory for the communicator's table of %d gathers", slot + 1);
    s->slot = larger;
    while (s->slots <= slot)
        s->slot[s->slots++] = 0;
    return 0;
}

static int nccl_all_gather_start(struct comm *comm, struct tensor data, int slot)
{
    struct nccl *s = nccl_of(comm);
    const size_t bytes = tensor_bytes(data), part = bytes / (size_t)comm->ranks;
    TRY(slot_room(s, slot));
    TRY(check_async(comm));
    TRY(before(s));
    CHECK_NCCL(comm, ncclAllGather((char *)data.data + (size_t)comm->rank * part, data.data, part, ncclUint8, s->comm,
                                   s->stream));
    return after(s, "all-gather", bytes, &s->slot[slot]);
}

static int nccl_all_gather_wait(struct comm *comm, int slot)
{
    struct nccl *s = nccl_of(comm);
    return slot < s->slots ? wait_for(s, s->slot[slot]) : 0;
}

static const struct comm_transport nccl_table = {
    .open = nccl_open,
    .close = nccl_close,
    .describe = nccl_describe,
    .sum_start = nccl_sum_start,
    .poll = nccl_poll,
    .wait = nccl_wait,
    .all_gather_start = nccl_all_gather_start,
    .all_gather_wait = nccl_all_gather_wait,
    .finish = nccl_finish,
};

const struct comm_transport *nccl_transport(void)
{
    return &nccl_table;
}
