/* How the emulation runs CUDA on the CPU: what the stand-in headers, the sources in tests/cuda_emu and its tests share.
 *
 * A launch is queued on its stream, and runs when something waits for that stream. One block runs at a time. Its threads
 * run one after another on one fiber; only a thread that waits in a barrier or for the other lanes of its warp keeps its
 * fiber, and the next thread gets a new one, so that a kernel without barriers costs no switches. In which order blocks
 * and threads run changes from launch to launch and from barrier to barrier, by a fixed rule: a kernel that needs some
 * order fails in one of them, and the same way each time.
 *
 * A fault (a barrier that some threads never reach, a write past shared memory, lanes missing from a warp primitive)
 * ends the launch; its description becomes the text of cudaErrorLaunchFailure, which all later calls return until
 * cudaDeviceReset, as with a real device's faults.
 *
 * Threads: any, as with CUDA; the default stream's work is run by the thread that queues it. */
#ifndef CUDA_EMU_H
#define CUDA_EMU_H

#include <functional>
#include <tuple>
#include <utility>

/* Where in the sources a primitive was called. */
struct cuda_emu_place {
    const char *file;
    int line;
};

/* ---- launching (block.cc) ---- */

typedef std::function<void()> cuda_emu_body;

/* Checks a launch and queues it. Errors are left for cudaGetLastError, as CUDA's are. */
void cuda_emu_queue_kernel(const void *kernel, const char *name, dim3 grid, dim3 block, size_t shared_bytes,
                           cudaStream_t stream, cuda_emu_body body);

template <class... Params, class... Args>
void cuda_emu_launch(void (*kernel)(Params...), const char *name, dim3 grid, dim3 block, size_t shared_bytes,
                     cudaStream_t stream, Args... args)
{
    const std::tuple<Params...> held(static_cast<Params>(args)...);
    cuda_emu_queue_kernel(reinterpret_cast<const void *>(kernel), name, grid, block, shared_bytes, stream,
                          [kernel, held] { std::apply(kernel, held); });
}

/* ---- for the primitives: called from inside kernels only ---- */

/* Ends the launch with this message, behind which kernel, block and thread are named. */
[[noreturn]] void cuda_emu_fault(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* __syncthreads. */
void cuda_emu_barrier(cuda_emu_place place);
/* Every lane named in `mask` arrives with its own `arg`; the last to come runs meet(args, mask), args[i] being lane i's,
 * and then all go on. */
void cuda_emu_meet(const char *what, unsigned mask, void *arg, void (*meet)(void *const *args, unsigned mask),
                   cuda_emu_place place);
/* The calling thread's asynchronous copies (cp.async): `bytes` from `from`, then zeros up to `total_bytes`. Copies are
 * grouped by commit; wait returns when at most `pending` groups of this thread are not done. In one launch they are done
 * when they are asked for, in the next when they are waited for: both may be seen on a GPU. */
void cuda_emu_copy_later(void *to, const void *from, size_t bytes, size_t total_bytes);
void cuda_emu_copy_commit();
void cuda_emu_copy_wait(size_t pending);
/* The calling thread's number in its warp. */
int cuda_emu_lane();
void *cuda_emu_dynamic_shared();

/* A block's static shared memory: at the start of every block it holds no values (bytes 0xff, which are NaN), and the
 * guard zones on both sides are checked at its end. */
void cuda_emu_enter_shared(const char *name, void *data, size_t bytes, size_t guard_bytes, unsigned long &block);

template <class T> class cuda_emu_shared
{
    static constexpr size_t guard_bytes = 1024;
    alignas(128) unsigned char before[guard_bytes];
    alignas(128) T data;
    unsigned char after[guard_bytes];
    unsigned long block = 0;

  public:
    T &enter(const char *name)
    {
        cuda_emu_enter_shared(name, &data, sizeof data, guard_bytes, block);
        return data;
    }
};

/* ---- streams (stream.cc) ---- */

/* Queues work on a stream, or records it where the stream is captured. It returns true when it is done, false to be called
 * again later. Errors are those of a launch. */
cudaError_t cuda_emu_queue(cudaStream_t stream, std::function<bool()> work);

#endif
