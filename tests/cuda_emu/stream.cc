/* Streams and events of the emulation, which run as late as CUDA allows.
 *
 * A stream is a queue. Its work runs when the host waits for that stream, or for an event in it; other streams stand
 * still meanwhile, but for what the awaited work itself waits for through events. So a result that needs an event that
 * nobody records, or waits for, is not there yet when it is used, and a buffer that is reused too early is overwritten
 * before its reader ran.
 *
 * Work may say that it is not done (a collective that waits for other ranks); then the other streams move on, as they
 * would on a GPU, and it is asked again.
 *
 * The default stream is run at once: it waits for all streams that do not opt out, and they for it.
 *
 * While a stream is captured, what is queued to it is kept in a graph, with a copy of its arguments, and does not run;
 * a launch of the graph queues all of it, in its order. As CUDA documents it, what is not permitted meanwhile invalidates
 * the capture, so that all that uses the stream fails until the capture is ended, which then fails as well. Permitted are
 * only launches, asynchronous copies and the like on the captured stream, and events within it; to wait for the device,
 * to query it, and to take or give back memory is not. Beyond what CUDA refuses, captures cannot be joined by other
 * streams, nor hold launches of other graphs. With the environment variable CUDA_EMU_INVALIDATE set, every capture is
 * invalidated by the first work in it, as by a library that does what is not permitted.
 *
 * Threads: any. Work is run by whoever waits, one item at a time with the emulation held, so that of several threads that
 * wait each gets on; what only one of them can run says to others that it is not done. As CUDA documents it, calls that a
 * capture forbids are forbidden to the thread that began it; to all with cudaStreamCaptureModeGlobal; to none with
 * cudaStreamCaptureModeRelaxed. A stream is of the device that was its maker's current one, and takes work of threads
 * alone whose current device it is: CUDA refuses launches of others, and lets their copies take memory on a device that
 * they do not use. */
#include "emu.h"

#include <sched.h>
#include <stdlib.h>
#include <time.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <thread>
#include <vector>

/* A place in a stream's queue. */
struct mark {
    cuda_emu_stream *stream;
    bool reached;
    double time_ms;
};

/* Work, or the wait for a mark. */
struct item {
    std::function<bool()> work;
    std::shared_ptr<mark> wait;
};

typedef std::vector<std::function<bool()>> recorded;

struct capture {
    recorded work;
    bool invalid;
    std::thread::id thread; /* that began it */
    cudaStreamCaptureMode mode;
};

struct cuda_emu_stream {
    std::deque<item> items;
    bool blocking;
    int device;
    std::shared_ptr<capture> captured; /* null: work runs */
};

struct cuda_emu_event {
    std::shared_ptr<mark> last; /* null until it is recorded */
    bool timing;
    std::weak_ptr<capture> inside; /* the capture that it was last recorded in, while that lasts */
    bool from_capture;             /* it was last recorded in one */
};

struct cuda_emu_graph {
    recorded work;
};

struct cuda_emu_graph_exec {
    std::shared_ptr<const recorded> work; /* launches that have not run hold it, too */
};

static std::vector<cuda_emu_stream *> &streams()
{
    static std::vector<cuda_emu_stream *> all;
    return all;
}

static double now_ms()
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

/* Runs the stream's first item, or what it waits for; after a fault items are only dropped. False when nothing could be
 * done. The caller holds the emulation. */
static bool step(cuda_emu_stream *stream)
{
    if (stream->items.empty()) return false;
    if (!emu_has_fault()) {
        item &first = stream->items.front();
        if (first.wait && !first.wait->reached) return step(first.wait->stream);
        if (first.work && !first.work()) return false;
    }
    stream->items.pop_front();
    return true;
}

void emu_step_all()
{
    bool moved = false;
    {
        const emu_held held(emu_mutex);
        for (cuda_emu_stream *stream : streams())
            moved = step(stream) || moved;
    }
    if (!moved) sched_yield();
}

/* Runs the stream that next() names, until there is none. When it stands still, because ranks wait for each other, all
 * others move. The emulation is let go of between items. */
template <class Next> static void run_while(Next next)
{
    for (;;) {
        {
            const emu_held held(emu_mutex);
            cuda_emu_stream *const stream = next();
            if (!stream) return;
            if (step(stream)) continue;
        }
        emu_step_all();
    }
}

static void finish(cuda_emu_stream *stream)
{
    run_while([stream] { return stream->items.empty() ? nullptr : stream; });
}

/* The youngest first: it is the one that others are least likely to have waited for. */
template <class Wanted> static void finish_those(Wanted wanted)
{
    run_while([wanted]() -> cuda_emu_stream * {
        for (size_t i = streams().size(); i > 0; i--)
            if (!streams()[i - 1]->items.empty() && wanted(streams()[i - 1])) return streams()[i - 1];
        return nullptr;
    });
}

void emu_finish_all()
{
    finish_those([](const cuda_emu_stream *) { return true; });
}

void emu_finish_blocking()
{
    finish_those([](const cuda_emu_stream *stream) { return stream->blocking; });
}

void emu_drop_all()
{
    const emu_held held(emu_mutex);
    for (cuda_emu_stream *stream : streams()) {
        stream->items.clear();
        stream->captured = nullptr;
    }
}

/* ---- captures ---- */

static cudaError_t invalidate(capture &one, cudaError_t error)
{
    one.invalid = true;
    return emu_error(error);
}

static bool forbids(const capture &one)
{
    return one.mode == cudaStreamCaptureModeGlobal ||
           (one.mode == cudaStreamCaptureModeThreadLocal && one.thread == std::this_thread::get_id());
}

cudaError_t emu_forbid_capture()
{
    const emu_held held(emu_mutex);
    bool any = false;
    for (cuda_emu_stream *stream : streams())
        if (stream->captured && forbids(*stream->captured)) any = stream->captured->invalid = true;
    return any ? emu_error(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}

/* The default stream waits for a blocking stream, which what is captured never lets it. */
static cudaError_t forbid_blocking_capture()
{
    const emu_held held(emu_mutex);
    for (cuda_emu_stream *stream : streams())
        if (stream->captured && stream->blocking)
            return invalidate(*stream->captured, cudaErrorStreamCaptureImplicit);
    return cudaSuccess;
}

static cudaError_t record(capture &into, std::function<bool()> work)
{
    if (into.work.empty() && getenv("CUDA_EMU_INVALIDATE")) into.invalid = true;
    if (into.invalid) return emu_error(cudaErrorStreamCaptureInvalidated);
    into.work.push_back(std::move(work));
    return emu_error(cudaSuccess);
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode)
{
    const emu_held held(emu_mutex);
    if (!stream) return emu_error(cudaErrorStreamCaptureUnsupported);
    if (stream->captured) return emu_error(cudaErrorInvalidValue);
    stream->captured = std::make_shared<capture>(capture{{}, false, std::this_thread::get_id(), mode});
    return emu_error(cudaSuccess);
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph)
{
    const emu_held held(emu_mutex);
    *graph = nullptr;
    if (!stream || !stream->captured) return emu_error(cudaErrorInvalidValue);
    const std::shared_ptr<capture> done = std::move(stream->captured);
    stream->captured = nullptr;
    if (done->invalid) return emu_error(cudaErrorStreamCaptureInvalidated);
    *graph = new cuda_emu_graph{std::move(done->work)};
    return emu_error(cudaSuccess);
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long)
{
    *exec = new cuda_emu_graph_exec{std::make_shared<const recorded>(graph->work)};
    return emu_error(cudaSuccess);
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream)
{
    const emu_held held(emu_mutex);
    if (stream && stream->captured) return invalidate(*stream->captured, cudaErrorStreamCaptureUnsupported);
    const std::shared_ptr<const recorded> work = exec->work;
    for (size_t i = 0; i < work->size(); i++)
        (void)cuda_emu_queue(stream, [work, i] { return (*work)[i](); });
    return emu_error(cudaSuccess);
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph)
{
    delete graph;
    return emu_error(cudaSuccess);
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec)
{
    delete exec;
    return emu_error(cudaSuccess);
}

/* ---- streams ---- */

cudaError_t cuda_emu_queue(cudaStream_t stream, std::function<bool()> work)
{
    if (stream) {
        const emu_held held(emu_mutex);
        if (stream->device != emu_device()) return emu_error(cudaErrorInvalidResourceHandle);
        if (stream->captured) return record(*stream->captured, std::move(work));
        stream->items.push_back({std::move(work), nullptr});
        return emu_error(cudaSuccess);
    }
    const cudaError_t error = forbid_blocking_capture();
    if (error != cudaSuccess) return error;
    emu_finish_blocking();
    for (;;) {
        {
            const emu_held held(emu_mutex);
            if (emu_has_fault() || work()) return emu_error(cudaSuccess);
        }
        sched_yield();
    }
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags)
{
    const emu_held held(emu_mutex);
    *stream = new cuda_emu_stream{{}, !(flags & cudaStreamNonBlocking), emu_device(), nullptr};
    streams().push_back(*stream);
    return emu_error(cudaSuccess);
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest)
{
    *least = *greatest = 0;
    return emu_error(cudaSuccess);
}

/* All streams are alike here. */
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int)
{
    return cudaStreamCreateWithFlags(stream, flags);
}

cudaError_t cudaStreamDestroy(cudaStream_t stream)
{
    const auto find = [stream] { return std::find(streams().begin(), streams().end(), stream); };
    {
        const emu_held held(emu_mutex);
        if (find() == streams().end()) return emu_error(cudaErrorInvalidResourceHandle);
    }
    finish(stream);
    const emu_held held(emu_mutex);
    streams().erase(find());
    delete stream;
    return emu_error(cudaSuccess);
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream)
{
    const cudaError_t forbidden = emu_forbid_capture();
    if (forbidden != cudaSuccess) return forbidden;
    if (stream)
        finish(stream);
    else
        emu_finish_blocking();
    emu_check_memory();
    return emu_error(cudaSuccess);
}

/* Who asks again and again must see it end: each question runs one item. */
cudaError_t cudaStreamQuery(cudaStream_t stream)
{
    const cudaError_t forbidden = emu_forbid_capture();
    if (forbidden != cudaSuccess) return forbidden;
    const emu_held held(emu_mutex);
    step(stream);
    return emu_error(stream->items.empty() ? cudaSuccess : cudaErrorNotReady);
}

cudaError_t cudaDeviceSynchronize()
{
    const cudaError_t forbidden = emu_forbid_capture();
    if (forbidden != cudaSuccess) return forbidden;
    emu_finish_all();
    emu_check_memory();
    return emu_error(cudaSuccess);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags)
{
    *event = new cuda_emu_event{nullptr, !(flags & cudaEventDisableTiming), {}, false};
    return emu_error(cudaSuccess);
}

cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    delete event;
    return emu_error(cudaSuccess);
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream)
{
    const emu_held held(emu_mutex);
    event->inside.reset();
    event->from_capture = stream && stream->captured;
    if (event->from_capture) { /* a place in the graph, and none in time */
        event->inside = stream->captured;
        event->last = nullptr;
        return emu_error(stream->captured->invalid ? cudaErrorStreamCaptureInvalidated : cudaSuccess);
    }
    const std::shared_ptr<mark> here = std::make_shared<mark>(mark{stream, false, 0});
    event->last = here;
    return cuda_emu_queue(stream, [here] {
        here->time_ms = now_ms();
        here->reached = true;
        return true;
    });
}

/* The host can ask nothing of a place in a graph. */
static cudaError_t forbid_captured(cudaEvent_t event)
{
    const cudaError_t forbidden = emu_forbid_capture();
    if (event->from_capture) return emu_error(cudaErrorCapturedEvent);
    return forbidden;
}

/* Within a capture only events of the same one may be waited for, and they are behind anyway; nobody else may. */
static cudaError_t wait_captured(cudaStream_t stream, cudaEvent_t event)
{
    const std::shared_ptr<capture> inside = event->inside.lock();
    if (!stream || !stream->captured)
        return inside ? invalidate(*inside, cudaErrorStreamCaptureUnsupported) : emu_error(cudaErrorCapturedEvent);
    capture &waits = *stream->captured;
    if (waits.invalid) return emu_error(cudaErrorStreamCaptureInvalidated);
    if (inside == stream->captured) return emu_error(cudaSuccess);
    if (inside) inside->invalid = true;
    return invalidate(waits, inside ? cudaErrorStreamCaptureMerge : cudaErrorStreamCaptureIsolation);
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned)
{
    if (stream) {
        const emu_held held(emu_mutex);
        if (event->from_capture || (stream->captured && event->last)) return wait_captured(stream, event);
        if (!event->last || event->last->reached) return emu_error(cudaSuccess);
        stream->items.push_back({nullptr, event->last});
        return emu_error(cudaSuccess);
    }
    return event->from_capture ? wait_captured(stream, event) : cudaEventSynchronize(event);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event)
{
    std::shared_ptr<mark> last;
    {
        const emu_held held(emu_mutex);
        const cudaError_t forbidden = forbid_captured(event);
        if (forbidden != cudaSuccess) return forbidden;
        last = event->last;
    }
    if (last) run_while([last] { return last->reached || emu_has_fault() ? nullptr : last->stream; });
    return emu_error(cudaSuccess);
}

cudaError_t cudaEventQuery(cudaEvent_t event)
{
    const emu_held held(emu_mutex);
    const cudaError_t forbidden = forbid_captured(event);
    if (forbidden != cudaSuccess) return forbidden;
    if (!event->last || event->last->reached) return emu_error(cudaSuccess);
    step(event->last->stream);
    return emu_error(event->last->reached ? cudaSuccess : cudaErrorNotReady);
}

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end)
{
    const emu_held held(emu_mutex);
    if (!start->timing || !end->timing || !start->last || !end->last)
        return emu_error(cudaErrorInvalidResourceHandle);
    if (!start->last->reached || !end->last->reached) return emu_error(cudaErrorNotReady);
    *ms = (float)(end->last->time_ms - start->last->time_ms);
    return emu_error(cudaSuccess);
}
