/* Private to comm: what a rank waits for in MPI, and a thread that ends the job when it waits for too long.
 *
 * Every blocking collective is entered and left. All ranks enter the same ones in the same order, so their count tells how
 * far each rank came. When a rank has been in one for longer than the time-out, it writes a line about itself into
 * FOLDER/hang-RANK. A little later the lowest rank that wrote one lists the ranks that did not arrive, on stderr and in
 * FOLDER/hang, and its exit ends the job: launchers end all ranks when one fails, those that are stopped or stuck too.
 *
 * Threads: `enter` and `leave` by the thread that owns MPI; the watching thread only reads what they set. */
#ifndef TATARA_WATCH_H
#define TATARA_WATCH_H

#include "comm.h"

struct watch;

/* Starts watching. Not collective. */
int watch_open(struct watch **watch, const struct comm *comm, const char *folder, double timeout_s);
void watch_close(struct watch *watch);
/* watch may be NULL: then nothing is recorded. `what` stays valid for ever. */
void watch_enter(struct watch *watch, const char *what, size_t bytes);
void watch_leave(struct watch *watch);

#endif
