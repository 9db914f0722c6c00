/* Saving: every rank's file, then the index, the manifest and the rename that makes it a checkpoint.
 *
 *   prepare   the ranks compare what they are about to save; rank 0 checks owner and free space, makes .tmp-save-…
 *   write     each rank its file, to disk
 *   commit    rank 0: index, manifest, folder to disk; owner checked again; renamed to step-N; run's folder to disk
 *   retain    rank 0 removes the oldest
 *
 * The ranks agree after each phase. Killed at any moment, it leaves either a whole step-N or a folder whose name starts
 * with .tmp-, which counts for nothing. Called by the thread that owns the communicator; only `write` is free of it. */
#include "ckpt_internal.h"
#include "log.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>
#include <xxhash.h>

/* What lies under the step's name already. */
enum present { PRESENT_NONE, PRESENT_COMPLETE, PRESENT_DAMAGED };

struct save {
    struct comm *comm;
    const struct ckpt_run *run;
    const struct ckpt_meta *meta;
    const struct ckpt_slab *slabs;
    int n;
    char temp[CKPT_PATH_MAX], final[CKPT_PATH_MAX];
    bool begun; /* on rank 0: temp is there and is ours to remove */
    enum present present;
    int64_t *mine, *all;     /* [n][2]: begin and end of each slab; all: of every rank, on rank 0 */
    struct ckpt_file *files; /* of every rank, on rank 0, with room for the index */
};

/* ---- prepare ---- */

static int check_slab(const struct ckpt_slab *slab)
{
    ASSERT(slab->ndim >= 1 && slab->ndim <= CKPT_DIMS_MAX);
    if (!ckpt_name_valid(slab->name)) FAIL(ERR_BUG, "'%.160s' cannot be the name of a tensor", slab->name);
    if (slab->begin < 0 || slab->begin > slab->end || slab->end > ckpt_tensor_elems(slab->ndim, slab->shape)) {
        FAIL(ERR_BUG, "%s: the range [%lld, %lld) is not within the tensor", slab->name, (long long)slab->begin,
             (long long)slab->end);
    }
    return 0;
}

/* A number that is the same on ranks with the same list of names and shapes. */
static int hash_list(const struct save *save, uint64_t *hash)
{
    *hash = XXH3_64bits(&save->meta->step, sizeof save->meta->step);
    for (int i = 0; i < save->n; i++) {
        const struct ckpt_slab *slab = &save->slabs[i];
        TRY(check_slab(slab));
        *hash = XXH3_64bits_withSeed(slab->name, strlen(slab->name), *hash);
        *hash = XXH3_64bits_withSeed(slab->shape, (size_t)slab->ndim * sizeof *slab->shape, *hash);
    }
    return 0;
}

/* All ranks must be saving the same step of the same tensors. Collective. */
static int check_lists(const struct save *save)
{
    uint64_t hash = 0;
    TRY(comm_agree(save->comm, hash_list(save, &hash)));
    uint64_t of_rank_0 = hash;
    TRY(comm_bcast(save->comm, &of_rank_0, sizeof of_rank_0, 0));
    int rc = 0;
    if (hash != of_rank_0) {
        rc = err_raise(ERR_BUG, __FILE__, __LINE__, "rank %d saves other tensors or another step than rank 0",
                       save->comm->rank);
    }
    return comm_agree(save->comm, rc);
}

/* What the checkpoint will take, over all ranks, with room for HDF5's own records. Collective. */
static int total_bytes(const struct save *save, int64_t *bytes)
{
    *bytes = (int64_t)1 << 20;
    for (int i = 0; i < save->n; i++) {
        const int64_t elems = save->slabs[i].end - save->slabs[i].begin;
        if (elems > 0) *bytes += elems * (int64_t)sizeof(float) + 4096;
    }
    return comm_sum_i64(save->comm, bytes, 1);
}

static int check_space(const char *run_dir, int64_t needed_bytes)
{
    struct statvfs disk;
    const double gib = 1024.0 * 1024.0 * 1024.0;
    if (statvfs(run_dir, &disk) != 0) FAIL(ERR_SYSTEM, "%s: free space is unknown: %s", run_dir, strerror(errno));
    const double free_bytes = (double)disk.f_bavail * (double)disk.f_frsize;
    if (free_bytes < (double)needed_bytes) {
        FAIL(ERR_SYSTEM, "%s: a checkpoint takes %.3g GiB and the disk has %.3g GiB free; " CKPT_REMEDY_DISK, run_dir,
             (double)needed_bytes / gib, free_bytes / gib);
    }
    return 0;
}

/* Finds out what lies under the step's name. Collective. */
static int find_present(struct save *save)
{
    struct stat info;
    int exists = save->comm->rank == 0 && lstat(save->final, &info) == 0;
    TRY(comm_bcast(save->comm, &exists, sizeof exists, 0));
    save->present = PRESENT_NONE;
    if (!exists) return 0;
    const int rc = ckpt_verify(save->comm, save->final);
    if (rc != 0 && rc != ERR_DATA) return rc;
    save->present = rc == 0 ? PRESENT_COMPLETE : PRESENT_DAMAGED;
    if (rc != 0 && err_message()[0] != '\0') log_warn("will be replaced: %s", err_message());
    err_clear();
    return 0;
}

/* This rank's ranges; and on rank 0 the lists for those of all, and the temporary folder. */
static int make_room(struct save *save, int64_t needed_bytes)
{
    const size_t n = (size_t)save->n, ranks = (size_t)save->comm->ranks;
    save->mine = calloc(2 * n, sizeof *save->mine);
    if (!save->mine) FAIL(ERR_SYSTEM, "%s: no memory left to save", save->final);
    for (size_t i = 0; i < n; i++) {
        save->mine[2 * i] = save->slabs[i].begin;
        save->mine[2 * i + 1] = save->slabs[i].end;
    }
    if (save->comm->rank > 0) return 0;
    save->all = calloc(2 * n * ranks, sizeof *save->all);
    save->files = calloc(ranks + 1, sizeof *save->files);
    if (!save->all || !save->files) FAIL(ERR_SYSTEM, "%s: no memory left to save", save->final);
    TRY(ckpt_check_owner(save->run));
    TRY(check_space(save->run->dir, needed_bytes));
    if (mkdir(save->temp, 0777) != 0) {
        FAIL(ERR_SYSTEM, "%s: cannot be created: %s; " CKPT_REMEDY_DISK, save->temp, strerror(errno));
    }
    save->begun = true;
    return 0;
}

static int prepare(struct save *save)
{
    int64_t bytes = 0;
    TRY(ckpt_step_path(save->final, save->run->dir, save->meta->step));
    TRY(ckpt_temp_path(save->temp, save->run, "save", save->meta->step));
    TRY(check_lists(save));
    TRY(total_bytes(save, &bytes));
    TRY(find_present(save));
    return comm_agree(save->comm, make_room(save, bytes));
}

/* ---- commit ---- */

/* One tensor of the manifest from the ranges that the ranks reported. */
static int build_tensor(const struct save *save, int i, struct ckpt_tensor *tensor)
{
    const struct ckpt_slab *slab = &save->slabs[i];
    snprintf(tensor->name, sizeof tensor->name, "%s", slab->name);
    tensor->ndim = slab->ndim;
    memcpy(tensor->shape, slab->shape, (size_t)slab->ndim * sizeof *slab->shape);
    tensor->ranges = calloc((size_t)save->comm->ranks, sizeof *tensor->ranges);
    if (!tensor->ranges) FAIL(ERR_SYSTEM, "%s: no memory left to save", save->final);
    for (int rank = 0; rank < save->comm->ranks; rank++) {
        const int64_t *range = &save->all[2 * ((size_t)rank * (size_t)save->n + (size_t)i)];
        if (range[0] < range[1]) {
            tensor->ranges[tensor->n_ranges++] = (struct ckpt_range){range[0], range[1], rank};
        }
    }
    if (!ckpt_ranges_tile(tensor)) {
        FAIL(ERR_BUG, "%s: the ranges that the ranks hold leave a gap or overlap", slab->name);
    }
    return 0;
}

/* The manifest of this save; what it owns is freed by ckpt_manifest_free, also after a failure. */
static int build_manifest(const struct save *save, struct ckpt_manifest *manifest)
{
    struct tm utc;
    const time_t now = time(NULL);
    memset(manifest, 0, sizeof *manifest);
    if (gmtime_r(&now, &utc))
        (void)strftime(manifest->saved_at, sizeof manifest->saved_at, "%Y-%m-%dT%H:%M:%SZ", &utc);
    manifest->n_files = save->comm->ranks + 1;
    manifest->files = calloc((size_t)manifest->n_files, sizeof *manifest->files);
    manifest->tensors = calloc((size_t)save->n, sizeof *manifest->tensors);
    manifest->meta = *save->meta;
    manifest->meta.config_yaml = strdup(save->meta->config_yaml ? save->meta->config_yaml : "");
    if (!manifest->files || !manifest->tensors || !manifest->meta.config_yaml) {
        FAIL(ERR_SYSTEM, "%s: no memory left to save", save->final);
    }
    memcpy(manifest->files, save->files, (size_t)save->comm->ranks * sizeof *manifest->files);
    manifest->n_tensors = save->n;
    for (int i = 0; i < save->n; i++) {
        TRY(build_tensor(save, i, &manifest->tensors[i]));
    }
    return 0;
}

/* Whether the complete checkpoint under the step's name holds the same bytes in the same files. */
static int check_same(const struct save *save, const struct ckpt_manifest *manifest)
{
    struct ckpt_manifest old;
    TRY(ckpt_manifest_read(save->final, &old));
    bool same = old.n_files == manifest->n_files;
    for (int i = 0; same && i < old.n_files; i++) {
        same = old.files[i].bytes == manifest->files[i].bytes && old.files[i].xxh3 == manifest->files[i].xxh3;
    }
    ckpt_manifest_free(&old);
    if (!same) {
        FAIL(ERR_CONFIG,
             "%s is a complete checkpoint of this step with other contents, and is kept; use another run.dir, "
             "or remove it",
             save->final);
    }
    return 0;
}

/* Lets the finished folder appear under the step's name. */
static int publish(const struct save *save, const struct ckpt_manifest *manifest)
{
    char damaged[CKPT_PATH_MAX];
    TRY(ckpt_temp_path(damaged, save->run, "damaged", save->meta->step));
    TRY(ckpt_check_owner(save->run));
    if (save->present == PRESENT_COMPLETE) {
        TRY(check_same(save, manifest));
        ckpt_folder_remove(save->temp);
        return 0;
    }
    if (save->present == PRESENT_DAMAGED && rename(save->final, damaged) != 0) {
        FAIL(ERR_SYSTEM, "%s: is damaged and cannot be replaced: %s", save->final, strerror(errno));
    }
    if (rename(save->temp, save->final) != 0) {
        FAIL(ERR_SYSTEM, "%s: cannot be renamed to %s: %s", save->temp, save->final, strerror(errno));
    }
    if (save->present == PRESENT_DAMAGED) ckpt_folder_remove(damaged);
    return ckpt_folder_sync(save->run->dir);
}

/* Rank 0 only, after all files are on disk. */
static int finish(const struct save *save)
{
    int rc = 0;
    struct ckpt_manifest manifest;
    TRY_GOTO(build_manifest(save, &manifest), done);
    TRY_GOTO(ckpt_write_index(save->temp, &manifest), done);
    TRY_GOTO(ckpt_manifest_write(save->temp, &manifest), done);
    TRY_GOTO(ckpt_folder_sync(save->temp), done);
    TRY_GOTO(publish(save, &manifest), done);
done:
    ckpt_manifest_free(&manifest);
    return rc;
}

static int commit(struct save *save, const struct ckpt_file *file)
{
    const size_t bytes = 2 * (size_t)save->n * sizeof *save->mine;
    TRY(comm_gather(save->comm, file, save->files, sizeof *file));
    TRY(comm_gather(save->comm, save->mine, save->all, bytes));
    return comm_agree(save->comm, save->comm->rank == 0 ? finish(save) : 0);
}

/* ---- the whole ---- */

int ckpt_save(struct comm *comm, const struct ckpt_run *run, const struct ckpt_meta *meta,
              const struct ckpt_slab *slabs, int n, int64_t keep)
{
    struct save save = {.comm = comm, .run = run, .meta = meta, .slabs = slabs, .n = n};
    struct ckpt_file file;
    int rc = 0;
    ASSERT(n > 0);
    TRY_GOTO(prepare(&save), done);
    TRY_GOTO(comm_agree(comm, ckpt_write_rank_file(save.temp, comm->rank, slabs, n, &file)), done);
    TRY_GOTO(commit(&save, &file), done);
    if (comm->rank == 0) ckpt_retain(run, meta->step, keep);
done:
    if (rc != 0 && save.begun) ckpt_folder_remove(save.temp);
    free(save.mine);
    free(save.all);
    free(save.files);
    return rc;
}
