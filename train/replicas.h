/* Checks that what ranks hold in common is the same on all of them. */
#ifndef TATARA_REPLICAS_H
#define TATARA_REPLICAS_H

#include "step.h"

/* Compares the weights, in the compute type, of every parameter, and the number of steps done. ERR_NUMERIC on all ranks
 * when one differs, naming the rank and the parameter: then memory, a GPU or a network card corrupts data. On a GPU the
 * weights pass through host memory. Collective. */
int replicas_check(struct step *step, int64_t steps);

#endif
