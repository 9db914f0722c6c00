/* The harness of the op tests (op_test.h). One thread; the op under test brings its own. */
#include "op_test.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define GRADIENT_SAMPLES 120
#define GRADIENT_STEP 1e-5
#define MAX_THREADS 3

struct op_test op_test_begin(struct device *dev, uint64_t seed)
{
    dev->threads = MAX_THREADS;
    return (struct op_test){.dev = dev, .random = seed};
}

void op_test_end(struct op_test *test)
{
    for (int i = 0; i < test->blocks; i++) {
        free(test->host[i]);
        if (test->device[i]) test->dev->table->free(test->dev, test->device[i], test->bytes[i]);
    }
    test->blocks = 0;
}

/* Remembers the memory for op_test_end. */
static void keep(struct op_test *test, void *host, void *device, size_t bytes)
{
    if (test->blocks == OP_TEST_BLOCKS) fail_msg("a test made more than %d tensors", OP_TEST_BLOCKS);
    test->host[test->blocks] = host;
    test->device[test->blocks] = device;
    test->bytes[test->blocks++] = bytes;
}

static void *host_memory(struct op_test *test, size_t bytes)
{
    void *memory = calloc(1, bytes > 0 ? bytes : 1);
    assert_non_null(memory);
    keep(test, memory, NULL, 0);
    return memory;
}

double *op_doubles(struct op_test *test, int64_t n)
{
    return host_memory(test, (size_t)n * sizeof(double));
}

int64_t *op_integers(struct op_test *test, int64_t n)
{
    return host_memory(test, (size_t)n * sizeof(int64_t));
}

/* SplitMix64 (Steele, Lea & Flood 2014). */
double op_uniform(struct op_test *test, double low, double high)
{
    uint64_t z = test->random += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    return low + (high - low) * ((double)(z >> 11) * 0x1p-53);
}

double op_round(enum dtype dtype, double x)
{
    if (dtype == DT_I32 || dtype == DT_I64) return floor(x);
    if (dtype == DT_F32 || !isfinite(x) || x == 0) return (double)(float)x;
    int exponent = 0;
    const double fraction = frexp((double)(float)x, &exponent); /* 8 significant bits, ties to even */
    return ldexp(rint(ldexp(fraction, 8)), exponent - 8);
}

/* Element i of the bytes of a tensor, as double. */
static double element(const void *bytes, enum dtype dtype, int64_t i)
{
    switch (dtype) {
    case DT_F32:
        return (double)((const float *)bytes)[i];
    case DT_BF16: {
        const uint32_t bits = (uint32_t)((const uint16_t *)bytes)[i] << 16;
        float x;
        memcpy(&x, &bits, sizeof x);
        return (double)x;
    }
    case DT_I32:
        return (double)((const int32_t *)bytes)[i];
    default:
        return (double)((const int64_t *)bytes)[i];
    }
}

/* Writes a value that op_round has already made exact. */
static void set_element(void *bytes, enum dtype dtype, int64_t i, double value)
{
    const float narrow = (float)value;
    uint32_t bits;
    memcpy(&bits, &narrow, sizeof bits);
    switch (dtype) {
    case DT_F32:
        ((float *)bytes)[i] = narrow;
        break;
    case DT_BF16:
        ((uint16_t *)bytes)[i] = (uint16_t)(bits >> 16);
        break;
    case DT_I32:
        ((int32_t *)bytes)[i] = (int32_t)value;
        break;
    default:
        ((int64_t *)bytes)[i] = (int64_t)value;
        break;
    }
}

/* Device memory for `shape`, filled with its bytes from the host. */
static struct tensor on_device(struct op_test *test, struct tensor shape, const void *bytes)
{
    const size_t size = tensor_bytes(shape) > 0 ? tensor_bytes(shape) : 1;
    void *data = NULL;
    op_ok(test->dev->table->alloc(test->dev, size, &data));
    keep(test, NULL, data, size);
    shape.data = data;
    if (tensor_bytes(shape) > 0) op_ok(test->dev->table->upload(test->dev, data, bytes, tensor_bytes(shape)));
    return shape;
}

struct op_tensor op_values(struct op_test *test, struct tensor shape, const double *values)
{
    const int64_t n = tensor_elems(shape);
    void *bytes = host_memory(test, tensor_bytes(shape));
    struct op_tensor out = {.v = op_doubles(test, n)};
    for (int64_t i = 0; i < n; i++) {
        out.v[i] = op_round(shape.dtype, values ? values[i] : 0);
        set_element(bytes, shape.dtype, i, out.v[i]);
    }
    out.t = on_device(test, shape, bytes);
    return out;
}

struct op_tensor op_random(struct op_test *test, struct tensor shape, double low, double high)
{
    const int64_t n = tensor_elems(shape);
    double *values = op_doubles(test, n);
    for (int64_t i = 0; i < n; i++)
        values[i] = op_uniform(test, low, high);
    return op_values(test, shape, values);
}

struct tensor op_values_i64(struct op_test *test, const int64_t *values, int64_t n)
{
    return on_device(test, tensor_1d(NULL, DT_I64, n), values);
}

/* The tensor's bytes, on the host. */
static void *read_bytes(struct op_test *test, struct tensor t)
{
    void *bytes = host_memory(test, tensor_bytes(t));
    op_ok(test->dev->table->sync(test->dev));
    if (tensor_bytes(t) > 0) op_ok(test->dev->table->download(test->dev, bytes, t.data, tensor_bytes(t)));
    return bytes;
}

double *op_read(struct op_test *test, struct tensor t)
{
    const void *bytes = read_bytes(test, t);
    double *values = op_doubles(test, tensor_elems(t));
    for (int64_t i = 0; i < tensor_elems(t); i++)
        values[i] = element(bytes, t.dtype, i);
    return values;
}

int64_t *op_read_i64(struct op_test *test, struct tensor t)
{
    assert_int_equal(t.dtype, DT_I64);
    return read_bytes(test, t);
}

double op_bound(enum dtype dtype)
{
    return dtype == DT_BF16 ? 4e-3 : 2e-6; /* bf16: half a unit in the last place is up to 2^-8 = 3.9e-3 */
}

static void compare(const char *what, enum dtype dtype, const double *got, const double *want, int64_t n,
                    double bound)
{
    double squares = 0;
    for (int64_t i = 0; i < n; i++)
        squares += want[i] * want[i];
    const double rms = n > 0 ? sqrt(squares / (double)n) : 0;
    for (int64_t i = 0; i < n; i++) {
        const double error = fabs(got[i] - want[i]);
        if (!(error <= bound * (fabs(want[i]) + rms))) {
            fail_msg("%s (%s): element %lld of %lld is %.9g, expected %.9g: error %.3g of size %.3g, bound %.3g",
                     what, dtype_name(dtype), (long long)i, (long long)n, got[i], want[i], error, fabs(want[i]) + rms,
                     bound);
        }
    }
}

void op_expect(struct op_test *test, const char *what, struct tensor t, const double *want, double bound)
{
    compare(what, t.dtype, op_read(test, t), want, tensor_elems(t), bound);
}

void op_expect_exact(struct op_test *test, const char *what, struct tensor t, const double *want)
{
    const double *got = op_read(test, t);
    for (int64_t i = 0; i < tensor_elems(t); i++) {
        if (!(got[i] == want[i])) {
            fail_msg("%s (%s): element %lld is %.17g, expected exactly %.17g", what, dtype_name(t.dtype),
                     (long long)i, got[i], want[i]);
        }
    }
}

void op_expect_gradient(struct op_test *test, const char *what, struct tensor t, const double *base, double *x,
                        op_loss *loss, const void *ctx, double bound)
{
    const int64_t n = tensor_elems(t);
    const int64_t samples = n < GRADIENT_SAMPLES ? n : GRADIENT_SAMPLES;
    const double *all = op_read(test, t);
    double *got = op_doubles(test, samples), *want = op_doubles(test, samples);
    for (int64_t k = 0; k < samples; k++) {
        const int64_t i = samples == n ? k : k * (n - 1) / (samples - 1); /* the first and the last are among them */
        const double kept = x[i], h = GRADIENT_STEP * fmax(1, fabs(kept));
        x[i] = kept + h;
        const double above = loss(ctx);
        x[i] = kept - h;
        const double below = loss(ctx);
        x[i] = kept;
        got[k] = all[i];
        want[k] = (above - below) / (2 * h) + (base ? base[i] : 0);
    }
    compare(what, t.dtype, got, want, samples, bound);
}

void op_run_on_threads(struct op_test *test, const char *what, op_run *run, const void *ctx,
                       const struct tensor *outputs, int n_outputs)
{
    enum { OUTPUTS_MAX = 8 };
    void *before[OUTPUTS_MAX], *first[OUTPUTS_MAX];
    assert_true(n_outputs > 0 && n_outputs <= OUTPUTS_MAX);
    for (int i = 0; i < n_outputs; i++)
        before[i] = read_bytes(test, outputs[i]);
    for (int threads = 1; threads <= MAX_THREADS; threads++) {
        for (int i = 0; i < n_outputs; i++) {
            if (tensor_bytes(outputs[i]) == 0) continue;
            op_ok(test->dev->table->upload(test->dev, outputs[i].data, before[i], tensor_bytes(outputs[i])));
        }
        test->dev->threads = threads;
        op_ok(run(test->dev, ctx));
        for (int i = 0; i < n_outputs; i++) {
            void *now = read_bytes(test, outputs[i]);
            if (threads == 1) first[i] = now;
            if (memcmp(now, first[i], tensor_bytes(outputs[i])) != 0) {
                fail_msg("%s: output %d on %d threads is not bit for bit that on 1", what, i, threads);
            }
        }
    }
}

void op_ok(int rc)
{
    if (rc != 0) fail_msg("%s: %s\n%s", err_name(rc), err_message(), err_trace_text());
}

void op_refused(int rc, const char *text)
{
    if (rc != ERR_BUG || !strstr(err_message(), text)) {
        fail_msg("expected ERR_BUG naming \"%s\", got %s: %s", text, err_name(rc), err_message());
    }
    err_clear();
}
