/* What HDF5 says when a call fails, for shards and checkpoints alike. */
#ifndef TATARA_H5_H
#define TATARA_H5_H

/* Prepares HDF5 in this thread: no messages of its own, and no work at exit, which crashes after a failed close. To be
 * called before other HDF5 calls. */
void h5_start(void);
/* When the last HDF5 call of this thread failed because the system refused it (no descriptors, no locks, no rights, a full
 * disk, a server that is gone …), keeps an error that says so and returns ERR_SYSTEM; else 0, and the file's content is
 * to blame. */
int h5_refused(const char *path);
/* Keeps "<path>: <doing>: <HDF5's innermost reason>; <remedy>" as this thread's error and returns `code`; or as
 * h5_refused has it. Use CHECK_H5. */
int h5_raise(int code, const char *file, int line, const char *path, const char *doing, const char *remedy);

/* Jumps to `label` with an error when an HDF5 call returned a negative value. */
#define CHECK_H5(label, result, code, path, doing, remedy)                        \
    do {                                                                          \
        if ((result) < 0) {                                                       \
            rc = h5_raise((code), __FILE__, __LINE__, (path), (doing), (remedy)); \
            goto label;                                                           \
        }                                                                         \
    } while (0)

#endif
