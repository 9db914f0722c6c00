/* What reading and writing a shard have in common: names, types and checksums. */
#include "data/shard_format.h"

#include "err.h"

static const struct {
    const char *dataset, *checksums;
} array_names[] = {
#define X(name, dataset, checksums) {dataset, checksums},
    SHARD_ARRAY_LIST(X)
#undef X
};

static const char *const table_names[] = {
#define X(name, dataset) dataset,
    SHARD_TABLE_LIST(X)
#undef X
};

const char *shard_array_dataset(enum shard_array_kind kind)
{
    return array_names[kind].dataset;
}

const char *shard_array_checksums(enum shard_array_kind kind)
{
    return array_names[kind].checksums;
}

const char *shard_table_dataset(enum shard_table_kind kind)
{
    return table_names[kind];
}

uint64_t shard_block_checksum(const struct shard_array *array, uint64_t block)
{
    const uint64_t bytes = array->elems * array->elem_bytes, begin = block * SHARD_BLOCK_BYTES;
    const uint64_t left = bytes - begin;
    return XXH3_64bits(array->data + begin, left < SHARD_BLOCK_BYTES ? left : SHARD_BLOCK_BYTES);
}

static void add_table(XXH3_state_t *hash, const struct shard_table *table)
{
    const uint64_t shape[] = {table->rows, table->text_bytes};
    XXH3_64bits_update(hash, shape, sizeof shape);
    XXH3_64bits_update(hash, table->texts, table->rows * table->text_bytes);
}

int shard_header_checksum(const struct shard_info *info, const struct shard_array *arrays,
                          const struct shard_table *tables, uint64_t *checksum)
{
    XXH3_state_t *hash = XXH3_createState();
    if (!hash) FAIL(ERR_SYSTEM, "out of memory for a checksum");
    XXH3_64bits_reset(hash);
    XXH3_64bits_update(hash, info, offsetof(struct shard_info, bos));
    if (info->bos >= 0) XXH3_64bits_update(hash, &info->bos, sizeof info->bos);
    for (int a = 0; a < SHARD_ARRAYS; a++) {
        const uint64_t shape[] = {arrays[a].elems, arrays[a].elem_bytes, arrays[a].blocks};
        XXH3_64bits_update(hash, shape, sizeof shape);
        XXH3_64bits_update(hash, arrays[a].sums, arrays[a].blocks * sizeof *arrays[a].sums);
    }
    for (int t = 0; t < SHARD_TABLES; t++)
        add_table(hash, &tables[t]);
    *checksum = XXH3_64bits_digest(hash);
    XXH3_freeState(hash);
    return 0;
}

hid_t shard_file_access(void)
{
    const hid_t access = H5Pcreate(H5P_FILE_ACCESS);
    if (access < 0) return access;
    if (H5Pset_fclose_degree(access, H5F_CLOSE_STRONG) < 0 || H5Pset_file_locking(access, 0, 1) < 0 ||
        H5Pset_alignment(access, 0, 64) < 0 || H5Pset_libver_bounds(access, H5F_LIBVER_V18, H5F_LIBVER_V110) < 0) {
        (void)H5Pclose(access);
        return H5I_INVALID_HID;
    }
    return access;
}

hid_t shard_text_type(uint64_t text_bytes)
{
    const hid_t type = H5Tcopy(H5T_C_S1);
    if (type < 0) return type;
    if (H5Tset_size(type, text_bytes) < 0 || H5Tset_cset(type, H5T_CSET_UTF8) < 0) {
        (void)H5Tclose(type);
        return H5I_INVALID_HID;
    }
    return type;
}

hid_t shard_array_type(enum shard_array_kind kind, uint64_t elem_bytes)
{
    if (kind == SHARD_ID) return shard_text_type(elem_bytes);
    switch (elem_bytes) {
    case 2:
        return H5Tcopy(H5T_STD_U16LE);
    case 4:
        return H5Tcopy(H5T_STD_U32LE);
    default:
        return H5Tcopy(H5T_STD_U64LE);
    }
}
