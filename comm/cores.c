/* Cores per rank, from the affinity that the launcher gave each, and the shares of what control groups limit.
 *
 * Launchers differ: some bind each rank to its own cores, some leave all ranks on all cores. Counting the ranks that may
 * use a core tells both apart: a rank's share is the sum, over the cores it may use, of one over the ranks on that core.
 * Likewise ranks may be in one control group or in several: a rank's share of a limit is what it leaves, divided by the
 * ranks of the node that are in that group. */
#define _GNU_SOURCE /* for sched_setaffinity */
#include "cores.h"

#include "cgroup.h"
#include "err.h"

#include <math.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CORES_MAX 4096

/* The cores that this rank may use, and how many there would be if no launcher had bound it: what the kernel makes of a wish
 * for all, which keeps to what the machine, a container or a scheduler's control group has. */
static int read_affinity(int32_t allowed[CORES_MAX], int *unbound)
{
    const size_t bytes = CPU_ALLOC_SIZE(CORES_MAX);
    cpu_set_t *bound = CPU_ALLOC(CORES_MAX), *all = CPU_ALLOC(CORES_MAX);
    if (!bound || !all) {
        CPU_FREE(bound);
        CPU_FREE(all);
        FAIL(ERR_SYSTEM, "no memory for a list of cores");
    }
    CPU_ZERO_S(bytes, bound);
    (void)sched_getaffinity(0, bytes, bound);
    for (size_t core = 0; core < CORES_MAX; core++)
        allowed[core] = CPU_ISSET_S(core, bytes, bound) != 0;
    *unbound = CPU_COUNT_S(bytes, bound);
    memset(all, 0xFF, bytes);
    if (sched_setaffinity(0, bytes, all) == 0) {
        if (sched_getaffinity(0, bytes, all) == 0) *unbound = CPU_COUNT_S(bytes, all);
        (void)sched_setaffinity(0, bytes, bound);
    }
    CPU_FREE(bound);
    CPU_FREE(all);
    return 0;
}

static int share_cores(struct comm *comm, MPI_Comm node, double *share)
{
    int32_t allowed[CORES_MAX] = {0}, users[CORES_MAX] = {0};
    int used = 0;
    TRY(read_affinity(allowed, &comm->node_cores));
    memcpy(users, allowed, sizeof users);
    if (comm->local_ranks > 1 &&
        MPI_Allreduce(allowed, users, CORES_MAX, MPI_INT32_T, MPI_SUM, node) != MPI_SUCCESS) {
        FAIL(ERR_COMM, "MPI: the ranks of a node could not compare the cores that they may use");
    }
    *share = 0;
    comm->allowed_cores = 0;
    for (int core = 0; core < CORES_MAX; core++) {
        comm->allowed_cores += allowed[core];
        used += users[core] > 0;
        if (allowed[core]) *share += 1.0 / users[core];
    }
    comm->idle_cores = comm->node_cores > used ? comm->node_cores - used : 0;
    return 0;
}

/* How many of the node's ranks are in that group: `ids` has CGROUP_LEVELS of each. */
static int count_members(const uint64_t *ids, int ranks, uint64_t id)
{
    int members = 0;
    for (int i = 0; i < ranks * CGROUP_LEVELS; i++)
        members += ids[i] == id;
    ASSERT(members > 0); /* the asking rank is one */
    return members;
}

static void share_level(struct comm_limits *limits, const struct cgroup_level *level, int members)
{
    const uint64_t left = level->limit_bytes > level->taken_bytes ? level->limit_bytes - level->taken_bytes : 0;
    const uint64_t bytes = left / (uint64_t)members + 1; /* 0 is no limit */
    const double cpus = level->cpus / members;
    if (cpus > 0 && (limits->cpus == 0 || cpus < limits->cpus)) {
        limits->cpus = cpus;
        snprintf(limits->cpus_of, sizeof limits->cpus_of, "%s", level->folder);
    }
    if (level->limit_bytes > 0 && (limits->memory_bytes == 0 || bytes < limits->memory_bytes)) {
        limits->memory_bytes = bytes;
        limits->memory_limit_bytes = level->limit_bytes;
        snprintf(limits->memory_of, sizeof limits->memory_of, "%s/%s", level->folder, level->limit_name);
    }
}

static int share_limits(struct comm *comm, MPI_Comm node, const char *root)
{
    struct cgroup_level level[CGROUP_LEVELS];
    uint64_t mine[CGROUP_LEVELS] = {0};
    const int n = cgroup_levels(root, level), ranks = comm->local_ranks;
    uint64_t *ids = calloc((size_t)ranks, sizeof mine);
    if (!ids) FAIL(ERR_SYSTEM, "no memory for the control groups of %d ranks", ranks);
    for (int i = 0; i < n; i++)
        mine[i] = level[i].id;
    memcpy(ids, mine, sizeof mine);
    if (ranks > 1 &&
        MPI_Allgather(mine, CGROUP_LEVELS, MPI_UINT64_T, ids, CGROUP_LEVELS, MPI_UINT64_T, node) != MPI_SUCCESS) {
        free(ids);
        FAIL(ERR_COMM, "MPI: the ranks of a node could not compare their control groups");
    }
    comm->limits = (struct comm_limits){.cpus = 0};
    for (int i = 0; i < n; i++)
        share_level(&comm->limits, &level[i], count_members(ids, ranks, level[i].id));
    free(ids);
    return 0;
}

/* OMP_NUM_THREADS, of which the first number counts; 0: not set. */
static int read_environment(void)
{
    const char *text = getenv("OMP_NUM_THREADS");
    const long threads = text ? strtol(text, NULL, 10) : 0;
    return threads > 0 && threads <= CORES_MAX ? (int)threads : 0;
}

int cores_count(struct comm *comm, MPI_Comm node, const char *root)
{
    double share = 0;
    TRY(share_cores(comm, node, &share));
    TRY(share_limits(comm, node, root));
    const double quota = comm->limits.cpus;
    comm->core_share = quota > 0 && quota < share ? quota : share > 0 ? share : 1;
    comm->threads = read_environment();
    if (comm->threads > 0) return 0;
    /* The share of three ranks on two cores is less than one core; a rank still has a thread. A quota is rounded up, since
     * what is left of it would go unused. */
    comm->threads = share < 1 ? 1 : (int)(share + 1e-6);
    if (quota > 0 && quota < comm->threads) comm->threads = (int)ceil(quota - 1e-6);
    return 0;
}
