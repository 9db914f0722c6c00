/* Tensors and devices: the two things every op takes.
 *
 * A tensor is a view: it owns nothing, is always row-major and contiguous, and is passed by value. A device is one CPU
 * rank or one GPU with the table of ops that its backend implements. */
#ifndef TATARA_TENSOR_H
#define TATARA_TENSOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum dtype { DT_F32, DT_BF16, DT_I32, DT_I64, DT_COUNT };

static inline size_t dtype_bytes(enum dtype dtype)
{
    return dtype == DT_BF16 ? 2 : dtype == DT_I64 ? 8 : 4;
}

const char *dtype_name(enum dtype dtype); /* "f32", "bf16", "i32", "i64" */

#define TENSOR_MAX_DIMS 4

struct tensor {
    void *data; /* in the memory of the device that the ops run on */
    enum dtype dtype;
    int ndim;                       /* 0 means: no tensor (an optional argument left out) */
    int64_t shape[TENSOR_MAX_DIMS]; /* row-major; entries past ndim are 1 */
};

/* The absent tensor, for optional arguments. */
#define TENSOR_NONE ((struct tensor){.data = NULL, .dtype = DT_F32, .ndim = 0, .shape = {0}})

static inline bool tensor_given(struct tensor t)
{
    return t.ndim > 0;
}

static inline struct tensor tensor_1d(void *data, enum dtype dtype, int64_t n)
{
    return (struct tensor){.data = data, .dtype = dtype, .ndim = 1, .shape = {n, 1, 1, 1}};
}

static inline struct tensor tensor_2d(void *data, enum dtype dtype, int64_t rows, int64_t cols)
{
    return (struct tensor){.data = data, .dtype = dtype, .ndim = 2, .shape = {rows, cols, 1, 1}};
}

static inline struct tensor tensor_3d(void *data, enum dtype dtype, int64_t a, int64_t b, int64_t c)
{
    return (struct tensor){.data = data, .dtype = dtype, .ndim = 3, .shape = {a, b, c, 1}};
}

/* Number of elements; 0 for TENSOR_NONE. */
static inline int64_t tensor_elems(struct tensor t)
{
    return t.ndim == 0 ? 0 : t.shape[0] * t.shape[1] * t.shape[2] * t.shape[3];
}

static inline size_t tensor_bytes(struct tensor t)
{
    return (size_t)tensor_elems(t) * dtype_bytes(t.dtype);
}

/* The flat range [begin, begin + n) of t's elements, as a 1-D tensor. A NULL data pointer (an arena being measured)
 * stays NULL. */
static inline struct tensor tensor_range(struct tensor t, int64_t begin, int64_t n)
{
    char *data = t.data ? (char *)t.data + (size_t)begin * dtype_bytes(t.dtype) : NULL;
    return tensor_1d(data, t.dtype, n);
}

/* Rows [begin, begin + n) of a tensor's first dimension, the other dimensions kept. */
static inline struct tensor tensor_rows(struct tensor t, int64_t begin, int64_t n)
{
    const int64_t row = t.shape[1] * t.shape[2] * t.shape[3];
    struct tensor out = t;
    out.data = t.data ? (char *)t.data + (size_t)(begin * row) * dtype_bytes(t.dtype) : NULL;
    out.shape[0] = n;
    return out;
}

enum device_kind { DEVICE_CPU, DEVICE_CUDA };

struct device_table; /* ops.h */

/* One rank's compute device. Not safe for use from several threads at once. */
struct device {
    enum device_kind kind;
    const struct device_table *table;
    int threads;            /* CPU: OpenMP threads of this rank */
    void *workspace;        /* set by the owner of the device before the first op: as much as its table wants */
    size_t workspace_bytes; /* of device memory, for the backend's own use within one op */
    void *state;            /* the backend's own: library handles, caches of prepared kernels, streams */
};

#endif
