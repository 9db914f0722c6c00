/* A checkpoint's files: to disk, size and checksum, verification.
 *
 * The checksum is of the whole file, HDF5's own bookkeeping too, but what is written from memory is taken from there,
 * while it is on its way to disk. Any thread. */
#include "ckpt_internal.h"
#include "fs.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#define READ_BYTES ((size_t)4 << 20)
#define HASH_ELEMS ((int64_t)1 << 16) /* summed up twice while they are in a core's own cache */
#define SMALL_FILE_MAX ((int64_t)1 << 30)

void ckpt_file_name(char name[CKPT_FILE_MAX], int rank)
{
    snprintf(name, CKPT_FILE_MAX, "rank-%05d.h5", rank);
}

int ckpt_path(char path[CKPT_PATH_MAX], const char *folder, const char *name)
{
    const int length = snprintf(path, CKPT_PATH_MAX, "%s/%s", folder, name);
    if (length < 0 || length >= CKPT_PATH_MAX) {
        FAIL(ERR_CONFIG, "%.200s...: the path is longer than %d characters; choose a shorter run.dir", folder,
             CKPT_PATH_MAX - 1);
    }
    return 0;
}

/* The checksum of a file's bytes so far. */
struct hash {
    int fd;
    const char *path;
    char *buffer;
    XXH3_state_t *state;
    int64_t bytes;
};

/* Goes on with what the file holds, up to `end` or its own. */
static int hash_read(struct hash *h, int64_t end)
{
    while (h->bytes < end) {
        const int64_t left = end - h->bytes;
        const ssize_t got = pread(h->fd, h->buffer, left < (int64_t)READ_BYTES ? (size_t)left : READ_BYTES, h->bytes);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) FAIL_FS("cannot read", h->path, ERR_DATA, CKPT_REMEDY_DAMAGED);
        if (got == 0) return 0;
        XXH3_64bits_update(h->state, h->buffer, (size_t)got);
        h->bytes += got;
    }
    return 0;
}

/* Goes on with an extent, whose digest it computes too. */
static void hash_extent(struct hash *h, struct ckpt_extent *extent)
{
    const int64_t elems = extent->bytes / (int64_t)sizeof *extent->data;
    for (int64_t at = 0; at < elems; at += HASH_ELEMS) {
        const int64_t end = elems - at < HASH_ELEMS ? elems : at + HASH_ELEMS;
        XXH3_64bits_update(h->state, extent->data + at, (size_t)(end - at) * sizeof *extent->data);
        extent->digest += ckpt_digest(extent->data + at, extent->first + at, extent->first + end);
    }
    h->bytes += extent->bytes;
}

/* XXH3-64 and length of a file, of which the extents need not be read. */
static int hash_file(int fd, const char *path, struct ckpt_extent *extents, int n, struct ckpt_file *file)
{
    int rc = 0;
    struct hash h = {.fd = fd, .path = path, .buffer = malloc(READ_BYTES), .state = XXH3_createState()};
    if (!h.buffer || !h.state) FAIL_GOTO(done, ERR_SYSTEM, "%s: no memory left to read it", path);
    XXH3_64bits_reset(h.state);
    for (int i = 0; i < n; i++) {
        TRY_GOTO(hash_read(&h, extents[i].begin), done);
        if (h.bytes != extents[i].begin) break; /* the file ends before */
        hash_extent(&h, &extents[i]);
    }
    TRY_GOTO(hash_read(&h, INT64_MAX), done);
    file->bytes = h.bytes;
    file->xxh3 = XXH3_64bits_digest(h.state);
done:
    free(h.buffer);
    XXH3_freeState(h.state);
    return rc;
}

static int compare_extents(const void *a, const void *b)
{
    const struct ckpt_extent *x = a, *y = b;
    return (x->begin > y->begin) - (x->begin < y->begin);
}

/* A file that lost what was written to it, as was seen of HDF5, must not count. */
static int check_size(int fd, const char *path, const struct ckpt_extent *extents, int n)
{
    struct stat info;
    const int64_t end = n > 0 ? extents[n - 1].begin + extents[n - 1].bytes : 0;
    if (fstat(fd, &info) != 0) FAIL(ERR_SYSTEM, "%s: its size is unknown: %s", path, strerror(errno));
    if ((int64_t)info.st_size >= end) return 0;
    FAIL(ERR_SYSTEM, "%s has %lld bytes after writing, and its data ends at %lld; " CKPT_REMEDY_DISK, path,
         (long long)info.st_size, (long long)end);
}

struct seal {
    const char *path;
    struct ckpt_extent *extents;
    int n;
    struct ckpt_file *file;
};

static int hash_sealed(void *context)
{
    int rc = 0;
    const struct seal *seal = context;
    const int fd = open(seal->path, O_RDONLY);
    if (fd < 0) FAIL(ERR_SYSTEM, "%s: cannot be opened again: %s", seal->path, strerror(errno));
    TRY_GOTO(check_size(fd, seal->path, seal->extents, seal->n), done);
    TRY_GOTO(hash_file(fd, seal->path, seal->extents, seal->n, seal->file), done);
done:
    (void)close(fd);
    return rc;
}

int ckpt_file_seal(const char *folder, struct ckpt_file *file, struct ckpt_extent *extents, int n)
{
    char path[CKPT_PATH_MAX];
    struct seal seal = {path, extents, n, file};
    TRY(ckpt_path(path, folder, file->name));
    if (n > 1) qsort(extents, (size_t)n, sizeof *extents, compare_extents);
    return ckpt_disk_write(path, extents, n, hash_sealed, &seal);
}

int ckpt_file_verify(const char *folder, const struct ckpt_file *file)
{
    int rc = 0;
    char path[CKPT_PATH_MAX];
    struct stat info;
    struct ckpt_file found = {.bytes = 0};
    TRY(ckpt_path(path, folder, file->name));
    const int fd = open(path, O_RDONLY);
    if (fd < 0 && errno == ENOENT) FAIL(ERR_DATA, "%s is missing; " CKPT_REMEDY_DAMAGED, path);
    if (fd < 0) FAIL_FS("cannot open", path, ERR_DATA, CKPT_REMEDY_DAMAGED);
    if (fstat(fd, &info) != 0) FAIL_FS_GOTO(done, "cannot look at", path, ERR_DATA, CKPT_REMEDY_DAMAGED);
    if (!S_ISREG(info.st_mode)) {
        FAIL_GOTO(done, ERR_DATA, "%s is not a plain file; " CKPT_REMEDY_DAMAGED, path);
    }
    if ((int64_t)info.st_size != file->bytes) {
        FAIL_GOTO(done, ERR_DATA, "%s has %lld bytes, and the manifest says %lld: it was cut short or changed; %s",
                  path, (long long)info.st_size, (long long)file->bytes, CKPT_REMEDY_DAMAGED);
    }
    TRY_GOTO(hash_file(fd, path, NULL, 0, &found), done);
    if (found.bytes != file->bytes || found.xxh3 != file->xxh3) {
        FAIL_GOTO(done, ERR_DATA, "%s is damaged: its checksum is not the manifest's; " CKPT_REMEDY_DAMAGED, path);
    }
done:
    (void)close(fd);
    return rc;
}

bool ckpt_file_present(const char *folder, const struct ckpt_file *file)
{
    char path[CKPT_PATH_MAX];
    struct stat info;
    const int length = snprintf(path, sizeof path, "%s/%s", folder, file->name);
    return length > 0 && length < CKPT_PATH_MAX && stat(path, &info) == 0 && S_ISREG(info.st_mode) &&
           (int64_t)info.st_size == file->bytes;
}

int ckpt_file_read(const char *path, char **text, size_t *bytes)
{
    int rc = 0;
    struct stat info;
    char *buffer = NULL;
    size_t used = 0;
    const int fd = open(path, O_RDONLY);
    if (fd < 0) FAIL_FS("cannot open", path, ERR_DATA, NULL);
    if (fstat(fd, &info) != 0) FAIL_FS_GOTO(done, "cannot look at", path, ERR_DATA, NULL);
    if (!S_ISREG(info.st_mode) || (int64_t)info.st_size > SMALL_FILE_MAX) {
        FAIL_GOTO(done, ERR_DATA, "%s is not a plain file of a possible size", path);
    }
    const size_t size = (size_t)info.st_size;
    buffer = malloc(size + 1);
    if (!buffer) FAIL_GOTO(done, ERR_SYSTEM, "%s: no memory left to read it", path);
    while (used < size) {
        const ssize_t got = read(fd, buffer + used, size - used);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) FAIL_FS_GOTO(done, "cannot read", path, ERR_DATA, NULL);
        if (got == 0) FAIL_GOTO(done, ERR_DATA, "%s became shorter while it was read", path);
        used += (size_t)got;
    }
    buffer[used] = '\0';
    *text = buffer;
    *bytes = used;
    buffer = NULL;
done:
    free(buffer);
    (void)close(fd);
    return rc;
}

int ckpt_file_write(const char *path, const char *text, size_t bytes)
{
    int rc = 0;
    const int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    if (fd < 0) FAIL(ERR_SYSTEM, "%s: cannot be created: %s", path, strerror(errno));
    for (size_t used = 0; used < bytes;) {
        const ssize_t put = write(fd, text + used, bytes - used);
        if (put < 0 && errno == EINTR) continue;
        if (put < 0) {
            FAIL_GOTO(done, ERR_SYSTEM, "%s: cannot be written: %s; " CKPT_REMEDY_DISK, path, strerror(errno));
        }
        used += (size_t)put;
    }
    if (fsync(fd) != 0) {
        FAIL_GOTO(done, ERR_SYSTEM, "%s: cannot be brought to disk: %s; " CKPT_REMEDY_DISK, path, strerror(errno));
    }
done:
    if (close(fd) != 0 && rc == 0) {
        rc = err_raise(ERR_SYSTEM, __FILE__, __LINE__, "%s: closing it failed: %s", path, strerror(errno));
    }
    return rc;
}
