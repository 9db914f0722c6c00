/* NCCL for the emulation, over MPI.
 *
 * A collective is work on its stream: it begins when the stream gets there, and is asked again and again until the
 * other ranks have come, while the streams behind other work move on, as on GPUs. First the ranks tell each other which
 * call it is, its number, kind, count, type and root; when they differ, the device has a fault that shows both calls. So
 * a run that ends without a fault has shown that all ranks made the same calls in the same order. Then every rank gets
 * all data, and sums them in the order of ranks, in float for bf16. Calls on one communicator are done in the order in
 * which they were made, whatever their streams.
 *
 * Host code that waits in MPI must not keep its GPU from working, since other ranks may wait for that: mpi_wait.cc.
 *
 * Threads: the one that has called MPI_Init, which alone moves collectives on; others may wait for their streams. */
#include "emu.h"

#include <cuda_bf16.h>
#include <mpi.h>
#include <nccl.h>
#include <stdio.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <vector>

enum call_kind { ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER, BROADCAST };

/* What all ranks must have in common. */
struct signature {
    uint64_t number;
    uint64_t count;
    int32_t kind, type, op, root;
};

struct group {
    MPI_Comm mpi;
    int rank, ranks;
    uint64_t made, finished; /* calls */
    bool aborted;
    ncclResult_t error;
};

struct cuda_emu_nccl {
    std::shared_ptr<group> shared; /* work that is queued may outlive the communicator */
};

/* One collective on its way. */
struct collective {
    std::shared_ptr<group> members;
    signature mine;
    const void *from;
    void *to;
    bool started, agreed;
    MPI_Request request;
    std::vector<signature> all;
    std::vector<unsigned char> data; /* of all ranks, in their order */
};

/* ---- elements ---- */

static size_t type_bytes(int32_t type)
{
    switch (type) {
    case ncclUint8:
        return 1;
    case ncclBfloat16:
        return 2;
    case ncclInt64:
    case ncclFloat64:
        return 8;
    default:
        return 4;
    }
}

static float widen(__nv_bfloat16 x)
{
    return __bfloat162float(x);
}

template <class T> static T widen(T x)
{
    return x;
}

/* to[i] = the sum or the maximum over the ranks of their element first + i, kept in Sum and rounded once. */
template <class T, class Sum> static void reduce(const collective &c, uint64_t first, uint64_t stride)
{
    const T *const data = reinterpret_cast<const T *>(c.data.data());
    for (uint64_t i = 0; i < c.mine.count; i++) {
        Sum result = widen(data[first + i]);
        for (int rank = 1; rank < c.members->ranks; rank++) {
            const Sum x = widen(data[(uint64_t)rank * stride + first + i]);
            result = c.mine.op == ncclSum ? (Sum)(result + x) : std::max(result, x);
        }
        static_cast<T *>(c.to)[i] = (T)result;
    }
}

static void reduce_any(const collective &c, uint64_t first, uint64_t stride)
{
    switch (c.mine.type) {
    case ncclUint8:
        return reduce<uint8_t, uint8_t>(c, first, stride);
    case ncclInt32:
        return reduce<int32_t, int32_t>(c, first, stride);
    case ncclInt64:
        return reduce<int64_t, int64_t>(c, first, stride);
    case ncclFloat64:
        return reduce<double, double>(c, first, stride);
    case ncclBfloat16:
        return reduce<__nv_bfloat16, float>(c, first, stride);
    default:
        return reduce<float, float>(c, first, stride);
    }
}

/* ---- a collective, step by step ---- */

static const char *kind_name(int32_t kind)
{
    static const char *const names[] = {"ncclAllReduce", "ncclReduceScatter", "ncclAllGather", "ncclBroadcast"};
    return names[kind];
}

/* Elements that each rank sends. */
static uint64_t sent_count(const collective &c)
{
    return c.mine.kind == REDUCE_SCATTER ? c.mine.count * (uint64_t)c.members->ranks : c.mine.count;
}

static void mpi_failed(collective &c)
{
    c.members->error = ncclRemoteError;
    emu_device_fault("NCCL: MPI failed in %s number %llu", kind_name(c.mine.kind), (unsigned long long)c.mine.number);
}

/* Starts to gather `bytes` of each rank. */
static void start_gather(collective &c, const void *from, void *to, size_t bytes)
{
    if (PMPI_Iallgather(from, (int)bytes, MPI_BYTE, to, (int)bytes, MPI_BYTE, c.members->mpi, &c.request) !=
        MPI_SUCCESS)
        mpi_failed(c);
}

/* True when all ranks make the same call. */
static bool agree(collective &c)
{
    for (int rank = 0; rank < c.members->ranks; rank++) {
        const signature &other = c.all[(size_t)rank];
        if (memcmp(&other, &c.mine, sizeof other) == 0) continue;
        c.members->error = ncclInvalidUsage;
        emu_device_fault(
            "NCCL: the order of calls differs between ranks: number %llu is %s of %llu elements of type %d, "
            "root %d, on rank %d, and on rank %d number %llu is %s of %llu of type %d, root %d",
            (unsigned long long)c.mine.number, kind_name(c.mine.kind), (unsigned long long)c.mine.count, c.mine.type,
            c.mine.root, c.members->rank, rank, (unsigned long long)other.number, kind_name(other.kind),
            (unsigned long long)other.count, other.type, other.root);
        return false;
    }
    return true;
}

/* All data are here. */
static void finish(collective &c)
{
    const size_t each = sent_count(c) * type_bytes(c.mine.type);
    switch (c.mine.kind) {
    case ALL_REDUCE:
        reduce_any(c, 0, sent_count(c));
        break;
    case REDUCE_SCATTER:
        reduce_any(c, c.mine.count * (uint64_t)c.members->rank, sent_count(c));
        break;
    case ALL_GATHER:
        memcpy(c.to, c.data.data(), c.data.size());
        break;
    default:
        memcpy(c.to, c.data.data() + each * (size_t)c.mine.root, each);
        break;
    }
}

/* Does what can be done now. True when the collective is done, or never will be. */
static bool advance(collective &c)
{
    int may_communicate = 0;
    group &g = *c.members;
    if (PMPI_Is_thread_main(&may_communicate) != MPI_SUCCESS) mpi_failed(c);
    if (!may_communicate) return emu_has_fault();
    if (g.aborted || g.error != ncclSuccess) return true;
    if (g.finished != c.mine.number) return false;
    const size_t bytes = sent_count(c) * type_bytes(c.mine.type);
    if (!c.started) {
        c.started = true;
        c.all.resize((size_t)g.ranks);
        start_gather(c, &c.mine, c.all.data(), sizeof c.mine);
    }
    int done = 0;
    if (PMPI_Test(&c.request, &done, MPI_STATUS_IGNORE) != MPI_SUCCESS) mpi_failed(c);
    if (!done) return emu_has_fault();
    if (!c.agreed) {
        if (!agree(c)) return true;
        c.agreed = true;
        c.data.resize(bytes * (size_t)g.ranks);
        start_gather(c, c.from, c.data.data(), bytes);
        return emu_has_fault();
    }
    finish(c);
    g.finished++;
    return true;
}

/* `received` is the number of elements that `to` has room for. */
static ncclResult_t queue(call_kind kind, const void *from, void *to, size_t count, size_t received,
                          ncclDataType_t type, int op, int root, ncclComm_t comm, cudaStream_t stream)
{
    const std::shared_ptr<collective> c = std::make_shared<collective>();
    c->members = comm->shared;
    c->mine = {c->members->made, count, kind, type, op, root};
    c->from = from;
    c->to = to;
    c->request = MPI_REQUEST_NULL;
    const size_t bytes = type_bytes(type);
    if (count > 0 && (!emu_on_device(from, sent_count(*c) * bytes) || !emu_on_device(to, received * bytes)))
        return ncclInvalidArgument;
    if (c->members->aborted) return ncclInvalidUsage;
    c->members->made++;
    return cuda_emu_queue(stream, [c] { return advance(*c); }) == cudaSuccess ? ncclSuccess : ncclUnhandledCudaError;
}

/* ---- the interface ---- */

ncclResult_t ncclGetVersion(int *version)
{
    *version = 22800;
    return ncclSuccess;
}

const char *ncclGetErrorString(ncclResult_t result)
{
    static const char *const texts[] = {"no error",
                                        "unhandled cuda error",
                                        "unhandled system error",
                                        "internal error",
                                        "invalid argument",
                                        "invalid usage",
                                        "remote process exited or there was a network error",
                                        "in progress"};
    return (unsigned)result < sizeof texts / sizeof *texts ? texts[result] : "unknown result code";
}

const char *ncclGetLastError(ncclComm_t)
{
    return emu_has_fault() ? cudaGetErrorString(cudaErrorLaunchFailure) : "";
}

ncclResult_t ncclGetUniqueId(ncclUniqueId *id)
{
    static unsigned made;
    *id = {};
    snprintf(id->internal, sizeof id->internal, "cuda_emu %ld %u", (long)getpid(), made++);
    return ncclSuccess;
}

/* The ranks with the same id become one communicator; all ranks of MPI_COMM_WORLD must make one at the same time. */
ncclResult_t ncclCommInitRank(ncclComm_t *comm, int ranks, ncclUniqueId id, int rank)
{
    unsigned hash = 2166136261u;
    for (const char byte : id.internal)
        hash = (hash ^ (unsigned char)byte) * 16777619u;
    const std::shared_ptr<group> g = std::make_shared<group>();
    if (MPI_Comm_split(MPI_COMM_WORLD, (int)(hash & INT_MAX), rank, &g->mpi) != MPI_SUCCESS) return ncclSystemError;
    MPI_Comm_rank(g->mpi, &g->rank);
    MPI_Comm_size(g->mpi, &g->ranks);
    if (g->rank != rank || g->ranks != ranks) return ncclInvalidArgument;
    *comm = new cuda_emu_nccl{g};
    return ncclSuccess;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t *comm, int ranks, ncclUniqueId id, int rank, ncclConfig_t *config)
{
    if (config->size != sizeof *config) return ncclInvalidArgument;
    return ncclCommInitRank(comm, ranks, id, rank);
}

ncclResult_t ncclCommFinalize(ncclComm_t)
{
    emu_finish_all();
    return emu_has_fault() ? ncclUnhandledCudaError : ncclSuccess;
}

ncclResult_t ncclCommDestroy(ncclComm_t comm)
{
    const ncclResult_t result = ncclCommFinalize(comm);
    if (result == ncclSuccess) MPI_Comm_free(&comm->shared->mpi);
    delete comm;
    return result;
}

/* What was queued never happens. MPI's communicator stays, since its other members may never come to free it. */
ncclResult_t ncclCommAbort(ncclComm_t comm)
{
    comm->shared->aborted = true;
    delete comm;
    return ncclSuccess;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *error)
{
    *error = comm->shared->error;
    return ncclSuccess;
}

/* Calls of a group go to their streams one by one: none of them blocks, so the group has nothing to add. */
ncclResult_t ncclGroupStart(void)
{
    return ncclSuccess;
}

ncclResult_t ncclGroupEnd(void)
{
    return ncclSuccess;
}

ncclResult_t ncclAllReduce(const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t op,
                           ncclComm_t comm, cudaStream_t stream)
{
    return queue(ALL_REDUCE, from, to, count, count, type, op, 0, comm, stream);
}

ncclResult_t ncclReduceScatter(const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t op,
                               ncclComm_t comm, cudaStream_t stream)
{
    return queue(REDUCE_SCATTER, from, to, count, count, type, op, 0, comm, stream);
}

ncclResult_t ncclAllGather(const void *from, void *to, size_t count, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t stream)
{
    return queue(ALL_GATHER, from, to, count, count * (size_t)comm->shared->ranks, type, ncclSum, 0, comm, stream);
}

ncclResult_t ncclBroadcast(const void *from, void *to, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                           cudaStream_t stream)
{
    return queue(BROADCAST, from, to, count, count, type, ncclSum, root, comm, stream);
}
