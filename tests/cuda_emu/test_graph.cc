/* Tests of captures and graphs: that the emulation keeps CUDA's rules for them, in one thread and in two, and that the
 * backend's graphs (graph.cu) do the work of its ops; and of the backend's clock, and its copies for a second thread. */
#include <cuda_runtime.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>

#include <thread>
#include <vector>

extern "C" {
#include <cmocka.h>
}

#include "../../kernels/cuda/cuda.cuh"

enum { N = 64 };

#define RUN(kernel, stream, ...) cuda_emu_launch((kernel), #kernel, 1, N, 0, (stream), __VA_ARGS__)

static __global__ void set(float *x, float value)
{
    x[threadIdx.x] = value;
}

/* x = factor·x + y. */
static __global__ void scale_add(float *x, float factor, const float *y)
{
    x[threadIdx.x] = factor * x[threadIdx.x] + y[threadIdx.x];
}

/* A stream to capture and some memory. */
struct rig {
    cudaStream_t stream, other;
    cudaEvent_t event, outside; /* `outside` is recorded before the capture, on the other stream */
    float *x, *y;
};

static void rig_open(rig *r, unsigned flags)
{
    void *memory = nullptr;
    assert_int_equal(cudaMalloc(&memory, 2 * N * sizeof(float)), cudaSuccess);
    r->x = static_cast<float *>(memory);
    r->y = r->x + N;
    assert_int_equal(cudaStreamCreateWithFlags(&r->stream, flags), cudaSuccess);
    assert_int_equal(cudaStreamCreateWithFlags(&r->other, cudaStreamNonBlocking), cudaSuccess);
    assert_int_equal(cudaEventCreateWithFlags(&r->event, cudaEventDisableTiming), cudaSuccess);
    assert_int_equal(cudaEventCreateWithFlags(&r->outside, cudaEventDisableTiming), cudaSuccess);
    RUN(set, r->stream, r->x, 1.0f);
    RUN(set, r->stream, r->y, 0.0f);
    assert_int_equal(cudaStreamSynchronize(r->stream), cudaSuccess);
    assert_int_equal(cudaEventRecord(r->outside, r->other), cudaSuccess);
}

static void rig_close(rig *r)
{
    assert_int_equal(cudaEventDestroy(r->event), cudaSuccess);
    assert_int_equal(cudaEventDestroy(r->outside), cudaSuccess);
    assert_int_equal(cudaStreamDestroy(r->stream), cudaSuccess);
    assert_int_equal(cudaStreamDestroy(r->other), cudaSuccess);
    assert_int_equal(cudaFree(r->x), cudaSuccess);
    assert_int_equal(cudaGetLastError(), cudaSuccess);
}

/* Element 0 of x, when all is done. */
static float value_of(const rig *r, const float *x)
{
    float value = 0;
    assert_int_equal(cudaMemcpyAsync(&value, x, sizeof value, cudaMemcpyDeviceToHost, r->stream), cudaSuccess);
    assert_int_equal(cudaStreamSynchronize(r->stream), cudaSuccess);
    return value;
}

/* ---- launches ---- */

/* What is captured does not run; each launch runs all of it in order, with the arguments of then, and copies read memory
 * as it is now. */
static void test_launch(void **)
{
    rig r = {};
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    float added = 1, factor = 2;
    rig_open(&r, cudaStreamNonBlocking);
    assert_int_equal(cudaStreamBeginCapture(r.stream, cudaStreamCaptureModeThreadLocal), cudaSuccess);
    assert_int_equal(cudaMemcpyAsync(r.y, &added, sizeof added, cudaMemcpyHostToDevice, r.stream), cudaSuccess);
    assert_int_equal(cudaEventRecord(r.event, r.stream), cudaSuccess);
    assert_int_equal(cudaStreamWaitEvent(r.stream, r.event, 0), cudaSuccess);
    RUN(scale_add, r.stream, r.x, factor, r.y);
    assert_int_equal(cudaMemsetAsync(r.y, 0, sizeof added, r.stream), cudaSuccess);
    assert_int_equal(cudaGetLastError(), cudaSuccess);
    assert_int_equal(cudaStreamEndCapture(r.stream, &graph), cudaSuccess);
    assert_int_equal(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
    assert_int_equal(cudaGraphDestroy(graph), cudaSuccess);
    factor = 100;
    assert_true(value_of(&r, r.x) == 1);

    assert_int_equal(cudaGraphLaunch(exec, r.stream), cudaSuccess); /* 2·1 + 1 */
    RUN(scale_add, r.stream, r.x, 10.0f, r.y);                      /* 10·3 + 0 */
    assert_int_equal(cudaGraphLaunch(exec, r.stream), cudaSuccess); /* 2·30 + 1 */
    assert_true(value_of(&r, r.x) == 61);
    added = 5;
    assert_int_equal(cudaGraphLaunch(exec, r.stream), cudaSuccess);
    assert_int_equal(cudaGraphExecDestroy(exec), cudaSuccess); /* once it has run */
    assert_true(value_of(&r, r.x) == 127);
    assert_true(value_of(&r, r.y) == 0);
    rig_close(&r);
}

/* ---- what is not permitted ---- */

static cudaError_t allocate(rig *)
{
    void *data = nullptr;
    return cudaMalloc(&data, N);
}

static cudaError_t allocate_host(rig *)
{
    void *data = nullptr;
    return cudaMallocHost(&data, N);
}

static cudaError_t give_back(rig *r)
{
    return cudaFree(r->x);
}

static cudaError_t wait_for_it(rig *r)
{
    return cudaStreamSynchronize(r->stream);
}

static cudaError_t query_it(rig *r)
{
    return cudaStreamQuery(r->stream);
}

static cudaError_t wait_for_all(rig *)
{
    return cudaDeviceSynchronize();
}

static cudaError_t copy_and_wait(rig *r)
{
    return cudaMemcpy(r->x, r->y, N, cudaMemcpyDeviceToDevice);
}

static cudaError_t query_outside(rig *r)
{
    return cudaEventQuery(r->outside);
}

static cudaError_t wait_inside(rig *r)
{
    assert_int_equal(cudaEventRecord(r->event, r->stream), cudaSuccess);
    return cudaEventSynchronize(r->event);
}

static cudaError_t depend_on_outside(rig *r)
{
    return cudaStreamWaitEvent(r->stream, r->outside, 0);
}

static cudaError_t fork_off(rig *r)
{
    assert_int_equal(cudaEventRecord(r->event, r->stream), cudaSuccess);
    return cudaStreamWaitEvent(r->other, r->event, 0);
}

static cudaError_t merge(rig *r)
{
    cudaGraph_t graph = nullptr;
    assert_int_equal(cudaStreamBeginCapture(r->other, cudaStreamCaptureModeThreadLocal), cudaSuccess);
    assert_int_equal(cudaEventRecord(r->event, r->other), cudaSuccess);
    const cudaError_t error = cudaStreamWaitEvent(r->stream, r->event, 0);
    assert_int_equal(cudaStreamEndCapture(r->other, &graph), cudaErrorStreamCaptureInvalidated);
    return error;
}

static cudaError_t use_default_stream(rig *r)
{
    RUN(set, nullptr, r->x, 2.0f);
    return cudaGetLastError();
}

/* Each call fails, and so do all later launches and the capture; the stream is as before when that has ended. */
static void test_forbidden(void **)
{
    const struct {
        cudaError_t (*call)(rig *r);
        cudaError_t want;
        unsigned flags;
    } cases[] = {{allocate, cudaErrorStreamCaptureUnsupported, cudaStreamNonBlocking},
                 {allocate_host, cudaErrorStreamCaptureUnsupported, cudaStreamNonBlocking},
                 {give_back, cudaErrorStreamCaptureUnsupported, cudaStreamNonBlocking},
                 {wait_for_it, cudaErrorStreamCaptureUnsupported, cudaStreamNonBlocking},
                 {query_it, cudaErrorStreamCaptureUnsupported, cudaStreamNonBlocking},
                 {wait_for_all, cudaErrorStreamCaptureUnsupported, cudaStreamNonBlocking},
                 {copy_and_wait, cudaErrorStreamCaptureUnsupported, cudaStreamNonBlocking},
                 {query_outside, cudaErrorStreamCaptureUnsupported, cudaStreamNonBlocking},
                 {wait_inside, cudaErrorCapturedEvent, cudaStreamNonBlocking},
                 {depend_on_outside, cudaErrorStreamCaptureIsolation, cudaStreamNonBlocking},
                 {fork_off, cudaErrorStreamCaptureUnsupported, cudaStreamNonBlocking},
                 {merge, cudaErrorStreamCaptureMerge, cudaStreamNonBlocking},
                 {use_default_stream, cudaErrorStreamCaptureImplicit, cudaStreamDefault}};
    for (const auto &one : cases) {
        rig r = {};
        cudaGraph_t graph = nullptr;
        rig_open(&r, one.flags);
        assert_int_equal(cudaStreamBeginCapture(r.stream, cudaStreamCaptureModeThreadLocal), cudaSuccess);
        RUN(set, r.stream, r.x, 2.0f);
        assert_int_equal(cudaGetLastError(), cudaSuccess);
        assert_int_equal(one.call(&r), one.want);
        (void)cudaGetLastError();
        RUN(set, r.stream, r.x, 3.0f);
        assert_int_equal(cudaGetLastError(), cudaErrorStreamCaptureInvalidated);
        assert_int_equal(cudaStreamEndCapture(r.stream, &graph), cudaErrorStreamCaptureInvalidated);
        assert_null(graph);
        (void)cudaGetLastError();
        assert_true(value_of(&r, r.x) == 1);
        rig_close(&r);
    }
}

static void test_permitted(void **)
{
    rig r = {};
    cudaGraph_t graph = nullptr;
    size_t available = 0, total = 0;
    rig_open(&r, cudaStreamNonBlocking);
    assert_int_equal(cudaStreamBeginCapture(r.stream, cudaStreamCaptureModeThreadLocal), cudaSuccess);
    assert_int_equal(cudaMemGetInfo(&available, &total), cudaSuccess);
    assert_int_equal(cuda_allow_shared(set, N), 0);
    RUN(set, r.other, r.y, 2.0f); /* runs */
    assert_int_equal(cudaEventRecord(r.event, r.stream), cudaSuccess);
    assert_int_equal(cudaStreamEndCapture(r.stream, &graph), cudaSuccess);
    assert_int_equal(cudaGraphDestroy(graph), cudaSuccess);
    assert_int_equal(cudaEventQuery(r.event), cudaErrorCapturedEvent);
    assert_int_equal(cudaStreamWaitEvent(r.other, r.event, 0), cudaErrorCapturedEvent);
    assert_int_equal(cudaEventRecord(r.event, r.other), cudaSuccess);
    assert_int_equal(cudaEventSynchronize(r.event), cudaSuccess);
    assert_true(value_of(&r, r.y) == 2);
    (void)cudaGetLastError();
    rig_close(&r);
}

/* ---- a second thread ---- */

/* What a second thread's calls give while this one captures in that mode. */
struct seen {
    int device;
    cudaError_t before, other_device, launch, wait, event, memory;
    float x, y; /* after it has waited for its stream; the emulation's memory is the host's, too */
};

static seen from_second_thread(rig *r, cudaStreamCaptureMode mode)
{
    seen got = {};
    cudaGraph_t graph = nullptr;
    assert_int_equal(cudaStreamBeginCapture(r->stream, mode), cudaSuccess);
    std::thread([r, &got] {
        void *data = nullptr;
        (void)cudaGetDevice(&got.device);
        got.before = cudaGetLastError();
        RUN(set, r->other, r->y, 5.0f);
        got.other_device = cudaGetLastError();
        (void)cudaSetDevice(1);
        RUN(set, r->other, r->y, 2.0f);
        got.launch = cudaGetLastError();
        got.wait = cudaStreamSynchronize(r->other);
        got.event = cudaEventSynchronize(r->outside);
        got.x = r->x[0];
        got.y = r->y[0];
        got.memory = cudaMalloc(&data, N);
        if (data) (void)cudaFree(data);
    }).join();
    const cudaError_t ended = cudaStreamEndCapture(r->stream, &graph);
    assert_int_equal(ended, got.wait == cudaSuccess ? cudaSuccess : cudaErrorStreamCaptureInvalidated);
    if (graph) assert_int_equal(cudaGraphDestroy(graph), cudaSuccess);
    return got;
}

/* A thread has a device and a last error of its own, and its waiting runs its own stream; what a capture forbids is
 * forbidden to the thread that captures, or to all, as its mode says. */
static void test_threads(void **)
{
    rig r = {};
    assert_int_equal(cudaSetDevice(1), cudaSuccess);
    rig_open(&r, cudaStreamNonBlocking);
    assert_int_equal(cudaMemcpy(nullptr, r.x, N, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
    RUN(set, r.stream, r.x, 7.0f);
    const seen beside = from_second_thread(&r, cudaStreamCaptureModeThreadLocal);
    assert_int_equal(beside.device, 0);
    assert_int_equal(beside.before, cudaSuccess);
    assert_int_equal(beside.other_device, cudaErrorInvalidResourceHandle);
    assert_int_equal(beside.launch, cudaSuccess);
    assert_int_equal(beside.wait, cudaSuccess);
    assert_int_equal(beside.event, cudaSuccess);
    assert_int_equal(beside.memory, cudaSuccess);
    assert_true(beside.y == 2 && beside.x == 1);
    assert_int_equal(cudaGetLastError(), cudaErrorInvalidValue);
    const seen kept_out = from_second_thread(&r, cudaStreamCaptureModeGlobal);
    assert_int_equal(kept_out.launch, cudaSuccess);
    assert_int_equal(kept_out.wait, cudaErrorStreamCaptureUnsupported);
    assert_int_equal(kept_out.event, cudaErrorStreamCaptureUnsupported);
    assert_int_equal(kept_out.memory, cudaErrorStreamCaptureUnsupported);
    (void)cudaGetLastError();
    rig_close(&r);
    assert_int_equal(cudaSetDevice(0), cudaSuccess);
}

/* ---- the backend ---- */

/* y[n, n] += x·x, x and y in one piece of memory. */
static int product(struct device *dev, float *memory, int64_t n)
{
    const struct tensor x = tensor_2d(memory, DT_F32, n, n), y = tensor_2d(memory + n * n, DT_F32, n, n);
    return op_matmul(dev, y, x, x, TENSOR_NONE, TENSOR_NONE, MATMUL_ADD);
}

/* A matrix product's plan is made by measurement, which cannot be captured; afterwards the product can. */
static void test_backend(void **)
{
    struct device dev = {};
    struct device_graph *graph = nullptr;
    void *memory = nullptr;
    float got = 0;
    assert_int_equal(device_open(&dev, DEVICE_CUDA, 0, 1), 0);
    const struct device_table *const table = dev.table;
    dev.workspace_bytes = CUDA_SCRATCH_BYTES;
    assert_int_equal(table->alloc(&dev, dev.workspace_bytes, &dev.workspace), 0);
    assert_int_equal(table->alloc(&dev, 2 * N * N * sizeof(float), &memory), 0);
    float *const x = static_cast<float *>(memory), *const y = x + N * N;
    assert_int_equal(op_fill(&dev, tensor_1d(x, DT_F32, N * N), 1), 0);

    for (bool wanted : {false, true}) {
        assert_int_equal(table->capture_begin(&dev), 0);
        assert_int_equal(product(&dev, x, N), ERR_DEVICE);
        assert_int_equal(table->capture_end(&dev, wanted ? &graph : nullptr), wanted ? ERR_DEVICE : 0);
        assert_null(graph);
        assert_int_equal(cudaGetLastError(), cudaSuccess);
    }
    assert_int_equal(product(&dev, x, N), 0);
    assert_int_equal(table->capture_begin(&dev), 0);
    assert_int_equal(product(&dev, x, N), 0);
    assert_int_equal(table->capture_end(&dev, &graph), 0);
    assert_non_null(graph);
    assert_int_equal(op_fill(&dev, tensor_1d(x, DT_F32, N * N), 2), 0);
    assert_int_equal(table->graph_launch(&dev, graph), 0);
    assert_int_equal(table->graph_launch(&dev, graph), 0);
    assert_int_equal(table->download(&dev, &got, y, sizeof got), 0);
    assert_true(got == (1 + 4 + 4) * N);

    table->graph_free(&dev, graph);
    table->graph_free(&dev, nullptr);
    table->free(&dev, memory, 0);
    table->free(&dev, dev.workspace, dev.workspace_bytes);
    device_close(&dev);
    err_clear();
}

static void test_clock(void **)
{
    struct device dev = {};
    void *memory = nullptr;
    double s = 0;
    assert_int_equal(device_open(&dev, DEVICE_CUDA, 0, 1), 0);
    const struct device_table *const table = dev.table;
    assert_int_equal(table->alloc(&dev, N * sizeof(float), &memory), 0);
    assert_int_equal(table->clock_s(&dev, &s), ERR_DEVICE); /* nothing is marked */
    err_clear();
    (void)cudaGetLastError();
    assert_int_equal(table->clock_mark(&dev, 0), 0);
    assert_int_equal(op_fill(&dev, tensor_1d(memory, DT_F32, N), 1), 0);
    assert_int_equal(table->clock_mark(&dev, 1), 0);
    assert_int_equal(table->sync(&dev), 0);
    assert_int_equal(table->clock_s(&dev, &s), 0);
    assert_true(s > 0 && s < 60);
    table->free(&dev, memory, 0);
    device_close(&dev);
}

/* What download_beside gives in another thread. */
struct copied {
    int rc;
    bool same;
    char message[256];
};

static copied download_in_thread(struct device *dev, const void *from_device, const std::vector<int> &want)
{
    copied result = {};
    std::vector<int> got(want.size());
    std::thread([&] {
        result.rc = dev->table->download_beside(dev, got.data(), from_device, got.size() * sizeof got[0]);
        snprintf(result.message, sizeof result.message, "%s", err_message());
    }).join();
    result.same = got == want;
    return result;
}

/* More than the ring holds, from a GPU that is not the first: while this thread captures, and before what it issued is done,
 * for which the copy does not wait. A failure is the other thread's alone. */
static void test_download_beside(void **)
{
    struct device dev = {};
    struct device_graph *graph = nullptr;
    void *memory = nullptr;
    std::vector<int> first(CUDA_SLOTS * CUDA_SLOT_BYTES / sizeof(int) + 3), second(first.size());
    const size_t bytes = first.size() * sizeof first[0];
    for (size_t i = 0; i < first.size(); i++)
        first[i] = -(second[i] = (int)i);
    assert_int_equal(device_open(&dev, DEVICE_CUDA, 1, 1), 0);
    const struct device_table *const table = dev.table;
    assert_int_equal(table->alloc(&dev, bytes, &memory), 0);
    assert_int_equal(table->upload(&dev, memory, first.data(), bytes), 0);
    assert_int_equal(table->sync(&dev), 0);
    assert_int_equal(table->capture_begin(&dev), 0);
    assert_int_equal(op_fill(&dev, tensor_1d(memory, DT_F32, N), 1), 0);
    const copied captured = download_in_thread(&dev, memory, first);
    assert_int_equal(captured.rc, 0);
    assert_true(captured.same);
    assert_int_equal(table->capture_end(&dev, &graph), 0);
    table->graph_free(&dev, graph);

    assert_int_equal(table->upload(&dev, memory, second.data(), bytes), 0);
    assert_false(download_in_thread(&dev, memory, second).same);
    assert_int_equal(table->sync(&dev), 0);
    assert_true(download_in_thread(&dev, memory, second).same);

    const copied failed = download_in_thread(&dev, first.data(), first);
    assert_int_equal(failed.rc, ERR_DEVICE);
    assert_non_null(strstr(failed.message, "cudaErrorInvalidValue"));
    assert_string_equal(err_message(), "");
    assert_int_equal(cudaGetLastError(), cudaSuccess);
    table->free(&dev, memory, bytes);
    device_close(&dev);
    assert_int_equal(cudaSetDevice(0), cudaSuccess);
}

int main()
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_launch),          cmocka_unit_test(test_forbidden), cmocka_unit_test(test_permitted),
        cmocka_unit_test(test_threads),         cmocka_unit_test(test_backend),   cmocka_unit_test(test_clock),
        cmocka_unit_test(test_download_beside),
    };
    return cmocka_run_group_tests(tests, nullptr, nullptr);
}
