/* Which device a rank computes on, and with how many threads. */
#ifndef TATARA_TRAIN_DEVICE_H
#define TATARA_TRAIN_DEVICE_H

#include "comm.h"
#include "config.h"

/* Opens the device that was chosen; auto takes a GPU if every rank has one, else the CPU, and says why. Collective. */
int device_choose(struct device *dev, enum device_choice choice, int threads, struct comm *comm);

/* Opens a run's device, and says what each rank has of the machine; warns of ranks and threads that get in each other's way
 * or have nothing to do. Collective. */
int device_start(struct device *dev, const struct config *cfg, struct comm *comm);

#endif
