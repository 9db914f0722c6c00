/* HDF5 errors, and how our files are opened. One thread of a rank at a time. */
#include "ckpt_internal.h"

#include <string.h>

/* Keeps the innermost message of HDF5's stack: the walk is upward, from the inside out. */
static herr_t keep_first(unsigned n, const H5E_error2_t *entry, void *data)
{
    char *text = data;
    if (n == 0 && entry->desc) snprintf(text, ERR_MESSAGE_MAX, "%s", entry->desc);
    return 0;
}

/* In "file write failed: …, errno = 28, error message = 'No space left on device', …" only the quoted part is for
 * people. */
static void shorten(char *text)
{
    static const char before[] = "error message = '";
    char *from = strstr(text, before);
    if (!from) return;
    from += sizeof before - 1;
    const size_t length = strcspn(from, "'");
    memmove(text, from, length);
    text[length] = '\0';
}

void ckpt_h5_quiet(void)
{
    /* Only the first call in a process has an effect. Without it, HDF5's cleanup at exit walks into files whose
     * closing failed on a full disk, and the program ends with a segmentation fault. */
    (void)H5dont_atexit();
    (void)H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
}

hid_t ckpt_h5_access(void)
{
    const hid_t access = H5Pcreate(H5P_FILE_ACCESS);
    if (access < 0) return access;
    /* Parallel file systems without flock() refuse HDF5's locks, and our files have one writer by construction. Large
     * datasets start at a page boundary, so that they can be written past the page cache. */
    if (H5Pset_file_locking(access, false, true) < 0 || H5Pset_fclose_degree(access, H5F_CLOSE_STRONG) < 0 ||
        H5Pset_alignment(access, CKPT_ALIGN_FROM, CKPT_ALIGN) < 0) {
        (void)H5Pclose(access);
        return H5I_INVALID_HID;
    }
    return access;
}

int ckpt_h5_raise(int code, const char *file, int line, const char *path, const char *doing, const char *remedy)
{
    char reason[ERR_MESSAGE_MAX] = "HDF5 gives no reason";
    (void)H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, keep_first, reason);
    shorten(reason);
    return err_raise(code, file, line, "%s: %s: %.300s; %s", path, doing, reason, remedy);
}
