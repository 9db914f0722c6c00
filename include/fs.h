/* Files that the system refuses to open, and folders brought to disk. */
#ifndef TATARA_FS_H
#define TATARA_FS_H

/* Keeps the error "<doing> <path>: <the system's reason>; <what helps>" and returns its code, for a call on `path` that
 * failed with `error`, an errno. A path that leads to nothing of the kind is `absent` (such as ERR_DATA), and `remedy`,
 * which may be NULL, helps; everything else is ERR_SYSTEM: the file itself may be as it should. A relative path is printed
 * whole. Use FAIL_FS. */
int fs_raise(const char *file, int line, const char *doing, const char *path, int error, int absent,
             const char *remedy);
/* What helps against an errno that is not about the path. */
const char *fs_remedy(int error);

#define FAIL_FS(doing, path, absent, remedy) \
    return fs_raise(__FILE__, __LINE__, (doing), (path), errno, (absent), (remedy))
#define FAIL_FS_GOTO(label, doing, path, absent, remedy)                               \
    do {                                                                               \
        rc = fs_raise(__FILE__, __LINE__, (doing), (path), errno, (absent), (remedy)); \
        goto label;                                                                    \
    } while (0)

/* Brings a folder's entries to disk. A file system that has no such operation (CIFS before Linux 4.17, some FUSE and Ceph
 * mounts) is warned of once in a process. */
int fs_sync_folder(const char *folder);

#endif
