/* The training step on several ranks: what it allocates, what an overflow does, and that it is the same on any number of
 * ranks. Whole runs are compared by tests/e2e; this looks inside one process. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "err.h"
#include "ops.h"
#include "optim.h"
#include "replicas.h"
#include "saving.h"
#include "step_fixture.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

/* Calls to the heap from Tatara's own code, in any thread; the linker sends them here (--wrap). */
static atomic_long heap_calls;

void *__real_malloc(size_t bytes);
void *__real_calloc(size_t n, size_t bytes);
void *__real_realloc(void *data, size_t bytes);
void *__wrap_malloc(size_t bytes);
void *__wrap_calloc(size_t n, size_t bytes);
void *__wrap_realloc(void *data, size_t bytes);

void *__wrap_malloc(size_t bytes)
{
    atomic_fetch_add(&heap_calls, 1);
    return __real_malloc(bytes);
}

void *__wrap_calloc(size_t n, size_t bytes)
{
    atomic_fetch_add(&heap_calls, 1);
    return __real_calloc(n, bytes);
}

void *__wrap_realloc(void *data, size_t bytes)
{
    atomic_fetch_add(&heap_calls, 1);
    return __real_realloc(data, bytes);
}

static struct comm the_comm;
static struct device the_dev;
static char the_folder[FIXTURE_PATH_BYTES];

static void open_step(struct step_fixture *f, enum compute compute, int zero)
{
    struct config *cfg = step_fixture_config(the_folder);
    cfg->precision.compute = (int)compute;
    cfg->parallel.zero = zero;
    step_fixture_open(f, cfg, &the_dev, &the_comm);
}

/* The rows behind the classifier's own take part in its products, and must stay zero. */
static void check_padding(const struct step_fixture *f)
{
    const struct params *p = &f->step.params;
    const struct param *rows = params_find(p, 0, p->classifier);
    const struct tensor unit = f->step.model.unit[0];
    const int64_t end = params_classifier_rows(FIXTURE_VOCAB) * rows->shape[1];
    assert_true(end > rows->elems);
    for (int64_t i = rows->elems; i < end; i++)
        for (size_t byte = 0; byte < dtype_bytes(unit.dtype); byte++)
            assert_int_equal(((const char *)tensor_range(unit, rows->offset + i, 1).data)[byte], 0);
}

static void steps_after_the_first_allocate_nothing(void **state)
{
    (void)state;
    for (int compute = COMPUTE_BF16; compute <= COMPUTE_FP32; compute++) {
        struct step_fixture f;
        struct step_report report;
        open_step(&f, (enum compute)compute, 1);
        for (int64_t i = 0; i < 2; i++)
            assert_int_equal(step_fixture_run(&f, i, &report), 0);
        const long before = atomic_load(&heap_calls);
        for (int64_t i = 2; i < 5; i++)
            assert_int_equal(step_fixture_run(&f, i, &report), 0);
        assert_int_equal(atomic_load(&heap_calls), before);
        check_padding(&f);
        step_fixture_close(&f);
    }
}

static int waits; /* of the host for the device, in counted_* */

static int counted_download(struct device *dev, void *to_host, const void *from_device, size_t bytes)
{
    waits++;
    return cpu_table.download(dev, to_host, from_device, bytes);
}

static int counted_sync(struct device *dev)
{
    waits++;
    return cpu_table.sync(dev);
}

/* On a GPU nothing inside a step may wait for it; only learning the outcome does, once. */
static void steps_do_not_wait_for_the_device(void **state)
{
    (void)state;
    struct step_fixture f;
    struct step_report report;
    struct device_table counting = cpu_table;
    counting.download = counted_download;
    counting.sync = counted_sync;
    open_step(&f, COMPUTE_BF16, 1);
    the_dev.table = &counting;
    waits = 0;
    for (int64_t i = 0; i < 3; i++)
        assert_int_equal(step_run(&f.step, f.loader, i, &report), 0);
    assert_int_equal(waits, 0);
    assert_int_equal(step_settle(&f.step, f.loader, 3, &report), 0);
    assert_int_equal(waits, 1);
    assert_true(report.loss > 0 && report.grad_norm > 0);
    the_dev.table = &cpu_table;
    step_fixture_close(&f);
}

static int marks[2]; /* of a device's clock, in marked_* */

static void *some_queue(struct device *dev)
{
    return dev;
}

static int marked_clock_mark(struct device *dev, int which)
{
    (void)dev;
    marks[which]++;
    return marks[0] - marks[1] == (which == 0 ? 1 : 0) ? 0 : ERR_BUG;
}

static int marked_clock_s(struct device *dev, double *s)
{
    (void)dev;
    *s = 0.25;
    return 0;
}

/* Where ops are only issued, the device's clock tells how long a rank computes, by which slow ones are found. */
static void the_devices_clock_times_backward_passes(void **state)
{
    (void)state;
    struct step_fixture f;
    struct step_report report;
    const bool alone = the_comm.ranks == 1;
    struct device_table clocked = cpu_table;
    clocked.queue = some_queue;
    clocked.clock_mark = marked_clock_mark;
    clocked.clock_s = marked_clock_s;
    open_step(&f, COMPUTE_BF16, 1);
    the_dev.table = &clocked;
    for (int64_t i = 0; i < 3; i++)
        assert_int_equal(step_run(&f.step, f.loader, i, &report), 0);
    assert_int_equal(step_settle(&f.step, f.loader, 3, &report), 0);
    assert_int_equal(marks[0], alone ? 0 : 3);
    assert_int_equal(marks[1], marks[0]);
    assert_int_equal(report.micro_batches, loader_micro_batches(f.loader));
    assert_true(report.backward_s == (alone ? 0 : 0.25 * 3 * (double)report.micro_batches));
    assert_true(report.forward_s == 0);
    the_dev.table = &cpu_table;
    step_fixture_close(&f);
}

/* A scale chosen for a gradient far smaller than the real one overflows; the step must be done again, see the same data,
 * and come out as if the coarser scale had been there from the start. */
static void overflow_repeats_the_step_with_a_coarser_scale(void **state)
{
    (void)state;
    struct step_fixture plain, repeated;
    struct step_report expected, report;
    open_step(&plain, COMPUTE_FP32, 1);
    open_step(&repeated, COMPUTE_FP32, 0);
    repeated.step.grad_norm = 1e-6;
    assert_int_equal(step_resume(&repeated.step, 0), 0);
    assert_int_equal(step_fixture_run(&plain, 0, &expected), 0);
    assert_int_equal(step_fixture_run(&repeated, 0, &report), 0);
    assert_int_equal(expected.redone, 0);
    assert_true(report.redone >= 1);
    assert_true(report.loss == expected.loss);
    assert_true(fabs(report.grad_norm / expected.grad_norm - 1) < 1e-6);
    assert_true(report.grad_norm > 0.01);
    /* The next step chooses its scale from the norm just found, and needs no second try. */
    assert_int_equal(step_fixture_run(&repeated, 1, &report), 0);
    assert_int_equal(report.redone, 0);
    step_fixture_close(&plain);
    step_fixture_close(&repeated);
}

/* Several steps are issued before anyone looks at their outcome, as on a GPU: a step that overflows, and those after it,
 * must be done again, and come out as if each had been looked at. */
static void steps_issued_ahead_are_repeated_from_the_overflow(void **state)
{
    (void)state;
    struct step_fixture plain, ahead;
    struct step_report expected, report;
    open_step(&plain, COMPUTE_BF16, 1);
    open_step(&ahead, COMPUTE_BF16, 1);
    assert_int_equal(step_fixture_run(&plain, 0, &expected), 0);
    assert_int_equal(step_fixture_run(&ahead, 0, &report), 0);
    ahead.step.grad_norm = 1e-6;
    assert_int_equal(step_resume(&ahead.step, 1), 0);
    plain.step.grad_norm = 1e-6;
    assert_int_equal(step_resume(&plain.step, 1), 0);
    for (int64_t i = 1; i < 4; i++) {
        assert_int_equal(step_fixture_run(&plain, i, &expected), 0);
        assert_int_equal(step_run(&ahead.step, ahead.loader, i, &report), 0);
    }
    assert_int_equal(step_settle(&ahead.step, ahead.loader, 4, &report), 0);
    assert_true(report.redone >= 1);
    assert_true(report.loss == expected.loss && report.grad_norm == expected.grad_norm);
    for (int u = 0; u < plain.step.params.n_units; u++) {
        const struct tensor a = plain.step.model.unit[u], b = ahead.step.model.unit[u];
        assert_memory_equal(a.data, b.data, tensor_bytes(a));
    }
    step_fixture_close(&plain);
    step_fixture_close(&ahead);
}

/* One bit of one weight on one rank. */
static void a_flipped_bit_of_a_replica_is_found(void **state)
{
    (void)state;
    struct step_fixture f;
    struct step_report report;
    char blamed[32];
    open_step(&f, COMPUTE_BF16, 1);
    assert_int_equal(step_fixture_run(&f, 0, &report), 0);
    assert_int_equal(replicas_check(&f.step, 1), 0);
    const int last = the_comm.ranks - 1;
    const struct param *param = &f.step.params.param[f.step.params.n / 2];
    if (the_comm.rank == last)
        ((uint16_t *)f.step.model.unit[param->unit].data)[param->offset + param->elems - 1] ^= 4;
    (void)snprintf(blamed, sizeof blamed, "rank %d", last);
    if (the_comm.ranks == 1) {
        assert_int_equal(replicas_check(&f.step, 1), 0);
    } else {
        assert_int_equal(replicas_check(&f.step, 1), ERR_NUMERIC);
        if (the_comm.rank == 0) assert_non_null(strstr(err_message(), param->name));
        if (the_comm.rank == 0 && the_comm.ranks > 2) assert_non_null(strstr(err_message(), blamed));
    }
    err_clear();
    step_fixture_close(&f);
}

/* The loss of a weight that is not a number must stop all ranks alike and leave the weights as they were. */
static void not_a_number_stops_every_rank(void **state)
{
    (void)state;
    struct step_fixture f;
    struct step_report report;
    open_step(&f, COMPUTE_FP32, 0);
    float *weights = f.step.model.unit[1].data;
    const float kept = weights[5];
    ((float *)f.step.model.wte.data)[0] = NAN;
    for (int64_t v = 0; v < FIXTURE_VOCAB; v++)
        ((float *)f.step.model.wte.data)[v * FIXTURE_HIDDEN] = NAN;
    assert_int_equal(step_fixture_run(&f, 0, &report), ERR_NUMERIC);
    assert_true(err_shared() || the_comm.ranks == 1);
    assert_true(weights[5] == kept);
    err_clear();
    step_fixture_close(&f);
}

/* The same step when NaN are passed over: it changes nothing, and the next one is as if it had not been there. */
static void not_a_number_may_be_skipped(void **state)
{
    (void)state;
    struct step_fixture f;
    struct step_report report;
    open_step(&f, COMPUTE_FP32, 0);
    f.cfg->run.on_nan = ON_FAULT_SKIP;
    f.cfg->run.faults_max = 1;
    float *weight = f.step.model.wte.data;
    const int64_t n = (int64_t)FIXTURE_VOCAB * FIXTURE_HIDDEN;
    float *kept = malloc((size_t)n * sizeof *kept);
    assert_non_null(kept);
    memcpy(kept, weight, (size_t)n * sizeof *kept);
    for (int64_t i = 0; i < n; i++)
        weight[i] = NAN;
    assert_int_equal(step_fixture_run(&f, 0, &report), 0);
    assert_int_equal(report.skipped, 1);
    assert_int_equal(f.step.faults, 1);
    memcpy(weight, kept, (size_t)n * sizeof *kept);
    assert_int_equal(model_weights_changed(&f.step.model), 0);
    assert_int_equal(step_fixture_run(&f, 1, &report), 0);
    assert_int_equal(report.skipped, 0);
    assert_true(report.loss > 0 && weight[0] != kept[0]);
    weight[0] = NAN; /* one more is too many */
    for (int64_t v = 0; v < FIXTURE_VOCAB; v++)
        weight[v * FIXTURE_HIDDEN] = NAN;
    assert_int_equal(step_fixture_run(&f, 2, &report), ERR_NUMERIC);
    err_clear();
    free(kept);
    step_fixture_close(&f);
}

/* ---- saving, and runs that begin with what another has saved ---- */

/* What saves and loads the fixture's state, in the folder of that name. */
static struct saving saving_of(struct step_fixture *f, const char *name)
{
    static struct metrics metrics;
    struct saving saving = {.cfg = f->cfg, .comm = &the_comm, .step = &f->step, .metrics = &metrics, .saved = -1};
    (void)snprintf(f->cfg->run.dir, CONFIG_TEXT_MAX, "%s/%s", the_folder, name);
    return saving;
}

static void save(struct step_fixture *f, const char *name, int64_t done)
{
    struct saving saving = saving_of(f, name);
    assert_int_equal(
        ckpt_open_run_dir(&the_comm, f->cfg->run.dir, (struct ckpt_terms){.takeover = false}, &saving.folder), 0);
    assert_int_equal(saving_open(&saving), 0);
    assert_int_equal(saving_last(&saving, done), 0);
    saving_close(&saving);
    ckpt_close_run_dir(&saving.folder);
}

/* Begins as checkpoint.init_from says, and does the first step. */
static void begin_and_step(struct step_fixture *f, bool optimizer, struct step_report *report)
{
    struct saving saving = saving_of(f, "branch");
    (void)snprintf(f->cfg->checkpoint.init_from, CONFIG_TEXT_MAX, "%s/base/step-00000003", the_folder);
    f->cfg->checkpoint.init_optimizer = optimizer;
    assert_int_equal(saving_begin(&saving), 0);
    assert_int_equal(loader_seek(f->loader, 0), 0);
    assert_int_equal(step_fixture_run(f, 0, report), 0);
}

/* Whether this rank's weights and optimizer state are the same in both. */
static bool same_state(const struct step_fixture *a, const struct step_fixture *b)
{
    bool same = true;
    for (int u = 0; u < a->step.params.n_units; u++) {
        const struct zero *x = &a->step.zero, *y = &b->step.zero;
        const struct tensor one[] = {x->weights[u], x->master[u], x->m[u], x->v[u]};
        const struct tensor other[] = {y->weights[u], y->master[u], y->m[u], y->v[u]};
        for (int i = 0; i < 4; i++)
            same = same && memcmp(one[i].data, other[i].data, tensor_bytes(one[i])) == 0;
    }
    return same;
}

/* Three steps and one more on the first batch, in one run, or the last one in a run that begins with the first three's
 * weights and moments: the same bits. So it is when that run begins again, and when it is resumed. */
static void a_branch_goes_on_as_its_run_would(void **state)
{
    (void)state;
    struct step_fixture base, branch, resumed, fresh;
    struct step_report expected, report;
    struct ckpt_meta meta;
    char folder[2 * FIXTURE_PATH_BYTES];
    open_step(&base, COMPUTE_FP32, 1);
    open_step(&branch, COMPUTE_FP32, 1);
    open_step(&resumed, COMPUTE_FP32, 1);
    for (int64_t i = 0; i < 3; i++)
        assert_int_equal(step_fixture_run(&base, i, &expected), 0);
    save(&base, "base", 3);
    assert_int_equal(loader_seek(base.loader, 0), 0);
    assert_int_equal(step_fixture_run(&base, 3, &expected), 0);
    for (int i = 0; i < 2; i++) {
        begin_and_step(&branch, true, &report);
        assert_true(report.loss == expected.loss && report.grad_norm == expected.grad_norm);
        assert_true(same_state(&base, &branch));
    }
    save(&branch, "branch", 1);
    (void)snprintf(folder, sizeof folder, "%s/branch/step-00000001", the_folder);
    assert_int_equal(ckpt_read_meta(folder, &meta), 0);
    assert_int_equal(meta.optim_steps, 4);
    assert_int_equal(state_load(&resumed.step, folder, &meta), 0);
    ckpt_meta_free(&meta);
    assert_int_equal(loader_seek(resumed.loader, 10), 0);
    assert_int_equal(step_fixture_run(&resumed, 1, &report), 0);
    assert_int_equal(step_fixture_run(&branch, 1, &report), 0);
    assert_true(same_state(&branch, &resumed));
    begin_and_step(&branch, false, &report);
    assert_true(report.loss == expected.loss);
    assert_false(same_state(&base, &branch));
    /* Without the moments it is the same whatever there was before. */
    open_step(&fresh, COMPUTE_FP32, 1);
    begin_and_step(&fresh, false, &report);
    assert_true(same_state(&fresh, &branch));
    step_fixture_close(&fresh);
    assert_int_equal(branch.step.optim_steps_before, 0);
    step_fixture_close(&base);
    step_fixture_close(&branch);
    step_fixture_close(&resumed);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(steps_after_the_first_allocate_nothing),
        cmocka_unit_test(overflow_repeats_the_step_with_a_coarser_scale),
        cmocka_unit_test(steps_do_not_wait_for_the_device),
        cmocka_unit_test(the_devices_clock_times_backward_passes),
        cmocka_unit_test(a_flipped_bit_of_a_replica_is_found),
        cmocka_unit_test(steps_issued_ahead_are_repeated_from_the_overflow),
        cmocka_unit_test(not_a_number_may_be_skipped),
        cmocka_unit_test(not_a_number_stops_every_rank),
        cmocka_unit_test(a_branch_goes_on_as_its_run_would),
    };
    if (comm_open(&the_comm, &argc, &argv) != 0) return 1;
    int rc = 0;
    if (the_comm.rank == 0) {
        char path[FIXTURE_PATH_BYTES + 16];
        rc = fixture_folder(the_folder);
        (void)snprintf(path, sizeof path, "%s/a.h5", the_folder);
        if (rc == 0) rc = fixture_write(path, 400, 1, FIXTURE_VOCAB);
    }
    if (rc == 0) rc = device_open(&the_dev, DEVICE_CPU, 0, 1);
    if (comm_agree(&the_comm, rc) != 0) return 1;
    if (comm_bcast(&the_comm, the_folder, sizeof the_folder, 0) != 0) return 1;
    const int failed = cmocka_run_group_tests(tests, NULL, NULL);
    if (comm_barrier(&the_comm) == 0 && the_comm.rank == 0) fixture_remove(the_folder);
    device_close(&the_dev);
    comm_close(&the_comm);
    return failed;
}
