/* The layout of a shard's file, known to shard.c and shard_write.c only. */
#ifndef TATARA_SHARD_FORMAT_H
#define TATARA_SHARD_FORMAT_H

#include "data/shard.h"

#include <hdf5.h>
#include <xxhash.h>

#define SHARD_FORMAT "tatara-shard"
#define SHARD_FORMAT_VERSION 2 /* of a shard with BOS; without it 1, which is the same otherwise */
#define SHARD_BLOCK_BYTES ((uint64_t)1 << 20)

/* The mapped arrays: name, dataset, dataset of its checksums. */
#define SHARD_ARRAY_LIST(X)                                      \
    X(SHARD_TOKENS, "/tokens", "/checksums/tokens")              \
    X(SHARD_OFFSET, "/documents/offset", "/checksums/offset")    \
    X(SHARD_ID, "/documents/id", "/checksums/id")                \
    X(SHARD_SOURCE, "/documents/source", "/checksums/source")    \
    X(SHARD_LICENCE, "/documents/licence", "/checksums/licence") \
    X(SHARD_LANGUAGE, "/documents/language", "/checksums/language")

enum shard_array_kind {
#define X(name, dataset, checksums) name,
    SHARD_ARRAY_LIST(X)
#undef X
        SHARD_ARRAYS
};

/* The tables of texts; table t belongs to the array SHARD_SOURCE + t. */
#define SHARD_TABLE_LIST(X)        \
    X(SHARD_SOURCES, "/sources")   \
    X(SHARD_LICENCES, "/licences") \
    X(SHARD_LANGUAGES, "/languages")

enum shard_table_kind {
#define X(name, dataset) name,
    SHARD_TABLE_LIST(X)
#undef X
        SHARD_TABLES
};

/* An array of the file: in the mapping (reading) or in a buffer (writing). */
struct shard_array {
    const char *data;
    uint64_t elems, elem_bytes;
    uint64_t blocks;
    uint64_t *sums; /* one a block */
};

/* Texts of text_bytes each, NUL-terminated and NUL-padded. */
struct shard_table {
    char *texts;
    uint64_t rows, text_bytes;
};

/* What the attribute `checksum` must be. */
int shard_header_checksum(const struct shard_info *info, const struct shard_array *arrays,
                          const struct shard_table *tables, uint64_t *checksum);
/* XXH3 of block b of the array. */
uint64_t shard_block_checksum(const struct shard_array *array, uint64_t block);
const char *shard_array_dataset(enum shard_array_kind kind);
const char *shard_array_checksums(enum shard_array_kind kind);
const char *shard_table_dataset(enum shard_table_kind kind);
/* Properties to open or create a shard with: closing the file closes all; no locks, which not every cluster's file
 * system has and a file that never changes does not need; every object at a 64-byte boundary; the structures of HDF5
 * 1.8, which carry checksums of their own. Negative on failure. */
hid_t shard_file_access(void);
/* The file's type of an element, or -1. Text when kind is SHARD_ID. The caller closes it. */
hid_t shard_array_type(enum shard_array_kind kind, uint64_t elem_bytes);
hid_t shard_text_type(uint64_t text_bytes);

#endif
