/* Normal deviates from counters: the same bits on every machine, whatever its C library and its vectors. */
#ifndef TATARA_NORMAL_H
#define TATARA_NORMAL_H

#include <stdint.h>

#define NORMAL_PAIRS 64

/* Elements 2·first to 2·(first + NORMAL_PAIRS) of the stream of a key. A pure function. */
void normal_pairs(uint64_t key, int64_t first, float deviate[2 * NORMAL_PAIRS]);

#endif
