/* One rank's file: each slab as up to three contiguous datasets. HDF5 lays the file out and closes it; the data are then
 * written to where it says, straight from the caller's memory.
 *
 * Contiguous layout with early allocation, because it writes at the disk's speed and because incremental allocation with
 * fill time "never" was seen to lose data without an error. Object times are not stored: equal tensors make equal
 * files. No communication; any one thread of a rank. */
#include "ckpt_internal.h"

#include <stdlib.h>
#include <string.h>

#define DOING "cannot be written"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
               "floats are written as they lie in memory, as H5T_IEEE_F32LE");

/* What all datasets of a file are created with. */
struct writer {
    const char *path;
    hid_t file, create, link;
    struct ckpt_extent *extents; /* of the datasets made so far */
    int n;
};

static int lay_out_piece(struct writer *writer, const struct ckpt_slab *slab, int i, const struct ckpt_piece *piece)
{
    int rc = 0;
    char name[CKPT_DATASET_MAX];
    ckpt_piece_name(name, slab->name, piece);
    hid_t dataset = H5I_INVALID_HID;
    const hid_t space = H5Screate_simple(slab->ndim, piece->count, NULL);
    CHECK_H5(done, space, ERR_SYSTEM, writer->path, DOING, CKPT_REMEDY_DISK);
    dataset = H5Dcreate2(writer->file, name, H5T_IEEE_F32LE, space, writer->link, writer->create, H5P_DEFAULT);
    CHECK_H5(done, dataset, ERR_SYSTEM, writer->path, DOING, CKPT_REMEDY_DISK);
    const haddr_t offset = H5Dget_offset(dataset);
    if (offset == HADDR_UNDEF) FAIL_GOTO(done, ERR_BUG, "%s: HDF5 has no place for %s", writer->path, name);
    writer->extents[writer->n++] = (struct ckpt_extent){.begin = (int64_t)offset,
                                                        .bytes = (piece->end - piece->begin) * (int64_t)sizeof(float),
                                                        .data = slab->data + (piece->begin - slab->begin),
                                                        .first = piece->begin,
                                                        .slab = i};
done:
    if (dataset >= 0 && H5Dclose(dataset) < 0 && rc == 0) {
        rc = h5_raise(ERR_SYSTEM, __FILE__, __LINE__, writer->path, DOING, CKPT_REMEDY_DISK);
    }
    if (space >= 0) (void)H5Sclose(space);
    return rc;
}

static int lay_out(struct writer *writer, const struct ckpt_slab *slabs, int n)
{
    for (int i = 0; i < n; i++) {
        struct ckpt_piece piece[CKPT_PIECES_MAX];
        const int pieces = ckpt_pieces(piece, slabs[i].ndim, slabs[i].shape, slabs[i].begin, slabs[i].end);
        for (int p = 0; p < pieces; p++)
            TRY(lay_out_piece(writer, &slabs[i], i, &piece[p]));
    }
    return 0;
}

static int set_up(struct writer *writer)
{
    int rc = 0;
    const hid_t access = ckpt_h5_access();
    writer->create = H5Pcreate(H5P_DATASET_CREATE);
    writer->link = H5Pcreate(H5P_LINK_CREATE);
    if (access < 0 || writer->create < 0 || writer->link < 0 || H5Pset_layout(writer->create, H5D_CONTIGUOUS) < 0 ||
        H5Pset_alloc_time(writer->create, H5D_ALLOC_TIME_EARLY) < 0 ||
        H5Pset_fill_time(writer->create, H5D_FILL_TIME_NEVER) < 0 ||
        H5Pset_obj_track_times(writer->create, false) < 0 || H5Pset_create_intermediate_group(writer->link, 1) < 0) {
        FAIL_GOTO(done, ERR_SYSTEM, "%s: HDF5 refuses our settings; is its version 1.10.7 or later?", writer->path);
    }
    writer->file = H5Fcreate(writer->path, H5F_ACC_EXCL, H5P_DEFAULT, access);
    CHECK_H5(done, writer->file, ERR_SYSTEM, writer->path, "cannot be created", CKPT_REMEDY_DISK);
done:
    if (access >= 0) (void)H5Pclose(access);
    return rc;
}

int ckpt_write_rank_file(const char *folder, int rank, const struct ckpt_slab *slabs, int n, struct ckpt_file *file,
                         uint64_t *digest)
{
    int rc = 0;
    char path[CKPT_PATH_MAX];
    struct writer writer = {.path = path, .file = -1, .create = -1, .link = -1};
    memset(file, 0, sizeof *file);
    ckpt_file_name(file->name, rank);
    TRY(ckpt_path(path, folder, file->name));
    writer.extents = calloc((size_t)n * CKPT_PIECES_MAX + 1, sizeof *writer.extents);
    if (!writer.extents) FAIL(ERR_SYSTEM, "%s: no memory left to save", path);
    h5_start();
    rc = set_up(&writer);
    if (rc == 0) rc = lay_out(&writer, slabs, n);
    if (writer.file >= 0 && H5Fclose(writer.file) < 0 && rc == 0) {
        rc = h5_raise(ERR_SYSTEM, __FILE__, __LINE__, path, DOING, CKPT_REMEDY_DISK);
    }
    if (writer.create >= 0) (void)H5Pclose(writer.create);
    if (writer.link >= 0) (void)H5Pclose(writer.link);
    if (rc == 0) rc = ckpt_file_seal(folder, file, writer.extents, writer.n);
    for (int i = 0; i < writer.n; i++)
        digest[writer.extents[i].slab] += writer.extents[i].digest;
    free(writer.extents);
    return rc;
}
