/* `tatara data show`: what is in shards. */
#ifndef TATARA_SHOW_H
#define TATARA_SHOW_H

#include "comm.h"

/* argv holds the words after "data". For one rank. */
int data_command(struct comm *comm, int argc, char **argv);

#endif
