/* Tests of the emulation: it runs right kernels as CUDA does, and does not let wrong ones pass. Each of the broken
 * kernels here has a mistake of a kind that was made before, in some kernel somewhere, and worked there for a while.
 *
 * The order of threads changes from launch to launch, with a period of 8, so everything is launched 8 times. */
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>

extern "C" {
#include <cmocka.h>
}

#include "../../kernels/cuda/cuda.cuh"
#include "../../kernels/cuda/ptx.cuh"

enum { LAUNCHES = 8, N = 128 };

#define RUN(kernel, grid, block, shared_bytes, stream, ...) \
    cuda_emu_launch((kernel), #kernel, (grid), (block), (shared_bytes), (stream), __VA_ARGS__)

/* ---- what the tests share ---- */

static float *device_floats(int n)
{
    void *data = nullptr;
    assert_int_equal(cudaMalloc(&data, (size_t)n * sizeof(float)), cudaSuccess);
    return static_cast<float *>(data);
}

/* Fails the test unless the device is well, and gives it back its health. */
static void expect_well()
{
    const cudaError_t error = cudaDeviceSynchronize();
    if (error != cudaSuccess) fail_msg("%s", cudaGetErrorString(error));
}

/* Fails the test unless the device has a fault whose description contains `text`; heals it. */
static void expect_fault(const char *text)
{
    assert_int_equal(cudaDeviceSynchronize(), cudaErrorLaunchFailure);
    const char *found = cudaGetErrorString(cudaErrorLaunchFailure);
    if (!strstr(found, text)) fail_msg("expected a fault with \"%s\", got: %s", text, found);
    assert_int_equal(cudaGetLastError(), cudaErrorLaunchFailure);
    assert_int_equal(cudaDeviceReset(), cudaSuccess);
}

/* Launches a kernel of one block that takes y, N floats; how often y did not become what `want` says. */
static int wrong_launches(void (*kernel)(float *), float (*want)(int i))
{
    int wrong = 0;
    for (int launch = 0; launch < LAUNCHES; launch++) {
        float *const y = device_floats(N);
        float got[N];
        RUN(kernel, 1, N, 0, nullptr, y);
        assert_int_equal(cudaMemcpy(got, y, sizeof got, cudaMemcpyDeviceToHost), cudaSuccess);
        bool right = true;
        for (int i = 0; i < N; i++)
            right = right && got[i] == want(i);
        wrong += !right;
        cudaFree(y);
    }
    expect_well();
    return wrong;
}

/* ---- barriers ---- */

static float want_previous(int i)
{
    return (float)((i + N - 1) % N);
}

static __global__ void previous(float *y)
{
    CUDA_SHARED(float, line, [N]);
    line[threadIdx.x] = (float)threadIdx.x;
    __syncthreads();
    y[threadIdx.x] = line[(threadIdx.x + N - 1) % N];
}

/* Right in a GPU's first warp, and wherever threads happen to run in ascending order. */
static __global__ void previous_without_barrier(float *y)
{
    CUDA_SHARED(float, line, [N]);
    line[threadIdx.x] = (float)threadIdx.x;
    y[threadIdx.x] = threadIdx.x == 0 ? N - 1 : line[threadIdx.x - 1];
}

static float want_rounds(int i)
{
    return (float)(2 * want_previous(i) + 1);
}

/* Two rounds over the same shared memory, added: the second may begin only when the first was read by all. */
template <bool barrier> static __global__ void two_rounds(float *y)
{
    CUDA_SHARED(float, line, [N]);
    float sum = 0;
    for (int round = 0; round < 2; round++) {
        line[threadIdx.x] = (float)((int)threadIdx.x + round);
        __syncthreads();
        sum += line[(threadIdx.x + N - 1) % N];
        if (barrier) __syncthreads();
    }
    y[threadIdx.x] = sum;
}

static void test_barriers(void **)
{
    assert_int_equal(wrong_launches(previous, want_previous), 0);
    assert_true(wrong_launches(previous_without_barrier, want_previous) > 0);
    assert_int_equal(wrong_launches(two_rounds<true>, want_rounds), 0);
    assert_true(wrong_launches(two_rounds<false>, want_rounds) > 0);
}

static __global__ void barrier_in_branch(float *y)
{
    if (threadIdx.x < N / 2) __syncthreads();
    y[threadIdx.x] = 1;
}

static __global__ void barrier_after_return(float *y, int n)
{
    if ((int)threadIdx.x >= n) return;
    y[threadIdx.x] = 1;
    __syncthreads();
}

static __global__ void two_barriers(float *y)
{
    if (threadIdx.x % 2 == 0)
        __syncthreads();
    else
        __syncthreads();
    y[threadIdx.x] = 1;
}

static void test_divergent_barriers(void **)
{
    for (int launch = 0; launch < LAUNCHES; launch++) {
        float *const y = device_floats(N);
        RUN(barrier_in_branch, 1, N, 0, nullptr, y);
        expect_fault("waits for ever in __syncthreads");
        RUN(barrier_after_return, 1, N, 0, nullptr, y, N - 1);
        expect_fault("1 have ended and 127 wait in __syncthreads");
        RUN(two_barriers, 1, N, 0, nullptr, y);
        expect_fault("while other threads of the block wait in the one at");
        RUN(barrier_after_return, 1, N, 0, nullptr, y, N);
        cudaFree(y);
        expect_well();
    }
}

/* ---- tails ---- */

/* y[i] = i for i < n, in pieces of 4 as kernels do. `extra` elements more is the mistake. */
static __global__ void count(float *y, int n, int extra)
{
    for (int at = (int)threadIdx.x * 4; at < n; at += N * 4)
        for (int i = at; i < at + 4 && i < n + extra; i++)
            y[i] = (float)i;
}

/* Runs it in another process, since AddressSanitizer ends the one it finds a mistake in. True when it was found. */
static bool count_is_caught(int n, int extra)
{
    const pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        if (!freopen("/dev/null", "w", stderr)) _exit(0);
        float *const y = device_floats(n);
        float got[N];
        RUN(count, 1, N, 0, nullptr, y, n, extra);
        bool right = cudaMemcpy(got, y, (size_t)n * sizeof(float), cudaMemcpyDeviceToHost) == cudaSuccess;
        right = right && cudaDeviceSynchronize() == cudaSuccess;
        for (int i = 0; i < n; i++)
            right = right && got[i] == (float)i;
        _exit(right ? 0 : 1);
    }
    int status = 0;
    assert_int_equal(waitpid(child, &status, 0), child);
    return status != 0;
}

static void test_tails(void **)
{
    for (int n = 1; n < 6; n += 2) {
        assert_false(count_is_caught(n, 0));
        assert_true(count_is_caught(n, -1));
        if (n % 4 != 0) assert_true(count_is_caught(n, 1));
    }
}

/* ---- shared memory ---- */

/* One element past, or before, through a pointer, as an index that went wrong. */
static __global__ void static_overrun(float *y, int at)
{
    CUDA_SHARED(float, line, [N]);
    float *const any = &line[0];
    any[at] = 1;
    __syncthreads();
    y[threadIdx.x] = line[0];
}

static __global__ void dynamic_overrun(float *y, int at)
{
    CUDA_SHARED_DYNAMIC(float, line);
    line[at] = 1;
    __syncthreads();
    y[threadIdx.x] = line[0];
}

static void test_shared_overruns(void **)
{
    float *const y = device_floats(N);
    RUN(static_overrun, 1, N, 0, nullptr, y, N - 1);
    RUN(dynamic_overrun, 1, N, N * sizeof(float), nullptr, y, N - 1);
    expect_well();
    RUN(static_overrun, 1, N, 0, nullptr, y, N);
    expect_fault("past its shared memory: line, 512 bytes");
    RUN(static_overrun, 1, N, 0, nullptr, y, -1);
    expect_fault("below its shared memory: line");
    RUN(dynamic_overrun, 1, N, N * sizeof(float), nullptr, y, N);
    expect_fault("past its shared memory: the dynamic part, 512 bytes");
    RUN(dynamic_overrun, 1, N, N * sizeof(float), nullptr, y, -1);
    expect_fault("below its shared memory: the dynamic part");
    cudaFree(y);
}

/* What another block left in shared memory, or another kernel in device memory, is not there. */
static __global__ void leftovers(float *y)
{
    CUDA_SHARED(float, line, [N]);
    if (blockIdx.x == 0) line[threadIdx.x] = 1;
    __syncthreads();
    if (blockIdx.x == 1) y[threadIdx.x] = line[threadIdx.x];
}

static void test_memory_holds_no_values(void **)
{
    for (int launch = 0; launch < LAUNCHES; launch++) {
        float *const y = device_floats(N);
        float got[N];
        assert_int_equal(cudaMemcpy(got, y, sizeof got, cudaMemcpyDeviceToHost), cudaSuccess);
        assert_true(isnan(got[0]) && isnan(got[N - 1]));
        RUN(leftovers, 2, N, 0, nullptr, y);
        assert_int_equal(cudaMemcpy(got, y, sizeof got, cudaMemcpyDeviceToHost), cudaSuccess);
        assert_true(isnan(got[0]) && isnan(got[N - 1]));
        cudaFree(y);
    }
}

/* ---- warps ---- */

static float want_shuffled(int i)
{
    const int lane = i % 32, first = i - lane;
    const float xor1 = (float)(i ^ 1), down = (float)(lane + 3 < 32 ? i + 3 : i), up = (float)(lane < 2 ? i : i - 2);
    const float eighth = (float)(first + lane / 8 * 8 + 5);
    return xor1 + 1000 * down + 1e6f * up + eighth + (float)(first == 0 ? 32 * 31 / 2 : 0);
}

static __global__ void shuffled(float *y)
{
    const int i = (int)threadIdx.x;
    const float value = (float)i;
    float sum = __shfl_xor_sync(CUDA_ALL_LANES, value, 1) + 1000 * __shfl_down_sync(CUDA_ALL_LANES, value, 3);
    sum += 1e6f * __shfl_up_sync(CUDA_ALL_LANES, value, 2);
    sum += __shfl_sync(CUDA_ALL_LANES, value, 5, 8);
    if (i < 32) sum += cuda_warp_sum(value);
    y[i] = sum;
}

static float want_voted(int i)
{
    return i % 32 < 8 ? 0xa8 : i < 32 ? 2 : 1;
}

/* The first 8 lanes vote for themselves while the others do something else. */
static __global__ void voted(float *y)
{
    const int i = (int)threadIdx.x, lane = i % 32;
    if (lane < 8)
        y[i] = (float)__ballot_sync(0xffu, lane == 3 || lane == 5 || lane == 7);
    else
        y[i] = (float)(__all_sync(0xffffff00u, i < 32) + __any_sync(0xffffff00u, lane == 20));
}

static float want_sums(int)
{
    return (float)(N * (N - 1) / 2 + N - 1);
}

static __global__ void sums(float *y)
{
    const float sum = cuda_block_sum((float)threadIdx.x);
    y[threadIdx.x] = sum + cuda_block_max((float)threadIdx.x);
}

static void test_warps(void **)
{
    assert_int_equal(wrong_launches(shuffled, want_shuffled), 0);
    assert_int_equal(wrong_launches(voted, want_voted), 0);
    assert_int_equal(wrong_launches(sums, want_sums), 0);
}

/* Lanes `first` and up take part in what the mask says that all do. */
static __global__ void lanes_missing(float *y, unsigned mask, int first)
{
    if ((int)threadIdx.x % 32 >= first) y[threadIdx.x] = __shfl_xor_sync(mask, 1.0f, 1);
}

static __global__ void masks_differ(float *y)
{
    const unsigned mask = threadIdx.x % 2 == 0 ? 0xffffffffu : 0x7fffffffu;
    y[threadIdx.x] = (float)__any_sync(mask, true);
}

static void test_missing_lanes(void **)
{
    float *const y = device_floats(N);
    RUN(lanes_missing, 1, N, 0, nullptr, y, 0xffffffffu, 1);
    expect_fault("waits for ever in __shfl_xor_sync");
    RUN(lanes_missing, 1, N, 0, nullptr, y, 0xfffffffeu, 0);
    expect_fault("not name");
    RUN(masks_differ, 1, 30, 0, nullptr, y);
    expect_fault("mask");
    RUN(lanes_missing, 1, N, 0, nullptr, y, 0xfffffffcu, 2);
    expect_well();
    cudaFree(y);
}

/* ---- tensor cores ---- */

static int a_at(int row, int k)
{
    return row * 3 % 7 + k * 5 % 11 - 6;
}

static int b_at(int k, int column)
{
    return k * 7 % 13 - column * 3 % 5;
}

static float want_product(int i)
{
    int sum = 0;
    for (int k = 0; k < 16; k++)
        sum += a_at(i / 8, k) * b_at(k, i % 8);
    return (float)sum;
}

/* y = A·B, 16×16 times 16×8, by the first warp. B is kept by its rows, or (columns) by its columns, as the weights of
 * y = x·Wᵀ are. `slip` is the mistake: the lower half of A is taken for the upper. */
template <bool columns, bool slip> static __global__ void product(float *y)
{
    CUDA_SHARED(bf16, a, [16][16]);
    CUDA_SHARED(bf16, b, [16][16]);
    const int lane = (int)threadIdx.x % CUDA_WARP, warp = (int)threadIdx.x / CUDA_WARP;
    for (int i = (int)threadIdx.x; i < 256; i += N) {
        const int row = i / 16, column = i % 16;
        a[row][column] = cuda_from_f32<bf16>((float)a_at(row, column));
        b[row][column] = cuda_from_f32<bf16>((float)(columns ? b_at(column, row) : b_at(row, column)));
    }
    __syncthreads();
    if (warp == 0) {
        unsigned as[4], bs[4];
        float d[4] = {};
        const int row = lane % 8, quarter = lane / 8;
        ptx_load_matrices(as,
                          &a[row + (slip ? quarter / 2 : quarter % 2) * 8][(slip ? quarter % 2 : quarter / 2) * 8]);
        if (columns)
            ptx_load_matrices(bs, &b[row][quarter % 2 * 8]);
        else
            ptx_load_matrices_transposed(bs, &b[row + quarter % 2 * 8][0]);
        const unsigned used[2] = {bs[0], bs[1]};
        ptx_mma(d, as, used);
        for (int i = 0; i < 4; i++)
            y[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
    }
}

static __global__ void misaligned_rows(float *y)
{
    CUDA_SHARED(bf16, a, [16][20]);
    unsigned as[4];
    a[threadIdx.x % 16][0] = cuda_from_f32<bf16>(0.0f);
    ptx_load_matrices(as, &a[threadIdx.x % 16][0]);
    y[threadIdx.x] = (float)as[0];
}

static void test_tensor_cores(void **)
{
    assert_int_equal(wrong_launches(product<true, false>, want_product), 0);
    assert_int_equal(wrong_launches(product<false, false>, want_product), 0);
    assert_int_equal(wrong_launches(product<true, true>, want_product), LAUNCHES);
    assert_int_equal(wrong_launches(product<false, true>, want_product), LAUNCHES);
    float *const y = device_floats(N);
    RUN(misaligned_rows, 1, 32, 0, nullptr, y);
    expect_fault("multiple of 16 bytes");
    cudaFree(y);
}

/* ---- asynchronous copies ---- */

/* y = 2 rows of x through shared memory, the second in flight while the first is used. `pending` groups are left
 * unawaited before the second is used: 0 is right. */
template <int pending> static __global__ void copied(float *y)
{
    CUDA_SHARED(float, rows, [2][4 * N]);
    alignas(16) static float x[2][4 * N];
    for (int i = 0; i < 8 * N; i++)
        x[i / (4 * N)][i % (4 * N)] = (float)i;
    for (int row = 0; row < 2; row++) {
        ptx_copy(&rows[row][4 * threadIdx.x], &x[row][4 * threadIdx.x], true);
        ptx_copy_commit();
    }
    ptx_copy_wait<1>();
    const float first = rows[0][4 * threadIdx.x];
    ptx_copy_wait<pending>();
    y[threadIdx.x] = first + rows[1][4 * threadIdx.x];
}

static float want_copied(int i)
{
    return (float)(8 * i + 4 * N);
}

static float want_reused(int i)
{
    return 2 * want_previous(i) + N;
}

/* Two rounds over the same stage, as pipelines reuse theirs: without `barrier` the second is asked for while others still
 * read the first. It is waited for only after they have, which hides the mistake from copies that come late. */
template <bool barrier> static __global__ void reused(float *y)
{
    CUDA_SHARED(float, stage, [4 * N]);
    alignas(16) static float x[2][4 * N];
    const int own = (int)threadIdx.x, previous = (own + N - 1) % N;
    for (int i = 0; i < 8 * N; i++)
        x[i / (4 * N)][i % (4 * N)] = (float)(i / 4);
    ptx_copy(&stage[4 * own], &x[0][4 * own], true);
    ptx_copy_commit();
    ptx_copy_wait<0>();
    __syncthreads();
    const float first = stage[4 * previous];
    if (barrier) __syncthreads();
    ptx_copy(&stage[4 * own], &x[1][4 * own], true);
    ptx_copy_commit();
    __syncthreads();
    ptx_copy_wait<0>();
    __syncthreads();
    y[own] = first + stage[4 * previous];
}

/* A kernel that does not wait is wrong in every launch: one that is launched once must not pass by luck. */
static void test_asynchronous_copies(void **)
{
    assert_int_equal(wrong_launches(copied<0>, want_copied), 0);
    assert_int_equal(wrong_launches(copied<1>, want_copied), LAUNCHES);
    assert_int_equal(wrong_launches(reused<true>, want_reused), 0);
    assert_int_equal(wrong_launches(reused<false>, want_reused), LAUNCHES);
}

/* ---- streams ---- */

static __global__ void set(float *y, float value)
{
    y[threadIdx.x] = value;
}

static __global__ void twice(float *y, const float *x)
{
    y[threadIdx.x] = 2 * x[threadIdx.x];
}

/* y = 2·x, x made on another stream, and set to other values there afterwards: that needs two events. The value that
 * comes out. */
static float over_streams(bool produced_event, bool consumed_event)
{
    cudaStream_t maker = nullptr, user = nullptr;
    cudaEvent_t made = nullptr, used = nullptr;
    float *const x = device_floats(N), *const y = device_floats(N);
    float got[2] = {0, 0};
    cudaStreamCreateWithFlags(&maker, cudaStreamNonBlocking);
    cudaStreamCreateWithFlags(&user, cudaStreamNonBlocking);
    cudaEventCreateWithFlags(&made, cudaEventDisableTiming);
    cudaEventCreateWithFlags(&used, cudaEventDisableTiming);
    RUN(set, 1, N, 0, maker, x, 1.0f);
    cudaEventRecord(made, maker);
    if (produced_event) cudaStreamWaitEvent(user, made, 0);
    RUN(twice, 1, N, 0, user, y, x);
    cudaEventRecord(used, user);
    if (consumed_event) cudaStreamWaitEvent(maker, used, 0);
    RUN(set, 1, N, 0, maker, x, 3.0f);
    if (produced_event) cudaStreamSynchronize(maker); /* so far the user was not waited for */
    cudaMemcpyAsync(got, y, sizeof got, cudaMemcpyDeviceToHost, user);
    cudaStreamSynchronize(user);
    cudaDeviceSynchronize();
    cudaEventDestroy(made);
    cudaEventDestroy(used);
    cudaStreamDestroy(maker);
    cudaStreamDestroy(user);
    cudaFree(x);
    cudaFree(y);
    return got[1];
}

static void test_events(void **)
{
    assert_true(over_streams(true, true) == 2.0f);
    assert_true(isnan(over_streams(false, true)));
    assert_true(over_streams(true, false) == 6.0f);
    expect_well();
}

/* Host memory that is given to an asynchronous copy may not be reused before the stream was waited for. */
static void test_late_copies(void **)
{
    cudaStream_t stream = nullptr;
    float *const x = device_floats(1);
    float value = 1, got = 0;
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    cudaMemcpyAsync(x, &value, sizeof value, cudaMemcpyHostToDevice, stream);
    value = 2;
    cudaMemcpyAsync(&got, x, sizeof got, cudaMemcpyDeviceToHost, stream);
    assert_true(got == 0);
    assert_int_equal(cudaStreamQuery(stream), cudaErrorNotReady);
    assert_int_equal(cudaStreamSynchronize(stream), cudaSuccess);
    assert_int_equal(cudaStreamQuery(stream), cudaSuccess);
    assert_true(got == 2);
    cudaStreamDestroy(stream);
    cudaFree(x);
}

/* ---- the runtime ---- */

static void test_refused_calls(void **)
{
    float *const y = device_floats(N), host = 0;
    const struct {
        dim3 grid, block;
        size_t shared_bytes;
        cudaError_t want;
    } launches[] = {{0, N, 0, cudaErrorInvalidConfiguration},
                    {1, 1025, 0, cudaErrorInvalidConfiguration},
                    {dim3(1, 65536), 1, 0, cudaErrorInvalidConfiguration},
                    {1, N, (48 << 10) + 1, cudaErrorInvalidValue}};
    for (const auto &launch : launches) {
        RUN(dynamic_overrun, launch.grid, launch.block, launch.shared_bytes, nullptr, y, 0);
        assert_int_equal(cudaGetLastError(), launch.want);
        assert_int_equal(cudaGetLastError(), cudaSuccess);
    }
    assert_int_equal(cuda_allow_shared(dynamic_overrun, 100 << 10), 0);
    RUN(dynamic_overrun, 1, N, 100 << 10, nullptr, y, 0);
    assert_int_equal(cuda_allow_shared(dynamic_overrun, 1 << 20), ERR_DEVICE);
    assert_non_null(strstr(err_message(), "cudaErrorInvalidValue"));
    (void)cudaGetLastError();
    assert_int_equal(cudaMemcpy(y, &host, (N + 1) * sizeof host, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
    assert_int_equal(cudaMemcpy(&host, y, sizeof host, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
    assert_int_equal(cudaFree(y + 1), cudaErrorInvalidValue);
    (void)cudaGetLastError();
    cudaFree(y);
    expect_well();
}

int main()
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_barriers),
        cmocka_unit_test(test_divergent_barriers),
        cmocka_unit_test(test_tails),
        cmocka_unit_test(test_shared_overruns),
        cmocka_unit_test(test_memory_holds_no_values),
        cmocka_unit_test(test_warps),
        cmocka_unit_test(test_missing_lanes),
        cmocka_unit_test(test_tensor_cores),
        cmocka_unit_test(test_asynchronous_copies),
        cmocka_unit_test(test_events),
        cmocka_unit_test(test_late_copies),
        cmocka_unit_test(test_refused_calls),
    };
    return cmocka_run_group_tests(tests, nullptr, nullptr);
}
