/* Memory: what a run will take, and whether it fits. */
#ifndef TATARA_PLAN_H
#define TATARA_PLAN_H

#include "arena.h"
#include "comm.h"

/* ERR_CONFIG when this node has too little free memory for its ranks, with what to change. Not collective. */
int plan_check_memory(const struct arena *measured, int sharers);

#endif
