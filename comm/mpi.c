/* The collectives over MPI, for host values and for tensors in host memory.
 *
 * Three communicators, all duplicates, so that nothing else in the process can interfere: `all` carries the blocking
 * collectives, `sums` the queued ones of comm_sum_start, `node` exists only while local ranks are counted. Two are
 * needed because MPI matches collectives of one communicator by their order: how far the queue has come differs from
 * rank to rank when one of them enters, say, comm_sum_f64.
 *
 * The queue holds one entry per comm_sum_start and cuts it into segments as it goes. Segments are started strictly in
 * order, at most SEGMENTS_IN_FLIGHT at once, by whichever of comm_sum_start, comm_poll and comm_wait finds a free
 * slot; when is a matter of each rank, in what order is not.
 *
 * Threads: only the one that called comm_open (MPI_THREAD_FUNNELED); watch.c's only looks. With one rank no collective
 * calls MPI. */
#include "comm.h"

#include "cores.h"
#include "err.h"
#include "log.h"
#include "transport.h"
#include "watch.h"

#include <math.h>
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Larger segments are no faster between ranks of a node (they leave the cache) and cost memory. */
#define SEGMENT_BYTES ((int64_t)1 << 20)
#define SEGMENTS_IN_FLIGHT 4
#define SEGMENT_COPIES 3 /* that Open MPI 4.1 holds of a segment in flight at most; measured with 2 to 4 ranks */
#define GATHER_SEGMENT_BYTES ((size_t)16 << 20) /* of each rank */
#define QUEUE_START 256 /* entries; the queue doubles when a step starts more sums than that */

/* One comm_sum_start. An all-reduce is one part; a scatter is a part per rank, whose segments take turns so that the
 * ranks, not one of them, receive at any time. */
struct sum {
    char *data;
    size_t elem_bytes;
    MPI_Datatype type;
    bool scatter;
    int parts;
    int64_t part_elems;
    int64_t next, segments; /* over all parts; segment i belongs to part i % parts */
};

struct comm_state {
    MPI_Comm all, sums;
    struct sum *queue; /* entries [first, n) have segments left to start */
    int first, n, capacity;
    MPI_Request in_flight[SEGMENTS_IN_FLIGHT]; /* MPI_REQUEST_NULL: a free slot */
    struct watch *watch;                       /* NULL: nobody watches */
    int64_t attempt;                           /* a number of this job's own; the same on all ranks */
};

#define CHECK_MPI(call, what)                                                               \
    do {                                                                                    \
        const int mpi_rc_ = (call);                                                         \
        if (mpi_rc_ != MPI_SUCCESS) return mpi_failed(__FILE__, __LINE__, (what), mpi_rc_); \
    } while (0)

/* A call that waits for other ranks. */
#define WAIT_MPI(comm, call, what, bytes)                                                     \
    do {                                                                                      \
        watch_enter((comm)->state->watch, (what), (bytes));                                   \
        const int wait_rc_ = (call);                                                          \
        watch_leave((comm)->state->watch);                                                    \
        if (wait_rc_ != MPI_SUCCESS) return mpi_failed(__FILE__, __LINE__, (what), wait_rc_); \
    } while (0)

static int mpi_failed(const char *file, int line, const char *what, int mpi_rc)
{
    char text[MPI_MAX_ERROR_STRING];
    int length = 0;
    if (MPI_Error_string(mpi_rc, text, &length) != MPI_SUCCESS) snprintf(text, sizeof text, "code %d", mpi_rc);
    return err_raise(ERR_COMM, file, line,
                     "MPI: %s failed: %s. Often another rank or its node died first: look for the earliest error of "
                     "any rank, then resume from the last checkpoint.",
                     what, text);
}

/* Settings of Open MPI that must be in the environment before MPI_Init; what the user has set is left alone, and
 * other MPI libraries ignore them all. `alone`: no launcher started this process.
 * - hwloc's GL plugin looks for graphics cards by connecting to ten X servers: no business of a training program.
 * - Alone, Open MPI would start a helper daemon (orted), which fails where neither ssh nor rsh is installed, listen
 * on all network interfaces for peers that cannot come, and search for interconnects. Without them a program that
 * runs alone opens no socket, and MPI_Init takes 30 ms instead of 340. All that are alone would share one folder in /tmp,
 * which one removes while another starts. */
static int settings_apply(bool alone)
{
    static const char *const settings[][2] = {
        {"HWLOC_COMPONENTS", "-gl"},
        {"OMPI_MCA_ess_singleton_isolated", "1"},
        {"OMPI_MCA_orte_create_session_dirs", "0"},
        {"OMPI_MCA_btl", "self"},
        {"OMPI_MCA_pml", "ob1"},
    };
    const size_t n = alone ? sizeof settings / sizeof *settings : 1;
    for (size_t i = 0; i < n; i++) {
        if (setenv(settings[i][0], settings[i][1], 0) != 0) {
            FAIL(ERR_SYSTEM, "no memory for the environment variable %s", settings[i][0]);
        }
    }
    return 0;
}

/* Under srun without PMIx every task would believe that it is alone, and all would write the same run. */
static int srun_check(int ranks)
{
    const char *tasks = getenv("SLURM_STEP_NUM_TASKS");
    if (ranks > 1 || tasks == NULL || strtol(tasks, NULL, 10) <= 1 || getenv("OMPI_COMM_WORLD_SIZE")) return 0;
    FAIL(ERR_COMM,
         "srun started %s tasks, but MPI sees only one: this srun and this MPI do not know each other. Use "
         "`srun --mpi=pmix`, or start with `mpirun` inside the allocation.",
         tasks);
}

static int local_ranks_count(struct comm *comm)
{
    MPI_Comm node = MPI_COMM_NULL;
    CHECK_MPI(MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &node), "split by node");
    CHECK_MPI(MPI_Comm_rank(node, &comm->local_rank), "rank on the node");
    CHECK_MPI(MPI_Comm_size(node, &comm->local_ranks), "ranks on the node");
    comm->node = comm->rank;
    CHECK_MPI(MPI_Bcast(&comm->node, 1, MPI_INT, 0, node), "lowest rank of the node");
    TRY(cores_count(comm, node, ""));
    CHECK_MPI(MPI_Comm_free(&node), "split by node");
    return 0;
}

static int attempt_choose(struct comm *comm)
{
    struct timespec now;
    (void)clock_gettime(CLOCK_REALTIME, &now);
    comm->state->attempt = (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
    if (comm->ranks == 1) return 0;
    CHECK_MPI(MPI_Bcast(&comm->state->attempt, 1, MPI_INT64_T, 0, MPI_COMM_WORLD), "number of the attempt");
    return 0;
}

static int state_open(struct comm *comm)
{
    comm->state = calloc(1, sizeof *comm->state);
    if (comm->state == NULL) FAIL(ERR_SYSTEM, "no memory for the communicator");
    struct comm_state *s = comm->state;
    s->all = s->sums = MPI_COMM_NULL;
    for (int i = 0; i < SEGMENTS_IN_FLIGHT; i++)
        s->in_flight[i] = MPI_REQUEST_NULL;
    TRY(attempt_choose(comm));
    if (comm->ranks == 1) return 0;
    s->capacity = QUEUE_START;
    s->queue = calloc((size_t)s->capacity, sizeof *s->queue);
    if (s->queue == NULL) FAIL(ERR_SYSTEM, "no memory for the communicator's queue");
    CHECK_MPI(MPI_Comm_dup(MPI_COMM_WORLD, &s->all), "duplicate of the communicator");
    CHECK_MPI(MPI_Comm_dup(MPI_COMM_WORLD, &s->sums), "duplicate of the communicator");
    return 0;
}

int comm_open(struct comm *comm, int *argc, char ***argv)
{
    *comm = (struct comm){.ranks = 1, .local_ranks = 1, .transport = &mpi_transport};
    TRY(settings_apply(!getenv("OMPI_COMM_WORLD_SIZE") && !getenv("PMIX_RANK") && !getenv("PMI_RANK")));
    int provided = MPI_THREAD_SINGLE;
    CHECK_MPI(MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &provided), "start");
    /* Duplicates inherit the handler; making datatypes reports to MPI_COMM_WORLD itself. */
    CHECK_MPI(MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN), "error handler");
    CHECK_MPI(MPI_Comm_rank(MPI_COMM_WORLD, &comm->rank), "rank");
    CHECK_MPI(MPI_Comm_size(MPI_COMM_WORLD, &comm->ranks), "number of ranks");
    if (provided < MPI_THREAD_FUNNELED) FAIL(ERR_COMM, "this MPI library was built without thread support");
    TRY(srun_check(comm->ranks));
    TRY(local_ranks_count(comm));
    return state_open(comm);
}

double comm_grace_s(void)
{
    /* Open MPI's launcher up to version 4 hands on its address, and what it was told by --mca: so
     * long after SIGCONT it sends SIGTERM, and as long after that SIGKILL. */
    const char *seconds = getenv("OMPI_MCA_odls_base_sigkill_timeout");
    if (!getenv("OMPI_MCA_orte_hnp_uri")) return (double)INFINITY;
    return 2 * (seconds ? strtod(seconds, NULL) : 1);
}

int comm_watch(struct comm *comm, const char *folder, double timeout_s)
{
    struct comm_state *s = comm->state;
    if (!s->watch) TRY(watch_open(&s->watch, comm, (uint64_t)s->attempt, timeout_s));
    watch_set_timeout(s->watch, timeout_s);
    if (folder) watch_set_folder(s->watch, folder);
    return 0;
}

void comm_wait_enter(struct comm *comm, const char *what)
{
    if (comm->state) watch_enter_alone(comm->state->watch, what);
}

void comm_wait_leave(struct comm *comm)
{
    if (comm->state) watch_leave_alone(comm->state->watch);
}

void comm_close(struct comm *comm)
{
    struct comm_state *s = comm->state;
    if (s != NULL) {
        watch_close(s->watch);
        if (s->sums != MPI_COMM_NULL) MPI_Comm_free(&s->sums);
        if (s->all != MPI_COMM_NULL) MPI_Comm_free(&s->all);
        free(s->queue);
        free(s);
        comm->state = NULL;
    }
    int started = 0;
    if (MPI_Initialized(&started) == MPI_SUCCESS && started) MPI_Finalize();
}

void comm_abort(struct comm *comm, int status)
{
    fflush(NULL);
    if (comm->ranks > 1) MPI_Abort(MPI_COMM_WORLD, status);
    /* Alone there is nobody to tell, and MPI_Abort would add a page of advice to our one message. */
    comm_close(comm);
    _Exit(status);
}

int comm_agree(struct comm *comm, int rc)
{
    if (comm->ranks == 1) return rc;
    /* The smallest of (rank, code) over the failing ranks, in one reduction. */
    int64_t first = rc == 0 ? INT64_MAX : ((int64_t)comm->rank << 32) | (uint32_t)rc;
    WAIT_MPI(comm, MPI_Allreduce(MPI_IN_PLACE, &first, 1, MPI_INT64_T, MPI_MIN, comm->state->all), "agreement",
             sizeof first);
    if (first == INT64_MAX) return 0;
    if (first >> 32 != comm->rank) {
        if (rc != 0) log_debug("failed too: %s", err_message());
        err_clear();
    }
    err_share();
    return (int)(first & INT32_MAX);
}

int comm_barrier(struct comm *comm)
{
    if (comm->ranks == 1) return 0;
    WAIT_MPI(comm, MPI_Barrier(comm->state->all), "barrier", 0);
    return 0;
}

int comm_bcast(struct comm *comm, void *data, size_t bytes, int root)
{
    if (comm->ranks == 1) return 0;
    for (size_t at = 0; at < bytes; at += GATHER_SEGMENT_BYTES) {
        const size_t n = bytes - at < GATHER_SEGMENT_BYTES ? bytes - at : GATHER_SEGMENT_BYTES;
        WAIT_MPI(comm, MPI_Bcast((char *)data + at, (int)n, MPI_BYTE, root, comm->state->all), "broadcast", n);
    }
    return 0;
}

static int all_reduce(struct comm *comm, void *values, int n, MPI_Datatype type, MPI_Op op, const char *what)
{
    if (comm->ranks == 1) return 0;
    WAIT_MPI(comm, MPI_Allreduce(MPI_IN_PLACE, values, n, type, op, comm->state->all), what, 8 * (size_t)n);
    return 0;
}

int comm_sum_i64(struct comm *comm, int64_t *values, int n)
{
    return all_reduce(comm, values, n, MPI_INT64_T, MPI_SUM, "sum of integers");
}

int comm_max_i64(struct comm *comm, int64_t *values, int n)
{
    return all_reduce(comm, values, n, MPI_INT64_T, MPI_MAX, "maximum of integers");
}

int comm_sum_f64(struct comm *comm, double *values, int n)
{
    return all_reduce(comm, values, n, MPI_DOUBLE, MPI_SUM, "sum of numbers");
}

int comm_max_f64(struct comm *comm, double *values, int n)
{
    return all_reduce(comm, values, n, MPI_DOUBLE, MPI_MAX, "maximum of numbers");
}

/* Makes the type of `bytes` bytes of which an array has one every `stride` bytes: with it a gather of one element per
 * rank moves a segment of each rank's part, whatever the parts' size, and no count exceeds an int. */
static int strided_type(size_t bytes, size_t stride, MPI_Datatype *type)
{
    MPI_Datatype run = MPI_DATATYPE_NULL;
    CHECK_MPI(MPI_Type_contiguous((int)bytes, MPI_BYTE, &run), "datatype of a gather");
    const int rc = MPI_Type_create_resized(run, 0, (MPI_Aint)stride, type);
    MPI_Type_free(&run);
    CHECK_MPI(rc, "datatype of a gather");
    CHECK_MPI(MPI_Type_commit(type), "datatype of a gather");
    return 0;
}

/* Gathers `part_bytes` of each rank into `all`, to every rank (mine NULL: it is in place already) or to rank 0. */
static int gather_segments(struct comm *comm, const char *mine, char *all, size_t part_bytes)
{
    for (size_t at = 0; at < part_bytes; at += GATHER_SEGMENT_BYTES) {
        const size_t n = part_bytes - at < GATHER_SEGMENT_BYTES ? part_bytes - at : GATHER_SEGMENT_BYTES;
        char *into = all == NULL ? NULL : all + at; /* only rank 0 of a gather has it */
        MPI_Comm ranks = comm->state->all;
        MPI_Datatype type = MPI_DATATYPE_NULL;
        TRY(strided_type(n, part_bytes, &type));
        watch_enter(comm->state->watch, mine == NULL ? "all-gather" : "gather", n);
        const int rc = mine == NULL ? MPI_Allgather(MPI_IN_PLACE, 0, MPI_DATATYPE_NULL, into, 1, type, ranks)
                                    : MPI_Gather(mine + at, (int)n, MPI_BYTE, into, 1, type, 0, ranks);
        watch_leave(comm->state->watch);
        MPI_Type_free(&type);
        CHECK_MPI(rc, mine == NULL ? "all-gather" : "gather");
    }
    return 0;
}

int comm_gather(struct comm *comm, const void *mine, void *all, size_t bytes)
{
    if (comm->ranks == 1) {
        memmove(all, mine, bytes);
        return 0;
    }
    return gather_segments(comm, mine, all, bytes);
}

/* ---- tensors in host memory ---- */

static int host_all_gather(struct comm *comm, struct tensor data, int slot)
{
    (void)slot;
    return gather_segments(comm, NULL, data.data, tensor_bytes(data) / (size_t)comm->ranks);
}

/* Starts the next segment of `sum` in the free slot. */
static int segment_start(struct comm *comm, struct sum *sum, MPI_Request *slot)
{
    const int64_t segment_elems = SEGMENT_BYTES / (int64_t)sum->elem_bytes;
    const int part = (int)(sum->next % sum->parts);
    const int64_t begin = sum->next / sum->parts * segment_elems;
    const int64_t left = sum->part_elems - begin;
    const int n = (int)(left < segment_elems ? left : segment_elems);
    char *data = sum->data + (size_t)(part * sum->part_elems + begin) * sum->elem_bytes;
    MPI_Comm sums = comm->state->sums;
    sum->next++;
    if (!sum->scatter) {
        CHECK_MPI(MPI_Iallreduce(MPI_IN_PLACE, data, n, sum->type, MPI_SUM, sums, slot), "all-reduce");
    } else if (part == comm->rank) {
        CHECK_MPI(MPI_Ireduce(MPI_IN_PLACE, data, n, sum->type, MPI_SUM, part, sums, slot), "reduce-scatter");
    } else {
        CHECK_MPI(MPI_Ireduce(data, NULL, n, sum->type, MPI_SUM, part, sums, slot), "reduce-scatter");
    }
    return 0;
}

/* Fills the free slots with the next segments in order. */
static int queue_advance(struct comm *comm)
{
    struct comm_state *s = comm->state;
    for (int i = 0; i < SEGMENTS_IN_FLIGHT && s->first < s->n; i++) {
        if (s->in_flight[i] != MPI_REQUEST_NULL) continue;
        struct sum *sum = &s->queue[s->first];
        TRY(segment_start(comm, sum, &s->in_flight[i]));
        if (sum->next == sum->segments) s->first++;
    }
    if (s->first == s->n) s->first = s->n = 0;
    return 0;
}

static int host_poll(struct comm *comm)
{
    int done = 0;
    int which[SEGMENTS_IN_FLIGHT];
    MPI_Status statuses[SEGMENTS_IN_FLIGHT];
    CHECK_MPI(MPI_Testsome(SEGMENTS_IN_FLIGHT, comm->state->in_flight, &done, which, statuses), "sum over ranks");
    return queue_advance(comm);
}

static int host_sum_start(struct comm *comm, struct tensor data, bool scatter)
{
    struct comm_state *s = comm->state;
    if (s->n == s->capacity) {
        struct sum *larger = realloc(s->queue, 2 * (size_t)s->capacity * sizeof *larger);
        if (larger == NULL) FAIL(ERR_SYSTEM, "no memory for the communicator's queue");
        s->queue = larger;
        s->capacity *= 2;
    }
    const size_t elem_bytes = dtype_bytes(data.dtype);
    const int parts = scatter ? comm->ranks : 1;
    const int64_t part_elems = tensor_elems(data) / parts;
    const int64_t segment_elems = SEGMENT_BYTES / (int64_t)elem_bytes;
    s->queue[s->n++] = (struct sum){
        .data = data.data,
        .elem_bytes = elem_bytes,
        .type = data.dtype == DT_I64 ? MPI_INT64_T : MPI_FLOAT,
        .scatter = scatter,
        .parts = parts,
        .part_elems = part_elems,
        .segments = (part_elems + segment_elems - 1) / segment_elems * parts,
    };
    return host_poll(comm);
}

static int queue_finish(struct comm *comm)
{
    int done = 0;
    int which[SEGMENTS_IN_FLIGHT];
    MPI_Status statuses[SEGMENTS_IN_FLIGHT]; /* gcc warns of MPICH's MPI_STATUSES_IGNORE */
    TRY(queue_advance(comm));
    while (true) {
        CHECK_MPI(MPI_Waitsome(SEGMENTS_IN_FLIGHT, comm->state->in_flight, &done, which, statuses), "sum over ranks");
        if (done == MPI_UNDEFINED) return 0; /* nothing was in flight, so nothing is queued */
        TRY(queue_advance(comm));
    }
}

static int host_wait(struct comm *comm)
{
    watch_enter(comm->state->watch, "sum over ranks", SEGMENT_BYTES);
    const int rc = queue_finish(comm);
    watch_leave(comm->state->watch);
    return rc;
}

/* A gather is complete when its start returns. */
static int host_all_gather_wait(struct comm *comm, int slot)
{
    (void)comm, (void)slot;
    return 0;
}

static int host_open(struct comm *comm, double timeout_s)
{
    (void)comm, (void)timeout_s;
    return 0;
}

static void host_close(struct comm *comm)
{
    (void)comm;
}

static void host_describe(struct comm *comm, char *text, size_t text_bytes)
{
    (void)comm;
    snprintf(text, text_bytes, "MPI");
}

const struct comm_transport mpi_transport = {
    .open = host_open,
    .close = host_close,
    .describe = host_describe,
    .sum_start = host_sum_start,
    .poll = host_poll,
    .wait = host_wait,
    .all_gather_start = host_all_gather,
    .all_gather_wait = host_all_gather_wait,
    .finish = host_wait,
};

size_t comm_buffer_bytes(const struct comm *comm)
{
    return comm->ranks == 1 ? 0 : (size_t)SEGMENT_BYTES * SEGMENTS_IN_FLIGHT * SEGMENT_COPIES;
}
