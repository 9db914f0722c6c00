/* A tensor's digest: a number that depends on every element and its place, and not on how the tensor is cut, so that two
 * checkpoints can be compared, and one be named, whatever ranks wrote them.
 *
 *   digest = Σ over i of mix(i · G + bits of element i)  mod 2^64,    mix(h) = g ^ (g >> 32),  g = (h ^ (h >> 32)) · M
 *
 * with G = 0x9E3779B97F4A7C15 (the golden ratio's, as in SplitMix64, Steele et al. 2014) and M = 0xD6E8FEB86659FD93. It
 * finds accidents, not forgers. Pure functions. */
#include "ckpt_internal.h"

#include <string.h>

uint64_t ckpt_digest(const float *data, int64_t begin, int64_t end)
{
    uint64_t sum = 0;
    for (int64_t i = begin; i < end; i++) {
        uint32_t bits;
        memcpy(&bits, &data[i - begin], sizeof bits);
        uint64_t h = (uint64_t)i * 0x9E3779B97F4A7C15u + bits;
        h = (h ^ (h >> 32)) * 0xD6E8FEB86659FD93u;
        sum += h ^ (h >> 32);
    }
    return sum;
}
