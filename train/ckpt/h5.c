/* How our files are opened. */
#include "ckpt_internal.h"

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
