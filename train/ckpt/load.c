/* Finding, verifying and reading checkpoints.
 *
 * Reading goes by the manifest, which says which file holds which flat range, and touches only the parts that overlap
 * with what was asked for; so any split may read what any other split wrote. Each file is opened once. */
#include "ckpt_internal.h"
#include "log.h"

#include <stdlib.h>
#include <string.h>

/* ---- verify ---- */

int ckpt_verify_files(const char *folder, const struct ckpt_manifest *manifest, int first, int stride, int threads)
{
    struct err_record failure = {.code = 0};
    int failed = manifest->n_files;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int i = first; i < manifest->n_files; i += stride) {
        struct err_record outcome;
        err_take(&outcome, ckpt_file_verify(folder, &manifest->files[i]));
#pragma omp critical(verify)
        if (outcome.code != 0 && i < failed) {
            failed = i;
            failure = outcome;
        }
    }
    return failure.code != 0 ? err_give(&failure) : 0;
}

/* The checks of one rank: the manifest, and every ranks-th file. By one thread: the ranks of a node are several. */
static int verify_share(const char *folder, int rank, int ranks)
{
    struct ckpt_manifest manifest;
    TRY(ckpt_manifest_read(folder, &manifest));
    const int rc = ckpt_verify_files(folder, &manifest, rank, ranks, 1);
    ckpt_manifest_free(&manifest);
    return rc;
}

int ckpt_verify(struct comm *comm, const char *folder)
{
    return comm_agree(comm, verify_share(folder, comm->rank, comm->ranks));
}

/* Tries the steps from the newest on; rank 0 knows them. Collective. */
static int try_steps(struct comm *comm, const char *run_dir, const int64_t *steps, int n, char found[CKPT_PATH_MAX])
{
    for (int i = n - 1; i >= 0; i--) {
        char folder[CKPT_PATH_MAX];
        int64_t step = steps ? steps[i] : 0;
        TRY(comm_bcast(comm, &step, sizeof step, 0));
        TRY(ckpt_step_path(folder, run_dir, step));
        const int rc = ckpt_verify(comm, folder);
        if (rc == 0) memcpy(found, folder, sizeof folder);
        if (rc != ERR_DATA) return rc;
        if (err_message()[0] != '\0') log_warn("passed over: %s", err_message());
        err_clear();
    }
    return 0;
}

/* Leaves the steps that were asked for; returns how many. */
static int keep_steps(int64_t *steps, int n, int64_t from, int64_t upto, int64_t every)
{
    int kept = 0;
    for (int i = 0; i < n; i++)
        if (steps[i] <= upto && ckpt_step_counts(steps[i], from, every)) steps[kept++] = steps[i];
    return kept;
}

int ckpt_find_newest(struct comm *comm, const char *run_dir, int64_t from, int64_t upto, int64_t every,
                     char found[CKPT_PATH_MAX])
{
    int64_t *steps = NULL;
    int n = 0, rc = 0;
    found[0] = '\0';
    if (comm->rank == 0) rc = ckpt_list_steps(run_dir, &steps, &n);
    TRY_GOTO(comm_agree(comm, rc), done);
    n = keep_steps(steps, n, from, upto, every);
    TRY_GOTO(comm_bcast(comm, &n, sizeof n, 0), done);
    TRY_GOTO(try_steps(comm, run_dir, steps, n, found), done);
    if (n > 0 && found[0] == '\0') {
        rc = err_raise(ERR_DATA, __FILE__, __LINE__,
                       "%s: none of its %d checkpoints can be used (see the warnings); restore one from a copy, or "
                       "remove them to start anew",
                       run_dir, n);
    }
    TRY_GOTO(comm_agree(comm, rc), done);
done:
    free(steps);
    return rc;
}

int ckpt_tokenizer(const char *folder, char path[CKPT_PATH_MAX])
{
    struct ckpt_manifest manifest;
    path[0] = '\0';
    TRY(ckpt_manifest_read(folder, &manifest));
    const bool there = manifest.n_files > 0 && strcmp(manifest.files[manifest.n_files - 1].name, CKPT_TOKENIZER) == 0;
    ckpt_manifest_free(&manifest);
    return there ? ckpt_path(path, folder, CKPT_TOKENIZER) : 0;
}

int ckpt_read_meta(const char *folder, struct ckpt_meta *meta)
{
    struct ckpt_manifest manifest;
    TRY(ckpt_manifest_read(folder, &manifest));
    *meta = manifest.meta;
    manifest.meta = (struct ckpt_meta){.step = 0}; /* the texts are the caller's now */
    ckpt_manifest_free(&manifest);
    return 0;
}

/* ---- read ---- */

/* A stored range that overlaps with a slab. */
struct job {
    const struct ckpt_slab *slab;
    const struct ckpt_tensor *tensor;
    const struct ckpt_range *range;
};

static int compare_jobs(const void *a, const void *b)
{
    const struct job *x = a, *y = b;
    if (x->range->file != y->range->file)
        return (x->range->file > y->range->file) - (x->range->file < y->range->file);
    if (x->slab != y->slab) return (x->slab > y->slab) - (x->slab < y->slab);
    return (x->range->begin > y->range->begin) - (x->range->begin < y->range->begin);
}

/* The tensor of that name; *next is where the search starts, since callers ask in the order in which they saved. */
static const struct ckpt_tensor *find_tensor(const struct ckpt_manifest *manifest, const char *name, int *next)
{
    for (int tries = 0; tries < manifest->n_tensors; tries++) {
        const int i = (*next + tries) % manifest->n_tensors;
        if (strcmp(manifest->tensors[i].name, name) == 0) {
            *next = i + 1;
            return &manifest->tensors[i];
        }
    }
    return NULL;
}

static void format_shape(char *text, size_t size, int ndim, const int64_t *shape)
{
    if (ndim == 1) snprintf(text, size, "[%lld]", (long long)shape[0]);
    if (ndim == 2) snprintf(text, size, "[%lld, %lld]", (long long)shape[0], (long long)shape[1]);
}

/* Fails unless the stored tensor is what the slab wants a part of. */
static int check_tensor(const char *folder, const struct ckpt_slab *slab, const struct ckpt_tensor *tensor)
{
    ASSERT(slab->ndim >= 1 && slab->ndim <= CKPT_DIMS_MAX);
    if (!tensor) {
        FAIL(ERR_DATA,
             "%s: the checkpoint has no tensor %s: it is of another model; check the model section of the "
             "configuration",
             folder, slab->name);
    }
    if (tensor->ndim != slab->ndim ||
        memcmp(tensor->shape, slab->shape, (size_t)slab->ndim * sizeof *slab->shape) != 0) {
        char stored[64] = "", wanted[64] = "";
        format_shape(stored, sizeof stored, tensor->ndim, tensor->shape);
        format_shape(wanted, sizeof wanted, slab->ndim, slab->shape);
        FAIL(ERR_DATA,
             "%s: %s is %s in the checkpoint and %s in this model; check the model section of the configuration",
             folder, slab->name, stored, wanted);
    }
    ASSERT(slab->begin >= 0 && slab->end <= ckpt_tensor_elems(slab->ndim, slab->shape));
    return 0;
}

/* Lists what has to be read, file by file. The caller frees *jobs. */
static int list_jobs(const char *folder, const struct ckpt_manifest *manifest, const struct ckpt_slab *slabs, int n,
                     struct job **jobs, size_t *n_jobs)
{
    size_t room = 0;
    int next = 0;
    *n_jobs = 0;
    *jobs = NULL;
    for (int i = 0; i < n; i++) {
        const struct ckpt_tensor *tensor = find_tensor(manifest, slabs[i].name, &next);
        TRY(check_tensor(folder, &slabs[i], tensor));
        for (int r = 0; r < tensor->n_ranges; r++) {
            const struct ckpt_range *range = &tensor->ranges[r];
            if (range->end <= slabs[i].begin || range->begin >= slabs[i].end || slabs[i].begin == slabs[i].end)
                continue;
            if (*n_jobs == room) {
                room = room > 0 ? 2 * room : 256;
                struct job *larger = realloc(*jobs, room * sizeof *larger);
                if (!larger) FAIL(ERR_SYSTEM, "%s: no memory left to load it", folder);
                *jobs = larger;
            }
            (*jobs)[(*n_jobs)++] = (struct job){&slabs[i], tensor, range};
        }
    }
    if (*n_jobs > 1) qsort(*jobs, *n_jobs, sizeof **jobs, compare_jobs);
    return 0;
}

/* Reads [begin, end) of a stored piece, counted within the piece, into `data`. */
static int read_part(hid_t dataset, const char *path, int ndim, const struct ckpt_piece *stored, int64_t begin,
                     int64_t end, float *data)
{
    int rc = 0;
    int64_t shape[CKPT_DIMS_MAX];
    hsize_t extent[H5S_MAX_RANK] = {0};
    for (int i = 0; i < CKPT_DIMS_MAX; i++) {
        shape[i] = (int64_t)stored->count[i];
    }
    hid_t memory = H5I_INVALID_HID;
    const hid_t space = H5Dget_space(dataset);
    if (space < 0 || H5Sget_simple_extent_ndims(space) != ndim ||
        H5Sget_simple_extent_dims(space, extent, NULL) != ndim ||
        memcmp(extent, stored->count, (size_t)ndim * sizeof *extent) != 0) {
        FAIL_GOTO(done, ERR_DATA, "%s: a dataset has another shape than the manifest says; " CKPT_REMEDY_DAMAGED,
                  path);
    }
    struct ckpt_piece part[CKPT_PIECES_MAX];
    const int parts = ckpt_pieces(part, ndim, shape, begin, end);
    for (int i = 0; i < parts; i++) {
        memory = H5Screate_simple(ndim, part[i].count, NULL);
        CHECK_H5(done, memory, ERR_SYSTEM, path, "cannot be read", CKPT_REMEDY_DAMAGED);
        CHECK_H5(done, H5Sselect_hyperslab(space, H5S_SELECT_SET, part[i].start, NULL, part[i].count, NULL), ERR_BUG,
                 path, "cannot be read", CKPT_REMEDY_DAMAGED);
        CHECK_H5(done, H5Dread(dataset, H5T_NATIVE_FLOAT, memory, space, H5P_DEFAULT, data + (part[i].begin - begin)),
                 ERR_DATA, path, "cannot be read", CKPT_REMEDY_DAMAGED);
        (void)H5Sclose(memory);
        memory = H5I_INVALID_HID;
    }
done:
    if (memory >= 0) (void)H5Sclose(memory);
    if (space >= 0) (void)H5Sclose(space);
    return rc;
}

static int read_job(hid_t file, const char *path, const struct job *job)
{
    struct ckpt_piece piece[CKPT_PIECES_MAX];
    const struct ckpt_slab *slab = job->slab;
    const int pieces = ckpt_pieces(piece, job->tensor->ndim, job->tensor->shape, job->range->begin, job->range->end);
    for (int p = 0; p < pieces; p++) {
        char name[CKPT_DATASET_MAX];
        const int64_t begin = piece[p].begin > slab->begin ? piece[p].begin : slab->begin;
        const int64_t end = piece[p].end < slab->end ? piece[p].end : slab->end;
        if (begin >= end) continue;
        ckpt_piece_name(name, slab->name, &piece[p]);
        const hid_t dataset = H5Dopen2(file, name, H5P_DEFAULT);
        if (dataset < 0) {
            TRY(h5_refused(path));
            FAIL(ERR_DATA, "%s: has no dataset %s; " CKPT_REMEDY_DAMAGED, path, name);
        }
        const int rc = read_part(dataset, path, job->tensor->ndim, &piece[p], begin - piece[p].begin,
                                 end - piece[p].begin, slab->data + (begin - slab->begin));
        (void)H5Dclose(dataset);
        TRY(rc);
    }
    return 0;
}

/* Reads the jobs of one file. */
static int read_file(const char *folder, const struct ckpt_file *entry, const struct job *jobs, size_t n)
{
    int rc = 0;
    char path[CKPT_PATH_MAX];
    hid_t file = H5I_INVALID_HID;
    TRY(ckpt_path(path, folder, entry->name));
    const hid_t access = ckpt_h5_access();
    CHECK_H5(done, access, ERR_SYSTEM, path, "cannot be opened", CKPT_REMEDY_DAMAGED);
    file = H5Fopen(path, H5F_ACC_RDONLY, access);
    CHECK_H5(done, file, ERR_DATA, path, "cannot be opened", CKPT_REMEDY_DAMAGED);
    for (size_t i = 0; i < n; i++) {
        TRY_GOTO(read_job(file, path, &jobs[i]), done);
    }
done:
    if (file >= 0) (void)H5Fclose(file);
    if (access >= 0) (void)H5Pclose(access);
    return rc;
}

int ckpt_read_slabs(const char *folder, const struct ckpt_manifest *manifest, const struct ckpt_slab *slabs, int n)
{
    int rc = 0;
    struct job *jobs = NULL;
    size_t n_jobs = 0;
    h5_start();
    TRY_GOTO(list_jobs(folder, manifest, slabs, n, &jobs, &n_jobs), done);
    for (size_t first = 0, last = 0; first < n_jobs; first = last) {
        const int file = jobs[first].range->file;
        while (last < n_jobs && jobs[last].range->file == file) {
            last++;
        }
        TRY_GOTO(read_file(folder, &manifest->files[file], &jobs[first], last - first), done);
    }
done:
    free(jobs);
    return rc;
}

int ckpt_load(const char *folder, const struct ckpt_slab *slabs, int n)
{
    struct ckpt_manifest manifest;
    TRY(ckpt_manifest_read(folder, &manifest));
    const int rc = ckpt_read_slabs(folder, &manifest, slabs, n);
    ckpt_manifest_free(&manifest);
    return rc;
}
