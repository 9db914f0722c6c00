/* The order of the training data: which sequence is the i-th sample of a run.
 *
 * Invariant: the answer is a pure function of (seed, the datasets' sizes and weights, i), computed in O(log datasets)
 * with nothing built or stored. Neither the number of ranks nor a resume can change it. It must never change for a
 * given seed either: tests/unit/test_sampler.c holds golden values.
 *
 * Mixture: samples come in blocks of SAMPLER_BLOCK. In each block a dataset has a fixed quota by its weight; a keyed
 * permutation of the block's slots interleaves the datasets. A dataset's own samples run through a keyed permutation
 * of all its sequences, a fresh one each epoch, so that no sequence comes twice before all have come once.
 *
 * Threads: a sampler is only read after sampler_open. */
#ifndef TATARA_SAMPLER_H
#define TATARA_SAMPLER_H

#include <stdint.h>

#include "config.h"

#define SAMPLER_BLOCK 65536

struct sampler {
    uint64_t seed;
    int datasets;
    int64_t sequences[CONFIG_DATASETS_MAX];
    /* Cumulative: dataset d has the slots quota_begin[d] … quota_begin[d + 1] − 1. */
    int64_t quota_begin[CONFIG_DATASETS_MAX + 1];
};

struct sample {
    int dataset;
    int64_t sequence; /* in the dataset */
    int64_t epoch;    /* how often the dataset was used up before */
};

/* datasets ≤ CONFIG_DATASETS_MAX; weights are relative and not negative. ERR_CONFIG when no weight is positive, ERR_DATA
 * when a dataset with a positive weight has no sequence. */
int sampler_open(struct sampler *sampler, uint64_t seed, int datasets, const int64_t *sequences,
                 const double *weights);
/* The sample at `index`: how many the run has read before it. */
struct sample sampler_at(const struct sampler *sampler, int64_t index);
/* A bijection of 0 … n − 1, chosen by `key`: where x goes. n ≥ 1, x < n. */
uint64_t sampler_permute(uint64_t key, uint64_t n, uint64_t x);

#endif
