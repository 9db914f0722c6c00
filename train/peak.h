/* The rate of matrix products that a run's progress is compared with. */
#ifndef TATARA_PEAK_H
#define TATARA_PEAK_H

#include "step.h"

#define PEAK_KEY_MAX 512

struct peak {
    double flops; /* of all ranks together, a second */
    bool kept;    /* as an earlier start of the run has measured it on machines of this kind */
    bool raised;  /* a step was faster than what was measured */
    char key[PEAK_KEY_MAX];
};

/* Measures what the model's largest matrix product runs at on all ranks at the same time, as a step uses the machine; or
 * takes what an earlier start in this run's folder has measured with as many ranks and threads on the same kind of CPU or
 * GPU. Takes some tenths of a second, and leaves nothing behind in the model's buffers. Collective. */
int peak_open(struct peak *peak, struct step *step, const char *run_dir);
/* The share of it that a step reaches with `flops` a second: at most 1. A step can be faster only than what was measured on
 * a machine that others used too, or before it had reached its speed: then the step's rate is the peak from here on, which
 * is said once. By rank 0. */
double peak_share(struct peak *peak, double flops, const char *run_dir);

#endif
