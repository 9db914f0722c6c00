/* Binary search in a sorted array: which part of a whole does an index fall into? */
#ifndef TATARA_SEARCH_H
#define TATARA_SEARCH_H

#include <stdint.h>

/* The last i with begin[i] ≤ x. begin rises (not always strictly), n ≥ 1, begin[0] ≤ x. */
static inline int64_t search_part(const int64_t *begin, int64_t n, int64_t x)
{
    int64_t low = 0, high = n - 1;
    while (low < high) {
        const int64_t middle = low + (high - low + 1) / 2;
        if (begin[middle] <= x) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return low;
}

#endif
