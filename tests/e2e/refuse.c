/* Preloaded into tatara by test_host.py: a system that refuses. REFUSE="CALL:PART:ERRNO:SKIP" lets CALL (open, flock, or
 * fsync of a folder) fail with that errno where PART is in the path, after SKIP calls that go well. */
#define _GNU_SOURCE /* for RTLD_NEXT */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

/* NOLINTBEGIN(readability-inconsistent-declaration-parameter-name): the C library's names are reserved */

static bool refused(const char *call, const char *path)
{
    static atomic_int calls;
    char wanted[16] = "", part[256] = "";
    int at = 0;
    const char *how = getenv("REFUSE");
    if (!how || sscanf(how, "%15[^:]:%255[^:]:%n", wanted, part, &at) != 2 || at == 0) return false;
    char *end = NULL;
    const long error = strtol(how + at, &end, 10);
    if (*end != ':') return false;
    const long skip = strtol(end + 1, NULL, 10);
    if (strcmp(call, wanted) != 0 || !strstr(path, part) || atomic_fetch_add(&calls, 1) < skip) return false;
    errno = (int)error;
    return true;
}

static bool refused_fd(const char *call, int fd)
{
    char link[64], path[PATH_MAX] = "";
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    return readlink(link, path, sizeof path - 1) > 0 && refused(call, path);
}

/* The C library's function of that name, into a pointer of whatever type. */
static void find(void *function, const char *name)
{
    void *const found = dlsym(RTLD_NEXT, name);
    memcpy(function, &found, sizeof found);
}

static int open_file(const char *path, int flags, mode_t mode)
{
    int (*real)(const char *, int, ...);
    if (refused("open", path)) return -1;
    find(&real, "open");
    return real(path, flags, mode);
}

int open(const char *path, int flags, ...)
{
    va_list args;
    va_start(args, flags);
    const mode_t mode = (flags & O_CREAT) ? va_arg(args, mode_t) : 0;
    va_end(args);
    return open_file(path, flags, mode);
}

int open64(const char *path, int flags, ...)
{
    va_list args;
    va_start(args, flags);
    const mode_t mode = (flags & O_CREAT) ? va_arg(args, mode_t) : 0;
    va_end(args);
    return open_file(path, flags, mode);
}

FILE *fopen(const char *path, const char *mode)
{
    FILE *(*real)(const char *, const char *);
    if (refused("open", path)) return NULL;
    find(&real, "fopen");
    return real(path, mode);
}

int flock(int fd, int operation)
{
    int (*real)(int, int);
    if (refused_fd("flock", fd)) return -1;
    find(&real, "flock");
    return real(fd, operation);
}

int fsync(int fd)
{
    int (*real)(int);
    struct stat st;
    if (fstat(fd, &st) == 0 && S_ISDIR(st.st_mode) && refused_fd("fsync", fd)) return -1;
    find(&real, "fsync");
    return real(fd);
}

/* NOLINTEND(readability-inconsistent-declaration-parameter-name) */
