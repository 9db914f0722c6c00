/* Files that the system refuses to open, and folders brought to disk. Any thread. */
#include "fs.h"

#include "err.h"
#include "log.h"
#include "path.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

/* Whether the path is wrong, rather than its file out of reach. */
static bool is_absent(int error)
{
    return error == ENOENT || error == ENOTDIR || error == EISDIR || error == ELOOP || error == ENAMETOOLONG;
}

const char *fs_remedy(int error)
{
    switch (error) {
    case EMFILE:
        return "raise the limit of open files (ulimit -n)";
    case ENFILE:
        return "too many files are open on this machine: raise fs.file-max, or end what has them open";
    case ENOLCK:
        return "unset HDF5_USE_FILE_LOCKING, if it is set";
    case EACCES:
    case EPERM:
        return "give this user the rights to it and to the folders above it";
    case ENOSPC:
        return "free space on that disk";
    case EDQUOT:
        return "free space within the quota, or have it raised";
    case EROFS:
        return "its file system is mounted read-only: choose another place, or mount it anew";
    case ENOMEM:
        return "the machine is out of memory";
    default:
        return "look after the file system, its disk or its server, and try again";
    }
}

int fs_raise(const char *file, int line, const char *doing, const char *path, int error, int absent,
             const char *remedy)
{
    char whole[PATH_WHOLE_MAX];
    const bool wrong_path = is_absent(error);
    if (!wrong_path) remedy = fs_remedy(error);
    return err_raise(wrong_path ? absent : ERR_SYSTEM, file, line, "%s %s: %s%s%s", doing, path_whole(whole, path),
                     strerror(error), remedy ? "; " : "", remedy ? remedy : "");
}

int fs_sync_folder(const char *folder)
{
    static atomic_flag warned = ATOMIC_FLAG_INIT;
    const int fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) FAIL_FS("cannot open the folder", folder, ERR_SYSTEM, NULL);
    const int error = fsync(fd) == 0 ? 0 : errno;
    (void)close(fd);
    if (error == 0) return 0;
    errno = error;
    if (error != EINVAL && error != ENOTSUP) FAIL_FS("cannot bring to disk the folder", folder, ERR_SYSTEM, NULL);
    if (!atomic_flag_test_and_set(&warned)) {
        log_warn(
            "%s: its file system cannot bring a folder to disk (fsync: %s): after a power failure the newest files "
            "may be gone",
            folder, strerror(error));
    }
    return 0;
}
