/* Extents to disk: whole files compared byte by byte, with memory and file offsets of every alignment, on file systems that
 * take O_DIRECT, that refuse it at once or only when it is used, that write less than they were asked to, and that fail. */
#define _GNU_SOURCE
#include "ckpt/ckpt_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

enum { EXTENTS = 9 };

/* The largest are of several chunks. */
static const int64_t elems[EXTENTS] = {1, 1023, 262143, 262144, 262145, 7 << 20, 0, 2 * (2 << 20) + 1, 300001};

/* What the file system does. */
static bool refuses_open, refuses_write;
static size_t most = SIZE_MAX; /* bytes that one write takes */
static atomic_int fails_after; /* so many writes; below zero: never */
static bool fails_fsync;
static atomic_int direct_fd;
static atomic_long direct_bytes;

int __real_open(const char *path, int flags, ...);
ssize_t __real_pwrite(int fd, const void *data, size_t bytes, off_t at);
int __real_fsync(int fd);
int __wrap_open(const char *path, int flags, ...);
ssize_t __wrap_pwrite(int fd, const void *data, size_t bytes, off_t at);
int __wrap_fsync(int fd);

static int refuse(int error)
{
    errno = error;
    return -1;
}

int __wrap_open(const char *path, int flags, ...)
{
    if ((flags & O_DIRECT) == 0) return __real_open(path, flags, 0600);
    const int fd = refuses_open ? refuse(EINVAL) : __real_open(path, flags);
    atomic_store(&direct_fd, fd);
    return fd;
}

ssize_t __wrap_pwrite(int fd, const void *data, size_t bytes, off_t at)
{
    const bool direct = fd == atomic_load(&direct_fd);
    if (direct && refuses_write) return refuse(EINVAL);
    if (atomic_fetch_sub(&fails_after, 1) == 0) return refuse(ENOSPC);
    const ssize_t written = __real_pwrite(fd, data, bytes < most ? bytes : most, at);
    if (direct && written > 0) atomic_fetch_add(&direct_bytes, written);
    return written;
}

int __wrap_fsync(int fd)
{
    return fails_fsync ? refuse(EIO) : __real_fsync(fd);
}

/* ---- a file ---- */

struct file {
    char folder[32], path[64];
    struct ckpt_file entry;
    struct ckpt_extent extents[EXTENTS];
    float *data; /* of all extents, one after the other, `shift` elements after a page's beginning */
    char *wanted;
    int64_t bytes;
};

static float *allocate(int64_t bytes)
{
    void *data = NULL;
    assert_int_equal(posix_memalign(&data, CKPT_ALIGN, (size_t)bytes), 0);
    return data;
}

/* A file as HDF5 leaves it: its gaps have been written, its data have not. Extents are not in their order. */
static void file_open(struct file *f, int shift)
{
    uint64_t random = (uint64_t)shift + 1;
    int64_t at = 0, used = shift;
    *f = (struct file){.folder = "/tmp/tatara-disk-XXXXXX", .entry = {.name = "rank-00000.h5"}};
    assert_non_null(mkdtemp(f->folder));
    snprintf(f->path, sizeof f->path, "%s/%s", f->folder, f->entry.name);
    for (int i = 0; i < EXTENTS; i++)
        f->bytes += elems[i] * (int64_t)sizeof(float) + 2 * (int64_t)CKPT_ALIGN;
    f->data = allocate(f->bytes);
    f->wanted = (char *)allocate(f->bytes);
    memset(f->wanted, 0x5a, (size_t)f->bytes);
    for (int64_t i = 0; i < f->bytes / (int64_t)sizeof random; i++) {
        random = random * 6364136223846793005u + 1442695040888963407u;
        memcpy((char *)f->data + i * (int64_t)sizeof random, &random, sizeof random);
    }
    for (int i = 0; i < EXTENTS; i++) {
        const int64_t bytes = elems[i] * (int64_t)sizeof(float);
        at += 40 + i;
        if (i % 3 != 1) at = (at + CKPT_ALIGN - 1) / CKPT_ALIGN * CKPT_ALIGN; /* HDF5 aligns what is large */
        f->extents[(i + 4) % EXTENTS] =
            (struct ckpt_extent){.begin = at, .bytes = bytes, .data = f->data + used, .first = 3, .slab = i};
        memcpy(f->wanted + at, f->data + used, (size_t)bytes);
        at += bytes;
        used += elems[i];
    }
    f->bytes = at + 7;
    const int fd = __real_open(f->path, O_RDWR | O_CREAT | O_EXCL, 0600);
    assert_true(fd >= 0);
    assert_int_equal(ftruncate(fd, f->bytes), 0);
    int64_t gap = 0;
    for (int i = 0; i <= EXTENTS; i++) {
        const struct ckpt_extent *e = &f->extents[(i + 4) % EXTENTS];
        const int64_t end = i < EXTENTS ? e->begin : f->bytes;
        assert_int_equal(__real_pwrite(fd, f->wanted + gap, (size_t)(end - gap), gap), end - gap);
        gap = e->begin + e->bytes;
    }
    assert_int_equal(close(fd), 0);
}

static void file_close(struct file *f)
{
    free(f->data);
    free(f->wanted);
    assert_int_equal(unlink(f->path), 0);
    assert_int_equal(rmdir(f->folder), 0);
}

static int seal(struct file *f)
{
    return ckpt_file_seal(f->folder, &f->entry, f->extents, EXTENTS);
}

static void check(const struct file *f)
{
    char *found = (char *)allocate(f->bytes);
    const int fd = __real_open(f->path, O_RDONLY);
    assert_true(fd >= 0);
    for (int64_t at = 0; at < f->bytes;) {
        const ssize_t got = pread(fd, found + at, (size_t)(f->bytes - at), at);
        assert_true(got > 0);
        at += got;
    }
    assert_int_equal(close(fd), 0);
    assert_memory_equal(found, f->wanted, (size_t)f->bytes);
    free(found);
    assert_int_equal(f->entry.bytes, f->bytes);
    assert_int_equal(ckpt_file_verify(f->folder, &f->entry), 0);
    for (int i = 0; i < EXTENTS; i++) {
        const struct ckpt_extent *e = &f->extents[i];
        assert_true(e->digest == ckpt_digest(e->data, 3, 3 + elems[e->slab]));
    }
}

/* Seals a file and compares it; returns how many bytes went past the page cache. */
static int64_t round_trip(int shift)
{
    struct file f;
    file_open(&f, shift);
    atomic_store(&fails_after, -1);
    atomic_store(&direct_bytes, 0);
    assert_int_equal(seal(&f), 0);
    check(&f);
    file_close(&f);
    return atomic_load(&direct_bytes);
}

/* The bytes that may: whole pages of large extents. */
static int64_t bulk_bytes(void)
{
    int64_t bytes = 0;
    for (int i = 0; i < EXTENTS; i++)
        if (elems[i] * 4 >= CKPT_BULK_FROM) bytes += elems[i] * 4 - 2 * sysconf(_SC_PAGESIZE);
    return bytes;
}

static bool takes_direct(void)
{
    char path[] = "/tmp/tatara-disk-XXXXXX";
    const int fd = mkstemp(path), direct = __real_open(path, O_WRONLY | O_DIRECT);
    assert_true(fd >= 0);
    assert_int_equal(unlink(path), 0);
    assert_int_equal(close(fd), 0);
    return direct >= 0 && close(direct) == 0;
}

static void test_contents(void **state)
{
    (void)state;
    for (int shift = 0; shift < 1024; shift += 341)
        assert_true(round_trip(shift) >= bulk_bytes() || !takes_direct());
}

static void test_without_direct(void **state)
{
    (void)state;
    refuses_open = true;
    assert_int_equal(round_trip(0), 0);
    refuses_open = false;
    refuses_write = true;
    assert_int_equal(round_trip(5), 0);
    refuses_write = false;
}

static void test_short_writes(void **state)
{
    (void)state;
    most = 1000001;
    (void)round_trip(0);
    most = (size_t)1 << 20;
    (void)round_trip(1);
    most = SIZE_MAX;
}

static void expect_failure(const char *reason)
{
    struct file f;
    file_open(&f, 2);
    assert_int_equal(seal(&f), ERR_SYSTEM);
    assert_non_null(strstr(err_message(), f.path));
    assert_non_null(strstr(err_message(), reason));
    assert_non_null(strstr(err_message(), "free space on that disk"));
    file_close(&f);
}

/* Wherever a write fails, in the small parts or in the bulk. */
static void test_failures(void **state)
{
    (void)state;
    for (int writes = 0; writes < 16; writes += 3) {
        atomic_store(&fails_after, writes);
        expect_failure("No space left on device");
    }
    atomic_store(&fails_after, -1);
    fails_fsync = true;
    expect_failure("Input/output error");
    fails_fsync = false;
}

/* A file shorter than its data must not count, though every write succeeds. */
static void test_short_file(void **state)
{
    (void)state;
    struct file f;
    file_open(&f, 0);
    struct ckpt_extent beyond = {.begin = f.bytes + CKPT_ALIGN, .bytes = 0, .data = f.data};
    assert_int_equal(ckpt_file_seal(f.folder, &f.entry, &beyond, 1), ERR_SYSTEM);
    assert_non_null(strstr(err_message(), "after writing"));
    file_close(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_contents), cmocka_unit_test(test_without_direct), cmocka_unit_test(test_short_writes),
        cmocka_unit_test(test_failures), cmocka_unit_test(test_short_file),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
