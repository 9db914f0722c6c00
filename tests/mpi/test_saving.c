/* Saves of a run that take as long as the test wants, or fail. What a process does its argument names:
 *
 *   waited   a save that was asked for during another one, on a GPU as the loop sees it
 *   nan      a run that ends on NaN during a save
 *   rewind   runs that go back to steps whose saves were skipped or failed
 *
 * The calls by which a run looks for requests, makes a folder, brings a file to disk and waits for a thread pass through
 * here (--wrap). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "ckpt/ckpt.h"
#include "err.h"
#include "ops.h"
#include "run.h"
#include "unit/shard_fixture.h"

#include <errno.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <sys/stat.h>

enum { WORDS = 12, PATH_BYTES = 2 * FIXTURE_PATH_BYTES };

static struct comm the_comm;
static pthread_t the_main;
static char the_folder[FIXTURE_PATH_BYTES], the_run[PATH_BYTES];

int __real_comm_watch(struct comm *comm, const char *folder, double timeout_s);
int __real_fsync(int fd);
int __real_mkdir(const char *path, mode_t mode);
int __real_pthread_join(pthread_t thread, void **result);
int __real_unlink(const char *path);
int __wrap_comm_watch(struct comm *comm, const char *folder, double timeout_s);
int __wrap_fsync(int fd);
int __wrap_mkdir(const char *path, mode_t mode);
int __wrap_pthread_join(pthread_t thread, void **result);
int __wrap_unlink(const char *path);

/* ---- the first save is held up ---- */

static atomic_int files; /* of this rank, brought to disk */
static sem_t go;
static bool holds = true; /* whether it is */
static bool asks;         /* the first save asks for another one, which asks the run to stop */

static void request_make(const char *name)
{
    char path[PATH_BYTES + 16];
    (void)snprintf(path, sizeof path, "%s/%s", the_run, name);
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    assert_int_equal(fclose(file), 0);
}

/* In the thread that writes: where the first save waits for `go`. */
int __wrap_fsync(int fd)
{
    char link[64], path[PATH_BYTES + 64] = "";
    (void)snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    const bool data = readlink(link, path, sizeof path - 1) > 0 && strstr(path, "/rank-");
    const int before = data ? atomic_fetch_add(&files, 1) : -1;
    if (asks && before == 0) request_make("SAVE");
    if (asks && before == 1) request_make("STOP");
    while (holds && before == 0 && sem_wait(&go) != 0) {
        /* interrupted */
    }
    return __real_fsync(fd);
}

/* How a request is taken: the save goes on when its own has been. */
int __wrap_unlink(const char *path)
{
    const int rc = __real_unlink(path);
    if (rc == 0 && asks && atomic_load(&files) > 0 && strstr(path, "/SAVE")) (void)sem_post(&go);
    return rc;
}

/* The save goes on when the run waits for it. */
int __wrap_pthread_join(pthread_t thread, void **result)
{
    if (pthread_equal(pthread_self(), the_main) && atomic_load(&files) > 0) (void)sem_post(&go);
    return __real_pthread_join(thread, result);
}

/* ---- saves of some steps fail ---- */

static int64_t fails_from, fails_to; /* of these steps, the last one aside */
static int failed_saves;

int __wrap_mkdir(const char *path, mode_t mode)
{
    static const char temp[] = "/.tmp-save-";
    const char *name = strstr(path, temp);
    const int64_t step = name ? strtoll(name + strlen(temp), NULL, 10) : -1;
    if (step < fails_from || step >= fails_to) return __real_mkdir(path, mode);
    failed_saves++;
    errno = ENOSPC;
    return -1;
}

/* A GPU as the loop sees it: steps are issued, and their outcome has to be asked for. Here they are done at once. */
static void *issued_queue(struct device *dev)
{
    return dev;
}

const struct device_table *cuda_backend(void)
{
    static struct device_table table;
    table = cpu_table;
    table.queue = issued_queue;
    return &table;
}

/* ---- runs ---- */

/* One run of a process has a folder in which its ranks would meet if they hung: the first. */
int __wrap_comm_watch(struct comm *comm, const char *folder, double timeout_s)
{
    static bool watched;
    const bool again = watched && folder;
    watched |= folder != NULL;
    return __real_comm_watch(comm, again ? NULL : folder, timeout_s);
}

/* `tatara train` with these words more, the last of them NULL, with a request to save before its first step. */
static int train(const char *const words[WORDS])
{
    char config[PATH_BYTES], text[WORDS + 2][PATH_BYTES + 32];
    char *argv[WORDS + 3] = {config};
    (void)snprintf(config, sizeof config, "%s/config.yaml", the_folder);
    if (the_comm.rank == 0) {
        FILE *file = fopen(config, "w");
        assert_non_null(file);
        (void)fputs(
            "run: {steps: 100000, threads: 1}\n"
            "model: {layers: 2, hidden: 48, heads: 3, kv_heads: 1, head_dim: 16, ffn_hidden: 80, seq_len: 32, "
            "vocab_size: 500}\n"
            "batch: {global: 10, micro: 2}\n"
            "optim: {warmup_steps: 0, schedule: constant}\n"
            "checkpoint: {every: 0}\n"
            "log: {every: 1000000}\n",
            file);
        assert_int_equal(fclose(file), 0);
        assert_int_equal(mkdir(the_run, 0777), 0);
        request_make("SAVE");
    }
    (void)snprintf(text[0], sizeof text[0], "run.dir=%s", the_run);
    (void)snprintf(text[1], sizeof text[1], "data.train=[{path: %s/a.h5}]", the_folder);
    int n = 2;
    for (int i = 0; i < WORDS && words[i]; i++)
        (void)snprintf(text[n++], sizeof text[0], "%s", words[i]);
    for (int i = 0; i < n; i++)
        argv[1 + i] = text[i];
    return run_command(&the_comm, 1 + n, argv);
}

/* The steps of the run's checkpoints, in order; −1: of an unfinished one. Returns how many. */
static int saved_steps(int64_t steps[4])
{
    int n = 0;
    struct dirent **entries = NULL;
    const int all = scandir(the_run, &entries, NULL, alphasort);
    assert_true(all > 0);
    for (int i = 0; i < all; i++) {
        const char *entry = entries[i]->d_name;
        const bool whole = strncmp(entry, "step-", 5) == 0, part = strncmp(entry, ".tmp-", 5) == 0;
        if ((whole || part) && n < 4) steps[n++] = whole ? strtoll(entry + 5, NULL, 10) : -1;
        free(entries[i]);
    }
    free(entries);
    return n;
}

/* The norm of the gradient in a checkpoint, which verifies. Collective. */
static double saved_norm(int64_t step)
{
    struct ckpt_meta meta;
    char folder[PATH_BYTES + 16];
    (void)snprintf(folder, sizeof folder, "%s/step-%08lld", the_run, (long long)step);
    assert_int_equal(ckpt_verify(&the_comm, folder), 0);
    assert_int_equal(ckpt_read_meta(folder, &meta), 0);
    ckpt_meta_free(&meta);
    assert_int_equal(meta.step, step);
    return meta.grad_norm;
}

/* The second save begins when the first has ended, at a step whose outcome nothing else asks for: without knowing it the
 * norm in the checkpoint would be that of the last step with a known outcome, the first. One rank. */
static void a_save_that_waited_knows_its_step(void **state)
{
    (void)state;
    static const char *const words[WORDS] = {"device=cuda", "comm=mpi", "checkpoint.keep=9", "checkpoint.async=true"};
    int64_t steps[4];
    assert_int_equal(the_comm.ranks, 1);
    asks = true;
    assert_int_equal(train(words), ERR_STOPPED);
    assert_int_equal(saved_steps(steps), 3);
    assert_int_equal(steps[0], 1);
    assert_true(steps[1] > 2); /* the request was taken after step 2 */
    assert_true(saved_norm(steps[1]) != saved_norm(1));
}

/* Weight decay of lr * weight_decay = 100 multiplies weights by -99 in every step, until they overflow. The save of the
 * first step is under way all that time, and is completed then. */
static void the_end_on_nan_completes_the_save(void **state)
{
    (void)state;
    static const char *const words[WORDS] = {"device=cpu", "optim.lr=10", "optim.min_lr=10", "optim.weight_decay=10"};
    int64_t steps[4];
    assert_int_equal(train(words), ERR_NUMERIC);
    assert_true(err_shared() || the_comm.ranks == 1);
    if (the_comm.rank == 0) assert_non_null(strstr(err_message(), "NaN"));
    err_clear();
    assert_int_equal(saved_steps(steps), 1);
    assert_int_equal(steps[0], 1);
    assert_true(saved_norm(1) > 0);
}

/* The lines of the run's metrics.jsonl that say how it went back, without their time, which is their last field. */
static void read_rewinds(char *text, size_t bytes)
{
    char path[PATH_BYTES + 16], line[512];
    (void)snprintf(path, sizeof path, "%s/metrics.jsonl", the_run);
    FILE *file = fopen(path, "r");
    assert_non_null(file);
    text[0] = '\0';
    while (fgets(line, sizeof line, file)) {
        const size_t n = strlen(text);
        char *time = strstr(line, ",\"time\"");
        if (time) memcpy(time, "\n", sizeof "\n");
        if (strstr(line, "\"rewind\"")) (void)snprintf(text + n, bytes - n, "%s", line);
    }
    assert_int_equal(fclose(file), 0);
}

enum { REWIND_STEPS = 120 };

/* A run that goes back for losses that are larger than others by chance. */
static void run_rewinds(const char *name, bool held, int64_t from, int64_t to)
{
    const char *const words[WORDS] = {
        "device=cuda",         "comm=mpi",           "run.steps=120",
        "optim.lr=1e-5",       "optim.min_lr=1e-5",  "optim.spike_sigma=1.5",
        "run.on_spike=rewind", "run.faults_max=100", "checkpoint.every=10",
        "batch.micro=1",       "batch.global=2",     held ? "checkpoint.async=true" : "checkpoint.async=false"};
    (void)snprintf(the_run, sizeof the_run, "%s/%s", the_folder, name);
    holds = held;
    atomic_store(&files, 0);
    while (sem_trywait(&go) == 0) {
        /* what the run before left */
    }
    fails_from = from;
    fails_to = to;
    failed_saves = 0;
    assert_int_equal(train(words), 0);
    assert_int_equal(comm_barrier(&the_comm), 0);
}

/* Where batches begin to be left out, and which, does not depend on the checkpoints that are there. */
static void a_rewind_does_not_depend_on_saves(void **state)
{
    (void)state;
    enum { RUNS = 3 };
    /* All are made; that of step 1 is being written until the run first goes back; most fail. */
    static const struct {
        const char *name;
        bool held;
        int64_t fails_from, fails_to;
    } run[RUNS] = {{"made", false, 0, 0}, {"held", true, 0, 0}, {"most", false, 20, 110}};
    char rewinds[RUNS][4096], last[RUNS][PATH_BYTES + 32];
    for (int i = 0; i < RUNS; i++) {
        struct ckpt_meta meta[2];
        run_rewinds(run[i].name, run[i].held, run[i].fails_from, run[i].fails_to);
        if (the_comm.rank != 0) continue;
        assert_true((failed_saves > 0) == (run[i].fails_to > 0));
        (void)snprintf(last[i], sizeof last[i], "%s/step-%08d", the_run, REWIND_STEPS);
        read_rewinds(rewinds[i], sizeof rewinds[i]);
        assert_string_equal(rewinds[i], rewinds[0]);
        char *diff[] = {"diff", last[0], last[i]};
        assert_int_equal(ckpt_command(&the_comm, 3, diff), 0);
        assert_int_equal(ckpt_read_meta(last[0], &meta[0]), 0);
        assert_int_equal(ckpt_read_meta(last[i], &meta[1]), 0);
        assert_true(meta[0].faults > 1);
        assert_int_equal(meta[1].faults, meta[0].faults);
        assert_int_equal(meta[1].batches_skipped, meta[0].batches_skipped);
        assert_true(meta[1].loss_seen == meta[0].loss_seen && meta[1].loss_variance == meta[0].loss_variance);
        ckpt_meta_free(&meta[0]);
        ckpt_meta_free(&meta[1]);
    }
}

int main(int argc, char **argv)
{
    const struct CMUnitTest waited[] = {cmocka_unit_test(a_save_that_waited_knows_its_step)};
    const struct CMUnitTest nan[] = {cmocka_unit_test(the_end_on_nan_completes_the_save)};
    const struct CMUnitTest rewinds[] = {cmocka_unit_test(a_rewind_does_not_depend_on_saves)};
    if (comm_open(&the_comm, &argc, &argv) != 0) return 1;
    the_main = pthread_self();
    int rc = sem_init(&go, 0, 0);
    if (the_comm.rank == 0) {
        char path[PATH_BYTES];
        if (rc == 0) rc = fixture_folder(the_folder);
        (void)snprintf(path, sizeof path, "%s/a.h5", the_folder);
        if (rc == 0) rc = fixture_write(path, 400, 1, FIXTURE_VOCAB);
    }
    if (comm_agree(&the_comm, rc) != 0) return 1;
    if (comm_bcast(&the_comm, the_folder, sizeof the_folder, 0) != 0) return 1;
    (void)snprintf(the_run, sizeof the_run, "%s/run", the_folder);
    const char *what = argc > 1 ? argv[1] : "";
    const int failed = strcmp(what, "waited") == 0   ? cmocka_run_group_tests(waited, NULL, NULL)
                       : strcmp(what, "rewind") == 0 ? cmocka_run_group_tests(rewinds, NULL, NULL)
                                                     : cmocka_run_group_tests(nan, NULL, NULL);
    if (comm_barrier(&the_comm) == 0 && the_comm.rank == 0) fixture_remove(the_folder);
    comm_close(&the_comm);
    return failed;
}
