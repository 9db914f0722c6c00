/* The copy of the training state that a save in the background makes beside the next step: that it begins when what was
 * issued is done, that the update waits for it, and what a failure of it does. `test_snapshot` runs on the CPU,
 * `test_snapshot cuda` on a GPU; the emulated one runs what is issued as late as it may.
 *
 * Saves are compared with one that nothing happened beside, by the checksums of their files. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "ckpt/ckpt_internal.h"
#include "ops.h"
#include "saving.h"
#include "step_fixture.h"

#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>

static struct comm the_comm;
static struct device the_dev;
static char the_folder[FIXTURE_PATH_BYTES];
static pthread_t the_main;

/* ---- a device whose copies are held up, or fail ---- */

static atomic_bool holds, fails;
static sem_t go;
static struct device_table table, real;

static int download_held(struct device *dev, void *to_host, const void *from_device, size_t bytes)
{
    while (atomic_load(&holds) && sem_wait(&go) != 0) {
        /* interrupted */
    }
    atomic_store(&holds, false);
    if (atomic_load(&fails)) FAIL(ERR_DEVICE, "no copy today");
    return real.download_beside(dev, to_host, from_device, bytes);
}

int __real_sem_wait(sem_t *semaphore);
int __wrap_sem_wait(sem_t *semaphore);

/* A copy that is held up goes on when the update waits for it. */
int __wrap_sem_wait(sem_t *semaphore)
{
    if (pthread_equal(pthread_self(), the_main)) (void)sem_post(&go);
    return __real_sem_wait(semaphore);
}

/* From here on the next copy waits. */
static void hold_up(void)
{
    while (sem_trywait(&go) == 0) {
        /* posted once for each wait */
    }
    atomic_store(&holds, true);
}

/* ---- a run ---- */

struct run {
    struct step_fixture at;
    struct metrics metrics;
    struct saving saving;
};

static void run_open(struct run *run, const char *name)
{
    struct config *cfg = step_fixture_config(the_folder);
    cfg->batch.global = 2;
    cfg->batch.micro = 1;
    cfg->precision.compute = COMPUTE_FP32;
    cfg->checkpoint.async = true;
    (void)snprintf(cfg->run.dir, CONFIG_TEXT_MAX, "%s/%s", the_folder, name);
    *run = (struct run){.saving = {.cfg = cfg, .comm = &the_comm, .saved = -1}};
    step_fixture_open(&run->at, cfg, &the_dev, &the_comm);
    run->saving.step = &run->at.step;
    run->saving.metrics = &run->metrics;
    assert_int_equal(
        ckpt_open_run_dir(&the_comm, cfg->run.dir, (struct ckpt_terms){.takeover = false}, &run->saving.folder), 0);
    assert_int_equal(saving_open(&run->saving), 0);
}

static void run_close(struct run *run)
{
    saving_close(&run->saving);
    ckpt_close_run_dir(&run->saving.folder);
    step_fixture_close(&run->at);
}

static void one_step(struct run *run, int64_t index)
{
    struct step_report report;
    assert_int_equal(step_fixture_run(&run->at, index, &report), 0);
}

/* The checksum of this rank's file of the checkpoint at that step, which verifies. Collective. */
static uint64_t saved(const struct run *run, int64_t step)
{
    struct ckpt_manifest manifest;
    char folder[CKPT_PATH_MAX];
    assert_int_equal(ckpt_step_path(folder, run->at.cfg->run.dir, step), 0);
    assert_int_equal(ckpt_verify(&the_comm, folder), 0);
    assert_int_equal(ckpt_manifest_read(folder, &manifest), 0);
    const uint64_t sum = manifest.files[the_comm.rank].xxh3;
    ckpt_manifest_free(&manifest);
    return sum;
}

/* The same of a run that saves after step 1 and goes no further. */
static uint64_t saved_alone(void)
{
    struct run run;
    run_open(&run, "alone");
    one_step(&run, 0);
    assert_int_equal(saving_last(&run.saving, 1), 0);
    const uint64_t sum = saved(&run, 1);
    run_close(&run);
    return sum;
}

/* ---- tests ---- */

/* The copy stands still until the update waits for it; if none did, until the next step were over. */
static void the_update_waits_for_the_copy(void **state)
{
    (void)state;
    struct run run;
    const uint64_t alone = saved_alone();
    run_open(&run, "held");
    one_step(&run, 0);
    hold_up();
    saving_now(&run.saving, 1);
    one_step(&run, 1);
    (void)sem_post(&go);
    const double wait_s = state_saver_take_wait_s(run.saving.saver);
    assert_int_equal(saving_last(&run.saving, 2), 0);
    assert_true(saved(&run, 1) == alone);
    assert_true(saved(&run, 2) != alone);
    assert_true(wait_s > 0);
    run_close(&run);
}

/* Whether all of a tensor is this number, in the checkpoint of step 0. */
static bool holds_only(const struct run *run, const char *prefix, const struct param *param, float value)
{
    char folder[CKPT_PATH_MAX];
    struct ckpt_slab slab = {.ndim = param->ndim, .end = param->elems};
    (void)snprintf(slab.name, sizeof slab.name, "%s%s", prefix, param->name);
    memcpy(slab.shape, param->shape, sizeof slab.shape);
    slab.data = calloc((size_t)param->elems, sizeof *slab.data);
    assert_non_null(slab.data);
    assert_int_equal(ckpt_step_path(folder, run->at.cfg->run.dir, 0), 0);
    assert_int_equal(ckpt_load(folder, &slab, 1), 0);
    bool only = true;
    for (int64_t i = 0; i < param->elems; i++)
        only = only && slab.data[i] == value;
    free(slab.data);
    return only;
}

/* A state that is changed just before it is saved. */
static void the_copy_begins_when_all_is_done(void **state)
{
    (void)state;
    struct run run;
    run_open(&run, "late");
    assert_int_equal(comm_finish(&the_comm), 0); /* gathers of the initial weights */
    for (int unit = 0; unit < run.at.step.params.n_units; unit++) {
        assert_int_equal(op_fill(&the_dev, run.at.step.zero.master[unit], 3), 0);
        assert_int_equal(op_fill(&the_dev, run.at.step.zero.m[unit], 4), 0);
        assert_int_equal(op_fill(&the_dev, run.at.step.zero.v[unit], 5), 0);
    }
    assert_int_equal(saving_last(&run.saving, 0), 0);
    (void)saved(&run, 0);
    for (int i = 0; i < run.at.step.params.n; i++) {
        const struct param *param = &run.at.step.params.param[i];
        assert_true(holds_only(&run, "", param, 3));
        assert_true(holds_only(&run, "optim/exp_avg/", param, 4));
        assert_true(holds_only(&run, "optim/exp_avg_sq/", param, 5));
    }
    run_close(&run);
}

/* A warning, and no checkpoint; the run goes on, and may save again. On the last rank alone, which alone can say why. */
static void a_copy_that_fails_ends_the_save_alone(void **state)
{
    (void)state;
    struct run run;
    run_open(&run, "failed");
    one_step(&run, 0);
    atomic_store(&fails, the_comm.rank == the_comm.ranks - 1);
    hold_up();
    saving_now(&run.saving, 1);
    one_step(&run, 1);
    (void)sem_post(&go);
    assert_true(ckpt_save_busy(run.saving.ckpt));
    assert_int_equal(ckpt_save_wait(run.saving.ckpt), ERR_DEVICE);
    if (the_comm.rank == the_comm.ranks - 1) assert_string_equal(err_message(), "no copy today");
    err_clear();
    atomic_store(&fails, false);
    one_step(&run, 2);
    assert_int_equal(saving_last(&run.saving, 3), 0);
    (void)saved(&run, 3);
    run_close(&run);
}

/* The device, and one shard for the run. Collective. */
static int open_all(bool cuda)
{
    int rc = sem_init(&go, 0, 0);
    const int devices = cuda ? cuda_backend()->count() : 1;
    if (the_comm.rank == 0) {
        char path[FIXTURE_PATH_BYTES + 16];
        if (rc == 0) rc = fixture_folder(the_folder);
        (void)snprintf(path, sizeof path, "%s/a.h5", the_folder);
        if (rc == 0) rc = fixture_write(path, 400, 1, FIXTURE_VOCAB);
    }
    if (rc == 0) rc = device_open(&the_dev, cuda ? DEVICE_CUDA : DEVICE_CPU, the_comm.local_rank % devices, 1);
    TRY(comm_agree(&the_comm, rc));
    real = table = *the_dev.table;
    table.download_beside = download_held;
    the_dev.table = &table;
    TRY(comm_bcast(&the_comm, the_folder, sizeof the_folder, 0));
    return comm_open_transport(&the_comm, &the_dev, cuda && devices < the_comm.ranks ? COMM_MPI : COMM_AUTO, 60);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(the_update_waits_for_the_copy),
                                       cmocka_unit_test(the_copy_begins_when_all_is_done),
                                       cmocka_unit_test(a_copy_that_fails_ends_the_save_alone)};
    the_main = pthread_self();
    if (comm_open(&the_comm, &argc, &argv) != 0) return 1;
    if (open_all(argc == 2 && strcmp(argv[1], "cuda") == 0) != 0) {
        fprintf(stderr, "test_snapshot: %s\n", err_message());
        return 1;
    }
    const int failed = cmocka_run_group_tests(tests, NULL, NULL);
    if (comm_barrier(&the_comm) == 0 && the_comm.rank == 0) fixture_remove(the_folder);
    comm_close_transport(&the_comm);
    device_close(&the_dev);
    comm_close(&the_comm);
    return failed;
}
