/* The order of the training data (see sampler.h): a Feistel permutation, and quotas by largest remainder. */
#include "data/sampler.h"

#include "data/search.h"
#include "err.h"
#include "mix.h"

#include <math.h>

/* Four rounds make a permutation pseudo-random (Luby & Rackoff 1988); more are needed for halves of a few bits. */
#define ROUNDS 8
/* The smallest half of the network: domains below 16 would have too few distinct permutations. */
#define MIN_HALF_BITS 2

/* One key from three numbers. */
static uint64_t key_of(uint64_t seed, uint64_t purpose, uint64_t number)
{
    return mix64(mix64(mix64(seed) ^ purpose) ^ number);
}

uint64_t sampler_permute(uint64_t key, uint64_t n, uint64_t x)
{
    ASSERT(n >= 1 && n <= UINT64_C(1) << 62 && x < n);
    unsigned half_bits = MIN_HALF_BITS;
    while (n > UINT64_C(1) << (2 * half_bits))
        half_bits++;
    const uint64_t mask = (UINT64_C(1) << half_bits) - 1;
    uint64_t round_key[ROUNDS];
    for (unsigned r = 0; r < ROUNDS; r++)
        round_key[r] = mix64(key ^ mix64(r));
    /* Cycle walking (Black & Rogaway 2002): the network permutes fewer than 4n values (16 at least), so walking on
     * until the result is below n permutes 0 … n − 1 and takes fewer than four turns on average for n ≥ 4. */
    do {
        uint64_t left = x >> half_bits, right = x & mask;
        for (unsigned r = 0; r < ROUNDS; r++) {
            const uint64_t next = left ^ (mix64(round_key[r] ^ right) & mask);
            left = right;
            right = next;
        }
        x = left << half_bits | right;
    } while (x >= n);
    return x;
}

/* Shares SAMPLER_BLOCK slots by weight: the whole part each, at least one for a positive weight; what is left goes to
 * the largest remainders, ties to the lower index; what is over is taken from the largest quotas. */
static void share_slots(int datasets, const double *weights, double total, int64_t *quota)
{
    double remainder[CONFIG_DATASETS_MAX];
    int64_t left = SAMPLER_BLOCK;
    for (int d = 0; d < datasets; d++) {
        const double exact = weights[d] / total * SAMPLER_BLOCK;
        quota[d] = (int64_t)exact;
        remainder[d] = exact - (double)quota[d];
        if (quota[d] == 0 && weights[d] > 0) {
            quota[d] = 1;
            remainder[d] = 0;
        }
        left -= quota[d];
    }
    for (; left > 0; left--) {
        int best = 0;
        for (int d = 1; d < datasets; d++) {
            if (remainder[d] > remainder[best]) best = d;
        }
        quota[best]++;
        remainder[best] = 0;
    }
    for (; left < 0; left++) {
        int largest = 0;
        for (int d = 1; d < datasets; d++) {
            if (quota[d] > quota[largest]) largest = d;
        }
        quota[largest]--;
    }
}

int sampler_open(struct sampler *sampler, uint64_t seed, int datasets, const int64_t *sequences,
                 const double *weights)
{
    ASSERT(datasets >= 1 && datasets <= CONFIG_DATASETS_MAX);
    double total = 0;
    for (int d = 0; d < datasets; d++) {
        if (!isfinite(weights[d]) || weights[d] < 0) {
            FAIL(ERR_CONFIG, "the weight of dataset %d is %g: weights are 0 or positive", d + 1, weights[d]);
        }
        if (weights[d] > 0 && sequences[d] < 1) FAIL(ERR_DATA, "dataset %d has no whole sequence", d + 1);
        total += weights[d];
    }
    if (!(total > 0) || !isfinite(total)) FAIL(ERR_CONFIG, "the weights of the datasets add up to %g", total);
    int64_t quota[CONFIG_DATASETS_MAX];
    share_slots(datasets, weights, total, quota);
    sampler->seed = seed;
    sampler->datasets = datasets;
    sampler->quota_begin[0] = 0;
    for (int d = 0; d < datasets; d++) {
        sampler->sequences[d] = sequences[d];
        sampler->quota_begin[d + 1] = sampler->quota_begin[d] + quota[d];
    }
    return 0;
}

struct sample sampler_at(const struct sampler *sampler, int64_t index)
{
    const int64_t block = index / SAMPLER_BLOCK;
    const uint64_t in_block = (uint64_t)(index % SAMPLER_BLOCK);
    const uint64_t block_key = key_of(sampler->seed, 0, (uint64_t)block);
    const int64_t slot = (int64_t)sampler_permute(block_key, SAMPLER_BLOCK, in_block);
    const int d = (int)search_part(sampler->quota_begin, sampler->datasets, slot);
    const int64_t begin = sampler->quota_begin[d], quota = sampler->quota_begin[d + 1] - begin;
    const int64_t counter = block * quota + (slot - begin);
    const int64_t n = sampler->sequences[d], epoch = counter / n;
    const uint64_t epoch_key = key_of(sampler->seed, (uint64_t)d + 1, (uint64_t)epoch);
    const uint64_t sequence = sampler_permute(epoch_key, (uint64_t)n, (uint64_t)(counter % n));
    return (struct sample){.dataset = d, .sequence = (int64_t)sequence, .epoch = epoch};
}
