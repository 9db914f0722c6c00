/* The folder that `tatara prepare` writes (see output.h). */
#define _XOPEN_SOURCE 700 /* realpath */
#include "data/output.h"

#include "data/dataset.h"
#include "data/files.h"
#include "err.h"
#include "fs.h"

#include <errno.h>
#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* The path from the root, without links, "." and ".."; its last parts need not be there. The caller frees *path. */
static int resolve(char **path, const char *folder)
{
    int rc = 0;
    char *rest = NULL, *const parts = strdup(folder);
    *path = realpath(*folder == '/' ? "/" : ".", NULL);
    if (!parts || !*path) FAIL_GOTO(done, ERR_SYSTEM, "cannot find the folder of %s: %s", folder, strerror(errno));
    for (const char *part = strtok_r(parts, "/", &rest); part; part = strtok_r(NULL, "/", &rest)) {
        char *joined = NULL;
        if (strcmp(part, ".") == 0) continue;
        if (strcmp(part, "..") == 0) {
            char *const slash = strrchr(*path, '/');
            slash[slash == *path] = '\0';
            continue;
        }
        TRY_GOTO(path_join(&joined, strcmp(*path, "/") == 0 ? "" : *path, part), done);
        free(*path);
        *path = realpath(joined, NULL);
        if (*path) {
            free(joined);
        } else {
            *path = joined;
        }
    }
done:
    free(parts);
    return rc;
}

int output_name(struct output *output, const char *folder)
{
    *output = (struct output){.final = NULL};
    if (*folder == '\0')
        FAIL(ERR_USAGE, "the name of a folder to make is empty: is a variable of the shell not set?");
    TRY(resolve(&output->final, folder));
    const size_t bytes = strlen(output->final) + sizeof ".partial";
    output->partial = malloc(bytes);
    if (!output->partial) FAIL(ERR_SYSTEM, "out of memory");
    (void)snprintf(output->partial, bytes, "%s.partial", output->final);
    return 0;
}

/* Is the path that of the folder, or of what lies in it? */
static bool is_within(const char *path, const char *folder)
{
    const size_t bytes = strlen(folder);
    return strncmp(path, folder, bytes) == 0 && (path[bytes] == '\0' || path[bytes] == '/');
}

int output_check_apart(const struct output *out, const struct output *valid)
{
    if (strcmp(out->final, valid->final) == 0) {
        FAIL(ERR_USAGE, "--out and --valid-out are the same folder, %s; give two", out->final);
    }
    if (is_within(valid->final, out->final) || is_within(out->final, valid->final) ||
        strcmp(valid->final, out->partial) == 0 || strcmp(out->final, valid->partial) == 0) {
        FAIL(ERR_USAGE, "--out %s and --valid-out %s are in each other's way; give two that lie side by side",
             out->final, valid->final);
    }
    return 0;
}

/* Does prepare write files of this name? */
static bool is_ours(const char *name)
{
    return strcmp(name, DATASET_LIST) == 0 || strcmp(name, OUTPUT_FAILED) == 0 ||
           (strncmp(name, "shard-", 6) == 0 && strstr(name, DATASET_SUFFIX) != NULL);
}

/* The names in the folder, none when it is not there; *foreign is one that prepare does not write, or NULL. */
static int list_folder(const char *folder, struct path_list *names, const char **foreign)
{
    struct stat st;
    *foreign = NULL;
    if (stat(folder, &st) != 0 && errno == ENOENT) return 0;
    TRY(path_list_folder(names, folder));
    for (int i = 0; i < names->n && !*foreign; i++) {
        if (!is_ours(names->path[i])) *foreign = names->path[i];
    }
    return 0;
}

/* Removes a folder that holds only what prepare writes. */
static int remove_folder(const char *folder)
{
    int rc = 0;
    char *path = NULL;
    const char *foreign = NULL;
    struct path_list names = {.path = NULL};
    TRY_GOTO(list_folder(folder, &names, &foreign), done);
    if (foreign) {
        FAIL_GOTO(done, ERR_USAGE, "%s holds %s, which `tatara prepare` did not write: choose another folder", folder,
                  foreign);
    }
    for (int i = 0; i < names.n; i++) {
        TRY_GOTO(path_join(&path, folder, names.path[i]), done);
        if (unlink(path) != 0) FAIL_GOTO(done, ERR_SYSTEM, "cannot remove %s: %s", path, strerror(errno));
        free(path);
        path = NULL;
    }
    if (rmdir(folder) != 0 && errno != ENOENT) {
        FAIL_GOTO(done, ERR_SYSTEM, "cannot remove %s: %s", folder, strerror(errno));
    }
done:
    free(path);
    path_list_free(&names);
    return rc;
}

int output_check(const struct output *output, bool overwrite)
{
    int rc = 0;
    const char *folder = output->final;
    const char *foreign = NULL;
    struct path_list names = {.path = NULL};
    struct stat st;
    if (lstat(folder, &st) == 0 && S_ISLNK(st.st_mode)) {
        FAIL(ERR_USAGE, "--out %s: a link to what is not there; make that folder, or remove the link", folder);
    }
    TRY_GOTO(list_folder(folder, &names, &foreign), done);
    if (foreign) {
        FAIL_GOTO(done, ERR_USAGE,
                  "--out %s: the folder holds %s, which `tatara prepare` did not write; choose a new one", folder,
                  foreign);
    }
    if (names.n > 0 && !overwrite) {
        FAIL_GOTO(done, ERR_USAGE, "--out %s: the folder already holds shards; choose a new one, or pass --overwrite",
                  folder);
    }
done:
    path_list_free(&names);
    return rc;
}

/* Makes a folder and those above it. */
static int make_folders(const char *folder)
{
    char *path = strdup(folder);
    if (!path) FAIL(ERR_SYSTEM, "out of memory");
    int failed = 0;
    for (char *slash = strchr(path + 1, '/'); slash && !failed; slash = strchr(slash + 1, '/')) {
        *slash = '\0';
        failed = mkdir(path, 0777) != 0 && errno != EEXIST;
        *slash = '/';
    }
    failed = failed || mkdir(path, 0777) != 0;
    const int reason = errno;
    free(path);
    if (failed) FAIL(ERR_SYSTEM, "cannot make the folder %s: %s", folder, strerror(reason));
    return 0;
}

int output_begin(struct output *output)
{
    TRY(remove_folder(output->partial));
    TRY(make_folders(output->partial));
    output->begun = true;
    return 0;
}

int output_commit(struct output *output, json_t *report)
{
    TRY(dataset_write_list(output->partial, report));
    TRY(fs_sync_folder(output->partial));
    TRY(remove_folder(output->final));
    if (rename(output->partial, output->final) != 0) {
        FAIL(ERR_SYSTEM, "cannot rename %s to %s: %s", output->partial, output->final, strerror(errno));
    }
    output->begun = false;
    char *copy = strdup(output->final);
    if (!copy) FAIL(ERR_SYSTEM, "out of memory");
    const int rc = fs_sync_folder(dirname(copy));
    free(copy);
    return rc;
}

void output_discard(struct output *output)
{
    if (!output->begun) return;
    struct err_record error;
    err_take(&error, 1); /* what went wrong first is the message to keep */
    (void)remove_folder(output->partial);
    (void)err_give(&error);
    output->begun = false;
}

void output_free(struct output *output)
{
    free(output->final);
    free(output->partial);
    *output = (struct output){.final = NULL};
}
