/* A dataset on disk (see dataset.h). */
#include "data/dataset.h"

#include "data/shard.h"
#include "err.h"
#include "fs.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int is_shard_name(const char *name)
{
    const size_t bytes = strlen(name), suffix = strlen(DATASET_SUFFIX);
    return bytes > suffix && name[0] != '.' && strcmp(name + bytes - suffix, DATASET_SUFFIX) == 0;
}

/* Is `name`, the next entry of the list, there and of the size that it had? */
static int check_listed(const char *folder, const char *name, json_int_t bytes)
{
    int rc = 0;
    char *path = NULL;
    struct stat st;
    TRY(path_join(&path, folder, name));
    const int error = stat(path, &st) == 0 ? 0 : errno;
    if (error != 0 && error != ENOENT)
        rc = fs_raise(__FILE__, __LINE__, "cannot look at", path, error, ERR_DATA, NULL);
    free(path);
    TRY(rc);
    if (error != 0) {
        FAIL(ERR_DATA, "%s/%s is missing: %s lists it; restore it, or make the dataset again with `tatara prepare`",
             folder, name, DATASET_LIST);
    }
    if (st.st_size != bytes) {
        FAIL(ERR_DATA,
             "%s/%s has %lld bytes, %s says %lld: it is truncated or not the same file; restore it, or make the "
             "dataset again with `tatara prepare`",
             folder, name, (long long)st.st_size, DATASET_LIST, (long long)bytes);
    }
    return 0;
}

/* Compares the list, if there is one, with the shards found in the folder, both sorted. */
static int compare_with_list(const char *folder, const char *list_path, const struct path_list *found)
{
    int rc = 0;
    json_error_t why;
    json_t *list = NULL;
    FILE *file = fopen(list_path, "rb");
    if (!file && errno == ENOENT) return 0;
    if (!file) FAIL_FS("cannot open", list_path, ERR_DATA, NULL);
    errno = 0;
    list = json_loadf(file, 0, &why);
    if (ferror(file)) FAIL_FS_GOTO(done, "cannot read", list_path, ERR_DATA, NULL);
    const json_t *entries = json_object_get(list, "shards");
    if (!json_is_array(entries)) {
        FAIL_GOTO(done, ERR_DATA, "%s is damaged (%s); make the dataset again with `tatara prepare`", list_path,
                  list ? "it lists no shards" : why.text);
    }
    for (size_t i = 0; i < json_array_size(entries); i++) {
        const json_t *entry = json_array_get(entries, i);
        const char *name = json_string_value(json_object_get(entry, "file"));
        if (!name || strchr(name, '/') || !is_shard_name(name)) {
            FAIL_GOTO(done, ERR_DATA, "%s: entry %zu names no shard", list_path, i);
        }
        TRY_GOTO(check_listed(folder, name, json_integer_value(json_object_get(entry, "bytes"))), done);
    }
    if ((size_t)found->n != json_array_size(entries)) {
        FAIL_GOTO(done, ERR_DATA, "%s has %d shards but lists %zu: move the others out, or remove the list", folder,
                  found->n, json_array_size(entries));
    }
done:
    (void)fclose(file);
    json_decref(list);
    return rc;
}

/* The folder's shards, as names or as paths. */
static int list_shards(struct path_list *shards, const char *folder)
{
    int rc = 0;
    struct path_list names = {.path = NULL};
    TRY_GOTO(path_list_folder(&names, folder), done);
    for (int i = 0; i < names.n; i++) {
        if (is_shard_name(names.path[i])) TRY_GOTO(path_list_add(shards, folder, names.path[i]), done);
    }
done:
    path_list_free(&names);
    return rc;
}

int dataset_shards(struct path_list *shards, const char *path)
{
    struct stat st;
    if (stat(path, &st) != 0) {
        FAIL_FS("cannot open the dataset", path, ERR_DATA,
                "give a folder of shards or a shard made by `tatara prepare`");
    }
    if (!S_ISDIR(st.st_mode)) return path_list_add(shards, NULL, path);
    TRY(list_shards(shards, path));
    char *list_path = NULL;
    TRY(path_join(&list_path, path, DATASET_LIST));
    int rc = compare_with_list(path, list_path, shards);
    free(list_path);
    if (rc == 0 && shards->n == 0) {
        rc = err_raise(ERR_DATA, __FILE__, __LINE__, "%s has no shards (*%s); make some with `tatara prepare`", path,
                       DATASET_SUFFIX);
    }
    return rc;
}

int dataset_report(json_t **report, const char *path)
{
    char *list_path = NULL;
    json_error_t why;
    *report = NULL;
    TRY(path_join(&list_path, path, DATASET_LIST));
    const bool there = access(list_path, F_OK) == 0;
    if (there) *report = json_load_file(list_path, 0, &why);
    free(list_path);
    if (there && !*report) {
        FAIL(ERR_DATA, "%s/" DATASET_LIST " is damaged (%s); make the dataset again with `tatara prepare`", path,
             why.text);
    }
    return 0;
}

/* One entry of the list. */
static int describe_shard(json_t *entries, const char *path)
{
    struct shard *shard = NULL;
    TRY(shard_open(&shard, path));
    const struct shard_info *info = shard_get_info(shard);
    json_t *entry =
        json_pack("{s:s, s:I, s:I, s:I}", "file", path_name(path), "bytes", (json_int_t)shard_file_bytes(shard),
                  "tokens", (json_int_t)info->tokens, "documents", (json_int_t)info->documents);
    shard_close(shard);
    if (!entry || json_array_append_new(entries, entry) != 0) FAIL(ERR_SYSTEM, "out of memory for %s", DATASET_LIST);
    return 0;
}

int dataset_write_list(const char *folder, json_t *report)
{
    int rc = 0;
    char *text = NULL, *path = NULL;
    struct path_list shards = {.path = NULL};
    json_t *entries = json_array();
    if (!entries || json_object_set_new(report, "shards", entries) != 0) {
        FAIL_GOTO(done, ERR_SYSTEM, "out of memory for %s", DATASET_LIST);
    }
    TRY_GOTO(list_shards(&shards, folder), done);
    for (int i = 0; i < shards.n; i++)
        TRY_GOTO(describe_shard(entries, shards.path[i]), done);
    text = json_dumps(report, JSON_INDENT(1) | JSON_REAL_PRECISION(12));
    if (!text) FAIL_GOTO(done, ERR_SYSTEM, "out of memory for %s", DATASET_LIST);
    TRY_GOTO(path_join(&path, folder, DATASET_LIST), done);
    TRY_GOTO(file_write_text(path, text), done);
done:
    path_list_free(&shards);
    free(path);
    free(text);
    return rc;
}
