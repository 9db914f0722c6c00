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
 * Threads: one host thread. */
#include "emu.h"

#include <sched.h>
#include <stdlib.h>
#include <time.h>

#include <algorithm>
#include <deque>
#include <memory>
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
};

struct cuda_emu_stream {
    std::deque<item> items;
    bool blocking;
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
 * done. */
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
    for (cuda_emu_stream *stream : streams())
        moved = step(stream) || moved;
    if (!moved) sched_yield();
}

/* Runs the stream until `done`. When it stands still, because ranks wait for each other, all others move. */
template <class Done> static void run_until(cuda_emu_stream *stream, Done done)
{
    while (!done()) {
        if (step(stream)) continue;
        emu_step_all();
    }
}

static void finish(cuda_emu_stream *stream)
{
    run_until(stream, [stream] { return stream->items.empty(); });
}

/* The youngest first: it is the one that others are least likely to have waited for. */
void emu_finish_all()
{
    for (size_t i = streams().size(); i > 0; i--)
        finish(streams()[i - 1]);
}

void emu_finish_blocking()
{
    for (size_t i = streams().size(); i > 0; i--)
        if (streams()[i - 1]->blocking) finish(streams()[i - 1]);
}

void emu_drop_all()
{
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

cudaError_t emu_forbid_capture()
{
    bool any = false;
    for (cuda_emu_stream *stream : streams())
        if (stream->captured) any = stream->captured->invalid = true;
    return any ? emu_error(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}

/* The default stream waits for a blocking stream, which what is captured never lets it. */
static cudaError_t forbid_blocking_capture()
{
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

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode)
{
    if (!stream) return emu_error(cudaErrorStreamCaptureUnsupported);
    if (stream->captured) return emu_error(cudaErrorInvalidValue);
    stream->captured = std::make_shared<capture>();
    return emu_error(cudaSuccess);
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph)
{
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
    if (stream && stream->captured) return invalidate(*stream->captured, cudaErrorStreamCaptureUnsupported);
    const std::shared_ptr<const recorded> held = exec->work;
    for (size_t i = 0; i < held->size(); i++)
        (void)cuda_emu_queue(stream, [held, i] { return (*held)[i](); });
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
    if (stream && stream->captured) return record(*stream->captured, std::move(work));
    if (stream) {
        stream->items.push_back({std::move(work), nullptr});
        return emu_error(cudaSuccess);
    }
    const cudaError_t error = forbid_blocking_capture();
    if (error != cudaSuccess) return error;
    emu_finish_blocking();
    while (!emu_has_fault() && !work())
        sched_yield();
    return emu_error(cudaSuccess);
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags)
{
    *stream = new cuda_emu_stream{{}, !(flags & cudaStreamNonBlocking), nullptr};
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
    const auto found = std::find(streams().begin(), streams().end(), stream);
    if (found == streams().end()) return emu_error(cudaErrorInvalidResourceHandle);
    finish(stream);
    streams().erase(found);
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
    if (event->from_capture || (stream && stream->captured && event->last)) return wait_captured(stream, event);
    if (!event->last || event->last->reached) return emu_error(cudaSuccess);
    if (stream) {
        stream->items.push_back({nullptr, event->last});
        return emu_error(cudaSuccess);
    }
    return cudaEventSynchronize(event);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event)
{
    const cudaError_t forbidden = forbid_captured(event);
    if (forbidden != cudaSuccess) return forbidden;
    const std::shared_ptr<mark> last = event->last;
    if (last) run_until(last->stream, [&] { return last->reached || emu_has_fault(); });
    return emu_error(cudaSuccess);
}

cudaError_t cudaEventQuery(cudaEvent_t event)
{
    const cudaError_t forbidden = forbid_captured(event);
    if (forbidden != cudaSuccess) return forbidden;
    if (!event->last || event->last->reached) return emu_error(cudaSuccess);
    step(event->last->stream);
    return emu_error(event->last->reached ? cudaSuccess : cudaErrorNotReady);
}

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end)
{
    if (!start->timing || !end->timing || !start->last || !end->last)
        return emu_error(cudaErrorInvalidResourceHandle);
    if (!start->last->reached || !end->last->reached) return emu_error(cudaErrorNotReady);
    *ms = (float)(end->last->time_ms - start->last->time_ms);
    return emu_error(cudaSuccess);
}
