/* The emulated device itself: its properties, its memory, errors and faults.
 *
 * Device memory is the host's, filled with bytes 0xff, NaN as f32 and bf16, since CUDA's holds no values either. What
 * is written just past a piece of it is found when something waits for the device; AddressSanitizer, where it is on,
 * finds reads, too, at once, and all uses after cudaFree.
 *
 * The environment variable CUDA_EMU_DEVICES is the number of devices, 8 without it.
 *
 * Threads: any. As CUDA documents it, each has its own current device, 0 at first, and its own last error. */
#include "emu.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <map>
#include <vector>

enum { MEMORY_ALIGN = 256, MEMORY_GUARD_BYTES = 1024 };
static const size_t memory_total_bytes = (size_t)16 << 30;

static thread_local cudaError_t last_error = cudaSuccess;
static thread_local int device_now;
static char fault_text[1024]; /* empty: the device is well */
static size_t memory_used_bytes;

static std::map<const char *, size_t> &allocations()
{
    static std::map<const char *, size_t> bytes; /* by address */
    return bytes;
}

/* ---- errors ---- */

bool emu_has_fault()
{
    const emu_held held(emu_mutex);
    return fault_text[0] != '\0';
}

void emu_device_fault(const char *format, ...)
{
    const emu_held held(emu_mutex);
    if (emu_has_fault()) return;
    va_list args;
    va_start(args, format);
    vsnprintf(fault_text, sizeof fault_text, format, args);
    va_end(args);
}

cudaError_t emu_error(cudaError_t error)
{
    if (emu_has_fault()) error = cudaErrorLaunchFailure;
    if (error != cudaSuccess && error != cudaErrorNotReady) last_error = error;
    return error;
}

cudaError_t cudaGetLastError()
{
    const cudaError_t error = emu_has_fault() ? cudaErrorLaunchFailure : last_error;
    last_error = cudaSuccess;
    return error;
}

cudaError_t cudaPeekAtLastError()
{
    return emu_has_fault() ? cudaErrorLaunchFailure : last_error;
}

#define EMU_ERRORS(X)                                                                                 \
    X(cudaSuccess, "no error")                                                                        \
    X(cudaErrorInvalidValue, "invalid argument")                                                      \
    X(cudaErrorMemoryAllocation, "out of memory")                                                     \
    X(cudaErrorInvalidConfiguration, "invalid configuration argument")                                \
    X(cudaErrorNoDevice, "no CUDA-capable device is detected")                                        \
    X(cudaErrorInvalidDevice, "invalid device ordinal")                                               \
    X(cudaErrorInvalidResourceHandle, "invalid resource handle")                                      \
    X(cudaErrorNotReady, "device not ready")                                                          \
    X(cudaErrorLaunchFailure, fault_text)                                                             \
    X(cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing")          \
    X(cudaErrorStreamCaptureInvalidated, "operation failed due to a previous error during capture")   \
    X(cudaErrorStreamCaptureMerge, "operation would result in a merge of separate capture sequences") \
    X(cudaErrorStreamCaptureIsolation, "dependency created on uncaptured work in another stream")     \
    X(cudaErrorStreamCaptureImplicit,                                                                 \
      "operation would make the legacy stream depend on a capturing blocking stream")                 \
    X(cudaErrorCapturedEvent, "operation not permitted on an event last recorded in a capturing stream")

const char *cudaGetErrorName(cudaError_t error)
{
#define X(name, text) \
    if (error == name) return #name;
    EMU_ERRORS(X)
#undef X
    return "unknown error";
}

const char *cudaGetErrorString(cudaError_t error)
{
#define X(name, text) \
    if (error == name) return text;
    EMU_ERRORS(X)
#undef X
    return "unknown error";
}

/* ---- devices ---- */

cudaError_t cudaGetDeviceCount(int *count)
{
    const char *wanted = getenv("CUDA_EMU_DEVICES");
    *count = wanted ? (int)strtol(wanted, nullptr, 10) : 8;
    return emu_error(*count > 0 ? cudaSuccess : cudaErrorNoDevice);
}

cudaError_t cudaSetDevice(int device)
{
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess) return error;
    if (device < 0 || device >= count) return emu_error(cudaErrorInvalidDevice);
    device_now = device;
    return emu_error(cudaSuccess);
}

int emu_device()
{
    return device_now;
}

cudaError_t cudaGetDevice(int *device)
{
    *device = device_now;
    return emu_error(cudaSuccess);
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *prop, int device)
{
    (void)device;
    *prop = {};
    snprintf(prop->name, sizeof prop->name, "an emulated GPU on the CPU");
    prop->totalGlobalMem = memory_total_bytes;
    prop->sharedMemPerBlockOptin = emu_shared_max_bytes;
    prop->major = 9;
    prop->multiProcessorCount = 4;
    return emu_error(cudaSuccess);
}

cudaError_t cudaDriverGetVersion(int *version)
{
    *version = 13000;
    return emu_error(cudaSuccess);
}

cudaError_t cudaRuntimeGetVersion(int *version)
{
    return cudaDriverGetVersion(version);
}

cudaError_t cudaDeviceGetPCIBusId(char *text, int text_bytes, int device)
{
    snprintf(text, (size_t)text_bytes, "0000:%02x:00.0", (unsigned)device);
    return emu_error(cudaSuccess);
}

cudaError_t cudaDeviceReset()
{
    const emu_held held(emu_mutex);
    emu_drop_all();
    fault_text[0] = '\0';
    last_error = cudaSuccess;
    return cudaSuccess;
}

/* ---- memory ---- */

bool emu_on_device(const void *data, size_t bytes)
{
    const emu_held held(emu_mutex);
    const char *at = static_cast<const char *>(data);
    auto next = allocations().upper_bound(at);
    if (next == allocations().begin()) return false;
    --next;
    const size_t offset = (size_t)(at - next->first);
    return offset <= next->second && bytes <= next->second - offset;
}

void emu_check_memory()
{
    const emu_held held(emu_mutex);
    for (const auto &one : allocations()) {
        const char *const guard = one.first + one.second;
        if (sanitizer_forbids(guard)) continue; /* it watches by itself */
        for (int i = 0; i < MEMORY_GUARD_BYTES; i++)
            if (guard[i] != (char)0xff) {
                emu_device_fault("a kernel wrote %d bytes past the end of %zu bytes of device memory", i, one.second);
                break;
            }
    }
}

cudaError_t cudaMalloc(void **data, size_t bytes)
{
    *data = nullptr;
    const cudaError_t forbidden = emu_forbid_capture();
    if (forbidden != cudaSuccess) return forbidden;
    if (bytes == 0) return emu_error(cudaSuccess);
    const emu_held held(emu_mutex);
    if (bytes > memory_total_bytes - memory_used_bytes ||
        posix_memalign(data, MEMORY_ALIGN, bytes + MEMORY_GUARD_BYTES) != 0)
        return emu_error(cudaErrorMemoryAllocation);
    memset(*data, 0xff, bytes + MEMORY_GUARD_BYTES);
    sanitizer_forbid(static_cast<char *>(*data) + bytes, MEMORY_GUARD_BYTES);
    allocations()[static_cast<char *>(*data)] = bytes;
    memory_used_bytes += bytes;
    return emu_error(cudaSuccess);
}

cudaError_t cudaFree(void *data)
{
    const cudaError_t forbidden = emu_forbid_capture();
    if (forbidden != cudaSuccess) return forbidden;
    if (!data) return emu_error(cudaSuccess);
    emu_finish_all();
    const emu_held held(emu_mutex);
    emu_check_memory();
    const auto found = allocations().find(static_cast<char *>(data));
    if (found == allocations().end()) return emu_error(cudaErrorInvalidValue);
    memory_used_bytes -= found->second;
    sanitizer_forget(found->first + found->second, MEMORY_GUARD_BYTES);
    allocations().erase(found);
    free(data);
    return emu_error(cudaSuccess);
}

cudaError_t cudaMallocHost(void **data, size_t bytes)
{
    const cudaError_t forbidden = emu_forbid_capture();
    if (forbidden != cudaSuccess) return forbidden;
    *data = malloc(bytes > 0 ? bytes : 1);
    return emu_error(*data ? cudaSuccess : cudaErrorMemoryAllocation);
}

cudaError_t cudaFreeHost(void *data)
{
    const cudaError_t forbidden = emu_forbid_capture();
    if (forbidden != cudaSuccess) return forbidden;
    emu_finish_all();
    free(data);
    return emu_error(cudaSuccess);
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes)
{
    const emu_held held(emu_mutex);
    *free_bytes = memory_total_bytes - memory_used_bytes;
    *total_bytes = memory_total_bytes;
    return emu_error(cudaSuccess);
}

/* Both sides are looked at when the copy runs, which may be long after the call. */
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream)
{
    const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    if (kind != cudaMemcpyDefault &&
        (to_device != emu_on_device(to, bytes) || from_device != emu_on_device(from, bytes)))
        return emu_error(cudaErrorInvalidValue);
    return cuda_emu_queue(stream, [=] {
        memmove(to, from, bytes);
        return true;
    });
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind)
{
    const cudaError_t forbidden = emu_forbid_capture();
    if (forbidden != cudaSuccess) return forbidden;
    return cudaMemcpyAsync(to, from, bytes, kind, nullptr);
}

cudaError_t cudaMemsetAsync(void *data, int value, size_t bytes, cudaStream_t stream)
{
    if (!emu_on_device(data, bytes)) return emu_error(cudaErrorInvalidValue);
    return cuda_emu_queue(stream, [=] {
        memset(data, value, bytes);
        return true;
    });
}

cudaError_t cudaMemset(void *data, int value, size_t bytes)
{
    const cudaError_t forbidden = emu_forbid_capture();
    if (forbidden != cudaSuccess) return forbidden;
    return cudaMemsetAsync(data, value, bytes, nullptr);
}
