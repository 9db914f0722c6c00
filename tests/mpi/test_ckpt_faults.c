/* Checkpoints in trouble: damaged and missing files, full disks, folders that cannot be written, other models, ranks
 * that disagree. Each must be told by one rank, naming the file, and must leave the earlier checkpoints usable. Runs
 * with 1 to 4 ranks. */
#include "ckpt_fixture.h"

#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#define FLIPS 5 /* of each file */

/* ---- damage ---- */

static void write_all(const char *path, const char *data, size_t bytes)
{
    assert_int_equal(ckpt_file_write(path, data, bytes), 0);
}

/* A pseudo-random number below n, the same on every run. */
static uint64_t below(uint64_t n)
{
    static uint64_t x = 88172645463325252u;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return x % n;
}

/* Rank 0 damages the file in the way of that number: cut short, emptied, longer, gone, or one bit flipped. */
static void damage(struct comm *comm, const char *path, int way)
{
    char *data = NULL;
    size_t bytes = 0;
    if (comm->rank == 0) {
        assert_int_equal(ckpt_file_read(path, &data, &bytes), 0);
        const size_t at = (size_t)below(bytes);
        data[at] = (char)(data[at] ^ (1 << below(8)));
        if (way == 0) assert_int_equal(truncate(path, (off_t)at), 0);
        if (way == 1) assert_int_equal(truncate(path, 0), 0);
        if (way == 2) assert_int_equal(truncate(path, (off_t)bytes + 1), 0);
        if (way == 3) assert_int_equal(unlink(path), 0);
        if (way >= 4) write_all(path, data, bytes);
        free(data);
    }
    assert_int_equal(comm_barrier(comm), 0);
}

static void check_file_damage(struct fixture *fix, int64_t step, const char *name)
{
    struct comm *comm = fix->comm;
    char folder[CKPT_PATH_MAX], path[CKPT_PATH_MAX];
    char *sound = NULL;
    size_t bytes = 0;
    fixture_path(fix, step, NULL, folder);
    fixture_path(fix, step, name, path);
    if (comm->rank == 0) assert_int_equal(ckpt_file_read(path, &sound, &bytes), 0);
    for (int way = 0; way < 4 + FLIPS; way++) {
        damage(comm, path, way);
        assert_int_equal(ckpt_verify(comm, folder), ERR_DATA);
        assert_true(fixture_told(comm, path));
        if (way < 5) assert_int_equal(fixture_newest(fix), step - 1);
        if (comm->rank == 0) write_all(path, sound, bytes);
        assert_int_equal(comm_barrier(comm), 0);
    }
    assert_int_equal(ckpt_verify(comm, folder), 0);
    free(sound);
}

static void test_damage(void **state)
{
    struct fixture fix;
    struct comm *comm = *state;
    fixture_open(&fix, comm);
    assert_int_equal(fixture_save(&fix, 0, 1), 0);
    assert_int_equal(fixture_save(&fix, 1, 2), 0);
    for (int rank = 0; rank < comm->ranks; rank++) {
        char name[CKPT_FILE_MAX];
        ckpt_file_name(name, rank);
        check_file_damage(&fix, 2, name);
    }
    check_file_damage(&fix, 2, CKPT_INDEX);
    check_file_damage(&fix, 2, CKPT_MANIFEST);
    fixture_close(&fix);
}

static void test_none_usable(void **state)
{
    struct fixture fix;
    struct comm *comm = *state;
    char path[CKPT_PATH_MAX], found[CKPT_PATH_MAX];
    fixture_open(&fix, comm);
    assert_int_equal(ckpt_find_newest(comm, fix.dir, 0, INT64_MAX, 1, found), 0);
    assert_string_equal(found, "");
    assert_int_equal(ckpt_find_newest(comm, "/nonexistent/run", 0, INT64_MAX, 1, found), 0);
    assert_string_equal(found, "");
    assert_int_equal(fixture_save(&fix, 0, 1), 0);
    fixture_path(&fix, 1, CKPT_MANIFEST, path);
    if (comm->rank == 0) assert_int_equal(unlink(path), 0);
    assert_int_equal(comm_barrier(comm), 0);
    assert_int_equal(ckpt_find_newest(comm, fix.dir, 0, INT64_MAX, 1, found), ERR_DATA);
    assert_string_equal(found, "");
    fixture_close(&fix);
}

/* ---- manifests whose checksum is right and whose content is not ---- */

/* Replaces the first `from` by `to` and makes the checksum fit again. */
static void forge(const char *path, const char *sound, size_t bytes, const char *from, const char *to)
{
    static const char mark[] = ",\n\"checksum\"";
    const char *at = strstr(sound, from), *tail = strstr(sound, mark);
    assert_true(at && tail && at < tail);
    const char *rest = at + strlen(from);
    const size_t room = bytes + strlen(to) + 64;
    char *forged = malloc(room);
    assert_non_null(forged);
    int used = snprintf(forged, room, "%.*s%s%.*s", (int)(at - sound), sound, to, (int)(tail - rest), rest);
    const unsigned long long hash = XXH3_64bits(forged, (size_t)used);
    used += snprintf(forged + used, room - (size_t)used, "%s: \"%016llx\"\n}\n", mark, hash);
    write_all(path, forged, (size_t)used);
    free(forged);
}

static void test_forged(void **state)
{
    static const char *const forgery[][2] = {
        {"tatara checkpoint", "other"},
        {"\"format_version\": 1", "\"format_version\": 2"},
        {"\"format_version\": 1", "\"format_version\": \"1\""},
        {"\"rank-00000.h5\"", "\"../rank-00000.h5\""},
        {"\"rank-00000.h5\"", "\"rank-0000000000000000000000000000.h5\""},
        {"\"step\":3", "\"step\":-3"},
        {"\"step\":3", "\"step\":{}"},
        {"\"optim_steps\":10", "\"optim_steps\":2"},
        {"\"optim_steps\":10", "\"optim_steps\":-1"},
        {"\"fedcba98", "\"FEDCBA98"},
        {"[37,13]", "[37,14]"},
        {"[37,13]", "[4294967296,4294967296]"},
        {"[37,13]", "[0,13]"},
        {"[37,13]", "[37,13,1]"},
        {"[[0,0,", "[[-1,0,"},
        {"[[0,0,", "[[900,0,"},
        {"[[0,0,", "[[0,1,"},
        {"[[0,0,", "[[0,-1,"},
        {"\"f32\"", "\"f64\""},
        {"\"model.norm.weight\"", "\"/model.norm.weight\""},
        {"\"tensors\"", "\"tensor\""},
        {"\"files\": [", "\"files\": [7,"},
        {"\"meta\": {", "\"meta\": {{"},
    };
    struct fixture fix;
    struct comm *comm = *state;
    char folder[CKPT_PATH_MAX], path[CKPT_PATH_MAX];
    char *sound = NULL;
    size_t bytes = 0;
    struct ckpt_meta meta;
    fixture_open(&fix, comm);
    assert_int_equal(fixture_save(&fix, 3, 3), 0);
    fixture_path(&fix, 3, NULL, folder);
    fixture_path(&fix, 3, CKPT_MANIFEST, path);
    if (comm->rank == 0) assert_int_equal(ckpt_file_read(path, &sound, &bytes), 0);
    for (size_t i = 0; comm->rank == 0 && i < sizeof forgery / sizeof *forgery; i++) {
        forge(path, sound, bytes, forgery[i][0], forgery[i][1]);
        if (ckpt_read_meta(folder, &meta) != ERR_DATA) fprintf(stderr, "accepted: %s\n", forgery[i][1]);
        assert_int_equal(ckpt_read_meta(folder, &meta), ERR_DATA);
        assert_non_null(strstr(err_message(), path));
    }
    if (comm->rank == 0) { /* forging itself is sound */
        forge(path, sound, bytes, "\"step\":3", "\"step\":3");
        assert_int_equal(ckpt_verify(&(struct comm){.ranks = 1}, folder), 0);
        /* A checkpoint that does not say what the moments have seen: its own steps. */
        forge(path, sound, bytes, "\"optim_steps\":10,", "");
        assert_int_equal(ckpt_read_meta(folder, &meta), 0);
        assert_int_equal(meta.optim_steps, 3);
        ckpt_meta_free(&meta);
    }
    free(sound);
    fixture_close(&fix);
}

/* ---- the disk ---- */

/* Saves step 2 while no file of one rank may grow beyond `limit` bytes; on any machine, this is what a full disk looks
 * like to the writer. */
static int save_limited(struct fixture *fix, int rank, off_t limit)
{
    struct rlimit before, now;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &before), 0);
    now = before;
    now.rlim_cur = (rlim_t)limit;
    if (fix->comm->rank == rank) assert_int_equal(setrlimit(RLIMIT_FSIZE, &now), 0);
    const int rc = fixture_save(fix, 1, 2);
    if (fix->comm->rank == rank) assert_int_equal(setrlimit(RLIMIT_FSIZE, &before), 0);
    return rc;
}

static off_t size_of(const struct fixture *fix, int64_t step, const char *name)
{
    struct stat info;
    char path[CKPT_PATH_MAX];
    fixture_path(fix, step, name, path);
    assert_int_equal(stat(path, &info), 0);
    return info.st_size;
}

static void expect_refused(struct fixture *fix, int rank, off_t limit, const char *file)
{
    assert_int_equal(save_limited(fix, rank, limit), ERR_SYSTEM);
    char *kept = strdup(err_message());
    assert_non_null(kept);
    assert_true(kept[0] == '\0' || strstr(kept, "File too large"));
    free(kept);
    assert_true(fixture_told(fix->comm, file));
    assert_int_equal(fixture_count(fix, ".tmp-"), 0);
    assert_int_equal(fixture_newest(fix), 1);
}

static void test_write_fails(void **state)
{
    struct fixture fix;
    struct comm *comm = *state;
    const int last = comm->ranks - 1;
    char name[CKPT_FILE_MAX];
    fixture_open(&fix, comm);
    assert_int_equal(fixture_save(&fix, 1, 1), 0);
    ckpt_file_name(name, last);
    const off_t rank_bytes = size_of(&fix, 1, name), index_bytes = size_of(&fix, 1, CKPT_INDEX);
    const off_t limit[] = {0, 100, rank_bytes / 4, rank_bytes / 2, rank_bytes - 1};
    for (size_t i = 0; i < sizeof limit / sizeof *limit; i++) {
        expect_refused(&fix, last, limit[i], name);
    }
    /* Rank 0 alone, with room for its own file: the index does not fit. */
    const off_t first_bytes = size_of(&fix, 1, "rank-00000.h5");
    if (first_bytes < index_bytes) expect_refused(&fix, 0, index_bytes - 1, CKPT_INDEX);
    assert_int_equal(fixture_save(&fix, 1, 2), 0);
    assert_int_equal(fixture_newest(&fix), 2);
    fixture_close(&fix);
}

/* A disk without room is noticed before anything is read or written: no machine has room for a tensor of 2^48 bytes. */
static void test_no_space(void **state)
{
    struct fixture fix;
    struct comm *comm = *state;
    const int64_t elems = (int64_t)1 << 46;
    struct ckpt_slab huge = {.name = "huge", .ndim = 1, .shape = {elems}, .begin = 0, .end = 0, .data = NULL};
    const struct ckpt_meta meta = fixture_meta(2);
    fixture_open(&fix, comm);
    assert_int_equal(fixture_save(&fix, 0, 1), 0);
    if (comm->rank == comm->ranks - 1) huge.end = elems;
    assert_int_equal(ckpt_save(comm, &fix.run, &meta, &huge, 1, (struct ckpt_keep){.newest = 1}), ERR_SYSTEM);
    assert_true(fixture_told(comm, "free space on that disk"));
    assert_int_equal(fixture_count(&fix, ".tmp-"), 0);
    assert_int_equal(fixture_newest(&fix), 1);
    fixture_close(&fix);
}

static void test_unwritable(void **state)
{
    struct fixture fix;
    struct comm *comm = *state;
    char path[CKPT_PATH_MAX], inside[CKPT_PATH_MAX];
    struct ckpt_run run;
    fixture_open(&fix, comm);
    assert_int_equal(ckpt_path(path, fix.dir, "file"), 0);
    assert_int_equal(ckpt_path(inside, path, "run"), 0);
    if (comm->rank == 0) write_all(path, "x", 1);
    assert_int_equal(ckpt_open_run_dir(comm, inside, (struct ckpt_terms){.takeover = false}, &run), ERR_SYSTEM);
    assert_true(fixture_told(comm, inside));
    assert_int_equal(ckpt_open_run_dir(comm, path, (struct ckpt_terms){.takeover = false}, &run), ERR_SYSTEM);
    assert_true(fixture_told(comm, path));
    assert_int_equal(ckpt_open_run_dir(comm, "/proc/tatara", (struct ckpt_terms){.takeover = false}, &run),
                     ERR_SYSTEM);
    assert_true(fixture_told(comm, "/proc/tatara"));
    assert_int_equal(ckpt_open_run_dir(comm, "", (struct ckpt_terms){.takeover = false}, &run), ERR_CONFIG);
    err_clear();
    assert_int_equal(ckpt_path(inside, fix.dir, "a/b/c"), 0);
    assert_int_equal(ckpt_open_run_dir(comm, inside, (struct ckpt_terms){.takeover = false}, &run), 0);
    if (comm->rank == 0) assert_int_equal(access(inside, W_OK), 0);
    ckpt_close_run_dir(&run);
    fixture_close(&fix);
}

/* ---- other models, and mistakes of the caller ---- */

static void test_other_model(void **state)
{
    struct fixture fix;
    struct comm *comm = *state;
    char folder[CKPT_PATH_MAX];
    fixture_open(&fix, comm);
    assert_int_equal(fixture_save(&fix, 0, 1), 0);
    fixture_path(&fix, 1, NULL, folder);
    struct ckpt_slab *slabs = fixture_slabs(0, 0, 1, 1);
    snprintf(slabs[2].name, sizeof slabs[2].name, "model.layers.99.weight");
    assert_int_equal(ckpt_load(folder, slabs, FIXTURE_TENSORS), ERR_DATA);
    assert_non_null(strstr(err_message(), "model.layers.99.weight"));
    assert_non_null(strstr(err_message(), folder));
    slabs[1].shape[0] = 4;
    assert_int_equal(ckpt_load(folder, slabs, 2), ERR_DATA);
    assert_non_null(
        strstr(err_message(), "model.layers.0.mlp.up_proj.weight is [5, 64] in the checkpoint and [4, 64]"));
    err_clear();
    fixture_slabs_free(slabs);
    fixture_close(&fix);
}

/* Ranks that save different things, a tensor with a gap, and numbers that are none, make no checkpoint. */
static void test_mistakes(void **state)
{
    struct fixture fix;
    struct comm *comm = *state;
    fixture_open(&fix, comm);
    struct ckpt_slab *slabs = fixture_slabs(0, comm->rank, comm->ranks, 1);
    struct ckpt_meta meta = fixture_meta(1);
    const int last = comm->ranks - 1;
    if (comm->rank == last) slabs[0].end--;
    assert_int_equal(ckpt_save(comm, &fix.run, &meta, slabs, FIXTURE_TENSORS, (struct ckpt_keep){.newest = 1}),
                     ERR_BUG);
    assert_true(fixture_told(comm, slabs[0].name));
    if (comm->rank == last) slabs[0].end += 2;
    assert_int_equal(ckpt_save(comm, &fix.run, &meta, slabs, FIXTURE_TENSORS, (struct ckpt_keep){.newest = 1}),
                     ERR_BUG);
    assert_true(fixture_told(comm, slabs[0].name));
    if (comm->rank == last) slabs[0].end--;
    meta.grad_norm = NAN;
    assert_int_equal(ckpt_save(comm, &fix.run, &meta, slabs, FIXTURE_TENSORS, (struct ckpt_keep){.newest = 1}),
                     ERR_NUMERIC);
    assert_true(fixture_told(comm, "grad_norm"));
    meta.grad_norm = 1;
    const int expected = last > 0 ? ERR_BUG : 0;
    if (comm->rank == last && last > 0) meta.step++; /* on the other side of an update */
    if (last > 0)
        assert_int_equal(ckpt_save(comm, &fix.run, &meta, slabs, FIXTURE_TENSORS, (struct ckpt_keep){.newest = 1}),
                         expected);
    assert_true(last == 0 || fixture_told(comm, "another step than rank 0"));
    meta.step = 1;
    if (comm->rank == last && last > 0) slabs[3].name[0] = 'X';
    assert_int_equal(ckpt_save(comm, &fix.run, &meta, slabs, FIXTURE_TENSORS, (struct ckpt_keep){.newest = 1}),
                     expected);
    assert_true(last == 0 || fixture_told(comm, "saves other tensors"));
    assert_int_equal(fixture_count(&fix, ".tmp-"), 0);
    assert_int_equal(fixture_count(&fix, "step-"), last > 0 ? 0 : 1);
    fixture_slabs_free(slabs);
    fixture_close(&fix);
}

int main(int argc, char **argv)
{
    struct comm comm;
    const struct sigaction ignore = {.sa_handler = SIG_IGN};
    if (comm_open(&comm, &argc, &argv) != 0 || sigaction(SIGXFSZ, &ignore, NULL) != 0) {
        fprintf(stderr, "%s\n", err_message());
        comm_abort(&comm, 1);
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_prestate(test_damage, &comm),      cmocka_unit_test_prestate(test_none_usable, &comm),
        cmocka_unit_test_prestate(test_forged, &comm),      cmocka_unit_test_prestate(test_write_fails, &comm),
        cmocka_unit_test_prestate(test_no_space, &comm),    cmocka_unit_test_prestate(test_unwritable, &comm),
        cmocka_unit_test_prestate(test_other_model, &comm), cmocka_unit_test_prestate(test_mistakes, &comm),
    };
    return fixture_main(&comm, "ckpt faults", tests, sizeof tests / sizeof *tests);
}
