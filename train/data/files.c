/* Paths, folders and files (see files.h). */
#include "data/files.h"

#include "err.h"
#include "fs.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int path_join(char **path, const char *folder, const char *name)
{
    const size_t bytes = (folder ? strlen(folder) : 0) + strlen(name) + 2;
    *path = malloc(bytes);
    if (!*path) FAIL(ERR_SYSTEM, "out of memory for a path");
    (void)snprintf(*path, bytes, "%s%s%s", folder ? folder : "", folder ? "/" : "", name);
    return 0;
}

const char *path_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

int path_list_add(struct path_list *list, const char *folder, const char *name)
{
    if (list->n == list->capacity) {
        const int capacity = 2 * list->capacity + 16;
        char **path = realloc(list->path, (size_t)capacity * sizeof *path);
        if (!path) FAIL(ERR_SYSTEM, "out of memory for %d paths", capacity);
        list->path = path;
        list->capacity = capacity;
    }
    TRY(path_join(&list->path[list->n], folder, name));
    list->n++;
    return 0;
}

static int compare_paths(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

int path_list_folder(struct path_list *list, const char *folder)
{
    int rc = 0;
    const int before = list->n;
    DIR *dir = opendir(folder);
    if (!dir) FAIL_FS("cannot read the folder", folder, ERR_DATA, NULL);
    for (const struct dirent *entry; errno = 0, (entry = readdir(dir)) != NULL;) {
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
        TRY_GOTO(path_list_add(list, NULL, entry->d_name), done);
    }
    if (errno != 0) FAIL_FS_GOTO(done, "cannot read the folder", folder, ERR_DATA, NULL);
    if (list->n > before) {
        qsort(list->path + before, (size_t)(list->n - before), sizeof *list->path, compare_paths);
    }
done:
    (void)closedir(dir);
    return rc;
}

void path_list_free(struct path_list *list)
{
    for (int i = 0; i < list->n; i++)
        free(list->path[i]);
    free(list->path);
    *list = (struct path_list){.path = NULL, .n = 0, .capacity = 0};
}

int file_check_fetched(const char *path)
{
    static const char head[] = "version https://git-lfs.github.com/spec/";
    char text[sizeof head] = "";
    FILE *file = fopen(path, "rb");
    const size_t got = file ? fread(text, 1, sizeof head - 1, file) : 0;
    if (file) (void)fclose(file);
    if (got != sizeof head - 1 || memcmp(text, head, got) != 0) return 0;
    FAIL(ERR_DATA, "%s is a Git-LFS pointer, a few lines in place of the file; fetch the file with `git lfs pull`",
         path);
}

int file_sync(const char *path)
{
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) FAIL_FS("cannot open", path, ERR_SYSTEM, NULL);
    const int error = fsync(fd) == 0 ? 0 : errno;
    (void)close(fd);
    if (error != 0) return fs_raise(__FILE__, __LINE__, "cannot bring to disk", path, error, ERR_SYSTEM, NULL);
    return 0;
}

int file_write_text(const char *path, const char *text)
{
    FILE *file = fopen(path, "w");
    bool failed = !file || fputs(text, file) == EOF;
    int reason = errno;
    if (file && fclose(file) != 0 && !failed) {
        failed = true;
        reason = errno;
    }
    if (failed) return fs_raise(__FILE__, __LINE__, "cannot write", path, reason, ERR_SYSTEM, NULL);
    return file_sync(path);
}
