/* Which device a rank computes on. */
#ifndef TATARA_TRAIN_DEVICE_H
#define TATARA_TRAIN_DEVICE_H

#include "comm.h"
#include "config.h"

/* Opens the device that was chosen; auto takes a GPU if every rank has one, else the CPU, and says why. Collective. */
int device_choose(struct device *dev, enum device_choice choice, int threads, struct comm *comm);

#endif
