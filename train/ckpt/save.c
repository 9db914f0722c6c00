/* Saving: every rank's file, then the index, the manifest and the rename that makes it a checkpoint.
 *
 *   prepare   the ranks compare what they are about to save; rank 0 checks owner and free space, makes .tmp-save-…
 *   write     each rank its file, to disk                                              (a thread of each rank)
 *   gather    rank 0 learns what the others wrote
 *   commit    rank 0: index, tokenizer, manifest, folder to disk; owner checked again; renamed to step-N; run's folder to disk;
 *             the oldest checkpoints removed                                           (a thread of rank 0)
 *
 * The ranks agree after each phase. Killed at any moment, it leaves either a whole step-N or a folder whose name starts
 * with .tmp-, which counts for nothing.
 *
 * Threads: all calls are made by the thread that owns the communicator, which alone communicates. A phase's thread has
 * the save to itself between its start and `ready`. */
#include "ckpt_internal.h"
#include "clock.h"
#include "fs.h"
#include "log.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>
#include <xxhash.h>

/* What lies under the step's name already. */
enum present { PRESENT_NONE, PRESENT_COMPLETE, PRESENT_DAMAGED };

/* What rank 0 learns of a slab. */
enum { SLAB_BEGIN, SLAB_END, SLAB_DIGEST, SLAB_FIELDS };

enum phase { PHASE_IDLE, PHASE_WRITE, PHASE_COMMIT };

struct ckpt_saver {
    struct comm *comm;
    const struct ckpt_run *run;
    const void *tokenizer; /* the model, on rank 0; the caller's */
    size_t tokenizer_bytes;
    enum phase phase;
    bool running; /* the thread is to be joined */
    pthread_t thread;
    atomic_bool ready;
    struct err_record outcome; /* of the thread */
    /* Of the save under way: */
    struct ckpt_meta meta; /* owned, as a copy */
    struct ckpt_slab *slabs;
    int n;
    struct ckpt_keep keep;
    int (*fill)(void *context);
    void *context;
    char temp[CKPT_PATH_MAX], final[CKPT_PATH_MAX];
    bool begun; /* on rank 0: temp is there and is ours to remove */
    enum present present;
    int64_t *mine, *all;         /* [n][SLAB_FIELDS] of each slab; all: of every rank, on rank 0 */
    uint64_t *digest;            /* [n], of this rank's parts */
    struct ckpt_written written; /* this rank's; after the gathering, all ranks' */
    struct ckpt_file file;       /* this rank's */
    struct ckpt_file *files;     /* of every rank, on rank 0, with room for the index */
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
static int hash_list(const struct ckpt_saver *save, uint64_t *hash)
{
    *hash = XXH3_64bits(&save->meta.step, sizeof save->meta.step);
    for (int i = 0; i < save->n; i++) {
        const struct ckpt_slab *slab = &save->slabs[i];
        TRY(check_slab(slab));
        *hash = XXH3_64bits_withSeed(slab->name, strlen(slab->name), *hash);
        *hash = XXH3_64bits_withSeed(slab->shape, (size_t)slab->ndim * sizeof *slab->shape, *hash);
    }
    return 0;
}

/* All ranks must be saving the same step of the same tensors. Collective. */
static int check_lists(const struct ckpt_saver *save)
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
static int total_bytes(const struct ckpt_saver *save, int64_t *bytes)
{
    *bytes = ((int64_t)1 << 20) + (int64_t)save->tokenizer_bytes;
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
static int find_present(struct ckpt_saver *save)
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
static int make_room(struct ckpt_saver *save, int64_t needed_bytes)
{
    const size_t n = (size_t)save->n, ranks = (size_t)save->comm->ranks;
    save->mine = calloc(SLAB_FIELDS * n, sizeof *save->mine);
    save->digest = calloc(n, sizeof *save->digest);
    if (!save->mine || !save->digest) FAIL(ERR_SYSTEM, "%s: no memory left to save", save->final);
    for (size_t i = 0; i < n; i++) {
        save->mine[SLAB_FIELDS * i + SLAB_BEGIN] = save->slabs[i].begin;
        save->mine[SLAB_FIELDS * i + SLAB_END] = save->slabs[i].end;
    }
    if (save->comm->rank > 0) return 0;
    save->all = calloc(SLAB_FIELDS * n * ranks, sizeof *save->all);
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

static int prepare(struct ckpt_saver *save)
{
    int64_t bytes = 0;
    TRY(ckpt_step_path(save->final, save->run->dir, save->meta.step));
    TRY(ckpt_temp_path(save->temp, save->run, "save", save->meta.step));
    TRY(check_lists(save));
    TRY(total_bytes(save, &bytes));
    TRY(find_present(save));
    return comm_agree(save->comm, make_room(save, bytes));
}

/* ---- commit ---- */

/* One tensor of the manifest from the ranges that the ranks reported. */
static int build_tensor(const struct ckpt_saver *save, int i, struct ckpt_tensor *tensor)
{
    const struct ckpt_slab *slab = &save->slabs[i];
    snprintf(tensor->name, sizeof tensor->name, "%s", slab->name);
    tensor->ndim = slab->ndim;
    memcpy(tensor->shape, slab->shape, (size_t)slab->ndim * sizeof *slab->shape);
    tensor->ranges = calloc((size_t)save->comm->ranks, sizeof *tensor->ranges);
    if (!tensor->ranges) FAIL(ERR_SYSTEM, "%s: no memory left to save", save->final);
    for (int rank = 0; rank < save->comm->ranks; rank++) {
        const int64_t *slab_of_rank = &save->all[SLAB_FIELDS * ((size_t)rank * (size_t)save->n + (size_t)i)];
        const struct ckpt_range range = {slab_of_rank[SLAB_BEGIN], slab_of_rank[SLAB_END], rank};
        if (range.begin >= range.end) continue;
        tensor->ranges[tensor->n_ranges++] = range;
        tensor->digest += (uint64_t)slab_of_rank[SLAB_DIGEST];
    }
    if (!ckpt_ranges_tile(tensor)) {
        FAIL(ERR_BUG, "%s: the ranges that the ranks hold leave a gap or overlap", slab->name);
    }
    return 0;
}

/* The manifest of this save; what it owns is freed by ckpt_manifest_free, also after a failure. */
static int build_manifest(const struct ckpt_saver *save, struct ckpt_manifest *manifest)
{
    struct tm utc;
    const time_t now = time(NULL);
    memset(manifest, 0, sizeof *manifest);
    if (gmtime_r(&now, &utc))
        (void)strftime(manifest->saved_at, sizeof manifest->saved_at, "%Y-%m-%dT%H:%M:%SZ", &utc);
    manifest->n_ranks = save->comm->ranks;
    manifest->n_files = manifest->n_ranks + 1 + (save->tokenizer_bytes > 0);
    manifest->files = calloc((size_t)manifest->n_files, sizeof *manifest->files);
    manifest->tensors = calloc((size_t)save->n, sizeof *manifest->tensors);
    TRY(ckpt_meta_copy(&manifest->meta, &save->meta));
    if (!manifest->files || !manifest->tensors) FAIL(ERR_SYSTEM, "%s: no memory left to save", save->final);
    memcpy(manifest->files, save->files, (size_t)save->comm->ranks * sizeof *manifest->files);
    manifest->n_tensors = save->n;
    for (int i = 0; i < save->n; i++) {
        TRY(build_tensor(save, i, &manifest->tensors[i]));
    }
    return 0;
}

/* The model as it is in memory, which is what the run was started with: its file may be another by now. */
static int write_tokenizer(const struct ckpt_saver *save, struct ckpt_file *file)
{
    char path[CKPT_PATH_MAX];
    TRY(ckpt_path(path, save->temp, CKPT_TOKENIZER));
    TRY(ckpt_file_write(path, save->tokenizer, save->tokenizer_bytes));
    *file = (struct ckpt_file){.name = CKPT_TOKENIZER,
                               .bytes = (int64_t)save->tokenizer_bytes,
                               .xxh3 = XXH3_64bits(save->tokenizer, save->tokenizer_bytes)};
    return 0;
}

/* Whether the complete checkpoint under the step's name holds the same bytes in the same files. */
static int check_same(const struct ckpt_saver *save, const struct ckpt_manifest *manifest)
{
    struct ckpt_manifest old;
    TRY(ckpt_manifest_read(save->final, &old));
    /* One of an earlier version has no tokenizer. */
    bool same = old.n_ranks == manifest->n_ranks;
    for (int i = 0; same && i < old.n_files && i < manifest->n_files; i++) {
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
static int publish(const struct ckpt_saver *save, const struct ckpt_manifest *manifest)
{
    char damaged[CKPT_PATH_MAX];
    TRY(ckpt_temp_path(damaged, save->run, "damaged", save->meta.step));
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
    return fs_sync_folder(save->run->dir);
}

/* Rank 0 only, after all files are on disk. */
static int finish(const struct ckpt_saver *save)
{
    int rc = 0;
    struct ckpt_manifest manifest;
    TRY_GOTO(build_manifest(save, &manifest), done);
    TRY_GOTO(ckpt_write_index(save->temp, &manifest), done);
    if (save->tokenizer_bytes > 0) TRY_GOTO(write_tokenizer(save, &manifest.files[manifest.n_files - 1]), done);
    TRY_GOTO(ckpt_manifest_write(save->temp, &manifest), done);
    TRY_GOTO(fs_sync_folder(save->temp), done);
    TRY_GOTO(publish(save, &manifest), done);
done:
    ckpt_manifest_free(&manifest);
    return rc;
}

/* ---- threads ---- */

static void *write_thread(void *saver)
{
    struct ckpt_saver *save = saver;
    int rc = save->fill ? save->fill(save->context) : 0;
    const double began_s = now_s();
    if (rc == 0)
        rc = ckpt_write_rank_file(save->temp, save->comm->rank, save->slabs, save->n, &save->file, save->digest);
    save->written = (struct ckpt_written){now_s() - began_s, save->file.bytes};
    for (int i = 0; i < save->n; i++)
        save->mine[SLAB_FIELDS * i + SLAB_DIGEST] = (int64_t)save->digest[i];
    err_take(&save->outcome, rc);
    atomic_store(&save->ready, true);
    return NULL;
}

static void *commit_thread(void *saver)
{
    struct ckpt_saver *save = saver;
    const int rc = finish(save);
    if (rc == 0) ckpt_retain(save->run, save->meta.step, save->keep);
    err_take(&save->outcome, rc);
    atomic_store(&save->ready, true);
    return NULL;
}

/* Without `work` this rank has nothing to do in the phase. */
static int begin_phase(struct ckpt_saver *save, enum phase phase, void *(*work)(void *saver))
{
    save->phase = phase;
    atomic_store(&save->ready, work == NULL);
    save->outcome = (struct err_record){.code = 0};
    if (!work) return 0;
    const int error = pthread_create(&save->thread, NULL, work, save);
    if (error != 0) FAIL(ERR_SYSTEM, "%s: no thread to save with: %s", save->final, strerror(error));
    save->running = true;
    return 0;
}

static void join(struct ckpt_saver *save)
{
    if (save->running) (void)pthread_join(save->thread, NULL);
    save->running = false;
}

/* How this rank's part of the phase ended. */
static int end_phase(struct ckpt_saver *save)
{
    join(save);
    return err_give(&save->outcome);
}

/* ---- a save ---- */

/* Frees what belongs to the save, which ended so. */
static int end_save(struct ckpt_saver *save, int rc)
{
    if (rc != 0 && save->begun) ckpt_folder_remove(save->temp);
    ckpt_meta_free(&save->meta);
    free(save->slabs);
    free(save->mine);
    free(save->digest);
    free(save->all);
    free(save->files);
    save->slabs = NULL;
    save->mine = save->all = NULL;
    save->digest = NULL;
    save->files = NULL;
    save->begun = false;
    save->phase = PHASE_IDLE;
    return rc;
}

/* The saver's own copies of what the caller may forget. */
static int copy_arguments(struct ckpt_saver *save, const struct ckpt_meta *meta, const struct ckpt_slab *slabs)
{
    TRY(ckpt_meta_copy(&save->meta, meta));
    save->slabs = calloc((size_t)save->n, sizeof *save->slabs);
    if (!save->slabs) FAIL(ERR_SYSTEM, "no memory left to save step %lld", (long long)meta->step);
    memcpy(save->slabs, slabs, (size_t)save->n * sizeof *slabs);
    return 0;
}

int ckpt_saver_open(struct ckpt_saver **saver, struct comm *comm, const struct ckpt_run *run)
{
    *saver = calloc(1, sizeof **saver);
    if (!*saver) FAIL(ERR_SYSTEM, "no memory for saving checkpoints");
    (*saver)->comm = comm;
    (*saver)->run = run;
    atomic_init(&(*saver)->ready, true);
    return 0;
}

void ckpt_saver_add_tokenizer(struct ckpt_saver *saver, const void *model, size_t bytes)
{
    saver->tokenizer = model;
    saver->tokenizer_bytes = bytes;
}

void ckpt_saver_close(struct ckpt_saver *saver)
{
    if (!saver) return;
    join(saver);
    (void)end_save(saver, 0);
    free(saver);
}

int ckpt_save_start(struct ckpt_saver *save, const struct ckpt_meta *meta, const struct ckpt_slab *slabs, int n,
                    struct ckpt_keep keep, int (*fill)(void *context), void *context)
{
    int rc = 0;
    ASSERT(n > 0 && save->phase == PHASE_IDLE);
    save->n = n;
    save->keep = keep;
    save->fill = fill;
    save->context = context;
    TRY_GOTO(comm_agree(save->comm, copy_arguments(save, meta, slabs)), done);
    TRY_GOTO(prepare(save), done);
    TRY_GOTO(comm_agree(save->comm, begin_phase(save, PHASE_WRITE, write_thread)), done);
done:
    if (rc != 0) join(save);
    return rc != 0 ? end_save(save, rc) : 0;
}

bool ckpt_save_busy(const struct ckpt_saver *save)
{
    return save->phase != PHASE_IDLE;
}

struct ckpt_written ckpt_save_written(const struct ckpt_saver *save)
{
    return save->written;
}

bool ckpt_save_ready(const struct ckpt_saver *save)
{
    return atomic_load(&save->ready);
}

/* From the written files to rank 0's commit. */
static int gather(struct ckpt_saver *save)
{
    const bool first = save->comm->rank == 0;
    TRY(comm_agree(save->comm, end_phase(save)));
    TRY(comm_max_f64(save->comm, &save->written.s, 1));
    TRY(comm_sum_i64(save->comm, &save->written.bytes, 1));
    TRY(comm_gather(save->comm, &save->file, save->files, sizeof save->file));
    TRY(comm_gather(save->comm, save->mine, save->all, SLAB_FIELDS * (size_t)save->n * sizeof *save->mine));
    return comm_agree(save->comm, begin_phase(save, PHASE_COMMIT, first ? commit_thread : NULL));
}

int ckpt_save_advance(struct ckpt_saver *save)
{
    if (save->phase == PHASE_IDLE) return 0;
    if (save->phase == PHASE_COMMIT) return end_save(save, comm_agree(save->comm, end_phase(save)));
    const int rc = gather(save);
    return rc != 0 ? end_save(save, rc) : 0;
}

int ckpt_save_wait(struct ckpt_saver *save)
{
    while (save->phase != PHASE_IDLE)
        TRY(ckpt_save_advance(save));
    return 0;
}

int ckpt_save(struct comm *comm, const struct ckpt_run *run, const struct ckpt_meta *meta,
              const struct ckpt_slab *slabs, int n, struct ckpt_keep keep)
{
    int rc = 0;
    struct ckpt_saver *saver = NULL;
    TRY(comm_agree(comm, ckpt_saver_open(&saver, comm, run)));
    TRY_GOTO(ckpt_save_start(saver, meta, slabs, n, keep, NULL, NULL), done);
    TRY_GOTO(ckpt_save_wait(saver), done);
done:
    ckpt_saver_close(saver);
    return rc;
}
