/* Cores per rank, from the affinity that the launcher gave each.
 *
 * Launchers differ: some bind each rank to its own cores, some leave all ranks on all cores. Counting the ranks that may
 * use a core tells both apart: a rank's share is the sum, over the cores it may use, of one over the ranks on that core. */
#include "cores.h"

#include "err.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define CORES_MAX 4096

/* Marks the cores of a list as Linux prints it: "0-3,8,10-11". */
static void parse_list(const char *text, int32_t allowed[CORES_MAX])
{
    while (*text >= '0' && *text <= '9') {
        char *end = NULL;
        const long first = strtol(text, &end, 10);
        const long last = *end == '-' ? strtol(end + 1, &end, 10) : first;
        for (long core = first; core <= last && core < CORES_MAX; core++)
            allowed[core] = 1;
        text = *end == ',' ? end + 1 : end;
    }
}

int cores_count(struct comm *comm, MPI_Comm node)
{
    static const char key[] = "Cpus_allowed_list:\t";
    int32_t allowed[CORES_MAX] = {0}, users[CORES_MAX] = {0};
    char line[8192];
    double share = 0;
    FILE *file = fopen("/proc/self/status", "r");
    while (file && fgets(line, sizeof line, file)) {
        if (strncmp(line, key, sizeof key - 1) == 0) parse_list(line + sizeof key - 1, allowed);
    }
    if (file) fclose(file);
    comm->node_cores = (int)sysconf(_SC_NPROCESSORS_ONLN);
    memcpy(users, allowed, sizeof users);
    if (comm->local_ranks > 1 &&
        MPI_Allreduce(allowed, users, CORES_MAX, MPI_INT32_T, MPI_SUM, node) != MPI_SUCCESS) {
        FAIL(ERR_COMM, "MPI: the ranks of a node could not compare the cores that they may use");
    }
    comm->allowed_cores = 0;
    for (int core = 0; core < CORES_MAX; core++) {
        comm->allowed_cores += allowed[core];
        if (allowed[core]) share += 1.0 / users[core];
    }
    comm->core_share = share > 0 ? share : 1;
    /* The share of three ranks on two cores is less than one core; a rank still has a thread. */
    comm->cores = share < 1 ? 1 : (int)(share + 1e-6);
    return 0;
}
