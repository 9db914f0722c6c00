/* The checkpoint tests' folder and tensors; see ckpt_fixture.h. */
#include "ckpt_fixture.h"

#include <dirent.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const struct {
    const char *name;
    int ndim;
    int64_t shape[2];
} tensor_list[FIXTURE_TENSORS] = {
    {"model.embed_tokens.weight", 2, {37, 13}},
    {"model.layers.0.mlp.up_proj.weight", 2, {5, 64}},
    {"model.norm.weight", 1, {29, 1}},
    {"column", 2, {17, 1}},
    {"row", 2, {1, 19}},
    {"single", 1, {1, 1}},
    {"optim/exp_avg/model.embed_tokens.weight", 2, {37, 13}},
};

static void remove_tree(const char *path)
{
    DIR *dir = opendir(path);
    for (struct dirent *entry = dir ? readdir(dir) : NULL; entry; entry = readdir(dir)) {
        char inner[CKPT_PATH_MAX + 300];
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
        snprintf(inner, sizeof inner, "%s/%s", path, entry->d_name);
        if (unlink(inner) != 0) remove_tree(inner);
    }
    if (dir) closedir(dir);
    rmdir(path);
}

int fixture_main(struct comm *comm, const char *name, const struct CMUnitTest *tests, size_t n)
{
    if (comm->ranks > 1 && setenv("CMOCKA_TEST_ABORT", "1", 1) != 0) comm_abort(comm, 1);
    if (_cmocka_run_group_tests(name, tests, n, NULL, NULL) != 0) comm_abort(comm, 1);
    comm_close(comm);
    return 0;
}

void fixture_open(struct fixture *fix, struct comm *comm)
{
    memset(fix, 0, sizeof *fix);
    fix->comm = comm;
    snprintf(fix->dir, sizeof fix->dir, "/tmp/tatara-ckpt-XXXXXX");
    if (comm->rank == 0) assert_non_null(mkdtemp(fix->dir));
    assert_int_equal(comm_bcast(comm, fix->dir, sizeof fix->dir, 0), 0);
    assert_int_equal(ckpt_open_run_dir(comm, fix->dir, (struct ckpt_terms){.takeover = false}, &fix->run), 0);
}

void fixture_close(struct fixture *fix)
{
    assert_int_equal(comm_barrier(fix->comm), 0);
    ckpt_close_run_dir(&fix->run);
    if (fix->comm->rank == 0) remove_tree(fix->dir);
    assert_int_equal(comm_barrier(fix->comm), 0);
}

float fixture_value(int t, int64_t step, int64_t i)
{
    return (float)((int64_t)t * 1024 + i) + (float)step / 64.0f;
}

/* Where the part of `rank` begins: 0 even, 1 the more the higher the rank, 2 all on the last rank, 3 all on the first. */
static int64_t split_begin(int split, int rank, int ranks, int64_t elems)
{
    if (rank == 0) return 0;
    if (rank == ranks) return elems;
    switch (split) {
    case 0:
        return elems * rank / ranks;
    case 1:
        return elems * rank * rank / ((int64_t)ranks * ranks);
    case 2:
        return 0;
    default:
        return elems;
    }
}

struct ckpt_slab *fixture_slabs(int split, int rank, int ranks, int64_t step)
{
    struct ckpt_slab *slabs = calloc(FIXTURE_TENSORS, sizeof *slabs);
    assert_non_null(slabs);
    for (int t = 0; t < FIXTURE_TENSORS; t++) {
        struct ckpt_slab *slab = &slabs[t];
        const int64_t elems = ckpt_tensor_elems(tensor_list[t].ndim, tensor_list[t].shape);
        snprintf(slab->name, sizeof slab->name, "%s", tensor_list[t].name);
        slab->ndim = tensor_list[t].ndim;
        memcpy(slab->shape, tensor_list[t].shape, sizeof tensor_list[t].shape);
        slab->begin = split_begin(split, rank, ranks, elems);
        slab->end = split_begin(split, rank + 1, ranks, elems);
        slab->data = calloc((size_t)(slab->end - slab->begin) + 1, sizeof *slab->data);
        assert_non_null(slab->data);
        for (int64_t i = slab->begin; i < slab->end; i++) {
            slab->data[i - slab->begin] = fixture_value(t, step, i);
        }
    }
    return slabs;
}

void fixture_slabs_free(struct ckpt_slab *slabs)
{
    for (int t = 0; slabs && t < FIXTURE_TENSORS; t++) {
        free(slabs[t].data);
    }
    free(slabs);
}

int64_t fixture_errors(const struct ckpt_slab *slabs, int64_t step)
{
    int64_t errors = 0;
    for (int t = 0; t < FIXTURE_TENSORS; t++) {
        for (int64_t i = slabs[t].begin; i < slabs[t].end; i++) {
            errors += slabs[t].data[i - slabs[t].begin] != fixture_value(t, step, i);
        }
    }
    return errors;
}

struct ckpt_meta fixture_meta(int64_t step)
{
    static char yaml[] = "run: {seed: 1}\nmodel: {arch: llama} # 踏鞴 \"quoted\" \\ back\n";
    return (struct ckpt_meta){.step = step,
                              .began = step / 2,
                              .optim_steps = step + 7,
                              .grad_scale = 0x1p-40,
                              .grad_norm = 0.1 + 1.0 / 3.0,
                              .model_id = 0xFEDCBA9876543210u,
                              .tokenizer_id = 1,
                              .tokens = 9007199254740993.0 * 3.0,
                              .config_yaml = yaml,
                              .version = "test 1.0"};
}

int fixture_save(struct fixture *fix, int split, int64_t step)
{
    struct ckpt_slab *slabs = fixture_slabs(split, fix->comm->rank, fix->comm->ranks, step);
    const struct ckpt_meta meta = fixture_meta(step);
    const int rc = ckpt_save(fix->comm, &fix->run, &meta, slabs, FIXTURE_TENSORS, (struct ckpt_keep){.newest = 100});
    fixture_slabs_free(slabs);
    return rc;
}

void fixture_path(const struct fixture *fix, int64_t step, const char *file, char path[CKPT_PATH_MAX])
{
    assert_int_equal(ckpt_step_path(path, fix->dir, step), 0);
    if (file) {
        char folder[CKPT_PATH_MAX];
        memcpy(folder, path, sizeof folder);
        assert_int_equal(ckpt_path(path, folder, file), 0);
    }
}

bool fixture_told(struct comm *comm, const char *text)
{
    int64_t told[2] = {err_message()[0] != '\0', strstr(err_message(), text) != NULL};
    if (told[0] && !told[1]) fprintf(stderr, "'%s' is not in: %s\n", text, err_message());
    err_clear();
    assert_int_equal(comm_sum_i64(comm, told, 2), 0);
    return told[0] == 1 && told[1] == 1;
}

int fixture_count(struct fixture *fix, const char *prefix)
{
    int n = 0;
    if (fix->comm->rank == 0) {
        DIR *dir = opendir(fix->dir);
        assert_non_null(dir);
        for (struct dirent *entry = readdir(dir); entry; entry = readdir(dir)) {
            n += strncmp(entry->d_name, prefix, strlen(prefix)) == 0;
        }
        closedir(dir);
    }
    assert_int_equal(comm_bcast(fix->comm, &n, sizeof n, 0), 0);
    return n;
}

int64_t fixture_newest(struct fixture *fix)
{
    char found[CKPT_PATH_MAX];
    struct ckpt_meta meta;
    const int rc = ckpt_find_newest(fix->comm, fix->dir, 0, INT64_MAX, 1, found);
    err_clear();
    if (rc != 0 || found[0] == '\0') return -1;
    assert_int_equal(ckpt_read_meta(found, &meta), 0);
    ckpt_meta_free(&meta);
    return meta.step;
}
