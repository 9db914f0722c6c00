/* Tests of the emulated NCCL, on several ranks: what collectives compute, that streams and MPI wait for each other as
 * they do with GPUs, and that ranks whose calls differ are told so. In C, as comm/nccl.c is. */
#include <cuda_runtime_api.h>
#include <mpi.h>
#include <nccl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { N = 5, RANKS_MAX = 8 };

struct fixture {
    int rank, ranks;
    ncclComm_t comm;
    cudaStream_t stream;
};

static void ok(ncclResult_t result)
{
    if (result != ncclSuccess) fail_msg("%s: %s", ncclGetErrorString(result), ncclGetLastError(NULL));
}

static void cuda_ok(cudaError_t error)
{
    if (error != cudaSuccess) fail_msg("%s", cudaGetErrorString(error));
}

static int setup(void **state)
{
    static struct fixture f;
    ncclUniqueId id;
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    MPI_Comm_rank(MPI_COMM_WORLD, &f.rank);
    MPI_Comm_size(MPI_COMM_WORLD, &f.ranks);
    if (f.rank == 0) ok(ncclGetUniqueId(&id));
    MPI_Bcast(&id, sizeof id, MPI_BYTE, 0, MPI_COMM_WORLD);
    ok(ncclCommInitRankConfig(&f.comm, f.ranks, id, f.rank, &config));
    cuda_ok(cudaStreamCreateWithFlags(&f.stream, cudaStreamNonBlocking));
    *state = &f;
    return 0;
}

static int teardown(void **state)
{
    struct fixture *f = *state;
    cuda_ok(cudaStreamDestroy(f->stream));
    ok(ncclCommDestroy(f->comm));
    return 0;
}

static void *on_device(const void *host, size_t bytes)
{
    void *data = NULL;
    cuda_ok(cudaMalloc(&data, bytes));
    cuda_ok(cudaMemcpy(data, host, bytes, cudaMemcpyHostToDevice));
    return data;
}

/* Waits for the stream, copies the data back and gives their memory back. */
static void read_back(struct fixture *f, void *host, void *data, size_t bytes)
{
    cuda_ok(cudaStreamSynchronize(f->stream));
    cuda_ok(cudaMemcpy(host, data, bytes, cudaMemcpyDeviceToHost));
    cuda_ok(cudaFree(data));
}

static void test_sums(void **state)
{
    struct fixture *f = *state;
    const int sum_of_ranks = f->ranks * (f->ranks - 1) / 2;
    float values[N];
    int64_t integers[N];
    uint16_t halves[N]; /* bf16: 1 + rank/64, whose sums need no rounding */
    for (int i = 0; i < N; i++) {
        values[i] = (float)(10 * i + f->rank);
        integers[i] = ((int64_t)1 << 60) / f->ranks + f->rank * i;
        halves[i] = (uint16_t)(0x3f80 + 2 * f->rank);
    }
    void *v = on_device(values, sizeof values), *n = on_device(integers, sizeof integers);
    void *h = on_device(halves, sizeof halves), *most = on_device(values, sizeof values);
    ok(ncclGroupStart());
    ok(ncclAllReduce(v, v, N, ncclFloat32, ncclSum, f->comm, f->stream));
    ok(ncclAllReduce(n, n, N, ncclInt64, ncclSum, f->comm, f->stream));
    ok(ncclAllReduce(h, h, N, ncclBfloat16, ncclSum, f->comm, f->stream));
    ok(ncclAllReduce(most, most, N, ncclFloat32, ncclMax, f->comm, f->stream));
    ok(ncclGroupEnd());
    float maxima[N];
    read_back(f, maxima, most, sizeof maxima);
    read_back(f, values, v, sizeof values);
    read_back(f, integers, n, sizeof integers);
    read_back(f, halves, h, sizeof halves);
    for (int i = 0; i < N; i++) {
        assert_true(values[i] == (float)(10 * i * f->ranks + sum_of_ranks));
        assert_true(maxima[i] == (float)(10 * i + f->ranks - 1));
        assert_true(integers[i] == ((int64_t)1 << 60) / f->ranks * f->ranks + i * sum_of_ranks);
        const uint32_t bits = (uint32_t)halves[i] << 16;
        float got;
        memcpy(&got, &bits, sizeof got);
        assert_true(got == (float)f->ranks + (float)sum_of_ranks / 64);
    }
}

/* In place, as ZeRO does it: each rank's part of the whole. */
static void test_parts(void **state)
{
    struct fixture *f = *state;
    float whole[N * RANKS_MAX];
    const size_t bytes = sizeof(float) * N * (size_t)f->ranks;
    for (int i = 0; i < N * f->ranks; i++)
        whole[i] = (float)(i * (f->rank + 1));
    float *data = on_device(whole, bytes), *part = data + N * f->rank;
    ok(ncclReduceScatter(data, part, N, ncclFloat32, ncclSum, f->comm, f->stream));
    ok(ncclAllGather(part, data, N, ncclFloat32, f->comm, f->stream));
    read_back(f, whole, data, bytes);
    for (int i = 0; i < N * f->ranks; i++)
        assert_true(whole[i] == (float)(i * f->ranks * (f->ranks + 1) / 2));
    for (int i = 0; i < N; i++)
        whole[i] = (float)(i + f->rank);
    data = on_device(whole, sizeof(float) * N);
    ok(ncclBroadcast(data, data, N, ncclFloat32, f->ranks - 1, f->comm, f->stream));
    read_back(f, whole, data, sizeof(float) * N);
    for (int i = 0; i < N; i++)
        assert_true(whole[i] == (float)(i + f->ranks - 1));
}

/* The sum, on a stream of its own, of what another stream makes; that stream then reads it. */
static float sum_beside(struct fixture *f, int with_events)
{
    cudaStream_t compute;
    cudaEvent_t made, summed;
    float one = 1, got = 0, *data = NULL;
    cuda_ok(cudaMalloc((void **)&data, sizeof one));
    cuda_ok(cudaMemset(data, 0, sizeof one));
    cuda_ok(cudaStreamCreateWithFlags(&compute, cudaStreamNonBlocking));
    cuda_ok(cudaEventCreateWithFlags(&made, cudaEventDisableTiming));
    cuda_ok(cudaEventCreateWithFlags(&summed, cudaEventDisableTiming));
    cuda_ok(cudaMemcpyAsync(data, &one, sizeof one, cudaMemcpyHostToDevice, compute));
    cuda_ok(cudaEventRecord(made, compute));
    if (with_events) cuda_ok(cudaStreamWaitEvent(f->stream, made, 0));
    ok(ncclAllReduce(data, data, 1, ncclFloat32, ncclSum, f->comm, f->stream));
    cuda_ok(cudaEventRecord(summed, f->stream));
    if (with_events) cuda_ok(cudaStreamWaitEvent(compute, summed, 0));
    cuda_ok(cudaMemcpyAsync(&got, data, sizeof got, cudaMemcpyDeviceToHost, compute));
    cuda_ok(cudaStreamSynchronize(compute));
    cuda_ok(cudaStreamSynchronize(f->stream));
    cuda_ok(cudaEventDestroy(made));
    cuda_ok(cudaEventDestroy(summed));
    cuda_ok(cudaStreamDestroy(compute));
    cuda_ok(cudaFree(data));
    return got;
}

static void test_events(void **state)
{
    struct fixture *f = *state;
    assert_true(sum_beside(f, 1) == (float)f->ranks);
    if (f->ranks > 1) assert_true(sum_beside(f, 0) == 1.0f);
}

/* Rank 0 waits for the others in MPI with its part of the sum still queued, while they wait for that sum. */
static void test_waiting_in_mpi(void **state)
{
    struct fixture *f = *state;
    float value = 1, total = 0;
    float *data = on_device(&value, sizeof value);
    ok(ncclAllReduce(data, data, 1, ncclFloat32, ncclSum, f->comm, f->stream));
    if (f->rank != 0) cuda_ok(cudaStreamSynchronize(f->stream));
    MPI_Barrier(MPI_COMM_WORLD);
    MPI_Allreduce(&value, &total, 1, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
    assert_true(total == (float)f->ranks);
    read_back(f, &value, data, sizeof value);
    assert_true(value == (float)f->ranks);
}

static void test_wrong_arguments(void **state)
{
    struct fixture *f = *state;
    float value = 1;
    assert_int_equal(ncclAllReduce(&value, &value, 1, ncclFloat32, ncclSum, f->comm, f->stream), ncclInvalidArgument);
    float *data = on_device(&value, sizeof value);
    assert_int_equal(ncclAllReduce(data, data, 2, ncclFloat32, ncclSum, f->comm, f->stream), ncclInvalidArgument);
    read_back(f, &value, data, sizeof value);
    ncclResult_t error = ncclInternalError;
    ok(ncclCommGetAsyncError(f->comm, &error));
    assert_int_equal(error, ncclSuccess);
}

/* The last rank makes its calls in another order: all ranks end with a fault that says so. */
static void test_other_order(void **state)
{
    struct fixture *f = *state;
    if (f->ranks == 1) return;
    float value = 1;
    float *data = on_device(&value, sizeof value);
    if (f->rank == f->ranks - 1) ok(ncclBroadcast(data, data, 1, ncclFloat32, 0, f->comm, f->stream));
    ok(ncclAllReduce(data, data, 1, ncclFloat32, ncclSum, f->comm, f->stream));
    if (f->rank != f->ranks - 1) ok(ncclBroadcast(data, data, 1, ncclFloat32, 0, f->comm, f->stream));
    assert_int_equal(cudaStreamSynchronize(f->stream), cudaErrorLaunchFailure);
    const char *text = cudaGetErrorString(cudaErrorLaunchFailure);
    assert_non_null(strstr(text, "the order of calls differs"));
    assert_non_null(strstr(text, "ncclAllReduce of 1"));
    assert_non_null(strstr(text, "ncclBroadcast of 1"));
    ncclResult_t error = ncclSuccess;
    ok(ncclCommGetAsyncError(f->comm, &error));
    assert_int_equal(error, ncclInvalidUsage);
    cuda_ok(cudaDeviceReset());
    cuda_ok(cudaFree(data));
}

/* A sum that the others do not join: it can be seen to hang, and be given up. */
static void test_abort(void **state)
{
    struct fixture *f = *state;
    if (f->ranks == 1) return;
    float value = 1;
    cudaEvent_t summed;
    float *data = on_device(&value, sizeof value);
    cuda_ok(cudaEventCreateWithFlags(&summed, cudaEventDisableTiming));
    if (f->rank == 0) {
        ok(ncclAllReduce(data, data, 1, ncclFloat32, ncclSum, f->comm, f->stream));
        cuda_ok(cudaEventRecord(summed, f->stream));
        for (int i = 0; i < 1000; i++)
            assert_int_equal(cudaEventQuery(summed), cudaErrorNotReady);
    }
    ok(ncclCommAbort(f->comm));
    cuda_ok(cudaStreamSynchronize(f->stream));
    cuda_ok(cudaEventDestroy(summed));
    cuda_ok(cudaFree(data));
    cuda_ok(cudaStreamDestroy(f->stream));
}

int main(int argc, char **argv)
{
    MPI_Init(&argc, &argv);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_sums, setup, teardown),
        cmocka_unit_test_setup_teardown(test_parts, setup, teardown),
        cmocka_unit_test_setup_teardown(test_events, setup, teardown),
        cmocka_unit_test_setup_teardown(test_waiting_in_mpi, setup, teardown),
        cmocka_unit_test_setup_teardown(test_wrong_arguments, setup, teardown),
        cmocka_unit_test_setup_teardown(test_other_order, setup, teardown),
        cmocka_unit_test_setup(test_abort, setup),
    };
    const int failed = cmocka_run_group_tests(tests, NULL, NULL);
    MPI_Finalize();
    return failed;
}
