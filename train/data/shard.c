/* Reading a shard: HDF5 says where the arrays lie, then the file is mapped and HDF5 is done with.
 *
 * Invariants: after shard_open every array lies wholly within the mapping, is aligned for its elements and has one
 * checksum a block; a block is compared with its checksum before anything in it is used (checked[]). */
#include "data/shard.h"

#include "data/files.h"
#include "data/shard_format.h"
#include "err.h"
#include "fs.h"
#include "h5/h5.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "shards are little-endian and mapped as they are");

struct shard {
    char *path;
    struct shard_info info;
    uint64_t stored_checksum;
    struct shard_array arrays[SHARD_ARRAYS];
    uint64_t file_offset[SHARD_ARRAYS];   /* of the array in the file */
    unsigned char *checked[SHARD_ARRAYS]; /* 1 for a block that was compared with its checksum */
    struct shard_table tables[SHARD_TABLES];
    bool offsets_checked;
    char *map;
    uint64_t map_bytes;
};

#define REMEDY "restore the file from a copy or make it again with `tatara prepare`"

/* A file of which HDF5 cannot read something is damaged, unless the system refused it. */
#define FAIL_READ_GOTO(label, path, ...)                                        \
    do {                                                                        \
        rc = h5_refused(path);                                                  \
        if (rc == 0) rc = err_raise(ERR_DATA, __FILE__, __LINE__, __VA_ARGS__); \
        goto label;                                                             \
    } while (0)

/* The dataset's only dimension. */
static int read_length(hid_t set, const char *path, const char *name, uint64_t *length)
{
    int rc = 0;
    const hid_t space = H5Dget_space(set);
    hsize_t size = 0;
    const int dims = space < 0 ? -1 : H5Sget_simple_extent_ndims(space);
    const int got = dims == 1 ? H5Sget_simple_extent_dims(space, &size, NULL) : -1;
    if (got != 1) FAIL_READ_GOTO(done, path, "%s: %s is not a list; " REMEDY, path, name);
    *length = size;
done:
    if (space >= 0) (void)H5Sclose(space);
    return rc;
}

/* A list of u64 or of texts, read by HDF5 into new memory of rows · elem_bytes. At most max_bytes. */
static int read_small(hid_t file, const char *path, const char *name, bool text, uint64_t max_bytes, void **out,
                      uint64_t *rows, uint64_t *elem_bytes)
{
    int rc = 0;
    *out = NULL;
    hid_t type = H5I_INVALID_HID;
    const hid_t set = H5Dopen2(file, name, H5P_DEFAULT);
    if (set < 0) FAIL_READ_GOTO(done, path, "%s: %s is missing; " REMEDY, path, name);
    TRY_GOTO(read_length(set, path, name, rows), done);
    type = H5Dget_type(set);
    *elem_bytes = type < 0 ? 0 : H5Tget_size(type);
    const bool right_class = text ? type >= 0 && H5Tget_class(type) == H5T_STRING && H5Tis_variable_str(type) == 0 &&
                                        *elem_bytes <= SHARD_TEXT_MAX_BYTES + 1
                                  : type >= 0 && H5Tequal(type, H5T_STD_U64LE) > 0;
    if (!right_class || *elem_bytes == 0) FAIL_GOTO(done, ERR_DATA, "%s: %s is of another type; " REMEDY, path, name);
    if (*rows > max_bytes / *elem_bytes) {
        FAIL_GOTO(done, ERR_DATA, "%s: %s has %" PRIu64 " rows, which cannot be; " REMEDY, path, name, *rows);
    }
    *out = calloc(*rows + 1, *elem_bytes);
    if (!*out) FAIL_GOTO(done, ERR_SYSTEM, "%s: out of memory for %s", path, name);
    if (*rows > 0 && H5Dread(set, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, *out) < 0) {
        FAIL_READ_GOTO(done, path, "%s: cannot read %s; " REMEDY, path, name);
    }
done:
    if (rc != 0) {
        free(*out);
        *out = NULL;
    }
    if (type >= 0) (void)H5Tclose(type);
    if (set >= 0) (void)H5Dclose(set);
    return rc;
}

static int read_count(hid_t file, const char *path, const char *name, uint64_t *value)
{
    int rc = 0;
    const hid_t attr = H5Aopen(file, name, H5P_DEFAULT);
    const hid_t space = attr < 0 ? H5I_INVALID_HID : H5Aget_space(attr);
    const bool one = space >= 0 && H5Sget_simple_extent_npoints(space) == 1;
    if (!one || H5Aread(attr, H5T_NATIVE_UINT64, value) < 0) {
        FAIL_READ_GOTO(done, path, "%s: the attribute %s is missing or damaged; " REMEDY, path, name);
    }
done:
    if (space >= 0) (void)H5Sclose(space);
    if (attr >= 0) (void)H5Aclose(attr);
    return rc;
}

/* Is this a shard at all, and one that we can read? */
static int check_format(hid_t file, const char *path)
{
    char format[32] = "";
    const htri_t exists = H5Aexists(file, "format");
    if (exists < 0) TRY(h5_refused(path));
    const hid_t attr = exists > 0 ? H5Aopen(file, "format", H5P_DEFAULT) : H5I_INVALID_HID;
    const hid_t type = attr < 0 ? H5I_INVALID_HID : H5Aget_type(attr);
    if (type >= 0 && H5Tget_class(type) == H5T_STRING && H5Tis_variable_str(type) == 0 &&
        H5Tget_size(type) < sizeof format && H5Aget_storage_size(attr) < sizeof format &&
        H5Aread(attr, type, format) < 0) {
        format[0] = '\0';
    }
    if (type >= 0) (void)H5Tclose(type);
    if (attr >= 0) (void)H5Aclose(attr);
    if (strcmp(format, SHARD_FORMAT) != 0) {
        FAIL(ERR_DATA, "%s is an HDF5 file but not a token shard; make shards with `tatara prepare`", path);
    }
    return 0;
}

static int read_info(struct shard *shard, hid_t file)
{
    TRY(check_format(file, shard->path));
#define X(name) TRY(read_count(file, shard->path, #name, &shard->info.name));
    SHARD_COUNTS(X)
#undef X
    TRY(read_count(file, shard->path, "checksum", &shard->stored_checksum));
    if (shard->info.format_version < 1 || shard->info.format_version > SHARD_FORMAT_VERSION) {
        FAIL(ERR_DATA,
             "%s has format version %" PRIu64
             ", this program reads versions up to %d; make it again with `tatara prepare`",
             shard->path, shard->info.format_version, SHARD_FORMAT_VERSION);
    }
    uint64_t bos = (uint64_t)-1;
    if (shard->info.format_version > 1) TRY(read_count(file, shard->path, "bos", &bos));
    shard->info.bos = (int64_t)bos;
    return 0;
}

static bool right_array_type(hid_t type, enum shard_array_kind kind)
{
    const size_t bytes = H5Tget_size(type);
    switch (kind) {
    case SHARD_ID:
        return H5Tget_class(type) == H5T_STRING && H5Tis_variable_str(type) == 0 && bytes >= 1 &&
               bytes <= SHARD_TEXT_MAX_BYTES + 1;
    case SHARD_TOKENS:
        return H5Tequal(type, H5T_STD_U16LE) > 0 || H5Tequal(type, H5T_STD_U32LE) > 0;
    case SHARD_OFFSET:
        return H5Tequal(type, H5T_STD_U64LE) > 0;
    default:
        return H5Tequal(type, H5T_STD_U32LE) > 0;
    }
}

static uint64_t expected_elems(const struct shard_info *info, enum shard_array_kind kind)
{
    return kind == SHARD_TOKENS ? info->tokens : kind == SHARD_OFFSET ? info->documents + 1 : info->documents;
}

/* Where an array lies in the file: its type, its length and its place, each checked against the file's size. */
static int locate_array(struct shard *shard, hid_t file, enum shard_array_kind kind)
{
    int rc = 0;
    const char *name = shard_array_dataset(kind);
    struct shard_array *array = &shard->arrays[kind];
    hid_t type = H5I_INVALID_HID;
    const hid_t set = H5Dopen2(file, name, H5P_DEFAULT);
    if (set < 0) FAIL_READ_GOTO(done, shard->path, "%s: %s is missing; " REMEDY, shard->path, name);
    TRY_GOTO(read_length(set, shard->path, name, &array->elems), done);
    type = H5Dget_type(set);
    if (type < 0 || !right_array_type(type, kind)) {
        FAIL_GOTO(done, ERR_DATA, "%s: %s is of another type; " REMEDY, shard->path, name);
    }
    array->elem_bytes = H5Tget_size(type);
    if (array->elems != expected_elems(&shard->info, kind) || array->elems == 0) {
        FAIL_GOTO(done, ERR_DATA, "%s: %s has %" PRIu64 " elements, which its header does not say; " REMEDY,
                  shard->path, name, array->elems);
    }
    const haddr_t offset = H5Dget_offset(set);
    if (offset == HADDR_UNDEF || offset % (kind == SHARD_ID ? 1 : array->elem_bytes) != 0) {
        FAIL_GOTO(done, ERR_DATA, "%s: %s cannot be mapped: it must be contiguous and aligned; " REMEDY, shard->path,
                  name);
    }
    if (offset > shard->map_bytes || array->elems > (shard->map_bytes - offset) / array->elem_bytes) {
        FAIL_GOTO(done, ERR_DATA, "%s: %s reaches past the end of the file, which is truncated; " REMEDY, shard->path,
                  name);
    }
    shard->file_offset[kind] = offset;
done:
    if (type >= 0) (void)H5Tclose(type);
    if (set >= 0) (void)H5Dclose(set);
    return rc;
}

static int read_sums(struct shard *shard, hid_t file, enum shard_array_kind kind)
{
    struct shard_array *array = &shard->arrays[kind];
    const char *name = shard_array_checksums(kind);
    void *sums = NULL;
    uint64_t elem_bytes = 0;
    TRY(read_small(file, shard->path, name, false, shard->map_bytes, &sums, &array->blocks, &elem_bytes));
    array->sums = sums;
    const uint64_t bytes = array->elems * array->elem_bytes;
    if (array->blocks != (bytes + SHARD_BLOCK_BYTES - 1) / SHARD_BLOCK_BYTES) {
        FAIL(ERR_DATA, "%s: %s has %" PRIu64 " checksums, not one a block; " REMEDY, shard->path, name,
             array->blocks);
    }
    shard->checked[kind] = calloc(array->blocks + 1, 1);
    if (!shard->checked[kind])
        FAIL(ERR_SYSTEM, "%s: out of memory for %" PRIu64 " blocks", shard->path, array->blocks);
    return 0;
}

static int read_table(struct shard *shard, hid_t file, enum shard_table_kind kind)
{
    struct shard_table *table = &shard->tables[kind];
    void *texts = NULL;
    TRY(read_small(file, shard->path, shard_table_dataset(kind), true, shard->map_bytes, &texts, &table->rows,
                   &table->text_bytes));
    table->texts = texts;
    return 0;
}

/* Everything that HDF5 has to say about the file. */
static int read_structure(struct shard *shard)
{
    int rc = 0;
    hid_t file = H5I_INVALID_HID;
    h5_start();
    const hid_t access = shard_file_access();
    if (access < 0) FAIL_GOTO(done, ERR_SYSTEM, "HDF5 does not start");
    if (H5Fis_hdf5(shard->path) <= 0) {
        FAIL_READ_GOTO(done, shard->path, "%s is not an HDF5 file or its head is damaged; " REMEDY, shard->path);
    }
    file = H5Fopen(shard->path, H5F_ACC_RDONLY, access);
    if (file < 0) {
        FAIL_READ_GOTO(done, shard->path, "%s: HDF5 cannot open it: truncated or damaged; " REMEDY, shard->path);
    }
    TRY_GOTO(read_info(shard, file), done);
    for (int a = 0; a < SHARD_ARRAYS; a++) {
        TRY_GOTO(locate_array(shard, file, (enum shard_array_kind)a), done);
        TRY_GOTO(read_sums(shard, file, (enum shard_array_kind)a), done);
    }
    for (int t = 0; t < SHARD_TABLES; t++)
        TRY_GOTO(read_table(shard, file, (enum shard_table_kind)t), done);
done:
    if (file >= 0) (void)H5Fclose(file);
    if (access >= 0) (void)H5Pclose(access);
    return rc;
}

static int check_header(const struct shard *shard)
{
    uint64_t checksum = 0;
    TRY(shard_header_checksum(&shard->info, shard->arrays, shard->tables, &checksum));
    if (checksum != shard->stored_checksum) {
        FAIL(ERR_DATA, "%s: the header is damaged (its checksum does not match); " REMEDY, shard->path);
    }
    const struct shard_info *info = &shard->info;
    if (info->vocab_size > INT32_MAX) FAIL(ERR_DATA, "%s: a vocabulary of more than 2^31", shard->path);
    if (info->eos >= info->vocab_size || info->bos >= (int64_t)info->vocab_size) {
        FAIL(ERR_DATA, "%s: BOS or EOS is not in its vocabulary of %" PRIu64 "; " REMEDY, shard->path,
             info->vocab_size);
    }
    for (int t = 0; t < SHARD_TABLES; t++) {
        const struct shard_table *table = &shard->tables[t];
        for (uint64_t row = 0; row < table->rows; row++) {
            if (table->texts[(row + 1) * table->text_bytes - 1] != '\0') {
                FAIL(ERR_DATA, "%s: a text of %s has no end; " REMEDY, shard->path,
                     shard_table_dataset((enum shard_table_kind)t));
            }
        }
    }
    return 0;
}

static int find_size(struct shard *shard, int fd)
{
    struct stat st;
    if (fd < 0 || fstat(fd, &st) != 0) {
        FAIL_FS("cannot open the shard", shard->path, ERR_DATA, "check the path in data.train or data.valid");
    }
    if (!S_ISREG(st.st_mode)) FAIL(ERR_DATA, "%s is not a file, so not a shard", shard->path);
    if (st.st_size == 0) FAIL(ERR_DATA, "%s is empty; " REMEDY, shard->path);
    TRY(file_check_fetched(shard->path));
    shard->map_bytes = (uint64_t)st.st_size;
    return 0;
}

static int map_arrays(struct shard *shard, int fd)
{
    void *map = mmap(NULL, shard->map_bytes, PROT_READ, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED) FAIL(ERR_SYSTEM, "cannot map %s into memory: %s", shard->path, strerror(errno));
    shard->map = map;
    for (int a = 0; a < SHARD_ARRAYS; a++)
        shard->arrays[a].data = shard->map + shard->file_offset[a];
    return 0;
}

int shard_open(struct shard **out, const char *path)
{
    int rc = 0, fd = -1;
    *out = NULL;
    struct shard *shard = calloc(1, sizeof *shard);
    if (!shard) FAIL_GOTO(done, ERR_SYSTEM, "out of memory");
    shard->path = strdup(path);
    if (!shard->path) FAIL_GOTO(done, ERR_SYSTEM, "out of memory");
    fd = open(path, O_RDONLY | O_CLOEXEC);
    TRY_GOTO(find_size(shard, fd), done);
    TRY_GOTO(read_structure(shard), done);
    TRY_GOTO(map_arrays(shard, fd), done);
    TRY_GOTO(check_header(shard), done);
    *out = shard;
    shard = NULL;
done:
    if (fd >= 0) (void)close(fd);
    shard_close(shard);
    return rc;
}

void shard_close(struct shard *shard)
{
    if (!shard) return;
    if (shard->map) (void)munmap(shard->map, shard->map_bytes);
    for (int a = 0; a < SHARD_ARRAYS; a++) {
        free(shard->arrays[a].sums);
        free(shard->checked[a]);
    }
    for (int t = 0; t < SHARD_TABLES; t++)
        free(shard->tables[t].texts);
    free(shard->path);
    free(shard);
}

const char *shard_path(const struct shard *shard)
{
    return shard->path;
}

const struct shard_info *shard_get_info(const struct shard *shard)
{
    return &shard->info;
}

uint64_t shard_fingerprint(const struct shard *shard)
{
    return shard->stored_checksum; /* it covers the checksums of all blocks */
}

uint64_t shard_file_bytes(const struct shard *shard)
{
    return shard->map_bytes;
}

int shard_token_bytes(const struct shard *shard)
{
    return (int)shard->arrays[SHARD_TOKENS].elem_bytes;
}

/* Compares the blocks under n elements with their checksums, those that were not compared before. */
static int check_blocks(struct shard *shard, enum shard_array_kind kind, uint64_t begin, uint64_t n)
{
    const struct shard_array *array = &shard->arrays[kind];
    ASSERT(n >= 1 && begin <= array->elems && n <= array->elems - begin);
    const uint64_t first = begin * array->elem_bytes / SHARD_BLOCK_BYTES;
    const uint64_t last = ((begin + n) * array->elem_bytes - 1) / SHARD_BLOCK_BYTES;
    for (uint64_t block = first; block <= last; block++) {
        if (shard->checked[kind][block]) continue;
        if (shard_block_checksum(array, block) != array->sums[block]) {
            FAIL(ERR_DATA,
                 "%s: block %" PRIu64 " of %s is damaged (its checksum does not match); " REMEDY
                 ", and run `tatara data show --verify` on the others",
                 shard->path, block, shard_array_dataset(kind));
        }
        shard->checked[kind][block] = 1;
    }
    return 0;
}

int shard_read(struct shard *shard, uint64_t begin, uint64_t n, int32_t *tokens)
{
    TRY(check_blocks(shard, SHARD_TOKENS, begin, n));
    const struct shard_array *array = &shard->arrays[SHARD_TOKENS];
    uint32_t largest = 0;
    const void *data = array->data;
    if (array->elem_bytes == 2) {
        const uint16_t *from = (const uint16_t *)data + begin;
        for (uint64_t i = 0; i < n; i++) {
            tokens[i] = from[i];
            largest = from[i] > largest ? from[i] : largest;
        }
    } else {
        const uint32_t *from = (const uint32_t *)data + begin;
        for (uint64_t i = 0; i < n; i++) {
            tokens[i] = (int32_t)from[i];
            largest = from[i] > largest ? from[i] : largest;
        }
    }
    if (largest >= shard->info.vocab_size) {
        FAIL(ERR_DATA,
             "%s: a token between %" PRIu64 " and %" PRIu64 " is %" PRIu32 ", but its vocabulary has %" PRIu64
             "; make it again with `tatara prepare`",
             shard->path, begin, begin + n - 1, largest, shard->info.vocab_size);
    }
    return 0;
}

int shard_offsets(struct shard *shard, const int64_t **offsets)
{
    const void *data = shard->arrays[SHARD_OFFSET].data;
    const int64_t *offset = data;
    if (!shard->offsets_checked) {
        const uint64_t documents = shard->info.documents;
        TRY(check_blocks(shard, SHARD_OFFSET, 0, documents + 1));
        bool rising = offset[0] == 0 && offset[documents] == (int64_t)shard->info.tokens;
        for (uint64_t d = 0; d < documents && rising; d++)
            rising = offset[d] < offset[d + 1];
        if (!rising)
            FAIL(ERR_DATA, "%s: the document offsets do not rise; make it again with `tatara prepare`", shard->path);
        shard->offsets_checked = true;
    }
    *offsets = offset;
    return 0;
}

/* The text of table `kind` that the document points at. */
static int get_table_text(struct shard *shard, enum shard_table_kind kind, uint64_t document, const char **text)
{
    const enum shard_array_kind rows = (enum shard_array_kind)(SHARD_SOURCE + kind);
    TRY(check_blocks(shard, rows, document, 1));
    const void *data = shard->arrays[rows].data;
    const uint32_t row = ((const uint32_t *)data)[document];
    const struct shard_table *table = &shard->tables[kind];
    if (row >= table->rows) {
        FAIL(ERR_DATA,
             "%s: document %" PRIu64 " points at row %" PRIu32 " of %s, which has %" PRIu64
             "; make it again with `tatara prepare`",
             shard->path, document, row, shard_table_dataset(kind), table->rows);
    }
    *text = table->texts + row * table->text_bytes;
    return 0;
}

int shard_get_label(struct shard *shard, uint64_t document, struct shard_label *label)
{
    const struct shard_array *ids = &shard->arrays[SHARD_ID];
    TRY(check_blocks(shard, SHARD_ID, document, 1));
    label->id = ids->data + document * ids->elem_bytes;
    if (label->id[ids->elem_bytes - 1] != '\0') {
        FAIL(ERR_DATA, "%s: the id of document %" PRIu64 " has no end; make it again with `tatara prepare`",
             shard->path, document);
    }
    TRY(get_table_text(shard, SHARD_SOURCES, document, &label->source));
    TRY(get_table_text(shard, SHARD_LICENCES, document, &label->licence));
    TRY(get_table_text(shard, SHARD_LANGUAGES, document, &label->language));
    return 0;
}

int shard_verify(struct shard *shard)
{
    int32_t tokens[4096];
    const uint64_t step = sizeof tokens / sizeof *tokens;
    for (uint64_t begin = 0; begin < shard->info.tokens; begin += step) {
        const uint64_t left = shard->info.tokens - begin;
        TRY(shard_read(shard, begin, left < step ? left : step, tokens));
    }
    const int64_t *offsets = NULL;
    TRY(shard_offsets(shard, &offsets));
    for (uint64_t d = 0; d < shard->info.documents; d++) {
        struct shard_label label;
        TRY(shard_get_label(shard, d, &label));
    }
    return 0;
}
