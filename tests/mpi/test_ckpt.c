/* Checkpoints in good health: what is saved under any split is loaded under any other, bit for bit; owners, retention,
 * metadata, commands. Faults are in test_ckpt_faults.c. Runs with 1 to 4 ranks.
 *
 * `test_ckpt write DIR` only saves two checkpoints into DIR, for tests/e2e/ckpt_h5py.py. */
#include "ckpt_fixture.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* Every range of a small matrix, cut: the pieces follow each other, and are the rectangles that they say. */
static void test_pieces(void **state)
{
    (void)state;
    for (int64_t cols = 1; cols <= 5; cols++) {
        const int64_t shape[2] = {4, cols};
        for (int64_t begin = 0; begin <= 4 * cols; begin++) {
            for (int64_t end = begin; end <= 4 * cols; end++) {
                struct ckpt_piece piece[CKPT_PIECES_MAX];
                const int n = ckpt_pieces(piece, 2, shape, begin, end);
                int64_t at = begin;
                for (int p = 0; p < n; p++) {
                    const int64_t row = (int64_t)piece[p].start[0], col = (int64_t)piece[p].start[1];
                    const int64_t rows = (int64_t)piece[p].count[0], width = (int64_t)piece[p].count[1];
                    assert_int_equal(piece[p].begin, at);
                    assert_int_equal(row * cols + col, at);
                    assert_int_equal(piece[p].end - piece[p].begin, rows * width);
                    assert_true(rows >= 1 && width >= 1 && row + rows <= 4 && col + width <= cols);
                    assert_true(rows == 1 || width == cols);
                    at = piece[p].end;
                }
                assert_int_equal(at, end);
            }
        }
    }
}

/* Loads the parts of all of `ranks` pretended ranks, one after the other. */
static void load_as(const char *folder, int split, int ranks, int64_t step)
{
    for (int rank = 0; rank < ranks; rank++) {
        struct ckpt_slab *slabs = fixture_slabs(split, rank, ranks, step + 1);
        assert_int_equal(ckpt_load(folder, slabs, FIXTURE_TENSORS), 0);
        assert_int_equal(fixture_errors(slabs, step), 0);
        fixture_slabs_free(slabs);
    }
}

static void test_round_trip(void **state)
{
    struct fixture fix;
    fixture_open(&fix, *state);
    assert_int_equal(fixture_newest(&fix), -1);
    for (int split = 0; split < FIXTURE_SPLITS; split++) {
        char folder[CKPT_PATH_MAX];
        const int64_t step = 100 + split;
        assert_int_equal(fixture_save(&fix, split, step), 0);
        assert_int_equal(fixture_newest(&fix), step);
        fixture_path(&fix, step, NULL, folder);
        for (int ranks = 1; ranks <= 5; ranks += 2) {
            load_as(folder, 0, ranks, step);
            load_as(folder, 1, ranks, step);
        }
    }
    assert_int_equal(fixture_count(&fix, ".tmp-"), 0);
    fixture_close(&fix);
}

/* A tensor of several megabytes, which goes past the page cache: from where a save needs no copy, and from elsewhere. */
static void test_large(void **state)
{
    enum { ROWS = 1531, COLS = 1021, ELEMS = ROWS * COLS };
    struct fixture fix;
    struct comm *comm = *state;
    const struct ckpt_keep keep = {.newest = 2};
    float *all = calloc(ELEMS, sizeof *all), *loaded = calloc(ELEMS, sizeof *loaded);
    float *room = calloc(ELEMS + CKPT_ALIGN / sizeof *room, sizeof *room);
    assert_true(all && loaded && room);
    fixture_open(&fix, comm);
    for (int step = 1; step <= 2; step++) {
        char folder[CKPT_PATH_MAX];
        const struct ckpt_meta meta = fixture_meta(step);
        const int64_t begin = (int64_t)(ELEMS - 1) * comm->rank / comm->ranks + (comm->rank > 0);
        struct ckpt_slab slab = {.name = "large", .ndim = 2, .shape = {ROWS, COLS}, .begin = begin};
        slab.end = (int64_t)(ELEMS - 1) * (comm->rank + 1) / comm->ranks + 1;
        slab.data = step == 1 ? ckpt_slab_place(&slab, room) : room + 1;
        assert_true(slab.data >= room && slab.data - room < (ptrdiff_t)(CKPT_ALIGN / sizeof *room));
        for (int i = 0; i < ELEMS; i++)
            all[i] = (float)i + (float)step / 4.0f;
        memcpy(slab.data, all + begin, (size_t)(slab.end - begin) * sizeof *all);
        assert_int_equal(ckpt_save(comm, &fix.run, &meta, &slab, 1, keep), 0);
        fixture_path(&fix, step, NULL, folder);
        assert_int_equal(ckpt_verify(comm, folder), 0);
        const struct ckpt_slab whole = {
            .name = "large", .ndim = 2, .shape = {ROWS, COLS}, .begin = 0, .end = ELEMS, .data = loaded};
        assert_int_equal(ckpt_load(folder, &whole, 1), 0);
        assert_memory_equal(loaded, all, ELEMS * sizeof *all);
    }
    fixture_close(&fix);
    free(all);
    free(loaded);
    free(room);
}

/* Part of the tensors, in another order, twice the same. */
static void test_load_some(void **state)
{
    struct fixture fix;
    char folder[CKPT_PATH_MAX];
    fixture_open(&fix, *state);
    assert_int_equal(fixture_save(&fix, 1, 7), 0);
    fixture_path(&fix, 7, NULL, folder);
    struct ckpt_slab *slabs = fixture_slabs(0, 0, 1, 9);
    const struct ckpt_slab some[3] = {slabs[4], slabs[1], slabs[4]};
    assert_int_equal(ckpt_load(folder, some, 3), 0);
    assert_true(slabs[1].data[200] == fixture_value(1, 7, 200));
    assert_true(slabs[4].data[18] == fixture_value(4, 7, 18));
    assert_true(slabs[0].data[0] == fixture_value(0, 9, 0)); /* not asked for */
    fixture_slabs_free(slabs);
    fixture_close(&fix);
}

static void test_meta(void **state)
{
    struct fixture fix;
    char folder[CKPT_PATH_MAX];
    struct ckpt_meta got;
    const struct ckpt_meta put = fixture_meta(123456789);
    fixture_open(&fix, *state);
    assert_int_equal(fixture_save(&fix, 0, put.step), 0);
    fixture_path(&fix, put.step, NULL, folder);
    assert_int_equal(ckpt_read_meta(folder, &got), 0);
    assert_int_equal(got.step, put.step);
    assert_int_equal(got.optim_steps, put.optim_steps);
    assert_int_equal(got.began, put.began);
    assert_memory_equal(&got.grad_scale, &put.grad_scale, sizeof put.grad_scale);
    assert_memory_equal(&got.grad_norm, &put.grad_norm, sizeof put.grad_norm);
    assert_memory_equal(&got.tokens, &put.tokens, sizeof put.tokens);
    assert_true(got.model_id == put.model_id && got.tokenizer_id == put.tokenizer_id);
    assert_string_equal(got.version, put.version);
    assert_string_equal(got.config_yaml, put.config_yaml);
    ckpt_meta_free(&got);
    fixture_close(&fix);
}

static void test_retention(void **state)
{
    struct fixture fix;
    struct comm *comm = *state;
    struct stat info;
    fixture_open(&fix, comm);
    assert_int_equal(fixture_save(&fix, 0, 900), 0); /* newer than what follows: not ours to remove */
    for (int64_t step = 1; step <= 5; step++) {
        struct ckpt_slab *slabs = fixture_slabs(0, comm->rank, comm->ranks, step);
        const struct ckpt_meta meta = fixture_meta(step);
        assert_int_equal(ckpt_save(comm, &fix.run, &meta, slabs, FIXTURE_TENSORS, (struct ckpt_keep){.newest = 2}),
                         0);
        fixture_slabs_free(slabs);
        assert_int_equal(comm_barrier(comm), 0);
        assert_int_equal(fixture_count(&fix, "step-"), step < 2 ? 2 : 3);
        char folder[CKPT_PATH_MAX];
        fixture_path(&fix, step, NULL, folder);
        assert_int_equal(stat(folder, &info), 0);
    }
    fixture_close(&fix);
}

/* A damaged checkpoint is not one of the `keep` that are kept. */
static void test_retention_damaged(void **state)
{
    struct fixture fix;
    struct comm *comm = *state;
    char path[CKPT_PATH_MAX];
    fixture_open(&fix, comm);
    assert_int_equal(fixture_save(&fix, 0, 1), 0);
    assert_int_equal(fixture_save(&fix, 0, 2), 0);
    fixture_path(&fix, 2, "rank-00000.h5", path);
    if (comm->rank == 0) assert_int_equal(truncate(path, 100), 0);
    assert_int_equal(comm_barrier(comm), 0);
    struct ckpt_slab *slabs = fixture_slabs(0, comm->rank, comm->ranks, 3);
    const struct ckpt_meta meta = fixture_meta(3);
    assert_int_equal(ckpt_save(comm, &fix.run, &meta, slabs, FIXTURE_TENSORS, (struct ckpt_keep){.newest = 2}), 0);
    fixture_slabs_free(slabs);
    fixture_path(&fix, 1, NULL, path);
    assert_int_equal(ckpt_verify(comm, path), 0);
    fixture_close(&fix);
}

static void test_same_step(void **state)
{
    struct fixture fix;
    struct comm *comm = *state;
    char path[CKPT_PATH_MAX];
    fixture_open(&fix, comm);
    assert_int_equal(fixture_save(&fix, 0, 5), 0);
    assert_int_equal(fixture_save(&fix, 0, 5), 0); /* equal: nothing to do */
    struct ckpt_slab *other = fixture_slabs(0, comm->rank, comm->ranks, 6);
    const struct ckpt_meta meta = fixture_meta(5);
    assert_int_equal(ckpt_save(comm, &fix.run, &meta, other, FIXTURE_TENSORS, (struct ckpt_keep){.newest = 100}),
                     ERR_CONFIG);
    assert_true(fixture_told(comm, "step-00000005"));
    assert_int_equal(fixture_count(&fix, ".tmp-"), 0);
    fixture_path(&fix, 5, NULL, path);
    load_as(path, 0, 1, 5);

    /* Damaged: it is replaced. */
    fixture_path(&fix, 5, "index.h5", path);
    if (comm->rank == 0) assert_int_equal(unlink(path), 0);
    assert_int_equal(ckpt_save(comm, &fix.run, &meta, other, FIXTURE_TENSORS, (struct ckpt_keep){.newest = 100}), 0);
    fixture_slabs_free(other);
    fixture_path(&fix, 5, NULL, path);
    assert_int_equal(ckpt_verify(comm, path), 0);
    load_as(path, 0, 1, 6);
    assert_int_equal(fixture_count(&fix, ".tmp-"), 0);
    fixture_close(&fix);
}

static void test_owner(void **state)
{
    struct fixture fix;
    struct comm *comm = *state;
    struct ckpt_run newer;
    fixture_open(&fix, comm);
    assert_int_equal(fixture_save(&fix, 0, 1), 0);
    assert_int_equal(ckpt_open_run_dir(comm, fix.dir, (struct ckpt_terms){.takeover = false}, &newer), 0);
    assert_string_not_equal(newer.owner, fix.run.owner);
    assert_int_equal(fixture_save(&fix, 0, 2), ERR_TAKEN);
    assert_true(fixture_told(comm, "newer attempt"));
    assert_int_equal(fixture_newest(&fix), 1);
    assert_int_equal(fixture_count(&fix, ".tmp-"), 0);
    ckpt_close_run_dir(&fix.run);
    fix.run = newer;
    assert_int_equal(fixture_save(&fix, 0, 2), 0);
    fixture_close(&fix);
}

/* What an attempt killed while saving leaves is never taken for a checkpoint, and the next attempt removes it. */
static void test_leftovers(void **state)
{
    struct fixture fix;
    struct comm *comm = *state;
    char whole[CKPT_PATH_MAX], temp[CKPT_PATH_MAX];
    fixture_open(&fix, comm);
    assert_int_equal(fixture_save(&fix, 0, 1), 0);
    assert_int_equal(fixture_save(&fix, 0, 2), 0);
    fixture_path(&fix, 2, NULL, whole);
    assert_int_equal(ckpt_temp_path(temp, &fix.run, "save", 2), 0);
    if (comm->rank == 0) assert_int_equal(rename(whole, temp), 0);
    assert_int_equal(comm_barrier(comm), 0);
    assert_int_equal(fixture_newest(&fix), 1);
    assert_int_equal(fixture_count(&fix, ".tmp-"), 1);
    ckpt_close_run_dir(&fix.run);
    assert_int_equal(ckpt_open_run_dir(comm, fix.dir, (struct ckpt_terms){.takeover = false}, &fix.run), 0);
    assert_int_equal(fixture_count(&fix, ".tmp-"), 0);
    assert_int_equal(fixture_newest(&fix), 1);
    fixture_close(&fix);
}

/* Runs `tatara ckpt …` as one rank and returns what it printed; the caller frees it. */
static char *command_output(int argc, char **argv, int expected)
{
    struct comm alone = {.rank = 0, .ranks = 1, .local_rank = 0, .local_ranks = 1};
    char path[] = "/tmp/tatara-ckpt-out-XXXXXX";
    const int file = mkstemp(path), out = dup(STDOUT_FILENO);
    char *text = NULL;
    size_t bytes = 0;
    assert_true(file >= 0 && out >= 0);
    fflush(stdout);
    assert_true(dup2(file, STDOUT_FILENO) >= 0);
    const int rc = ckpt_command(&alone, argc, argv);
    fflush(stdout);
    assert_true(dup2(out, STDOUT_FILENO) >= 0);
    close(out);
    close(file);
    assert_int_equal(rc, expected);
    assert_int_equal(ckpt_file_read(path, &text, &bytes), 0);
    unlink(path);
    return text;
}

static void expect_output(char *verb, char *path, int expected, const char *const *wanted)
{
    char *argv[] = {verb, path};
    char *text = command_output(2, argv, expected);
    for (; *wanted; wanted++) {
        if (!strstr(text, *wanted)) fprintf(stderr, "'%s' is not in:\n%s", *wanted, text);
        assert_non_null(strstr(text, *wanted));
    }
    free(text);
}

static void test_commands(void **state)
{
    struct fixture fix;
    struct comm *comm = *state;
    char folder[CKPT_PATH_MAX], file[CKPT_PATH_MAX];
    fixture_open(&fix, comm);
    assert_int_equal(fixture_save(&fix, 0, 1), 0);
    assert_int_equal(fixture_save(&fix, 0, 2), 0);
    fixture_path(&fix, 1, NULL, folder);
    fixture_path(&fix, 2, "rank-00000.h5", file);
    if (comm->rank == 0) {
        char none[] = "/nonexistent";
        assert_int_equal(truncate(file, 10), 0);
        expect_output("ls", fix.dir, 0,
                      (const char *[]){"complete\n", "1 of its files missing or of another size", NULL});
        expect_output("show", folder, 0,
                      (const char *[]){"step          1\n", "fedcba9876543210", "  model: {arch: llama}", "test 1.0",
                                       "optim/exp_avg/model.embed_tokens.weight", "[37, 13]",
                                       /* single: one element, 5 * 1024 + 1/64 */
                                       "     5120.02         5120         5120  c3f610a325e9a2c3\n", NULL});
        expect_output("verify", folder, 0, (const char *[]){"OK: ", NULL});
        fixture_path(&fix, 2, NULL, folder);
        fixture_path(&fix, 2, CKPT_INDEX, file);
        assert_int_equal(truncate(file, 10), 0);
        for (int i = 0; i < 20; i++) { /* of several damaged files the first, whichever thread is faster */
            expect_output("verify", folder, ERR_DATA, (const char *[]){NULL});
            assert_non_null(strstr(err_message(), "rank-00000.h5"));
        }
        expect_output("show", folder, ERR_DATA, (const char *[]){NULL});
        expect_output("ls", none, ERR_DATA, (const char *[]){NULL});
        expect_output("frobnicate", none, ERR_USAGE, (const char *[]){NULL});
        free(command_output(0, NULL, ERR_USAGE));
        char *help[] = {"--help"};
        char *text = command_output(1, help, 0);
        assert_non_null(strstr(text, "tatara ckpt verify"));
        free(text);
        err_clear();
    }
    fixture_close(&fix);
}

/* Two checkpoints into `dir`, cut evenly and unevenly. */
static int write_only(struct comm *comm, char *dir)
{
    struct fixture fix = {.comm = comm};
    TRY(ckpt_open_run_dir(comm, dir, (struct ckpt_terms){.takeover = false}, &fix.run));
    TRY(fixture_save(&fix, 0, 1));
    TRY(fixture_save(&fix, 1, 2));
    ckpt_close_run_dir(&fix.run);
    return 0;
}

int main(int argc, char **argv)
{
    struct comm comm;
    int rc = comm_open(&comm, &argc, &argv);
    if (rc == 0 && argc == 3 && strcmp(argv[1], "write") == 0) {
        rc = write_only(&comm, argv[2]);
        if (rc == 0) {
            comm_close(&comm);
            return 0;
        }
    }
    if (rc != 0) {
        fprintf(stderr, "%s\n", err_message());
        comm_abort(&comm, 1);
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_prestate(test_pieces, &comm),
        cmocka_unit_test_prestate(test_round_trip, &comm),
        cmocka_unit_test_prestate(test_large, &comm),
        cmocka_unit_test_prestate(test_load_some, &comm),
        cmocka_unit_test_prestate(test_meta, &comm),
        cmocka_unit_test_prestate(test_retention, &comm),
        cmocka_unit_test_prestate(test_retention_damaged, &comm),
        cmocka_unit_test_prestate(test_same_step, &comm),
        cmocka_unit_test_prestate(test_owner, &comm),
        cmocka_unit_test_prestate(test_leftovers, &comm),
        cmocka_unit_test_prestate(test_commands, &comm),
    };
    return fixture_main(&comm, "ckpt", tests, sizeof tests / sizeof *tests);
}
