/* Collectives on tensors of any device through host memory, by mpi_transport: a segment is downloaded, summed or gathered,
 * and uploaded. Nothing overlaps, as it serves ranks that share a GPU: tests, and machines without NCCL.
 *
 * Sums are only remembered when they start and done in comm_wait, in their order. */
#include "transport.h"

#include "err.h"
#include "ops.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define HOST_BYTES ((size_t)16 << 20) /* of the buffer */
#define QUEUE_START 64

struct staged {
    char *host;
    struct tensor *queue; /* sums that have been started */
    int n, capacity;
};

static struct staged *staged_of(const struct comm *comm)
{
    return comm->transport_state;
}

static void staged_close(struct comm *comm)
{
    struct staged *s = staged_of(comm);
    if (!s) return;
    free(s->host);
    free(s->queue);
    free(s);
    comm->transport_state = NULL;
}

static int staged_open(struct comm *comm, double timeout_s)
{
    (void)timeout_s;
    struct staged *s = comm->transport_state = calloc(1, sizeof *s);
    if (!s) FAIL(ERR_SYSTEM, "no memory for the communicator");
    s->capacity = QUEUE_START;
    s->host = malloc(HOST_BYTES);
    s->queue = calloc((size_t)s->capacity, sizeof *s->queue);
    if (!s->host || !s->queue) FAIL(ERR_SYSTEM, "no memory for the communicator's buffer of %zu bytes", HOST_BYTES);
    return 0;
}

static void staged_describe(struct comm *comm, char *text, size_t text_bytes)
{
    (void)comm;
    snprintf(text, text_bytes, "MPI through host memory");
}

static int staged_sum_start(struct comm *comm, struct tensor data, bool scatter)
{
    struct staged *s = staged_of(comm);
    if (s->n == s->capacity) {
        struct tensor *larger = realloc(s->queue, 2 * (size_t)s->capacity * sizeof *larger);
        if (!larger) FAIL(ERR_SYSTEM, "no memory for the communicator's queue");
        s->queue = larger;
        s->capacity *= 2;
    }
    (void)scatter;
    s->queue[s->n++] = data;
    return 0;
}

static int staged_poll(struct comm *comm)
{
    (void)comm;
    return 0;
}

/* An all-reduce does for a scatter, too: what other ranks get is undefined, so it may be the sum. */
static int sum(struct comm *comm, struct tensor data)
{
    struct device *dev = comm->dev;
    struct staged *s = staged_of(comm);
    const int64_t n = tensor_elems(data), most = (int64_t)(HOST_BYTES / dtype_bytes(data.dtype));
    for (int64_t at = 0; at < n; at += most) {
        const struct tensor part = tensor_range(data, at, n - at < most ? n - at : most);
        const struct tensor host = tensor_1d(s->host, data.dtype, tensor_elems(part));
        TRY(dev->table->download(dev, host.data, part.data, tensor_bytes(part)));
        TRY(mpi_transport.sum_start(comm, host, false));
        TRY(mpi_transport.wait(comm));
        TRY(dev->table->upload(dev, part.data, host.data, tensor_bytes(part)));
    }
    return 0;
}

static int staged_wait(struct comm *comm)
{
    struct staged *s = staged_of(comm);
    for (int i = 0; i < s->n; i++)
        TRY(sum(comm, s->queue[i]));
    s->n = 0;
    return 0;
}

static int staged_all_gather_start(struct comm *comm, struct tensor data, int slot)
{
    struct device *dev = comm->dev;
    struct staged *s = staged_of(comm);
    const int ranks = comm->ranks;
    /* Bytes are gathered in pairs, as no type has fewer. */
    const size_t part_bytes = tensor_bytes(data) / (size_t)ranks, most = HOST_BYTES / (size_t)ranks / 2 * 2;
    (void)slot;
    for (size_t at = 0; at < part_bytes; at += most) {
        const size_t bytes = part_bytes - at < most ? part_bytes - at : most;
        const struct tensor host = tensor_2d(s->host, DT_BF16, ranks, (int64_t)(bytes / dtype_bytes(DT_BF16)));
        char *const all = (char *)data.data + at;
        TRY(dev->table->download(dev, s->host + (size_t)comm->rank * bytes, all + (size_t)comm->rank * part_bytes,
                                 bytes));
        TRY(mpi_transport.all_gather_start(comm, host, 0));
        for (int r = 0; r < ranks; r++) {
            if (r == comm->rank) continue;
            TRY(dev->table->upload(dev, all + (size_t)r * part_bytes, s->host + (size_t)r * bytes, bytes));
        }
    }
    return 0;
}

static int staged_all_gather_wait(struct comm *comm, int slot)
{
    (void)comm, (void)slot;
    return 0;
}

const struct comm_transport staged_transport = {
    .open = staged_open,
    .close = staged_close,
    .describe = staged_describe,
    .sum_start = staged_sum_start,
    .poll = staged_poll,
    .wait = staged_wait,
    .all_gather_start = staged_all_gather_start,
    .all_gather_wait = staged_all_gather_wait,
    .finish = staged_wait,
};
