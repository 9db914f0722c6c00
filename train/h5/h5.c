/* HDF5's errors. HDF5 keeps a stack of messages a thread, which the next call clears. Messages of system calls that failed
 * have "errno = 28, error message = 'No space left on device'" in them, for nothing else tells of it. */
#include "h5/h5.h"

#include "err.h"
#include "fs.h"

#include <errno.h>
#include <hdf5.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct reason {
    char text[ERR_MESSAGE_MAX]; /* the innermost message, or what the system said */
    int error;                  /* errno of a system call that failed; 0: none did */
    bool lock;                  /* that was to lock the file */
};

/* The walk is upward: from the inside out. */
static herr_t read_message(unsigned n, const H5E_error2_t *entry, void *data)
{
    static const char number[] = "errno = ";
    struct reason *reason = data;
    const char *at = entry->desc && reason->error == 0 ? strstr(entry->desc, number) : NULL;
    if (n == 0 && entry->desc) snprintf(reason->text, sizeof reason->text, "%s", entry->desc);
    if (!at) return 0;
    reason->error = (int)strtol(at + sizeof number - 1, NULL, 10);
    reason->lock = strstr(entry->desc, "lock file") != NULL;
    if (reason->error != 0) snprintf(reason->text, sizeof reason->text, "%s", strerror(reason->error));
    return 0;
}

static struct reason last_reason(void)
{
    struct reason reason = {.text = "HDF5 gives no reason"};
    (void)H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, read_message, &reason);
    return reason;
}

/* Whether the system, not the file, is to blame: the other errors are what a damaged file's numbers lead to. */
static bool is_refusal(const struct reason *reason)
{
    return reason->error != 0 && reason->error != EINVAL && reason->error != EOVERFLOW && reason->error != EFBIG;
}

static const char *remedy_of(const struct reason *reason)
{
    return fs_remedy(reason->lock ? ENOLCK : reason->error);
}

static void leave_no_work_at_exit(void)
{
    (void)H5dont_atexit(); /* fails when another part of the program was first, which is as good */
}

void h5_start(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    (void)pthread_once(&once, leave_no_work_at_exit);
    (void)H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
}

int h5_refused(const char *path)
{
    const struct reason reason = last_reason();
    if (!is_refusal(&reason)) return 0;
    FAIL(ERR_SYSTEM, "%s: cannot be %s: %s; %s", path, reason.lock ? "locked" : "read", reason.text,
         remedy_of(&reason));
}

int h5_raise(int code, const char *file, int line, const char *path, const char *doing, const char *remedy)
{
    const struct reason reason = last_reason();
    const bool full = reason.error == ENOSPC || reason.error == EDQUOT; /* which the caller knows more of */
    if (is_refusal(&reason)) {
        code = ERR_SYSTEM;
        if (!full) remedy = remedy_of(&reason);
    }
    return err_raise(code, file, line, "%s: %s: %.300s; %s", path, doing, reason.text, remedy);
}
