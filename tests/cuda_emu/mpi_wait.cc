/* Waiting in MPI while the emulated GPU works.
 *
 * A real GPU goes on while its rank waits for another in MPI, and that other rank may be waiting for a collective of the
 * GPU. The emulated one only works when its host thread lets it. So the blocking calls of MPI that our code makes are
 * replaced here, by MPI's own profiling interface, with their non-blocking kin and a loop. The streams are still left
 * alone for as long as the call needs to succeed by itself: their work is to run late. */
#include "emu.h"

#include <mpi.h>
#include <time.h>

static const double patience_s = 0.005;

static double now_s()
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Calls `test(&done)` until it is done, or fails. */
template <class Test> static int wait_until(Test test)
{
    const double start_s = now_s();
    for (;;) {
        int done = 0;
        const int rc = test(&done);
        if (rc != MPI_SUCCESS || done) return rc;
        if (now_s() - start_s > patience_s) emu_step_all();
    }
}

static int wait_for(int rc, MPI_Request *request)
{
    if (rc != MPI_SUCCESS) return rc;
    return wait_until([request](int *done) { return PMPI_Test(request, done, MPI_STATUS_IGNORE); });
}

extern "C" {

int MPI_Barrier(MPI_Comm comm)
{
    MPI_Request request;
    return wait_for(PMPI_Ibarrier(comm, &request), &request);
}

int MPI_Bcast(void *data, int count, MPI_Datatype type, int root, MPI_Comm comm)
{
    MPI_Request request;
    return wait_for(PMPI_Ibcast(data, count, type, root, comm, &request), &request);
}

int MPI_Allreduce(const void *from, void *to, int count, MPI_Datatype type, MPI_Op op, MPI_Comm comm)
{
    MPI_Request request;
    return wait_for(PMPI_Iallreduce(from, to, count, type, op, comm, &request), &request);
}

int MPI_Gather(const void *from, int from_count, MPI_Datatype from_type, void *to, int to_count, MPI_Datatype to_type,
               int root, MPI_Comm comm)
{
    MPI_Request request;
    return wait_for(PMPI_Igather(from, from_count, from_type, to, to_count, to_type, root, comm, &request), &request);
}

int MPI_Allgather(const void *from, int from_count, MPI_Datatype from_type, void *to, int to_count,
                  MPI_Datatype to_type, MPI_Comm comm)
{
    MPI_Request request;
    return wait_for(PMPI_Iallgather(from, from_count, from_type, to, to_count, to_type, comm, &request), &request);
}

int MPI_Waitsome(int n, MPI_Request requests[], int *finished, int indices[], MPI_Status statuses[])
{
    return wait_until([=](int *done) {
        const int rc = PMPI_Testsome(n, requests, finished, indices, statuses);
        *done = *finished != 0; /* MPI_UNDEFINED, too: there is nothing to wait for */
        return rc;
    });
}
}
