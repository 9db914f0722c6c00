/* What the control groups of this process leave it: time of processors, and memory. */
#ifndef TATARA_CGROUP_H
#define TATARA_CGROUP_H

#include <stdint.h>

#define CGROUP_LEVELS 32
#define CGROUP_FOLDER_MAX 256

/* A group that this process is in: its own, or one above it, all of whose limits hold together. */
struct cgroup_level {
    uint64_t id;            /* the same in every process of this machine that is in the group, and in no other */
    double cpus;            /* processors' worth of time that it may take; 0: as much as there is */
    uint64_t limit_bytes;   /* of memory; 0: none */
    uint64_t taken_bytes;   /* of it, but what the kernel can give back at once */
    const char *limit_name; /* of the file that has the limit of memory */
    char folder[CGROUP_FOLDER_MAX];
};

/* The groups that have a limit, of version 1 and 2; returns how many. root: "", or in tests a folder that has proc/ and what
 * is mounted. A machine without control groups has none. */
int cgroup_levels(const char *root, struct cgroup_level level[CGROUP_LEVELS]);

#endif
