/* A run's folder: which steps it holds, and what is removed from it.
 *
 * A folder is taken away in two steps, renamed first, so that no half of a checkpoint is ever seen under its name. */
#include "ckpt_internal.h"
#include "fs.h"
#include "log.h"
#include "path.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define TEMP_PREFIX ".tmp-"
#define STEP_PREFIX "step-"

void ckpt_folder_remove(const char *folder)
{
    DIR *dir = opendir(folder);
    if (!dir && errno == ENOENT) return;
    for (struct dirent *entry = dir ? readdir(dir) : NULL; entry; entry = readdir(dir)) {
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
        (void)unlinkat(dirfd(dir), entry->d_name, 0); /* what stays makes rmdir fail */
    }
    if (dir) (void)closedir(dir);
    if (rmdir(folder) != 0) log_warn("%s: cannot be removed: %s; remove it by hand", folder, strerror(errno));
}

int ckpt_step_path(char path[CKPT_PATH_MAX], const char *run_dir, int64_t step)
{
    char name[64];
    snprintf(name, sizeof name, STEP_PREFIX "%08lld", (long long)step);
    return ckpt_path(path, run_dir, name);
}

int ckpt_temp_path(char path[CKPT_PATH_MAX], const struct ckpt_run *run, const char *what, int64_t step)
{
    char name[64 + CKPT_OWNER_MAX];
    snprintf(name, sizeof name, TEMP_PREFIX "%.16s-%08lld-%s", what, (long long)step, run->owner);
    return ckpt_path(path, run->dir, name);
}

/* The step in a folder's name, or -1: "step-00001000", nothing else. */
static int64_t parse_step(const char *name)
{
    const size_t prefix = strlen(STEP_PREFIX);
    if (strncmp(name, STEP_PREFIX, prefix) != 0) return -1;
    const char *digits = name + prefix;
    const size_t length = strlen(digits);
    if (length < 8 || length > 18 || strspn(digits, "0123456789") != length) return -1;
    if (length > 8 && digits[0] == '0') return -1;
    return strtoll(digits, NULL, 10);
}

static int compare_steps(const void *a, const void *b)
{
    const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

int ckpt_list_steps(const char *run_dir, int64_t **steps, int *n)
{
    int rc = 0, room = 0;
    *steps = NULL;
    *n = 0;
    DIR *dir = opendir(run_dir);
    if (!dir && errno == ENOENT) return 0;
    if (!dir) FAIL(ERR_SYSTEM, "%s: cannot be listed: %s", run_dir, strerror(errno));
    for (struct dirent *entry = readdir(dir); entry; entry = readdir(dir)) {
        const int64_t step = parse_step(entry->d_name);
        if (step < 0) continue;
        if (*n == room) {
            room = room > 0 ? 2 * room : 64;
            int64_t *larger = realloc(*steps, (size_t)room * sizeof *larger);
            if (!larger) FAIL_GOTO(done, ERR_SYSTEM, "%s: no memory left to list it", run_dir);
            *steps = larger;
        }
        (*steps)[(*n)++] = step;
    }
    if (*n > 1) qsort(*steps, (size_t)*n, sizeof **steps, compare_steps);
done:
    (void)closedir(dir);
    if (rc != 0) {
        free(*steps);
        *steps = NULL;
        *n = 0;
    }
    return rc;
}

/* ---- retention ---- */

/* Whether every file of the checkpoint is there in its right size: quick, for deciding what may be removed. */
static bool is_complete(const char *folder)
{
    struct ckpt_manifest manifest;
    if (ckpt_manifest_read(folder, &manifest) != 0) {
        err_clear();
        return false;
    }
    bool complete = true;
    for (int i = 0; complete && i < manifest.n_files; i++) {
        complete = ckpt_file_present(folder, &manifest.files[i]);
    }
    ckpt_manifest_free(&manifest);
    return complete;
}

/* The newest complete checkpoint of a run's folder, and a warning for each newer one that is not; "" when there is none. */
static int newest_complete(const char *run_dir, const int64_t *steps, int n, char folder[CKPT_PATH_MAX])
{
    for (int i = n - 1; i >= 0; i--) {
        TRY(ckpt_step_path(folder, run_dir, steps[i]));
        if (is_complete(folder)) return 0;
        log_warn("%s: passed over, it is not complete; `tatara ckpt verify %s` says why", folder, folder);
    }
    FAIL(ERR_DATA, "%s: none of its %d checkpoints is complete; restore one from a copy", run_dir, n);
}

int ckpt_choose(const char *path, char folder[CKPT_PATH_MAX])
{
    char manifest[CKPT_PATH_MAX];
    int64_t *steps = NULL;
    int n = 0;
    TRY(ckpt_path(manifest, path, CKPT_MANIFEST));
    snprintf(folder, CKPT_PATH_MAX, "%s", path);
    if (access(manifest, F_OK) == 0) return 0;
    TRY(ckpt_list_steps(path, &steps, &n));
    const int rc = n > 0 ? newest_complete(path, steps, n, folder) : 0;
    free(steps);
    TRY(rc);
    if (n == 0) {
        char whole[PATH_WHOLE_MAX];
        FAIL(ERR_DATA,
             "%s is neither a checkpoint, which has a " CKPT_MANIFEST ", nor a run's folder, which holds some",
             path_whole(whole, path));
    }
    log_info("%s: the newest checkpoint of %s", folder, path);
    return 0;
}

static int discard_step(const struct ckpt_run *run, int64_t step)
{
    char folder[CKPT_PATH_MAX], doomed[CKPT_PATH_MAX];
    TRY(ckpt_step_path(folder, run->dir, step));
    TRY(ckpt_temp_path(doomed, run, "old", step));
    if (rename(folder, doomed) != 0) {
        FAIL(ERR_SYSTEM, "%s: an old checkpoint that cannot be removed: %s", folder, strerror(errno));
    }
    ckpt_folder_remove(doomed);
    return 0;
}

bool ckpt_step_counts(int64_t step, int64_t from, int64_t every)
{
    return step == from || (every > 0 && step > from && step % every == 0);
}

void ckpt_retain(const struct ckpt_run *run, int64_t step, struct ckpt_keep keep)
{
    int64_t *steps = NULL;
    int n = 0, rc = 0;
    int64_t complete = 0;
    bool back = keep.back; /* its checkpoint is still to come */
    rc = ckpt_list_steps(run->dir, &steps, &n);
    for (int i = n - 1; rc == 0 && i >= 0; i--) {
        char folder[CKPT_PATH_MAX];
        if (steps[i] > step) continue;
        rc = ckpt_step_path(folder, run->dir, steps[i]);
        if (rc != 0 || !is_complete(folder)) continue;
        const bool for_ever = keep.every > 0 && steps[i] % keep.every == 0;
        const bool to_go_back = back && ckpt_step_counts(steps[i], keep.back_from, keep.back_every);
        back &= !to_go_back;
        if (++complete > keep.newest && !for_ever && !to_go_back) rc = discard_step(run, steps[i]);
    }
    if (rc != 0) {
        log_warn("old checkpoints stay: %s", err_message());
        err_clear();
    }
    free(steps);
}

/* mkdir -p */
int ckpt_folder_make(const char *run_dir)
{
    char path[CKPT_PATH_MAX], whole[PATH_WHOLE_MAX];
    snprintf(path, sizeof path, "%s", run_dir);
    for (char *end = path + 1;; end++) {
        const char kept = *end;
        if (kept != '/' && kept != '\0') continue;
        *end = '\0';
        if (mkdir(path, 0777) != 0 && errno != EEXIST) {
            FAIL(ERR_SYSTEM, "run.dir %s: the folder %s cannot be created: %s; set run.dir to one that can", run_dir,
                 path_whole(whole, path), strerror(errno));
        }
        *end = kept;
        if (kept == '\0') return 0;
    }
}

int ckpt_remove_leftovers(const char *run_dir)
{
    DIR *dir = opendir(run_dir);
    if (!dir) FAIL(ERR_SYSTEM, "%s: cannot be listed: %s", run_dir, strerror(errno));
    for (struct dirent *entry = readdir(dir); entry; entry = readdir(dir)) {
        char path[CKPT_PATH_MAX];
        if (strncmp(entry->d_name, TEMP_PREFIX, strlen(TEMP_PREFIX)) != 0) continue;
        if (ckpt_path(path, run_dir, entry->d_name) != 0) continue;
        log_info("%s: removed, an earlier attempt left it unfinished", path);
        ckpt_folder_remove(path);
    }
    (void)closedir(dir);
    return 0;
}
