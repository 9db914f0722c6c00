/* Saves of a run that take as long as the test wants. A process does one run, which its argument names:
 *
 *   waited   a save that was asked for during another one, on a GPU as the loop sees it
 *   nan      a run that ends on NaN during a save
 *
 * The calls by which a run looks for requests, brings a file to disk and waits for a thread pass through here (--wrap). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "ckpt/ckpt.h"
#include "err.h"
#include "ops.h"
#include "run.h"
#include "unit/shard_fixture.h"

#include <aio.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <sys/stat.h>

enum { WORDS = 4, PATH_BYTES = 2 * FIXTURE_PATH_BYTES };

static struct comm the_comm;
static char the_folder[FIXTURE_PATH_BYTES], the_run[PATH_BYTES];

int __real_aio_fsync(int operation, struct aiocb *request);
int __real_pthread_join(pthread_t thread, void **result);
int __real_unlink(const char *path);
int __wrap_aio_fsync(int operation, struct aiocb *request);
int __wrap_pthread_join(pthread_t thread, void **result);
int __wrap_unlink(const char *path);

/* ---- the first save is held up ---- */

static atomic_int files; /* of this rank, brought to disk */
static sem_t go;
static bool asks; /* the first save asks for another one, which asks the run to stop */

static bool ends_with(const char *text, const char *end)
{
    const size_t n = strlen(text), m = strlen(end);
    return n >= m && strcmp(text + n - m, end) == 0;
}

static void request_make(const char *name)
{
    char path[PATH_BYTES + 16];
    (void)snprintf(path, sizeof path, "%s/%s", the_run, name);
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    assert_int_equal(fclose(file), 0);
}

/* In the thread that writes: where the first save waits for `go`. */
int __wrap_aio_fsync(int operation, struct aiocb *request)
{
    char link[64], path[PATH_BYTES + 64] = "";
    (void)snprintf(link, sizeof link, "/proc/self/fd/%d", request->aio_fildes);
    const bool index = readlink(link, path, sizeof path - 1) > 0 && ends_with(path, "/index.h5");
    const int before = index ? -1 : atomic_fetch_add(&files, 1);
    if (asks && before == 0) request_make("SAVE");
    if (asks && before == 1) request_make("STOP");
    while (before == 0 && sem_wait(&go) != 0) {
        /* interrupted */
    }
    return __real_aio_fsync(operation, request);
}

/* How a request is taken: the save goes on when its own has been. */
int __wrap_unlink(const char *path)
{
    const int rc = __real_unlink(path);
    if (rc == 0 && asks && atomic_load(&files) > 0 && ends_with(path, "/SAVE")) (void)sem_post(&go);
    return rc;
}

/* The save goes on when the run waits for it. */
int __wrap_pthread_join(pthread_t thread, void **result)
{
    if (atomic_load(&files) > 0) (void)sem_post(&go);
    return __real_pthread_join(thread, result);
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

/* `tatara train` with these words more, with a request to save before its first step. */
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
    for (int i = 0; i < WORDS; i++)
        (void)snprintf(text[2 + i], sizeof text[2 + i], "%s", words[i]);
    for (int i = 0; i < WORDS + 2; i++)
        argv[1 + i] = text[i];
    return run_command(&the_comm, WORDS + 3, argv);
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

int main(int argc, char **argv)
{
    const struct CMUnitTest waited[] = {cmocka_unit_test(a_save_that_waited_knows_its_step)};
    const struct CMUnitTest nan[] = {cmocka_unit_test(the_end_on_nan_completes_the_save)};
    if (comm_open(&the_comm, &argc, &argv) != 0) return 1;
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
    const int failed = argc > 1 && strcmp(argv[1], "waited") == 0 ? cmocka_run_group_tests(waited, NULL, NULL)
                                                                  : cmocka_run_group_tests(nan, NULL, NULL);
    if (comm_barrier(&the_comm) == 0 && the_comm.rank == 0) fixture_remove(the_folder);
    comm_close(&the_comm);
    return failed;
}
