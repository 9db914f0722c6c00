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
 * Threads: one host thread. */
#include "emu.h"

#include <sched.h>
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

struct cuda_emu_stream {
    std::deque<item> items;
    bool blocking;
};

struct cuda_emu_event {
    std::shared_ptr<mark> last; /* null until it is recorded */
    bool timing;
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
    for (cuda_emu_stream *stream : streams())
        stream->items.clear();
}

void cuda_emu_queue(cudaStream_t stream, std::function<bool()> work)
{
    if (stream) {
        stream->items.push_back({std::move(work), nullptr});
        return;
    }
    emu_finish_blocking();
    while (!emu_has_fault() && !work())
        sched_yield();
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags)
{
    *stream = new cuda_emu_stream{{}, !(flags & cudaStreamNonBlocking)};
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
    step(stream);
    return emu_error(stream->items.empty() ? cudaSuccess : cudaErrorNotReady);
}

cudaError_t cudaDeviceSynchronize()
{
    emu_finish_all();
    emu_check_memory();
    return emu_error(cudaSuccess);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags)
{
    *event = new cuda_emu_event{nullptr, !(flags & cudaEventDisableTiming)};
    return emu_error(cudaSuccess);
}

cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    delete event;
    return emu_error(cudaSuccess);
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream)
{
    const std::shared_ptr<mark> here = std::make_shared<mark>(mark{stream, false, 0});
    event->last = here;
    cuda_emu_queue(stream, [here] {
        here->time_ms = now_ms();
        here->reached = true;
        return true;
    });
    return emu_error(cudaSuccess);
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned)
{
    if (!event->last || event->last->reached) return emu_error(cudaSuccess);
    if (stream) {
        stream->items.push_back({nullptr, event->last});
        return emu_error(cudaSuccess);
    }
    return cudaEventSynchronize(event);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event)
{
    const std::shared_ptr<mark> last = event->last;
    if (last) run_until(last->stream, [&] { return last->reached || emu_has_fault(); });
    return emu_error(cudaSuccess);
}

cudaError_t cudaEventQuery(cudaEvent_t event)
{
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
