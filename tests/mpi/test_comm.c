/* The collectives, each against what one rank can compute alone. All values are chosen so that every order of
 * summation gives the same bits, so results are compared exactly. Runs with 1 to 4 ranks.
 *
 * `test_comm abort` is another program: its last rank ends the job with status 7 while the others wait in a barrier.
 */
#include "comm.h"
#include "err.h"

#include "../../comm/cores.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#define SEGMENT_F32 ((int64_t)1 << 18) /* elements of one segment of comm_sum_start */
#define ABORT_STATUS 7

static struct comm *comm_of(void **state)
{
    return *state;
}

/* Two numbers a rank, so that a wrong rank, place or start shows; sums over ranks stay below 2^24 and are exact. */
static float f32_value(int rank, int64_t i, int salt)
{
    return (float)((i * 7 + (int64_t)salt * 13) % 100003 + (int64_t)rank * 1000);
}

/* Uses 61 bits and both signs: a sum that passed through a double would be seen. */
static int64_t i64_value(int rank, int64_t i, int salt)
{
    const uint64_t mixed =
        ((uint64_t)i + 1) * 0x9E3779B97F4A7C15u + ((uint64_t)rank * 77 + (uint64_t)salt) * 0xC2B2AE3D27D4EB4Fu;
    return (int64_t)(mixed >> 3) - ((int64_t)1 << 60);
}

static struct tensor values_new(struct comm *comm, enum dtype dtype, int64_t n, int salt)
{
    struct tensor t = tensor_1d(malloc((size_t)n * dtype_bytes(dtype)), dtype, n);
    assert_non_null(t.data);
    for (int64_t i = 0; i < n; i++) {
        if (dtype == DT_F32) ((float *)t.data)[i] = f32_value(comm->rank, i, salt);
        if (dtype == DT_I64) ((int64_t *)t.data)[i] = i64_value(comm->rank, i, salt);
    }
    return t;
}

/* Elements of [begin, end) that are not the sum over ranks of what values_new put there. */
static int64_t sum_errors(struct comm *comm, struct tensor t, int salt, int64_t begin, int64_t end)
{
    int64_t wrong = 0;
    for (int64_t i = begin; i < end; i++) {
        float f = 0;
        int64_t k = 0;
        for (int r = 0; r < comm->ranks; r++) {
            if (t.dtype == DT_F32) f += f32_value(r, i, salt);
            if (t.dtype == DT_I64) k += i64_value(r, i, salt);
        }
        wrong += t.dtype == DT_F32 ? ((float *)t.data)[i] != f : ((int64_t *)t.data)[i] != k;
    }
    return wrong;
}

static int64_t sum_check(struct comm *comm, struct tensor t, int salt, bool scatter)
{
    const int64_t part = tensor_elems(t) / (scatter ? comm->ranks : 1);
    const int64_t begin = scatter ? comm->rank * part : 0;
    return sum_errors(comm, t, salt, begin, begin + part);
}

/* What the launcher says of this process, Open MPI's or Hydra; `alone` when there is none. */
static long launcher_number(const char *open_mpi, const char *hydra, long alone)
{
    const char *text = getenv(open_mpi) ? getenv(open_mpi) : getenv(hydra);
    return text ? strtol(text, NULL, 10) : alone;
}

static void test_ranks(void **state)
{
    const struct comm *comm = comm_of(state);
    assert_int_equal(comm->ranks, launcher_number("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", 1));
    assert_int_equal(comm->rank, launcher_number("OMPI_COMM_WORLD_RANK", "PMI_RANK", 0));
    assert_int_equal(comm->local_rank, launcher_number("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", 0));
    assert_int_equal(comm->local_ranks, comm->ranks);
}

static void test_sum_sizes(void **state)
{
    struct comm *comm = comm_of(state);
    static const int64_t sizes[] = {
        1, 2, 3, 1001, SEGMENT_F32 - 1, SEGMENT_F32, SEGMENT_F32 + 1, 9 * SEGMENT_F32 + 17};
    for (size_t i = 0; i < 4 * sizeof sizes / sizeof *sizes; i++) {
        const bool scatter = i % 2 == 1;
        const enum dtype dtype = i / 2 % 2 == 1 ? DT_I64 : DT_F32;
        const int64_t n = dtype == DT_I64 ? (sizes[i / 4] + 1) / 2 : sizes[i / 4];
        struct tensor t = values_new(comm, dtype, scatter ? n * comm->ranks : n, (int)i);
        assert_int_equal(comm_sum_start(comm, t, scatter), 0);
        assert_int_equal(comm_wait(comm), 0);
        assert_int_equal(sum_check(comm, t, (int)i, scatter), 0);
        free(t.data);
    }
    assert_int_equal(comm_sum_start(comm, tensor_1d(NULL, DT_F32, 0), false), 0);
    assert_int_equal(comm_wait(comm), 0);
}

/* More starts than the queue's first size, of mixed kinds, with polls that differ from rank to rank and blocking
 * collectives in between: each must get its own data back. */
static void test_sum_many(void **state)
{
    enum { STARTS = 700 };
    struct comm *comm = comm_of(state);
    struct tensor *sums = calloc(STARTS, sizeof *sums);
    assert_non_null(sums);
    for (int i = 0; i < STARTS; i++) {
        const int64_t n = i % 100 == 50 ? 3 * SEGMENT_F32 + 5 : 1 + i * 37 % 2000;
        sums[i] = values_new(comm, i % 3 == 0 ? DT_I64 : DT_F32, n * comm->ranks, i);
    }
    for (int i = 0; i < STARTS; i++) {
        assert_int_equal(comm_sum_start(comm, sums[i], i % 2 == 0), 0);
        for (int k = 0; k < comm->rank * (i % 5); k++)
            assert_int_equal(comm_poll(comm), 0);
        if (i % 90 == 0) {
            double total = i;
            assert_int_equal(comm_sum_f64(comm, &total, 1), 0);
            assert_true(total == (double)i * comm->ranks);
        }
    }
    assert_int_equal(comm_wait(comm), 0);
    for (int i = 0; i < STARTS; i++) {
        assert_int_equal(sum_check(comm, sums[i], i, i % 2 == 0), 0);
        free(sums[i].data);
    }
    free(sums);
}

static void test_small_reductions(void **state)
{
    struct comm *comm = comm_of(state);
    const int n = comm->ranks;
    int64_t ints[2] = {comm->rank + ((int64_t)1 << 60), -comm->rank};
    assert_int_equal(comm_sum_i64(comm, ints, 2), 0);
    assert_true(ints[0] == (int64_t)n * (n - 1) / 2 + n * ((int64_t)1 << 60));
    assert_true(ints[1] == -(int64_t)n * (n - 1) / 2);
    int64_t most[2] = {comm->rank, -comm->rank};
    assert_int_equal(comm_max_i64(comm, most, 2), 0);
    assert_true(most[0] == n - 1 && most[1] == 0);
    double numbers[2] = {0.5 * comm->rank, -1};
    assert_int_equal(comm_max_f64(comm, numbers, 2), 0);
    assert_true(numbers[0] == 0.5 * (n - 1) && numbers[1] == -1);
}

static unsigned char byte_value(int rank, size_t i)
{
    return (unsigned char)(i * 31 + i / 256 + (size_t)rank * 101);
}

static void test_bcast(void **state)
{
    struct comm *comm = comm_of(state);
    const size_t sizes[] = {1, 1000, ((size_t)16 << 20) + 3};
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        const int root = (int)s % comm->ranks;
        unsigned char *bytes = malloc(sizes[s]);
        assert_non_null(bytes);
        for (size_t i = 0; i < sizes[s]; i++)
            bytes[i] = byte_value(comm->rank, i);
        assert_int_equal(comm_bcast(comm, bytes, sizes[s], root), 0);
        size_t wrong = 0;
        for (size_t i = 0; i < sizes[s]; i++)
            wrong += bytes[i] != byte_value(root, i);
        assert_int_equal(wrong, 0);
        free(bytes);
    }
}

/* Bytes of `all`, ranks·part of them, that are not in rank order. */
static size_t gather_errors(struct comm *comm, const unsigned char *all, size_t part)
{
    size_t wrong = 0;
    for (int r = 0; r < comm->ranks; r++) {
        for (size_t i = 0; i < part; i++)
            wrong += all[(size_t)r * part + i] != byte_value(r, i);
    }
    return wrong;
}

static void test_gather(void **state)
{
    struct comm *comm = comm_of(state);
    const size_t sizes[] = {1, 8, 1001, ((size_t)16 << 20) + 3};
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        unsigned char *mine = malloc(sizes[s]);
        unsigned char *all = comm->rank == 0 ? calloc((size_t)comm->ranks, sizes[s]) : NULL;
        assert_non_null(mine);
        for (size_t i = 0; i < sizes[s]; i++)
            mine[i] = byte_value(comm->rank, i);
        assert_int_equal(comm_gather(comm, mine, all, sizes[s]), 0);
        if (comm->rank == 0) assert_int_equal(gather_errors(comm, all, sizes[s]), 0);
        free(mine);
        free(all);
    }
}

/* Parts of an odd number of bf16, up to more than one segment of the gather. */
static void test_all_gather(void **state)
{
    struct comm *comm = comm_of(state);
    const int64_t sizes[] = {1, 7, 4097, (8 << 20) + 1};
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        const size_t part = 2 * (size_t)sizes[s];
        unsigned char *all = calloc((size_t)comm->ranks, part);
        assert_non_null(all);
        for (size_t i = 0; i < part; i++)
            all[(size_t)comm->rank * part + i] = byte_value(comm->rank, i);
        assert_int_equal(comm_all_gather_start(comm, tensor_2d(all, DT_BF16, comm->ranks, sizes[s]), (int)s), 0);
        assert_int_equal(comm_all_gather_wait(comm, (int)s), 0);
        assert_int_equal(gather_errors(comm, all, part), 0);
        free(all);
    }
}

static int fail_with(int code, int rank)
{
    FAIL(code, "rank %d is to blame", rank);
}

static void test_agree(void **state)
{
    struct comm *comm = comm_of(state);
    const int last = comm->ranks - 1;
    assert_int_equal(comm_agree(comm, 0), 0);
    /* The last rank alone. */
    int rc = comm->rank == last ? fail_with(ERR_DATA, last) : 0;
    assert_int_equal(comm_agree(comm, rc), ERR_DATA);
    char blame[40] = "";
    if (comm->rank == last) snprintf(blame, sizeof blame, "rank %d is to blame", last);
    assert_string_equal(err_message(), blame);
    err_clear();
    /* Every rank, each with its own code: the lowest rank's counts. */
    rc = fail_with(comm->rank == 0 ? ERR_CONFIG : ERR_SYSTEM, comm->rank);
    assert_int_equal(comm_agree(comm, rc), ERR_CONFIG);
    assert_string_equal(err_message(), comm->rank == 0 ? "rank 0 is to blame" : "");
    err_clear();
    assert_int_equal(comm_agree(comm, 0), 0);
    assert_int_equal(comm_barrier(comm), 0);
}

static void test_accounting(void **state)
{
    struct comm *comm = comm_of(state);
    assert_true(comm->ranks == 1 ? comm_buffer_bytes(comm) == 0 : comm_buffer_bytes(comm) >= (size_t)SEGMENT_F32 * 4);
}

static void sleep_s(double s)
{
    const struct timespec t = {.tv_sec = (time_t)s, .tv_nsec = (long)(1e9 * (s - (double)(time_t)s))};
    nanosleep(&t, NULL);
}

/* A wait may take longer than the time-out when the rank computes in it now and then, and so may what is no wait: nothing
 * is said of them. (tests/e2e/test_hang.py has those that end the job.) */
static void test_slow_work(void **state)
{
    struct comm *comm = comm_of(state);
    if (comm->ranks > 1) skip();
    FILE *said = tmpfile();
    assert_non_null(said);
    (void)fflush(stderr);
    const int kept = dup(STDERR_FILENO);
    assert_int_equal(dup2(fileno(said), STDERR_FILENO), STDERR_FILENO);
    assert_int_equal(comm_watch(comm, NULL, 1), 0);
    comm_wait_enter(comm, "something slow");
    for (int i = 0; i < 10; i++) {
        const clock_t begin = clock();
        sleep_s(0.15);
        while (clock() - begin < CLOCKS_PER_SEC / 1000) {
        }
    }
    comm_wait_leave(comm);
    sleep_s(1.5);
    assert_int_equal(comm_watch(comm, NULL, 600), 0);
    (void)fflush(stderr);
    assert_int_equal(dup2(kept, STDERR_FILENO), STDERR_FILENO);
    (void)close(kept);
    assert_int_equal(fseek(said, 0, SEEK_END), 0);
    assert_int_equal(ftell(said), 0);
    (void)fclose(said);
}

/* A machine of files, whose only control group has a quota of 1.5 processors and 1000 of 3000 bytes left. */
static void make_machine(const char *root)
{
    static const char *const folders[] = {"proc", "proc/self", "cg"};
    static const char *const files[][2] = {{"proc/self/cgroup", "0::/\n"},
                                           {"proc/self/mountinfo", "1 0 0:1 / /cg rw - cgroup2 cgroup2 rw\n"},
                                           {"cg/cpu.max", "150000 100000\n"},
                                           {"cg/memory.max", "3000\n"},
                                           {"cg/memory.current", "2000\n"}};
    char path[128];
    for (size_t i = 0; i < sizeof folders / sizeof *folders; i++) {
        snprintf(path, sizeof path, "%s/%s", root, folders[i]);
        assert_int_equal(mkdir(path, 0777), 0);
    }
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        snprintf(path, sizeof path, "%s/%s", root, files[i][0]);
        FILE *file = fopen(path, "w");
        assert_non_null(file);
        assert_true(fputs(files[i][1], file) >= 0);
        assert_int_equal(fclose(file), 0);
    }
}

static void remove_machine(const char *root)
{
    char command[128];
    snprintf(command, sizeof command, "rm -rf '%s'", root);
    assert_int_equal(system(command), 0); // NOLINT(cert-env33-c): a path of our own
}

/* Ranks in one control group share what it leaves; each in its own has all of it. */
static void test_limits(void **state)
{
    struct comm *comm = comm_of(state), own = *comm, shared = *comm;
    char root[] = "/tmp/tatara-comm-XXXXXX", first[sizeof root];
    assert_non_null(mkdtemp(root));
    make_machine(root);
    memcpy(first, root, sizeof root);
    assert_int_equal(comm_bcast(comm, first, sizeof first, 0), 0);
    assert_int_equal(cores_count(&own, MPI_COMM_WORLD, root), 0);
    assert_int_equal(cores_count(&shared, MPI_COMM_WORLD, first), 0);
    assert_int_equal(comm_barrier(comm), 0);
    remove_machine(root);
    assert_true(own.limits.cpus == 1.5 && own.limits.memory_bytes == 1001 && own.limits.memory_limit_bytes == 3000);
    assert_true(own.threads == (comm->core_share < 2 ? 1 : 2));
    assert_true(shared.limits.cpus == 1.5 / comm->ranks &&
                shared.limits.memory_bytes == 1000 / (uint64_t)comm->ranks + 1);
    assert_int_equal(shared.threads, comm->ranks > 1 || comm->core_share < 2 ? 1 : 2);
}

int main(int argc, char **argv)
{
    struct comm comm;
    if (comm_open(&comm, &argc, &argv) != 0) {
        fprintf(stderr, "%s\n", err_message());
        comm_abort(&comm, 1);
    }
    if (argc > 1 && strcmp(argv[1], "abort") == 0) {
        if (comm.rank == comm.ranks - 1) comm_abort(&comm, ABORT_STATUS);
        comm_barrier(&comm);
        comm_close(&comm);
        return 0;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_prestate(test_ranks, &comm),      cmocka_unit_test_prestate(test_sum_sizes, &comm),
        cmocka_unit_test_prestate(test_sum_many, &comm),   cmocka_unit_test_prestate(test_small_reductions, &comm),
        cmocka_unit_test_prestate(test_bcast, &comm),      cmocka_unit_test_prestate(test_gather, &comm),
        cmocka_unit_test_prestate(test_all_gather, &comm), cmocka_unit_test_prestate(test_agree, &comm),
        cmocka_unit_test_prestate(test_accounting, &comm), cmocka_unit_test_prestate(test_slow_work, &comm),
        cmocka_unit_test_prestate(test_limits, &comm),
    };
    const int failed = cmocka_run_group_tests_name("comm", tests, NULL, NULL);
    if (failed != 0) comm_abort(&comm, 1);
    comm_close(&comm);
    return 0;
}
