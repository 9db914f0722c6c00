/* The CUDA device: opening and describing it, its memory, its streams, and the table of ops made from ops.def. */
#include "attention_library.h"
#include "cuda.cuh"

#include <cublasLt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int cuda_failed(const char *file, int line, const char *call, cudaError_t error)
{
    return err_raise(ERR_DEVICE, file, line, "CUDA: %s: %s (%s)", call, cudaGetErrorString(error),
                     cudaGetErrorName(error));
}

/* What keeps this machine from running on a GPU, in one line. */
static int refuse_device(int index, int devices, cudaError_t error)
{
    int driver = 0;
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
        FAIL(ERR_DEVICE, "no NVIDIA driver is loaded on this machine; install it, or use device=cpu");
    if (error != cudaSuccess || devices == 0)
        FAIL(ERR_DEVICE, "no GPU: %s. Check nvidia-smi and CUDA_VISIBLE_DEVICES, or use device=cpu",
             cudaGetErrorString(error));
    FAIL(ERR_DEVICE, "GPU %d was asked for, and this machine shows %d (CUDA_VISIBLE_DEVICES may hide some)", index,
         devices);
}

static int ring_open(struct cuda_ring *ring)
{
    CHECK_CUDA(cudaStreamCreateWithFlags(&ring->stream, cudaStreamNonBlocking));
    for (struct cuda_slot &slot : ring->slot) {
        CHECK_CUDA(cudaMallocHost(&slot.host, CUDA_SLOT_BYTES));
        CHECK_CUDA(cudaEventCreateWithFlags(&slot.used, cudaEventDisableTiming));
    }
    return 0;
}

static void ring_close(struct cuda_ring *ring)
{
    for (struct cuda_slot &slot : ring->slot) {
        if (slot.used) (void)cudaEventDestroy(slot.used);
        if (slot.host) (void)cudaFreeHost(slot.host);
    }
    if (ring->stream) (void)cudaStreamDestroy(ring->stream);
}

/* Fills the state of a GPU that is there. */
static int open_state(struct cuda_state *state)
{
    struct cudaDeviceProp prop;
    CHECK_CUDA(cudaSetDevice(state->index));
    CHECK_CUDA(cudaGetDeviceProperties(&prop, state->index));
    if (prop.major < 8)
        FAIL(ERR_DEVICE, "%s has compute capability %d.%d; 8.0 (A100) is the least that works", prop.name, prop.major,
             prop.minor);
    state->sms = prop.multiProcessorCount;
    state->major = prop.major;
    state->minor = prop.minor;
    state->shared_max_bytes = prop.sharedMemPerBlockOptin;
    snprintf(state->name, sizeof state->name, "%s", prop.name);
    TRY(ring_open(&state->ring));
    TRY(ring_open(&state->beside));
    state->stream = state->ring.stream;
    for (cudaEvent_t &event : state->clock)
        CHECK_CUDA(cudaEventCreateWithFlags(&event, cudaEventDefault));
    return cuda_matmul_open(&state->matmul);
}

static void device_close_cuda(struct device *dev)
{
    struct cuda_state *state = cuda_state_of(dev);
    if (!state) return;
    cuda_attention_close(dev);
    cuda_matmul_close(state->matmul);
    for (cudaEvent_t event : state->clock)
        if (event) (void)cudaEventDestroy(event);
    ring_close(&state->beside);
    ring_close(&state->ring);
    free(state);
    dev->state = NULL;
}

static int device_open_cuda(struct device *dev, int index)
{
    int devices = 0;
    const cudaError_t error = cudaGetDeviceCount(&devices);
    if (error != cudaSuccess || index < 0 || index >= devices) return refuse_device(index, devices, error);
    dev->state = calloc(1, sizeof(struct cuda_state));
    if (!dev->state) FAIL(ERR_SYSTEM, "no memory for the state of the CUDA device");
    cuda_state_of(dev)->index = index;
    const int rc = open_state(cuda_state_of(dev));
    if (rc) device_close_cuda(dev);
    return rc;
}

static void device_describe_cuda(struct device *dev, char *text, size_t text_bytes)
{
    const struct cuda_state *state = cuda_state_of(dev);
    snprintf(text, text_bytes, "CUDA device %d, %s, sm_%d%d, %d SMs", state->index, state->name, state->major,
             state->minor, state->sms);
}

static void device_arithmetic_cuda(struct device *dev, char *text, size_t text_bytes)
{
    const struct cuda_state *state = cuda_state_of(dev);
    const struct attention_library *library = attention_cudnn();
    const int used = snprintf(text, text_bytes, "%s, sm_%d%d, cuBLASLt %zu", state->name, state->major, state->minor,
                              cublasLtGetVersion());
    if (library) snprintf(text + used, text_bytes - (size_t)used, ", %s %zu", library->name, library->version());
}

static int device_count(void)
{
    int devices = 0;
    return cudaGetDeviceCount(&devices) == cudaSuccess ? devices : 0;
}

static int device_identify(struct device *dev, char *text, size_t text_bytes)
{
    CHECK_CUDA(cudaDeviceGetPCIBusId(text, (int)text_bytes, cuda_state_of(dev)->index));
    return 0;
}

static int device_memory(struct device *dev, size_t *free_bytes, size_t *total_bytes)
{
    (void)dev;
    CHECK_CUDA(cudaMemGetInfo(free_bytes, total_bytes));
    return 0;
}

static void *device_queue(struct device *dev)
{
    return cuda_state_of(dev)->stream;
}

static int device_sync(struct device *dev)
{
    CHECK_CUDA(cudaStreamSynchronize(cuda_state_of(dev)->stream));
    return 0;
}

static int device_clock_mark(struct device *dev, int which)
{
    CHECK_CUDA(cudaEventRecord(cuda_state_of(dev)->clock[which], cuda_state_of(dev)->stream));
    return 0;
}

static int device_clock_s(struct device *dev, double *s)
{
    float ms = 0;
    CHECK_CUDA(cudaEventElapsedTime(&ms, cuda_state_of(dev)->clock[0], cuda_state_of(dev)->clock[1]));
    *s = 1e-3 * (double)ms;
    return 0;
}

static void device_free(struct device *dev, void *data, size_t bytes)
{
    (void)dev, (void)bytes;
    (void)cudaFree(data);
}

static int device_alloc(struct device *dev, size_t bytes, void **data)
{
    size_t available = 0, total = 0;
    *data = NULL;
    CHECK_CUDA(cudaMemGetInfo(&available, &total));
    const cudaError_t error = cudaMalloc(data, bytes > 0 ? bytes : 1);
    if (error == cudaErrorMemoryAllocation) {
        (void)cudaGetLastError(); /* else the next launch would report it */
        FAIL(ERR_DEVICE,
             "cannot get %zu bytes of GPU memory: %zu of %zu are free. Use a smaller micro-batch, or more GPUs.",
             bytes, available, total);
    }
    CHECK_CUDA(error);
    const cudaError_t cleared = cudaMemsetAsync(*data, 0, bytes > 0 ? bytes : 1, cuda_state_of(dev)->stream);
    if (cleared == cudaSuccess) return 0;
    device_free(dev, *data, bytes);
    *data = NULL;
    return cuda_failed(__FILE__, __LINE__, "cudaMemsetAsync", cleared);
}

/* ---- copies, through pinned host memory: a ring of slots, each free again when its event is reached ---- */

/* The next slot, once the copy that used it last is done. */
static int slot_next(struct cuda_ring *ring, struct cuda_slot **slot)
{
    *slot = &ring->slot[ring->next];
    ring->next = (ring->next + 1) % CUDA_SLOTS;
    CHECK_CUDA(cudaEventSynchronize((*slot)->used));
    return 0;
}

static int device_upload(struct device *dev, void *to_device, const void *from_host, size_t bytes)
{
    struct cuda_ring *ring = &cuda_state_of(dev)->ring;
    for (size_t at = 0; at < bytes; at += CUDA_SLOT_BYTES) {
        const size_t n = cuda_min(bytes - at, CUDA_SLOT_BYTES);
        struct cuda_slot *slot = NULL;
        TRY(slot_next(ring, &slot));
        memcpy(slot->host, static_cast<const char *>(from_host) + at, n);
        CHECK_CUDA(cudaMemcpyAsync(static_cast<char *>(to_device) + at, slot->host, n, cudaMemcpyHostToDevice,
                                   ring->stream));
        CHECK_CUDA(cudaEventRecord(slot->used, ring->stream));
    }
    return 0;
}

/* Queues the copies of a whole ring of pieces before it waits for the first. */
static int ring_download(struct cuda_ring *ring, void *to_host, const void *from_device, size_t bytes)
{
    struct cuda_slot *slot[CUDA_SLOTS] = {};
    for (size_t at = 0; at < bytes; at += CUDA_SLOTS * CUDA_SLOT_BYTES) {
        const size_t many = cuda_min(bytes - at, CUDA_SLOTS * CUDA_SLOT_BYTES);
        for (size_t i = 0; i * CUDA_SLOT_BYTES < many; i++) {
            const size_t from = i * CUDA_SLOT_BYTES, n = cuda_min(many - from, CUDA_SLOT_BYTES);
            TRY(slot_next(ring, &slot[i]));
            CHECK_CUDA(cudaMemcpyAsync(slot[i]->host, static_cast<const char *>(from_device) + at + from, n,
                                       cudaMemcpyDeviceToHost, ring->stream));
            CHECK_CUDA(cudaEventRecord(slot[i]->used, ring->stream));
        }
        for (size_t i = 0; i * CUDA_SLOT_BYTES < many; i++) {
            const size_t from = i * CUDA_SLOT_BYTES, n = cuda_min(many - from, CUDA_SLOT_BYTES);
            CHECK_CUDA(cudaEventSynchronize(slot[i]->used));
            memcpy(static_cast<char *>(to_host) + at + from, slot[i]->host, n);
        }
    }
    return 0;
}

static int device_download(struct device *dev, void *to_host, const void *from_device, size_t bytes)
{
    return ring_download(&cuda_state_of(dev)->ring, to_host, from_device, bytes);
}

/* A new thread's device is GPU 0, on which its first call would take memory. The ring is this function's own, since a copy
 * to memory that is not pinned goes through the driver's, of which nothing says that another thread's launches do not
 * wait for it; pinning the whole destination would keep it from all other use. */
static int device_download_beside(struct device *dev, void *to_host, const void *from_device, size_t bytes)
{
    struct cuda_state *state = cuda_state_of(dev);
    CHECK_CUDA(cudaSetDevice(state->index));
    return ring_download(&state->beside, to_host, from_device, bytes);
}

/* In the order of struct device_table, since C++17 has no designated initialisers. */
static const struct device_table cuda_table = {
    "cuda",
    device_open_cuda,
    device_close_cuda,
    device_describe_cuda,
    device_arithmetic_cuda,
    device_count,
    device_identify,
    device_memory,
    device_queue,
    device_alloc,
    device_free,
    device_upload,
    device_download,
    device_download_beside,
    device_sync,
    device_clock_mark,
    device_clock_s,
    cuda_pack_bytes,
    cuda_workspace_bytes,
    cuda_choose_attention,
    cuda_capture_begin,
    cuda_capture_end,
    cuda_graph_launch,
    cuda_graph_free,
#define OP(name, params, args) cuda_##name,
#include "ops.def"
#undef OP
};

extern "C" const struct device_table *cuda_backend(void)
{
    return &cuda_table;
}
