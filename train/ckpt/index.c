/* index.h5: every tensor whole under its own name, as a virtual dataset over the ranks' files.
 *
 * For people and other programs (h5py, h5ls, h5dump); our own loading goes by the manifest, because HDF5 reads a missing
 * source as the fill value with success. The fill value is NaN, so that such a hole is at least seen. Sources are named
 * relative to the index: the folder can be moved. Rank 0's writer only. */
#include "ckpt_internal.h"

#include <math.h>
#include <string.h>

#define DOING "cannot be written"

/* Maps one piece of the tensor to its dataset in a rank's file. */
static int map_piece(hid_t create, hid_t whole, int ndim, const char *source, const char *dataset,
                     const struct ckpt_piece *piece)
{
    const hid_t part = H5Screate_simple(ndim, piece->count, NULL);
    const bool ok = part >= 0 &&
                    H5Sselect_hyperslab(whole, H5S_SELECT_SET, piece->start, NULL, piece->count, NULL) >= 0 &&
                    H5Pset_virtual(create, whole, source, dataset, part) >= 0;
    if (part >= 0) (void)H5Sclose(part);
    return ok ? 0 : -1;
}

static int map_tensor(hid_t create, hid_t whole, const struct ckpt_manifest *manifest,
                      const struct ckpt_tensor *tensor)
{
    for (int r = 0; r < tensor->n_ranges; r++) {
        const struct ckpt_range *range = &tensor->ranges[r];
        struct ckpt_piece piece[CKPT_PIECES_MAX];
        const int pieces = ckpt_pieces(piece, tensor->ndim, tensor->shape, range->begin, range->end);
        for (int p = 0; p < pieces; p++) {
            char dataset[CKPT_DATASET_MAX];
            ckpt_piece_name(dataset, tensor->name, &piece[p]);
            if (map_piece(create, whole, tensor->ndim, manifest->files[range->file].name, dataset, &piece[p]) < 0) {
                return -1;
            }
        }
    }
    return 0;
}

static int write_tensor(hid_t file, const char *path, const struct ckpt_manifest *manifest,
                        const struct ckpt_tensor *tensor)
{
    int rc = 0;
    const float hole = NAN;
    hsize_t shape[CKPT_DIMS_MAX] = {1, 1};
    for (int i = 0; i < tensor->ndim; i++) {
        shape[i] = (hsize_t)tensor->shape[i];
    }
    hid_t dataset = H5I_INVALID_HID;
    const hid_t whole = H5Screate_simple(tensor->ndim, shape, NULL);
    const hid_t create = H5Pcreate(H5P_DATASET_CREATE);
    const hid_t link = H5Pcreate(H5P_LINK_CREATE);
    if (whole < 0 || create < 0 || link < 0 || H5Pset_fill_value(create, H5T_NATIVE_FLOAT, &hole) < 0 ||
        H5Pset_obj_track_times(create, false) < 0 || H5Pset_create_intermediate_group(link, 1) < 0) {
        FAIL_GOTO(done, ERR_SYSTEM, "%s: HDF5 refuses our settings", path);
    }
    CHECK_H5(done, map_tensor(create, whole, manifest, tensor), ERR_SYSTEM, path, DOING, CKPT_REMEDY_DISK);
    CHECK_H5(done, H5Sselect_all(whole), ERR_SYSTEM, path, DOING, CKPT_REMEDY_DISK);
    dataset = H5Dcreate2(file, tensor->name, H5T_IEEE_F32LE, whole, link, create, H5P_DEFAULT);
    CHECK_H5(done, dataset, ERR_SYSTEM, path, DOING, CKPT_REMEDY_DISK);
done:
    if (dataset >= 0 && H5Dclose(dataset) < 0 && rc == 0) {
        rc = h5_raise(ERR_SYSTEM, __FILE__, __LINE__, path, DOING, CKPT_REMEDY_DISK);
    }
    if (link >= 0) (void)H5Pclose(link);
    if (create >= 0) (void)H5Pclose(create);
    if (whole >= 0) (void)H5Sclose(whole);
    return rc;
}

int ckpt_write_index(const char *folder, struct ckpt_manifest *manifest)
{
    int rc = 0;
    char path[CKPT_PATH_MAX];
    struct ckpt_file *entry = &manifest->files[manifest->n_ranks];
    hid_t file = H5I_INVALID_HID;
    snprintf(entry->name, sizeof entry->name, "%s", CKPT_INDEX);
    TRY(ckpt_path(path, folder, entry->name));
    h5_start();
    const hid_t access = ckpt_h5_access();
    CHECK_H5(done, access, ERR_SYSTEM, path, "cannot be created", CKPT_REMEDY_DISK);
    file = H5Fcreate(path, H5F_ACC_EXCL, H5P_DEFAULT, access);
    CHECK_H5(done, file, ERR_SYSTEM, path, "cannot be created", CKPT_REMEDY_DISK);
    for (int i = 0; i < manifest->n_tensors; i++) {
        TRY_GOTO(write_tensor(file, path, manifest, &manifest->tensors[i]), done);
    }
done:
    if (file >= 0 && H5Fclose(file) < 0 && rc == 0) {
        rc = h5_raise(ERR_SYSTEM, __FILE__, __LINE__, path, DOING, CKPT_REMEDY_DISK);
    }
    if (access >= 0) (void)H5Pclose(access);
    return rc != 0 ? rc : ckpt_file_seal(folder, entry, NULL, 0);
}
