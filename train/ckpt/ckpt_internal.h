/* What the files of train/ckpt share: files and their checksums, folders, the manifest in memory, pieces, HDF5 errors.
 *
 * None of these functions communicates. All of them report through err.h unless they say otherwise, and all may be
 * called from any one thread at a time: HDF5 is used by one thread of a rank only. */
#ifndef TATARA_CKPT_INTERNAL_H
#define TATARA_CKPT_INTERNAL_H

#include "ckpt.h"
#include "err.h"
#include "h5/h5.h"

#include <hdf5.h>
#include <stdio.h>

#define CKPT_MANIFEST "manifest.json"
#define CKPT_INDEX "index.h5"
#define CKPT_TOKENIZER "tokenizer.model"
#define CKPT_FILE_MAX 32
#define CKPT_DIMS_MAX 2 /* of a stored tensor */

/* ---- files (file.c) ---- */

/* One file of a checkpoint as the manifest lists it. */
struct ckpt_file {
    char name[CKPT_FILE_MAX]; /* within the folder */
    int64_t bytes;
    uint64_t xxh3; /* XXH3-64 of all its bytes */
};

/* "rank-00003.h5" */
void ckpt_file_name(char name[CKPT_FILE_MAX], int rank);
/* Joins folder and name; a path that does not fit is ERR_CONFIG. */
int ckpt_path(char path[CKPT_PATH_MAX], const char *folder, const char *name);
/* A part of a file that is to hold elements of a tensor. */
struct ckpt_extent {
    int64_t begin, bytes;
    const float *data;
    int64_t first;   /* which element of the tensor the first one is */
    int slab;        /* the writer's */
    uint64_t digest; /* computed on the way */
};
/* Fills in the extents, which do not overlap and are sorted here, of a file that has its length and all else, brings it to
 * disk, and says its size and checksum. */
int ckpt_file_seal(const char *folder, struct ckpt_file *file, struct ckpt_extent *extents, int n);
/* Compares a file's size and checksum with the manifest's: ERR_DATA naming the file and what is wrong. */
int ckpt_file_verify(const char *folder, const struct ckpt_file *file);
/* Whether the file is there with the manifest's size. Never fails. */
bool ckpt_file_present(const char *folder, const struct ckpt_file *file);
/* Reads a whole small file into *text, with a zero byte after it; the caller frees it. */
int ckpt_file_read(const char *path, char **text, size_t *bytes);
/* Writes a small file and brings it to disk. */
int ckpt_file_write(const char *path, const char *text, size_t bytes);

/* ---- to disk (disk.c) ---- */

/* Extents of so many bytes are written past the page cache. */
#define CKPT_BULK_FROM ((int64_t)1 << 20)
/* Writes the extents into a file that has its length, and brings it to disk, in threads, while `meanwhile` runs, whose
 * code is returned where all else went well. */
int ckpt_disk_write(const char *path, const struct ckpt_extent *extents, int n, int (*meanwhile)(void *context),
                    void *context);

/* ---- folders (folder.c) ---- */

/* Makes run_dir and the folders above it. */
int ckpt_folder_make(const char *run_dir);
/* Removes what earlier attempts left unfinished in run_dir. */
int ckpt_remove_leftovers(const char *run_dir);
/* Removes a folder of plain files. What cannot be removed is a warning. */
void ckpt_folder_remove(const char *folder);
/* run_dir/step-%08d */
int ckpt_step_path(char path[CKPT_PATH_MAX], const char *run_dir, int64_t step);
/* run_dir/.tmp-<what>-<step>-<owner>: removed by the next attempt if this one does not get to it. */
int ckpt_temp_path(char path[CKPT_PATH_MAX], const struct ckpt_run *run, const char *what, int64_t step);
/* The steps of all step-* folders, ascending; none when run_dir does not exist. The caller frees *steps. */
int ckpt_list_steps(const char *run_dir, int64_t **steps, int *n);
/* Whether it is `from`, or after it and a multiple of `every` (0: none). */
bool ckpt_step_counts(int64_t step, int64_t from, int64_t every);
/* Removes the complete checkpoints of steps up to `step` that `keep` does not keep; failures are warnings. */
void ckpt_retain(const struct ckpt_run *run, int64_t step, struct ckpt_keep keep);

/* ---- the manifest (manifest.c) ---- */

/* Elements [begin, end) of a tensor are in that file. */
struct ckpt_range {
    int64_t begin, end;
    int file;
};

struct ckpt_tensor {
    char name[CKPT_NAME_MAX];
    int ndim;
    int64_t shape[CKPT_DIMS_MAX];
    int n_ranges;
    struct ckpt_range *ranges; /* ascending; together the whole tensor. Owned by the manifest */
    uint64_t digest;           /* of all its elements */
};

struct ckpt_manifest {
    struct ckpt_meta meta; /* config_yaml is owned */
    char saved_at[32];     /* UTC */
    int n_ranks, n_files, n_tensors;
    struct ckpt_file *files; /* one per rank, then the index, then the tokenizer if there is one */
    struct ckpt_tensor *tensors;
};

/* Writes folder/manifest.json to disk. */
int ckpt_manifest_write(const char *folder, const struct ckpt_manifest *manifest);
/* Reads it, refusing (ERR_DATA) one whose own checksum or content is wrong. */
int ckpt_manifest_read(const char *folder, struct ckpt_manifest *manifest);
void ckpt_manifest_free(struct ckpt_manifest *manifest);
int64_t ckpt_tensor_elems(int ndim, const int64_t *shape);
/* Sorts a tensor's ranges and checks that they are the whole tensor without overlap; false when not. */
bool ckpt_ranges_tile(struct ckpt_tensor *tensor);
/* Whether the name is letters, digits and ._- in parts divided by single slashes, and fits. */
bool ckpt_name_valid(const char *name);

/* ---- digests (digest.c) ---- */

/* The part of a tensor's digest that its elements [begin, end) make up; the parts of a whole add up to it. */
uint64_t ckpt_digest(const float *data, int64_t begin, int64_t end);

/* ---- reading (load.c) ---- */

/* Verifies files first, first + stride, … of the manifest, as many at a time as there are threads: the first failure. */
int ckpt_verify_files(const char *folder, const struct ckpt_manifest *manifest, int first, int stride, int threads);
/* ckpt_load with the manifest at hand. */
int ckpt_read_slabs(const char *folder, const struct ckpt_manifest *manifest, const struct ckpt_slab *slabs, int n);

/* ---- pieces (piece.c) ---- */

/* HDF5 maps a virtual dataset fast only between selections of equal rank and shape, so a flat range of a matrix is
 * stored as up to three rectangles: part of a first row, whole rows, part of a last row. Each is contiguous in the
 * tensor too. */
#define CKPT_PIECES_MAX 3

struct ckpt_piece {
    int64_t begin, end; /* flat, in the tensor that was cut */
    hsize_t start[CKPT_DIMS_MAX], count[CKPT_DIMS_MAX];
};

/* Cuts [begin, end) of a tensor of one or two dimensions into pieces; returns how many. */
int ckpt_pieces(struct ckpt_piece piece[CKPT_PIECES_MAX], int ndim, const int64_t *shape, int64_t begin, int64_t end);

#define CKPT_DATASET_MAX (CKPT_NAME_MAX + 24)
/* The dataset of a piece in a rank's file: "name@begin". */
void ckpt_piece_name(char name[CKPT_DATASET_MAX], const char *tensor, const struct ckpt_piece *piece);

/* ---- HDF5 (h5.c) ---- */

/* Datasets of so many bytes begin at multiples of CKPT_ALIGN. */
#define CKPT_ALIGN_FROM 65536
/* How all our files are opened; negative on failure. The caller closes it. */
hid_t ckpt_h5_access(void);

/* ---- what a save writes (write.c, index.c) ---- */

/* Writes this rank's slabs into its file in `folder` and seals it; digest[i], 0 before, is that of slab i. Reads the
 * slabs only, so it can run in a thread. */
int ckpt_write_rank_file(const char *folder, int rank, const struct ckpt_slab *slabs, int n, struct ckpt_file *file,
                         uint64_t *digest);
/* Writes index.h5 for the tensors of the manifest and seals it into the manifest's entry after the ranks'. */
int ckpt_write_index(const char *folder, struct ckpt_manifest *manifest);

#define CKPT_REMEDY_DISK "free space on that disk, or lower checkpoint.keep"
#define CKPT_REMEDY_DAMAGED "use an earlier checkpoint, or restore this folder from a copy"

#endif
