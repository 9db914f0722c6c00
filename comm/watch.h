/* Private to comm: what a rank waits for, and a thread that ends the job when it waits for too long.
 *
 * Every blocking collective is entered and left. All ranks enter the same ones in the same order, so their count names
 * one. A rank that waits for something else, such as a read, enters that too; it is not counted, collectives within it
 * are, and as long as the rank computes now and then, as it does with what it reads, that wait begins again. A rank
 * that is in neither is at work, for as long as it likes.
 *
 * When a rank has waited for longer than the time-out, it writes a line about itself into FOLDER/hang-RANK. A little later
 * the lowest rank that wrote one says on stderr which ranks did not arrive: those that are in no collective. Its exit ends
 * the job: launchers end all ranks when one fails, those that are stopped or stuck too. Where there is no folder, or it
 * does not answer in time either, every rank that waits says so itself.
 *
 * Threads: `enter` and `leave` by the thread that owns MPI; the watching thread reads what they set. A third one
 * writes and reads the files, so that a file system that hangs cannot keep the job. */
#ifndef TATARA_WATCH_H
#define TATARA_WATCH_H

#include "comm.h"

struct watch;

/* Starts watching. attempt: tells this job from others that leave files in the same folder; equal on all ranks. Not
 * collective. */
int watch_open(struct watch **watch, const struct comm *comm, uint64_t attempt, double timeout_s);
void watch_close(struct watch *watch);
void watch_set_timeout(struct watch *watch, double timeout_s);
/* From here on the folder is known; once only. It is made when it is needed and not there. */
void watch_set_folder(struct watch *watch, const char *folder);

/* watch may be NULL: then nothing is recorded. `what` stays valid for ever. */
void watch_enter(struct watch *watch, const char *what, size_t bytes);
void watch_leave(struct watch *watch);
/* Around what is no collective; collectives may lie within, but no other such wait. */
void watch_enter_alone(struct watch *watch, const char *what);
void watch_leave_alone(struct watch *watch);

#endif
