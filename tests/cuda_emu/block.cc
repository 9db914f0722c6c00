/* The grids of the emulation: launches are checked and queued here, and their blocks run, one at a time, with a fiber
 * for each thread that has to wait (cuda_emu.h). Fibers are Boost.Context's; ucontext's would do but for the system call
 * in every switch. They and their stacks are made when first needed and kept.
 *
 * Threads: any; the one that runs a launch, with the emulation held, is its scheduler. A fiber that waits lets another one
 * run that can go on, or the scheduler. */
#include "emu.h"

#include <boost/context/detail/fcontext.hpp>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <deque>
#include <map>
#include <memory>
#include <vector>

namespace context = boost::context::detail;

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

enum { WARP = 32, THREADS_MAX = 1024 };
static const size_t stack_bytes = 256 << 10, stack_guard_bytes = 64 << 10;
static const size_t shared_default_bytes = 48 << 10, shared_guard_bytes = 4096;
static const unsigned short guard_pattern = 0xfffd; /* NaN as bf16, and twice as f32 */

struct launch {
    const char *name;
    dim3 grid, block;
    size_t shared_bytes;
    cuda_emu_body body;
};

/* A copy that a thread has asked for and not waited for. */
struct async_copy {
    unsigned char *to;
    const void *from;
    size_t bytes, total_bytes;
    unsigned long group;
};

/* A stack, and the thread of the block that runs on it. */
struct fiber {
    context::fcontext_t context; /* while it does not run */
    char *stack;
    sanitizer_stack bounds; /* of the stack, for AddressSanitizer */
    int thread;
    uint3 index;
    const char *waits_in; /* the primitive, for the description of a fault */
    cuda_emu_place place;
    void *fake_stack; /* AddressSanitizer's */
    std::deque<async_copy> copies;
    unsigned long group; /* that its next copies belong to */
};

/* The lanes of a warp that have come to a primitive so far. */
struct meeting {
    unsigned mask, arrived;
    const char *what;
    void *args[WARP];
    fiber *fibers[WARP];
};

struct static_shared {
    const char *name;
    unsigned char *data;
    size_t bytes, guard_bytes;
};

/* The one block that runs. */
struct block_state {
    const launch *grid;
    unsigned long number; /* counts all blocks that ever ran, from 1 */
    int threads, started, finished, at_barrier;
    bool descending; /* the order in which threads start and are released */
    bool eager;      /* released threads come before threads that have not started */
    bool faulted;
    std::deque<fiber *> ready;
    std::vector<fiber *> idle;
    fiber *waiting[THREADS_MAX]; /* at the barrier, by thread */
    cuda_emu_place barrier;
    meeting meetings[THREADS_MAX / WARP][WARP]; /* by warp and by the lowest lane of the mask */
    std::vector<static_shared> shared;
};

static block_state now;
static std::vector<std::unique_ptr<fiber>> all_fibers;
static fiber scheduler; /* the host thread that runs the launch, on its own stack */
static fiber *current = &scheduler;
static std::vector<unsigned char> dynamic_shared;
static unsigned long launches; /* so far; its lowest bits decide the order in which things run */

static std::map<const void *, size_t> &shared_allowed()
{
    static std::map<const void *, size_t> bytes; /* by kernel */
    return bytes;
}

/* ---- shared memory ---- */

/* What guard zones are filled with, as often as in the largest. */
static const unsigned char *guard_bytes_wanted()
{
    static const std::vector<unsigned short> pattern(shared_guard_bytes / sizeof guard_pattern, guard_pattern);
    return reinterpret_cast<const unsigned char *>(pattern.data());
}

static void guard_fill(unsigned char *zone, size_t bytes)
{
    memcpy(zone, guard_bytes_wanted(), bytes);
}

static bool guard_intact(const unsigned char *zone, size_t bytes)
{
    return memcmp(zone, guard_bytes_wanted(), bytes) == 0;
}

static unsigned char *dynamic_data()
{
    const uintptr_t first = reinterpret_cast<uintptr_t>(dynamic_shared.data()) + shared_guard_bytes;
    return reinterpret_cast<unsigned char *>((first + 127) / 128 * 128);
}

void *cuda_emu_dynamic_shared()
{
    return dynamic_data();
}

void cuda_emu_enter_shared(const char *name, void *data, size_t bytes, size_t guard_bytes, unsigned long &block)
{
    if (block == now.number) return;
    block = now.number;
    const size_t padded = (bytes + 1) / 2 * 2; /* the zones hold whole patterns; alignment pads odd sizes */
    unsigned char *const first = static_cast<unsigned char *>(data);
    memset(first, 0xff, bytes);
    guard_fill(first - guard_bytes, guard_bytes);
    guard_fill(first + padded, guard_bytes);
    now.shared.push_back({name, first, padded, guard_bytes});
}

static void shared_begin()
{
    now.shared.clear();
    dynamic_shared.resize(now.grid->shared_bytes + 2 * shared_guard_bytes + 128);
    guard_fill(dynamic_data() - shared_guard_bytes, shared_guard_bytes);
    memset(dynamic_data(), 0xff, now.grid->shared_bytes);
    guard_fill(dynamic_data() + now.grid->shared_bytes, shared_guard_bytes);
}

/* The end of a block: what was written around its shared memory is a fault. */
static void shared_end()
{
    const launch &grid = *now.grid;
    now.shared.push_back({"the dynamic part", dynamic_data(), grid.shared_bytes, shared_guard_bytes});
    for (const static_shared &one : now.shared) {
        const bool below = !guard_intact(one.data - one.guard_bytes, one.guard_bytes);
        if (!below && guard_intact(one.data + one.bytes, one.guard_bytes)) continue;
        now.faulted = true;
        emu_device_fault("kernel %s, block (%u, %u, %u) wrote %s its shared memory: %s, %zu bytes", grid.name,
                         blockIdx.x, blockIdx.y, blockIdx.z, below ? "below" : "past", one.name, one.bytes);
        return;
    }
}

/* ---- fibers ---- */

static void fiber_main(context::transfer_t from);

static void fiber_reset(fiber *f)
{
    sanitizer_forget(f->stack, stack_bytes);
    f->bounds = {f->stack, stack_bytes};
    f->fake_stack = nullptr;
    f->waits_in = nullptr;
    f->context = context::make_fcontext(f->stack + stack_bytes, stack_bytes, fiber_main);
}

static fiber *fiber_new()
{
    const int protection = PROT_READ | PROT_WRITE;
    void *memory = mmap(nullptr, stack_guard_bytes + stack_bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, stack_guard_bytes, PROT_NONE) != 0) {
        perror("cuda_emu: no memory for the stack of a fiber");
        abort();
    }
    all_fibers.push_back(std::make_unique<fiber>());
    fiber *f = all_fibers.back().get();
    f->stack = static_cast<char *>(memory) + stack_guard_bytes;
    fiber_reset(f);
    return f;
}

/* What comes after every switch: `from` says who ran before. */
static void arrive(fiber *self, context::transfer_t from)
{
    fiber *const left = static_cast<fiber *>(from.data);
    left->context = from.fctx;
    sanitizer_enter(self->fake_stack, &left->bounds);
    current = self;
    threadIdx = self->index;
}

/* Lets `to` run, until somebody switches back. */
static void switch_to(fiber *to)
{
    fiber *const self = current;
    current = to;
    sanitizer_leave(&self->fake_stack, to->bounds);
    arrive(self, context::jump_fcontext(to->context, self));
}

/* The fiber whose turn it is among those that can go on; null when it is another thread's turn to start, or nobody's. */
static fiber *take_ready()
{
    if (now.ready.empty() || (!now.eager && now.started < now.threads)) return nullptr;
    fiber *const next = now.ready.front();
    now.ready.pop_front();
    return next;
}

/* The calling thread of the block waits in a primitive until it is released. */
static void wait_in(const char *what, cuda_emu_place place)
{
    current->waits_in = what;
    current->place = place;
    fiber *const self = current, *const next = take_ready();
    if (next != self) switch_to(next ? next : &scheduler);
    self->waits_in = nullptr;
}

/* Runs threads of the block that have not started, until it is another fiber's turn; again for each block. */
static void fiber_main(context::transfer_t from)
{
    fiber *const self = current;
    arrive(self, from);
    for (;;) {
        while (now.started < now.threads && (!now.eager || now.ready.empty())) {
            const unsigned i = (unsigned)(now.descending ? now.threads - 1 - now.started : now.started);
            now.started++;
            const unsigned row = i / blockDim.x;
            self->thread = (int)i;
            self->index = {i % blockDim.x, row % blockDim.y, row / blockDim.y};
            threadIdx = self->index;
            self->copies.clear();
            now.grid->body();
            now.finished++;
        }
        now.idle.push_back(self);
        switch_to(&scheduler);
    }
}

void cuda_emu_fault(const char *format, ...)
{
    char text[512];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    emu_device_fault("kernel %s, block (%u, %u, %u), thread (%u, %u, %u): %s", now.grid->name, blockIdx.x, blockIdx.y,
                     blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z, text);
    now.faulted = true;
    switch_to(&scheduler);
    abort(); /* the scheduler never returns to this fiber */
}

/* ---- barriers and warps ---- */

static void release(fiber *const *fibers, int n)
{
    for (int i = 0; i < n; i++) {
        fiber *const f = fibers[now.descending ? n - 1 - i : i];
        if (f) now.ready.push_back(f);
    }
}

void cuda_emu_barrier(cuda_emu_place place)
{
    fiber *const self = current;
    if (now.at_barrier > 0 && (now.barrier.line != place.line || now.barrier.file != place.file)) {
        cuda_emu_fault("it waits in __syncthreads at %s:%d while other threads of the block wait in the one at %s:%d",
                       place.file, place.line, now.barrier.file, now.barrier.line);
    }
    now.barrier = place;
    now.waiting[self->thread] = self;
    if (++now.at_barrier == now.threads) {
        now.at_barrier = 0;
        now.descending = !now.descending;
        release(now.waiting, now.threads);
    }
    wait_in("__syncthreads", place);
}

int cuda_emu_lane()
{
    return current->thread % WARP;
}

void cuda_emu_meet(const char *what, unsigned mask, void *arg, void (*meet)(void *const *args, unsigned mask),
                   cuda_emu_place place)
{
    fiber *const self = current;
    const int lane = self->thread % WARP, warp = self->thread / WARP;
    if (!(mask >> lane & 1)) {
        cuda_emu_fault("%s:%d: %s with mask %08x, which does not name the calling lane %d", place.file, place.line,
                       what, mask, lane);
    }
    meeting &m = now.meetings[warp][__builtin_ctz(mask)];
    if (m.arrived != 0 && (m.mask != mask || m.what != what)) {
        cuda_emu_fault("%s:%d: %s with mask %08x while other lanes of the warp are in %s with mask %08x", place.file,
                       place.line, what, mask, m.what, m.mask);
    }
    m.mask = mask;
    m.what = what;
    m.arrived |= 1u << lane;
    m.args[lane] = arg;
    m.fibers[lane] = self;
    if (m.arrived == mask) {
        meet(m.args, mask);
        m.fibers[lane] = nullptr;
        release(m.fibers, WARP);
        memset(m.fibers, 0, sizeof m.fibers);
        m.arrived = 0;
        return;
    }
    wait_in(what, place);
}

/* ---- asynchronous copies ---- */

static void copy_now(const async_copy &copy)
{
    memcpy(copy.to, copy.from, copy.bytes);
    memset(copy.to + copy.bytes, 0, copy.total_bytes - copy.bytes);
}

/* Every other thread's copies are done at once, to see who still reads what they overwrite; the others' when they are
 * waited for, to see who reads too early. In the next launch it is the other way round. */
void cuda_emu_copy_later(void *to, const void *from, size_t bytes, size_t total_bytes)
{
    fiber *const self = current;
    const uintptr_t bits = reinterpret_cast<uintptr_t>(to) | (bytes > 0 ? reinterpret_cast<uintptr_t>(from) : 0);
    if (bytes > total_bytes || bits % total_bytes != 0) {
        cuda_emu_fault("an asynchronous copy of %zu of %zu bytes from %p to %p, which must be multiples of its size",
                       bytes, total_bytes, from, to);
    }
    const async_copy copy = {static_cast<unsigned char *>(to), from, bytes, total_bytes, self->group};
    if ((launches + (unsigned long)self->thread) & 1)
        copy_now(copy);
    else
        self->copies.push_back(copy);
}

void cuda_emu_copy_commit()
{
    current->group++;
}

void cuda_emu_copy_wait(size_t pending)
{
    fiber *const self = current;
    while (!self->copies.empty() && self->copies.front().group + pending < self->group) {
        copy_now(self->copies.front());
        self->copies.pop_front();
    }
}

/* ---- blocks and grids ---- */

/* Nobody can go on: some wait for others that have ended, or wait elsewhere. */
static void fault_deadlock()
{
    for (const std::unique_ptr<fiber> &one : all_fibers) {
        if (!one->waits_in) continue;
        emu_device_fault("kernel %s, block (%u, %u, %u): thread (%u, %u, %u) waits for ever in %s at %s:%d: of %d "
                         "threads, %d have ended and %d wait in __syncthreads",
                         now.grid->name, blockIdx.x, blockIdx.y, blockIdx.z, one->index.x, one->index.y, one->index.z,
                         one->waits_in, one->place.file, one->place.line, now.threads, now.finished, now.at_barrier);
        break;
    }
    now.faulted = true;
}

/* After a fault fibers hang in the middle of the kernel; they start afresh. */
static void abandon_block()
{
    now.idle.clear();
    for (const std::unique_ptr<fiber> &one : all_fibers) {
        fiber_reset(one.get());
        now.idle.push_back(one.get());
    }
    memset(now.meetings, 0, sizeof now.meetings);
}

static void run_block(bool descending)
{
    now.number++;
    now.threads = (int)(blockDim.x * blockDim.y * blockDim.z);
    now.started = now.finished = now.at_barrier = 0;
    now.descending = descending;
    now.eager = launches & 2;
    now.ready.clear();
    shared_begin();
    while (now.finished < now.threads && !now.faulted) {
        fiber *next = take_ready();
        if (!next && now.started == now.threads) {
            fault_deadlock();
            break;
        }
        if (!next && !now.idle.empty()) {
            next = now.idle.back();
            now.idle.pop_back();
        }
        switch_to(next ? next : fiber_new());
    }
    if (!now.faulted) shared_end();
    if (now.faulted) abandon_block();
}

static bool run_grid(const launch &grid)
{
    now.grid = &grid;
    now.faulted = false;
    gridDim = grid.grid;
    blockDim = grid.block;
    launches++;
    const uint64_t blocks = (uint64_t)gridDim.x * gridDim.y * gridDim.z;
    for (uint64_t i = 0; i < blocks && !now.faulted; i++) {
        const uint64_t at = launches & 4 ? blocks - 1 - i : i, row = at / gridDim.x;
        blockIdx = {(unsigned)(at % gridDim.x), (unsigned)(row % gridDim.y), (unsigned)(row / gridDim.y)};
        run_block((launches ^ i) & 1);
    }
    return true;
}

cudaError_t cudaFuncSetAttribute(const void *function, cudaFuncAttribute attribute, int value)
{
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || (size_t)value > emu_shared_max_bytes)
        return emu_error(cudaErrorInvalidValue);
    const emu_held held(emu_mutex);
    shared_allowed()[function] = (size_t)value;
    return emu_error(cudaSuccess);
}

static size_t shared_allowed_bytes(const void *kernel)
{
    const emu_held held(emu_mutex);
    const auto found = shared_allowed().find(kernel);
    return found == shared_allowed().end() ? shared_default_bytes : found->second;
}

void cuda_emu_queue_kernel(const void *kernel, const char *name, dim3 grid, dim3 block, size_t shared_bytes,
                           cudaStream_t stream, cuda_emu_body body)
{
    const uint64_t threads = (uint64_t)block.x * block.y * block.z;
    const size_t allowed = shared_allowed_bytes(kernel);
    if (threads < 1 || threads > THREADS_MAX || block.z > 64 || grid.x < 1 || grid.x > 0x7fffffffu || grid.y < 1 ||
        grid.y > 0xffffu || grid.z < 1 || grid.z > 0xffffu) {
        emu_error(cudaErrorInvalidConfiguration);
        return;
    }
    if (shared_bytes > allowed) {
        emu_error(cudaErrorInvalidValue);
        return;
    }
    const launch one = {name, grid, block, shared_bytes, std::move(body)};
    (void)cuda_emu_queue(stream, [one] { return run_grid(one); });
}
