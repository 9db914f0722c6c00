/* Requests from outside: signals, and files named STOP or SAVE in the run's folder. */
#ifndef TATARA_SIGNALS_H
#define TATARA_SIGNALS_H

#include "ckpt/ckpt.h"
#include "comm.h"

struct request {
    bool
        stop; /* SIGTERM, SIGINT, SIGUSR1 (Slurm's warning before the time limit) on any rank, or STOP: save and end */
    bool save; /* SAVE: save and go on */
    bool busy; /* some rank's `busy` */
};

/* Installs the handlers. A second SIGINT or SIGTERM ends the process at once. */
int signal_open(void);
/* What was asked for since the last call, the same on all ranks; the files are removed as they are seen. busy: what this
 * rank has to tell the others in passing. ERR_TAKEN when the run's folder is another attempt's now. Collective. */
int signal_poll(struct comm *comm, const struct ckpt_run *folder, bool busy, struct request *request);

#endif
