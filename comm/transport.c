/* Collectives on tensors: chooses what carries them, and calls it. With one rank there is nothing to carry. */
#include "transport.h"

#include "err.h"
#include "ops.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DEVICE_NAME_MAX 64

/* Where a rank computes. */
struct seat {
    int node, local_ranks;
    char device[DEVICE_NAME_MAX];
};

/* On rank 0: fails when two ranks have the same GPU. */
static int check_seats(const struct seat *seats, int ranks)
{
    for (int a = 0; a < ranks; a++) {
        for (int b = 0; b < a; b++) {
            if (seats[a].node != seats[b].node || strcmp(seats[a].device, seats[b].device) != 0) continue;
            FAIL(ERR_CONFIG,
                 "ranks %d and %d would share GPU %s, and NCCL wants one GPU a rank: of the %d ranks on their node "
                 "each "
                 "needs its own. Start as many ranks a node as it has GPUs, or set comm=mpi, with which ranks may "
                 "share "
                 "a GPU (slow, for tests)",
                 b, a, seats[a].device, seats[a].local_ranks);
        }
    }
    return 0;
}

/* Fails when ranks share a GPU. Collective. */
static int one_device_a_rank(struct comm *comm)
{
    int rc = 0;
    struct seat mine = {.node = comm->node, .local_ranks = comm->local_ranks};
    struct seat *seats = calloc((size_t)comm->ranks, sizeof *seats);
    if (!seats) rc = err_raise(ERR_SYSTEM, __FILE__, __LINE__, "no memory for the list of %d ranks", comm->ranks);
    if (rc == 0) rc = comm->dev->table->identify(comm->dev, mine.device, sizeof mine.device);
    TRY_GOTO(comm_agree(comm, rc), done);
    ASSERT(seats);
    TRY_GOTO(comm_gather(comm, &mine, seats, sizeof mine), done);
    if (comm->rank == 0) rc = check_seats(seats, comm->ranks);
    rc = comm_agree(comm, rc);
done:
    free(seats);
    return rc;
}

int comm_open_transport(struct comm *comm, struct device *dev, enum comm_choice choice, double timeout_s)
{
    const bool host = dev->kind == DEVICE_CPU;
    const struct comm_transport *wanted = host                 ? &mpi_transport
                                          : choice == COMM_MPI ? &staged_transport
                                                               : nccl_transport();
    if (host && choice == COMM_NCCL)
        FAIL(ERR_CONFIG, "comm=nccl carries GPU memory only; use comm=auto with device=cpu");
    if (!wanted) FAIL(ERR_UNSUPPORTED, "this build has no NCCL; build with TATARA_CUDA=ON, or set comm=mpi");
    comm->dev = dev;
    comm->transport = wanted;
    if (comm->ranks == 1) return 0;
    if (wanted == nccl_transport()) TRY(one_device_a_rank(comm));
    return wanted->open(comm, timeout_s);
}

void comm_close_transport(struct comm *comm)
{
    if (comm->ranks > 1 && comm->transport && comm->dev) comm->transport->close(comm);
    comm->transport = &mpi_transport;
    comm->dev = NULL;
}

void comm_describe(struct comm *comm, char *text, size_t text_bytes)
{
    if (comm->ranks == 1) {
        snprintf(text, text_bytes, "nothing to communicate with one rank");
    } else {
        comm->transport->describe(comm, text, text_bytes);
    }
}

int comm_sum_start(struct comm *comm, struct tensor data, bool scatter)
{
    ASSERT(data.dtype == DT_F32 || data.dtype == DT_I64);
    ASSERT(!scatter || tensor_elems(data) % comm->ranks == 0);
    if (comm->ranks == 1 || tensor_elems(data) == 0) return 0;
    return comm->transport->sum_start(comm, data, scatter);
}

int comm_poll(struct comm *comm)
{
    return comm->ranks == 1 ? 0 : comm->transport->poll(comm);
}

int comm_wait(struct comm *comm)
{
    return comm->ranks == 1 ? 0 : comm->transport->wait(comm);
}

int comm_all_gather_start(struct comm *comm, struct tensor data, int slot)
{
    ASSERT(tensor_elems(data) % comm->ranks == 0);
    return comm->ranks == 1 ? 0 : comm->transport->all_gather_start(comm, data, slot);
}

int comm_all_gather_wait(struct comm *comm, int slot)
{
    return comm->ranks == 1 ? 0 : comm->transport->all_gather_wait(comm, slot);
}

int comm_finish(struct comm *comm)
{
    return comm->ranks == 1 ? 0 : comm->transport->finish(comm);
}
