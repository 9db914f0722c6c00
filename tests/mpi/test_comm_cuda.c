/* The collectives on tensors of an emulated GPU, by NCCL (comm/nccl.c) and through host memory (comm/staged.c): what they
 * compute, that they wait for ops and ops for them, and how they end when ranks do not come, or make other calls.
 *
 * Values are chosen so that every order of summation gives the same bits, and results are compared exactly. The emulated
 * GPU runs work as late as CUDA allows, so where an event is missing a result is not there yet. Runs with 1 to 3 ranks. */
#include "comm.h"
#include "err.h"
#include "ops.h"

#include <cuda_runtime_api.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define PATIENT_S 60.0
#define TIMEOUT_S 1.0
#define MANY 600 /* more collectives than comm/nccl.c remembers */

/* One test's case. */
struct row {
    struct comm *comm;
    enum comm_choice choice;
};

/* A GPU of its own for each rank, and what carries its tensors. */
struct rig {
    struct comm *comm;
    struct device dev;
};

static void must(int rc)
{
    if (rc != 0) fail_msg("%s\n%s", err_message(), err_trace_text());
}

static void rig_open(struct rig *rig, const struct row *row, double timeout_s)
{
    rig->comm = row->comm;
    must(device_open(&rig->dev, DEVICE_CUDA, row->comm->local_rank, 1));
    must(comm_open_transport(row->comm, &rig->dev, row->choice, timeout_s));
}

static void rig_close(struct rig *rig)
{
    comm_close_transport(rig->comm);
    device_close(&rig->dev);
}

/* Device memory that holds a number everywhere, at once and not when ops get there. */
static struct tensor tensor_new(struct rig *rig, enum dtype dtype, int64_t n, double value)
{
    struct tensor t = tensor_1d(NULL, dtype, n);
    must(rig->dev.table->alloc(&rig->dev, tensor_bytes(t), &t.data));
    must(op_fill(&rig->dev, t, value));
    must(rig->dev.table->sync(&rig->dev));
    return t;
}

static void tensor_free(struct rig *rig, struct tensor t)
{
    rig->dev.table->free(&rig->dev, t.data, tensor_bytes(t));
}

/* ---- values ---- */

/* Differs by rank, place and use; sums over ranks stay below 2^24. */
static int64_t value_of(enum dtype dtype, int rank, int64_t i, int salt)
{
    const int64_t small = (i * 7 + (int64_t)salt * 13) % 100003 + (int64_t)rank * 1000;
    return dtype == DT_I64 ? small << 36 ^ i : small;
}

static void store(void *host, enum dtype dtype, int64_t i, int64_t value)
{
    if (dtype == DT_I64) ((int64_t *)host)[i] = value;
    if (dtype == DT_F32) ((float *)host)[i] = (float)value;
}

/* Gives the tensor this rank's values, when the ops issued before are done. */
static void put_values(struct rig *rig, struct tensor t, int salt)
{
    void *host = malloc(tensor_bytes(t) + 1);
    assert_non_null(host);
    for (int64_t i = 0; i < tensor_elems(t); i++)
        store(host, t.dtype, i, value_of(t.dtype, rig->comm->rank, i, salt));
    must(rig->dev.table->upload(&rig->dev, t.data, host, tensor_bytes(t)));
    free(host);
}

/* Fails unless elements [begin, end) are the sum over the ranks of what put_values gave them; or, gathered, each is that
 * of the rank whose part it lies in. */
static void expect_values(struct rig *rig, struct tensor t, int salt, int64_t begin, int64_t end, bool gathered)
{
    const int64_t part = tensor_elems(t) / rig->comm->ranks;
    void *host = malloc(tensor_bytes(t) + 1), *want = malloc(tensor_bytes(t) + 1);
    assert_true(host && want);
    must(rig->dev.table->download(&rig->dev, host, t.data, tensor_bytes(t)));
    for (int64_t i = begin; i < end; i++) {
        int64_t sum = 0;
        for (int r = 0; r < rig->comm->ranks; r++)
            sum += gathered && i / part != r ? 0 : value_of(t.dtype, r, i, salt);
        store(want, t.dtype, i, sum);
    }
    const size_t size = dtype_bytes(t.dtype);
    assert_memory_equal((char *)host + (size_t)begin * size, (char *)want + (size_t)begin * size,
                        (size_t)(end - begin) * size);
    free(host);
    free(want);
}

/* ---- what is computed ---- */

static void test_sums(void **state)
{
    /* More than the staging buffer, and less; per rank. */
    static const int64_t sizes[] = {1, 1031, ((int64_t)5 << 20) / 2 + 1};
    struct rig rig;
    rig_open(&rig, *state, PATIENT_S);
    for (int i = 0; i < 12; i++) {
        const enum dtype dtype = i & 1 ? DT_I64 : DT_F32;
        const bool scatter = i & 2;
        const int64_t n = sizes[i / 4] * rig.comm->ranks, part = scatter ? n / rig.comm->ranks : n;
        const int64_t begin = scatter ? part * rig.comm->rank : 0;
        const struct tensor x = tensor_new(&rig, dtype, n, 0);
        put_values(&rig, x, i);
        must(comm_sum_start(rig.comm, x, scatter));
        must(comm_wait(rig.comm));
        expect_values(&rig, x, i, begin, begin + part, false);
        tensor_free(&rig, x);
    }
    rig_close(&rig);
}

/* Gathers in several slots between sums, waited for in another order than they were started in, and again. */
static void test_gathers(void **state)
{
    enum { SLOTS = 4, ROUNDS = 2, N = 1031 };
    static const int waited[SLOTS] = {2, 0, 3, 1};
    struct rig rig;
    struct tensor x[SLOTS], y[SLOTS];
    rig_open(&rig, *state, PATIENT_S);
    const struct tensor sum = tensor_new(&rig, DT_I64, N, 0);
    for (int slot = 0; slot < SLOTS; slot++) {
        x[slot] = tensor_new(&rig, DT_F32, (int64_t)N * rig.comm->ranks, 0);
        y[slot] = tensor_new(&rig, DT_F32, (int64_t)N * rig.comm->ranks, 0);
    }
    must(comm_all_gather_wait(rig.comm, SLOTS + 3)); /* never used */
    for (int round = 0; round < ROUNDS; round++) {
        put_values(&rig, sum, round);
        for (int slot = 0; slot < SLOTS; slot++) {
            put_values(&rig, x[slot], round * SLOTS + slot);
            if (slot == 1) must(comm_sum_start(rig.comm, sum, false));
            must(comm_all_gather_start(rig.comm, x[slot], slot));
        }
        for (int i = 0; i < SLOTS; i++) {
            const int slot = waited[i];
            must(comm_all_gather_wait(rig.comm, slot));
            must(op_copy(&rig.dev, y[slot], x[slot]));
            expect_values(&rig, y[slot], round * SLOTS + slot, 0, tensor_elems(y[slot]), true);
        }
        must(comm_wait(rig.comm));
        expect_values(&rig, sum, round, 0, N, false);
    }
    for (int slot = 0; slot < SLOTS; slot++) {
        tensor_free(&rig, x[slot]);
        tensor_free(&rig, y[slot]);
    }
    tensor_free(&rig, sum);
    rig_close(&rig);
}

/* A gather larger than the staging buffer. */
static void test_large_gather(void **state)
{
    struct rig rig;
    rig_open(&rig, *state, PATIENT_S);
    const struct tensor x = tensor_new(&rig, DT_F32, (((int64_t)5 << 20) + 3) * rig.comm->ranks, 0);
    put_values(&rig, x, 1);
    must(comm_all_gather_start(rig.comm, x, 0));
    must(comm_all_gather_wait(rig.comm, 0));
    expect_values(&rig, x, 1, 0, tensor_elems(x), true);
    tensor_free(&rig, x);
    rig_close(&rig);
}

/* ---- order ---- */

/* A collective reads what ops issued before it write, though the host asks for the collective alone. */
static void test_collectives_wait_for_ops(void **state)
{
    struct rig rig;
    rig_open(&rig, *state, PATIENT_S);
    const int ranks = rig.comm->ranks;
    const struct tensor x = tensor_new(&rig, DT_F32, ranks, 0), y = tensor_new(&rig, DT_F32, ranks, 0);
    put_values(&rig, x, 1);
    must(comm_sum_start(rig.comm, x, false));
    must(comm_finish(rig.comm));
    expect_values(&rig, x, 1, 0, ranks, false);
    put_values(&rig, y, 2);
    must(comm_all_gather_start(rig.comm, y, 0));
    must(comm_finish(rig.comm));
    expect_values(&rig, y, 2, 0, ranks, true);
    tensor_free(&rig, x);
    tensor_free(&rig, y);
    rig_close(&rig);
}

/* Ops issued after a wait read what the collective wrote, though the host asks for the ops alone, and may overwrite what
 * it read. */
static void test_ops_wait_for_collectives(void **state)
{
    struct rig rig;
    rig_open(&rig, *state, PATIENT_S);
    const int ranks = rig.comm->ranks;
    const struct tensor x = tensor_new(&rig, DT_F32, ranks, 0), y = tensor_new(&rig, DT_F32, ranks, 0);
    for (int round = 0; round < 4; round++) {
        const bool gather = round % 2;
        put_values(&rig, x, round);
        must(gather ? comm_all_gather_start(rig.comm, x, 0) : comm_sum_start(rig.comm, x, false));
        must(gather ? comm_all_gather_wait(rig.comm, 0) : comm_wait(rig.comm));
        must(op_copy(&rig.dev, y, x));
        must(op_fill(&rig.dev, x, -1));
        if (round < 2) must(comm_finish(rig.comm));
        expect_values(&rig, y, round, 0, ranks, gather);
    }
    tensor_free(&rig, x);
    tensor_free(&rig, y);
    rig_close(&rig);
}

/* More collectives under way than are remembered by name; the first slot's event has been used again since. */
static void test_many(void **state)
{
    struct rig rig;
    rig_open(&rig, *state, PATIENT_S);
    const int ranks = rig.comm->ranks;
    const struct tensor first = tensor_new(&rig, DT_F32, ranks, 0), x = tensor_new(&rig, DT_I64, MANY, 0);
    put_values(&rig, first, 1);
    put_values(&rig, x, 2);
    must(comm_all_gather_start(rig.comm, first, 0));
    for (int i = 0; i < MANY; i++) {
        must(comm_sum_start(rig.comm, tensor_range(x, i, 1), false));
        must(comm_poll(rig.comm));
    }
    must(comm_all_gather_wait(rig.comm, 0));
    expect_values(&rig, first, 1, 0, ranks, true);
    must(comm_finish(rig.comm));
    expect_values(&rig, x, 2, 0, MANY, false);
    tensor_free(&rig, first);
    tensor_free(&rig, x);
    rig_close(&rig);
}

/* ---- failures ---- */

static void expect_error(int rc, int code, const char *const *texts)
{
    assert_int_equal(rc, code);
    for (; *texts; texts++)
        if (!strstr(err_message(), *texts)) fail_msg("expected \"%s\" in: %s", *texts, err_message());
    err_clear();
}

/* Two sums that all make; a third that rank 0 makes alone. It gives up after the time-out, says which it was, and from then
 * on refuses everything. The others are none the worse for it, since they wait for nothing. */
static void test_time_out(void **state)
{
    const struct row *row = *state;
    if (row->comm->ranks == 1) return;
    struct rig rig;
    rig_open(&rig, row, TIMEOUT_S);
    const struct tensor x = tensor_new(&rig, DT_F32, 60, 1);
    for (int i = 0; i < 2; i++)
        must(comm_sum_start(rig.comm, x, false));
    must(comm_finish(rig.comm));
    if (rig.comm->rank == 0) {
        const char *const why[] = {"rank 0", "all-reduce number 2", "240 bytes", "not done after 1 s", NULL};
        const char *const after[] = {"rank 0", "aborted before", NULL};
        must(comm_sum_start(rig.comm, x, false));
        must(comm_poll(rig.comm));
        expect_error(comm_finish(rig.comm), ERR_COMM, why);
        for (int i = 0; i < 4; i++)
            expect_error(comm_finish(rig.comm), ERR_COMM, after);
        expect_error(comm_poll(rig.comm), ERR_COMM, after);
        expect_error(comm_sum_start(rig.comm, x, false), ERR_COMM, after);
        expect_error(comm_all_gather_start(rig.comm, x, 0), ERR_COMM, after);
    }
    must(comm_barrier(rig.comm));
    if (rig.comm->rank != 0) must(comm_poll(rig.comm));
    tensor_free(&rig, x);
    rig_close(&rig);
}

/* Closing with a collective under way that will never be done ends all the same. */
static void test_close_under_way(void **state)
{
    const struct row *row = *state;
    struct rig rig;
    rig_open(&rig, row, PATIENT_S);
    const struct tensor x = tensor_new(&rig, DT_F32, 6, 1);
    if (rig.comm->rank == 0) must(comm_sum_start(rig.comm, x, false));
    comm_close_transport(rig.comm);
    tensor_free(&rig, x);
    device_close(&rig.dev);
    must(comm_barrier(rig.comm));
}

/* NCCL wants a GPU for each rank. */
static void test_shared_gpu(void **state)
{
    const struct row *row = *state;
    if (row->comm->ranks == 1) return;
    const char *const texts[] = {"ranks 0 and 1", "comm=mpi", NULL}, *const none[] = {NULL};
    struct rig rig = {.comm = row->comm};
    must(device_open(&rig.dev, DEVICE_CUDA, 0, 1));
    expect_error(comm_open_transport(rig.comm, &rig.dev, COMM_AUTO, PATIENT_S), ERR_CONFIG,
                 rig.comm->rank == 0 ? texts : none);
    rig_close(&rig);
}

/* The last rank makes its calls in another order: the emulated NCCL says so on every rank, and so does comm_finish. */
static void test_other_order(void **state)
{
    const struct row *row = *state;
    if (row->comm->ranks == 1) return;
    const char *const texts[] = {"the order of calls differs", "ncclAllReduce of 6", NULL};
    struct rig rig;
    rig_open(&rig, row, PATIENT_S);
    const struct tensor x = tensor_new(&rig, DT_F32, 6, 1);
    const bool last = rig.comm->rank == rig.comm->ranks - 1;
    if (last) must(comm_all_gather_start(rig.comm, x, 0));
    must(comm_sum_start(rig.comm, x, false));
    if (!last) must(comm_all_gather_start(rig.comm, x, 0));
    expect_error(comm_finish(rig.comm), ERR_DEVICE, texts);
    must(comm_barrier(rig.comm));
    comm_close_transport(rig.comm);
    assert_int_equal(cudaDeviceReset(), cudaSuccess);
    tensor_free(&rig, x);
    device_close(&rig.dev);
}

/* ---- running them ---- */

int main(int argc, char **argv)
{
    struct comm comm;
    if (comm_open(&comm, &argc, &argv) != 0) return 1;
    struct row nccl = {&comm, COMM_AUTO}, staged = {&comm, COMM_MPI};
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_prestate(test_sums, &nccl),
        cmocka_unit_test_prestate(test_sums, &staged),
        cmocka_unit_test_prestate(test_gathers, &nccl),
        cmocka_unit_test_prestate(test_gathers, &staged),
        cmocka_unit_test_prestate(test_large_gather, &nccl),
        cmocka_unit_test_prestate(test_large_gather, &staged),
        cmocka_unit_test_prestate(test_collectives_wait_for_ops, &nccl),
        cmocka_unit_test_prestate(test_collectives_wait_for_ops, &staged),
        cmocka_unit_test_prestate(test_ops_wait_for_collectives, &nccl),
        cmocka_unit_test_prestate(test_ops_wait_for_collectives, &staged),
        cmocka_unit_test_prestate(test_many, &nccl),
        cmocka_unit_test_prestate(test_many, &staged),
        cmocka_unit_test_prestate(test_shared_gpu, &nccl),
        cmocka_unit_test_prestate(test_time_out, &nccl),
        cmocka_unit_test_prestate(test_close_under_way, &nccl),
        cmocka_unit_test_prestate(test_other_order, &nccl),
    };
    const int failed = cmocka_run_group_tests(tests, NULL, NULL);
    comm_close(&comm);
    return failed;
}
