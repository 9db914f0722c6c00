/* Elements 2k and 2k + 1 of a stream are the two of one Box-Muller transform (Box & Muller 1958) of two uniforms hashed
 * from the key and k.
 *
 * Logarithm, sine and cosine are computed here, because a library's differ from version to version and take one number at
 * a time: by additions, multiplications, divisions and roots, which IEEE 754 rounds in one way only, and of which the
 * compiler must fuse none (-ffp-contract=off). Their series stop where what is left is below the rounding of a double, and
 * only f32 of it is kept. */
#include "model/normal.h"

#include "mix.h"

#include <math.h>
#include <string.h>

#define MANTISSA 0x000fffffffffffffu
#define ONE 0x3ff0000000000000u       /* the bits of 1 */
#define ROOT_HALF 0x3fe6a09e667f3bcdu /* of √½ */
#define TWO_52 0x4330000000000000u /* of 2^52: with an integer below 2^52 in the mantissa it is 2^52 more than it */
#define TERMS(series) (int)(sizeof(series) / sizeof *(series))

/* ln 2 in two parts; the product of the first with an exponent is exact. */
static const double ln2_high = 0x1.62e42fefa38p-1, ln2_low = 0x1.ef35793c7673p-45;
static const double half_pi = 1.57079632679489661923;
/* The factors of (atanh(s) - s) / s³ in powers of s², of (sin x - x) / x³ and (cos x - 1) / x² in powers of x², from the
 * highest on. */
static const double atanh_series[] = {1.0 / 19, 1.0 / 17, 1.0 / 15, 1.0 / 13, 1.0 / 11,
                                      1.0 / 9,  1.0 / 7,  1.0 / 5,  1.0 / 3};
static const double sin_series[] = {-1.0 / 1307674368000, 1.0 / 6227020800, -1.0 / 39916800, 1.0 / 362880,
                                    -1.0 / 5040,          1.0 / 120,        -1.0 / 6};
static const double cos_series[] = {1.0 / 20922789888000, -1.0 / 87178291200, 1.0 / 479001600, -1.0 / 3628800,
                                    1.0 / 40320,          -1.0 / 720,         1.0 / 24,        -1.0 / 2};

static inline uint64_t to_bits(double x)
{
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline double from_bits(uint64_t bits)
{
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline double sum(const double *series, int terms, double x)
{
    double y = series[0];
    for (int i = 1; i < terms; i++)
        y = y * x + series[i];
    return y;
}

/* ln u for a normal number: u = m · 2^e with m from √½ to √2, and ln m = 2 atanh((m - 1) / (m + 1)). */
static inline double logarithm(double u)
{
    const uint64_t bits = to_bits(u) + (ONE - ROOT_HALF);
    const double e = from_bits(TWO_52 | bits >> 52) - (0x1p52 + 1023);
    const double m = from_bits((bits & MANTISSA) + ROOT_HALF);
    const double s = (m - 1) / (m + 1), z = s * s;
    return e * ln2_high + (2 * s + (2 * s * z * sum(atanh_series, TERMS(atanh_series), z) + e * ln2_low));
}

void normal_pairs(uint64_t key, int64_t first, float deviate[2 * NORMAL_PAIRS])
{
    double radius[NORMAL_PAIRS], quarters[NORMAL_PAIRS]; /* of a turn */
    for (int64_t i = 0; i < NORMAL_PAIRS; i++) {
        const uint64_t a = mix64(key ^ mix64((uint64_t)(first + i))), b = mix64(a ^ key);
        radius[i] = ((double)(a >> 11) + 0.5) * 0x1p-53;
        quarters[i] = (double)(b >> 11) * 0x1p-51;
    }
    for (int64_t i = 0; i < NORMAL_PAIRS; i++)
        radius[i] = sqrt(-2.0 * logarithm(radius[i]));
    for (int64_t i = 0; i < NORMAL_PAIRS; i++) {
        const double shifted = quarters[i] + 0x1.8p52; /* the nearest whole quarter is in its lowest bits */
        const double x = (quarters[i] - (shifted - 0x1.8p52)) * half_pi, z = x * x;
        const double cosine = 1 + z * sum(cos_series, TERMS(cos_series), z);
        const double sine = x + x * z * sum(sin_series, TERMS(sin_series), z);
        const uint64_t quarter = to_bits(shifted);
        const uint64_t cos_sign = ((quarter + 1) & 2) << 62, sin_sign = (quarter & 2) << 62;
        const double u = quarter & 1 ? sine : cosine, v = quarter & 1 ? cosine : sine;
        deviate[2 * i] = (float)(radius[i] * from_bits(to_bits(u) ^ cos_sign));
        deviate[2 * i + 1] = (float)(radius[i] * from_bits(to_bits(v) ^ sin_sign));
    }
}
