/* Memory to disk, past the page cache, beside what the calling thread does.
 *
 * Through the page cache every byte is copied once more, on cores that a training step wants, and the disk begins late.
 * Threads that wait in O_DIRECT writes straight from the memory take next to no core. Memory that does not lie on a page
 * boundary where the file does goes through a buffer. Small parts, and what is not a whole page, go through the page
 * cache: before the rest, and to disk, since no kernel promises anything to those who write a file both ways at once. On
 * a file system without O_DIRECT everything does. */
#define _GNU_SOURCE /* for O_DIRECT */
#include "ckpt_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define WRITERS 2 /* one copies, or wakes up, while the other's bytes are on their way */
#define CHUNK_BYTES ((int64_t)8 << 20)

struct disk {
    int fd, direct; /* direct: -1 without O_DIRECT */
    const struct ckpt_extent *extents;
    int n;
    int64_t page;
    pthread_mutex_t lock; /* of what follows */
    int extent;           /* the one written next, from `at` on */
    int64_t at;
    int writers; /* that have not ended */
    int error;   /* errno of the first that failed */
};

/* Bytes of the file, and where they are. */
struct chunk {
    int64_t begin, end;
    const char *data;
};

static struct chunk part(const struct ckpt_extent *extent, int64_t begin, int64_t end)
{
    return (struct chunk){begin, end, (const char *)extent->data + (begin - extent->begin)};
}

/* What the writers write of an extent; the rest has been written before. */
static struct chunk bulk(const struct disk *disk, const struct ckpt_extent *extent)
{
    const int64_t begin = extent->begin, end = begin + extent->bytes, page = disk->page;
    if (extent->bytes < CKPT_BULK_FROM) return part(extent, end, end);
    if (disk->direct < 0) return part(extent, begin, end);
    return part(extent, (begin + page - 1) / page * page, end / page * page);
}

/* Returns errno. */
static int put(int fd, struct chunk chunk)
{
    while (chunk.begin < chunk.end) {
        const ssize_t written = pwrite(fd, chunk.data, (size_t)(chunk.end - chunk.begin), chunk.begin);
        if (written < 0 && errno == EINTR) continue;
        if (written <= 0) return written < 0 ? errno : ENOSPC;
        chunk.data += written;
        chunk.begin += written;
    }
    return 0;
}

/* Returns errno. *buffer is kept for the next chunk. */
static int put_bulk(const struct disk *disk, struct chunk chunk, void **buffer)
{
    if (disk->direct < 0) return put(disk->fd, chunk);
    if ((uintptr_t)chunk.data % CKPT_ALIGN != 0) {
        if (!*buffer && posix_memalign(buffer, CKPT_ALIGN, (size_t)CHUNK_BYTES) != 0) return ENOMEM;
        chunk.data = memcpy(*buffer, chunk.data, (size_t)(chunk.end - chunk.begin));
    }
    const int error = put(disk->direct, chunk);
    return error == EINVAL ? put(disk->fd, chunk) : error; /* refused for an alignment that we cannot know */
}

/* The next chunk; false when there is none, or a writer has failed. */
static bool take(struct disk *disk, struct chunk *chunk)
{
    bool found = false;
    (void)pthread_mutex_lock(&disk->lock);
    while (!found && disk->error == 0 && disk->extent < disk->n) {
        const struct ckpt_extent *extent = &disk->extents[disk->extent];
        const struct chunk all = bulk(disk, extent);
        const int64_t begin = disk->at > all.begin ? disk->at : all.begin;
        *chunk = part(extent, begin, all.end - begin < CHUNK_BYTES ? all.end : begin + CHUNK_BYTES);
        found = begin < all.end;
        disk->at = chunk->end;
        disk->extent += chunk->end >= all.end;
    }
    (void)pthread_mutex_unlock(&disk->lock);
    return found;
}

static void *writer(void *context)
{
    struct disk *disk = context;
    struct chunk chunk;
    void *buffer = NULL;
    int error = 0;
    while (error == 0 && take(disk, &chunk))
        error = put_bulk(disk, chunk, &buffer);
    free(buffer);
    (void)pthread_mutex_lock(&disk->lock);
    if (disk->error == 0) disk->error = error;
    if (--disk->writers == 0 && disk->error == 0 && fsync(disk->fd) != 0) disk->error = errno;
    (void)pthread_mutex_unlock(&disk->lock);
    return NULL;
}

/* What the writers leave out. Returns errno. */
static int put_rest(const struct disk *disk)
{
    int error = 0;
    bool both = false;
    for (int i = 0; i < disk->n && error == 0; i++) {
        const struct ckpt_extent *extent = &disk->extents[i];
        const struct chunk all = bulk(disk, extent);
        both |= disk->direct >= 0 && all.begin < all.end;
        error = put(disk->fd, part(extent, extent->begin, all.begin));
        if (error == 0) error = put(disk->fd, part(extent, all.end, extent->begin + extent->bytes));
    }
    if (error == 0 && both && fdatasync(disk->fd) != 0) error = errno;
    return error;
}

/* Runs the writers beside `meanwhile`. Returns errno; *rc is what meanwhile returned. */
static int run_writers(struct disk *disk, int (*meanwhile)(void *context), void *context, int *rc)
{
    pthread_t thread[WRITERS];
    int error = 0, started = 0;
    disk->writers = WRITERS;
    while (started < WRITERS && error == 0) {
        error = pthread_create(&thread[started], NULL, writer, disk);
        started += error == 0;
    }
    if (error == 0) *rc = meanwhile(context);
    for (int i = 0; i < started; i++)
        (void)pthread_join(thread[i], NULL);
    return error != 0 ? error : disk->error;
}

int ckpt_disk_write(const char *path, const struct ckpt_extent *extents, int n, int (*meanwhile)(void *context),
                    void *context)
{
    int rc = 0, error = 0;
    struct disk disk = {.fd = open(path, O_WRONLY), .direct = -1, .extents = extents, .n = n};
    if (disk.fd < 0) FAIL(ERR_SYSTEM, "%s: cannot be opened again: %s", path, strerror(errno));
    disk.direct = open(path, O_WRONLY | O_DIRECT);
    disk.page = sysconf(_SC_PAGESIZE);
    (void)pthread_mutex_init(&disk.lock, NULL);
    error = put_rest(&disk);
    if (error == 0) error = run_writers(&disk, meanwhile, context, &rc);
    (void)pthread_mutex_destroy(&disk.lock);
    if (disk.direct >= 0) (void)close(disk.direct);
    if (close(disk.fd) != 0 && error == 0) error = errno;
    if (error != 0) FAIL(ERR_SYSTEM, "%s: cannot be brought to disk: %s; " CKPT_REMEDY_DISK, path, strerror(error));
    return rc;
}
