/* `tatara prepare`: text in, token shards out.
 *
 * What it writes depends on the inputs and the options alone: not on ranks, threads or their timing. */
#ifndef TATARA_PREPARE_H
#define TATARA_PREPARE_H

#include "comm.h"

/* argv holds the words after "prepare". Collective; returns the same code on all ranks. */
int prepare_command(struct comm *comm, int argc, char **argv);

#endif
