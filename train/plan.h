/* Memory: what a run will take, and whether it fits. */
#ifndef TATARA_PLAN_H
#define TATARA_PLAN_H

#include "arena.h"
#include "comm.h"

/* ERR_CONFIG when a rank's share of the device's free memory, which so many ranks share, or on a CPU of what control groups
 * leave, is too small, with what to change. Not collective. */
int plan_check_memory(const struct arena *measured, const struct comm *comm, int sharers);

#endif
