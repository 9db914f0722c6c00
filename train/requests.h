/* Requests from outside, brought to one answer on all ranks: signals, and files named STOP or SAVE in the run's folder. */
#ifndef TATARA_REQUESTS_H
#define TATARA_REQUESTS_H

#include "ckpt/ckpt.h"
#include "comm.h"

struct request {
    bool stop; /* a signal to any rank, or STOP: save and end */
    bool save; /* SAVE: save and go on */
    bool busy; /* some rank's `busy` */
};

/* What was asked for, the same on all ranks; the files are removed as they are seen. busy: what this rank has to tell the
 * others in passing. ERR_TAKEN when the run's folder is another attempt's now. Collective. */
int request_poll(struct comm *comm, const struct ckpt_run *folder, bool busy, struct request *request);

#endif
