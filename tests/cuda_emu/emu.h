/* Private to the sources of the emulation: errors, and what AddressSanitizer is told about fibers. */
#ifndef CUDA_EMU_PRIVATE_H
#define CUDA_EMU_PRIVATE_H

#include <cuda_runtime.h>

#include <mutex>

/* The most dynamic shared memory that a block may be given, as on sm_90. */
constexpr size_t emu_shared_max_bytes = 227 << 10;

/* ---- threads ---- */

/* What the emulation knows is looked at and changed with this held. Nobody waits for a stream meanwhile, but for what runs
 * inside of work. */
inline std::recursive_mutex emu_mutex;
typedef std::lock_guard<std::recursive_mutex> emu_held;

/* The calling thread's current device. */
int emu_device();

/* ---- errors (runtime.cc) ---- */

/* Keeps an error for this thread's cudaGetLastError and returns it, or the device's fault if there is one. */
cudaError_t emu_error(cudaError_t error);
/* Makes this the text of cudaErrorLaunchFailure, which everything returns from now on. */
void emu_device_fault(const char *format, ...) __attribute__((format(printf, 1, 2)));
bool emu_has_fault();

/* True when [data, data + bytes) lies in one piece of device memory. */
bool emu_on_device(const void *data, size_t bytes);
/* Faults when something was written just past a piece of device memory. */
void emu_check_memory();

/* ---- streams (stream.cc) ---- */

/* Runs everything that is queued, on all streams. */
void emu_finish_all();
/* Runs what a call on the default stream waits for: all streams but those made with cudaStreamNonBlocking. */
void emu_finish_blocking();
/* Runs at most one item of each stream: for those who wait for something else meanwhile. */
void emu_step_all();
/* Forgets what is queued, and ends all captures. */
void emu_drop_all();
/* For calls that are not permitted to this thread during a capture: then it invalidates such captures and is an error. */
cudaError_t emu_forbid_capture();

/* ---- stacks that AddressSanitizer should know of ---- */

struct sanitizer_stack {
    const void *bottom;
    size_t bytes;
};

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>

/* Before a switch to the stack given. */
static inline void sanitizer_leave(void **fake_stack, const sanitizer_stack &to)
{
    __sanitizer_start_switch_fiber(fake_stack, to.bottom, to.bytes);
}

/* After the switch; `from` is told the stack that was left. */
static inline void sanitizer_enter(void *fake_stack, sanitizer_stack *from)
{
    __sanitizer_finish_switch_fiber(fake_stack, &from->bottom, &from->bytes);
}

/* This memory is anybody's again: a stack whose frames are never returned to, or memory to be given back. */
static inline void sanitizer_forget(const void *begin, size_t bytes)
{
    __asan_unpoison_memory_region(begin, bytes);
}

/* Nobody is to touch this memory. */
static inline void sanitizer_forbid(const void *begin, size_t bytes)
{
    __asan_poison_memory_region(begin, bytes);
}

static inline bool sanitizer_forbids(const void *at)
{
    return __asan_address_is_poisoned(at);
}
#else
static inline void sanitizer_leave(void **, const sanitizer_stack &)
{
}

static inline void sanitizer_enter(void *, sanitizer_stack *)
{
}

static inline void sanitizer_forget(const void *, size_t)
{
}

static inline void sanitizer_forbid(const void *, size_t)
{
}

static inline bool sanitizer_forbids(const void *)
{
    return false;
}
#endif

#endif
