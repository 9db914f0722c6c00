/* Making a shard: documents are gathered in memory, then written as one HDF5 file.
 *
 * Invariant: a file under its final name is whole. HDF5 can report success for a file that it did not write (a full disk
 * may show only at closing, and not always there), so the finished file is synced, opened and verified before the
 * rename. Objects carry no times, so that equal documents make equal files. */
#include "data/shard.h"

#include "data/buffer.h"
#include "data/files.h"
#include "data/shard_format.h"
#include "err.h"
#include "fs.h"
#include "h5/h5.h"

#include <errno.h>
#include <inttypes.h>
#include <jansson.h>
#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <unistd.h>

/* Space for HDF5's own structures, for the check whether the disk has room. */
#define STRUCTURE_BYTES ((uint64_t)256 * 1024)

/* A table while it grows: its texts one after the other, each with its NUL, and the row of each. */
struct names {
    json_t *rows; /* text -> row */
    struct buffer texts;
    uint64_t longest;
};

struct shard_builder {
    struct shard_info info;
    struct buffer tokens, offsets, ids; /* ids: NUL-terminated, one after the other */
    struct buffer rows[SHARD_TABLES];
    struct names names[SHARD_TABLES];
    uint64_t longest_id;
};

/* What is written: the arrays and tables as they will lie in the file. */
struct image {
    struct shard_array arrays[SHARD_ARRAYS];
    struct shard_table tables[SHARD_TABLES];
    char *ids;
    uint64_t checksum, bytes;
};

int shard_builder_open(struct shard_builder **out, uint64_t vocab_size, int64_t bos, uint64_t eos,
                       uint64_t tokenizer_id)
{
    struct shard_builder *builder = calloc(1, sizeof *builder);
    *out = builder;
    if (!builder) FAIL(ERR_SYSTEM, "out of memory");
    builder->info = (struct shard_info){.format_version = bos >= 0 ? SHARD_FORMAT_VERSION : 1,
                                        .vocab_size = vocab_size,
                                        .bos = bos,
                                        .eos = eos,
                                        .tokenizer_id = tokenizer_id};
    return 0;
}

static void forget_documents(struct shard_builder *builder)
{
    buffer_free(&builder->tokens);
    buffer_free(&builder->offsets);
    buffer_free(&builder->ids);
    for (int t = 0; t < SHARD_TABLES; t++) {
        buffer_free(&builder->rows[t]);
        buffer_free(&builder->names[t].texts);
        json_decref(builder->names[t].rows);
        builder->names[t].rows = NULL;
        builder->names[t].longest = 0;
    }
    builder->info.tokens = builder->info.documents = builder->info.text_bytes = 0;
    builder->longest_id = 0;
}

void shard_builder_close(struct shard_builder *builder)
{
    if (!builder) return;
    forget_documents(builder);
    free(builder);
}

uint64_t shard_builder_tokens(const struct shard_builder *builder)
{
    return builder->info.tokens;
}

/* The text, cut at a character's boundary with a hash of the whole at its end when it is too long. Returns its bytes. */
static size_t fit_text(const char *text, char fitted[SHARD_TEXT_MAX_BYTES + 1])
{
    const size_t bytes = strlen(text);
    size_t kept = bytes;
    if (bytes > SHARD_TEXT_MAX_BYTES) {
        kept = SHARD_TEXT_MAX_BYTES - 17;
        while (kept > 0 && ((unsigned char)text[kept] & 0xC0U) == 0x80U)
            kept--;
    }
    memcpy(fitted, text, kept);
    fitted[kept] = '\0';
    if (kept < bytes) (void)snprintf(fitted + kept, 18, "#%016" PRIx64, (uint64_t)XXH3_64bits(text, bytes));
    return strlen(fitted);
}

/* The row of `text` in the table, a new one when it is new. */
static int find_row(struct names *names, const char *text, uint32_t *row)
{
    char fitted[SHARD_TEXT_MAX_BYTES + 1];
    const size_t bytes = fit_text(text, fitted);
    if (!names->rows) names->rows = json_object();
    const json_t *known = json_object_get(names->rows, fitted);
    if (known) {
        *row = (uint32_t)json_integer_value(known);
        return 0;
    }
    *row = (uint32_t)json_object_size(names->rows);
    if (json_object_set_new(names->rows, fitted, json_integer(*row)) != 0) {
        FAIL(ERR_DATA, "cannot keep the name %s: it is not UTF-8, or memory is out", fitted);
    }
    if (bytes > names->longest) names->longest = bytes;
    return buffer_add(&names->texts, fitted, bytes + 1);
}

static int add_tokens(struct shard_builder *builder, const int32_t *tokens, uint64_t n)
{
    const size_t token_bytes = builder->info.vocab_size <= 65536 ? 2 : 4;
    TRY(buffer_reserve(&builder->tokens, n * token_bytes));
    char *to = builder->tokens.data + builder->tokens.used;
    for (uint64_t i = 0; i < n; i++) {
        const uint32_t token = (uint32_t)tokens[i];
        ASSERT(token < builder->info.vocab_size);
        memcpy(to + i * token_bytes, &token, token_bytes); /* little-endian: the low bytes come first */
    }
    builder->tokens.used += n * token_bytes;
    return 0;
}

int shard_builder_add(struct shard_builder *builder, const int32_t *tokens, uint64_t n, uint64_t text_bytes,
                      const struct shard_label *label)
{
    ASSERT(n >= 1);
    const char *const texts[SHARD_TABLES] = {label->source, label->licence, label->language};
    for (int t = 0; t < SHARD_TABLES; t++) {
        uint32_t row = 0;
        TRY(find_row(&builder->names[t], texts[t], &row));
        TRY(buffer_add(&builder->rows[t], &row, sizeof row));
    }
    char id[SHARD_TEXT_MAX_BYTES + 1];
    const size_t id_bytes = fit_text(label->id, id);
    if (id_bytes > builder->longest_id) builder->longest_id = id_bytes;
    TRY(buffer_add(&builder->ids, id, id_bytes + 1));
    TRY(buffer_add(&builder->offsets, &builder->info.tokens, sizeof builder->info.tokens));
    TRY(add_tokens(builder, tokens, n));
    builder->info.tokens += n;
    builder->info.documents++;
    builder->info.text_bytes += text_bytes;
    return 0;
}

/* Spreads texts that lie one after the other into fields of equal size. The caller frees *fields. */
static int spread_texts(const struct buffer *texts, uint64_t rows, uint64_t text_bytes, char **fields)
{
    *fields = calloc(rows, text_bytes);
    if (!*fields) FAIL(ERR_SYSTEM, "out of memory for %" PRIu64 " names", rows);
    const char *text = texts->data;
    for (uint64_t row = 0; row < rows; row++) {
        const size_t bytes = strlen(text) + 1;
        memcpy(*fields + row * text_bytes, text, bytes);
        text += bytes;
    }
    return 0;
}

static void set_array(struct image *image, enum shard_array_kind kind, const char *data, uint64_t elems,
                      uint64_t elem_bytes)
{
    image->arrays[kind] =
        (struct shard_array){.data = data,
                             .elems = elems,
                             .elem_bytes = elem_bytes,
                             .blocks = (elems * elem_bytes + SHARD_BLOCK_BYTES - 1) / SHARD_BLOCK_BYTES,
                             .sums = NULL};
    image->bytes += elems * elem_bytes;
}

static int make_sums(struct shard_array *array)
{
    array->sums = calloc(array->blocks, sizeof *array->sums);
    if (!array->sums) FAIL(ERR_SYSTEM, "out of memory for %" PRIu64 " checksums", array->blocks);
    for (uint64_t block = 0; block < array->blocks; block++)
        array->sums[block] = shard_block_checksum(array, block);
    return 0;
}

static int make_image(struct shard_builder *builder, struct image *image)
{
    const struct shard_info *info = &builder->info;
    TRY(buffer_add(&builder->offsets, &info->tokens, sizeof info->tokens));
    TRY(spread_texts(&builder->ids, info->documents, builder->longest_id + 1, &image->ids));
    set_array(image, SHARD_TOKENS, builder->tokens.data, info->tokens, info->vocab_size <= 65536 ? 2 : 4);
    set_array(image, SHARD_OFFSET, builder->offsets.data, info->documents + 1, sizeof(uint64_t));
    set_array(image, SHARD_ID, image->ids, info->documents, builder->longest_id + 1);
    for (int t = 0; t < SHARD_TABLES; t++) {
        const struct names *names = &builder->names[t];
        struct shard_table *table = &image->tables[t];
        set_array(image, (enum shard_array_kind)(SHARD_SOURCE + t), builder->rows[t].data, info->documents,
                  sizeof(uint32_t));
        table->rows = json_object_size(names->rows);
        table->text_bytes = names->longest + 1;
        TRY(spread_texts(&names->texts, table->rows, table->text_bytes, &table->texts));
    }
    for (int a = 0; a < SHARD_ARRAYS; a++)
        TRY(make_sums(&image->arrays[a]));
    return shard_header_checksum(info, image->arrays, image->tables, &image->checksum);
}

static void free_image(struct image *image)
{
    free(image->ids);
    for (int a = 0; a < SHARD_ARRAYS; a++)
        free(image->arrays[a].sums);
    for (int t = 0; t < SHARD_TABLES; t++)
        free(image->tables[t].texts);
}

/* One contiguous dataset, its space taken at once. `type` is closed. Negative on failure. */
static herr_t write_list(hid_t file, const char *name, hid_t type, uint64_t rows, const void *data)
{
    herr_t status = -1;
    const hsize_t size = rows;
    const hid_t space = H5Screate_simple(1, &size, NULL);
    const hid_t create = H5Pcreate(H5P_DATASET_CREATE);
    if (type >= 0 && space >= 0 && create >= 0 && H5Pset_obj_track_times(create, 0) >= 0 &&
        H5Pset_layout(create, H5D_CONTIGUOUS) >= 0 && H5Pset_alloc_time(create, H5D_ALLOC_TIME_EARLY) >= 0 &&
        H5Pset_fill_time(create, H5D_FILL_TIME_NEVER) >= 0) {
        const hid_t set = H5Dcreate2(file, name, type, space, H5P_DEFAULT, create, H5P_DEFAULT);
        if (set >= 0) {
            status = H5Dwrite(set, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, data);
            if (H5Dclose(set) < 0) status = -1;
        }
    }
    if (create >= 0) (void)H5Pclose(create);
    if (space >= 0) (void)H5Sclose(space);
    if (type >= 0) (void)H5Tclose(type);
    return status;
}

/* `type` is closed. */
static herr_t write_attribute(hid_t file, const char *name, hid_t type, const void *value)
{
    herr_t status = -1;
    const hid_t space = H5Screate(H5S_SCALAR);
    const hid_t attr =
        type < 0 || space < 0 ? H5I_INVALID_HID : H5Acreate2(file, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
    if (attr >= 0) {
        status = H5Awrite(attr, type, value);
        if (H5Aclose(attr) < 0) status = -1;
    }
    if (space >= 0) (void)H5Sclose(space);
    if (type >= 0) (void)H5Tclose(type);
    return status;
}

/* The groups, and like all objects here without times. Negative on failure. */
static herr_t make_groups(hid_t file)
{
    static const char *const names[] = {"/documents", "/checksums"};
    herr_t status = -1;
    const hid_t create = H5Pcreate(H5P_GROUP_CREATE);
    if (create < 0) return -1;
    if (H5Pset_obj_track_times(create, 0) >= 0) status = 0;
    for (int i = 0; i < 2 && status >= 0; i++) {
        const hid_t group = H5Gcreate2(file, names[i], H5P_DEFAULT, create, H5P_DEFAULT);
        status = group < 0 ? -1 : H5Gclose(group);
    }
    (void)H5Pclose(create);
    return status;
}

static herr_t write_image(hid_t file, const struct shard_info *info, const struct image *image)
{
    herr_t status = make_groups(file);
    if (status >= 0) status = write_attribute(file, "format", shard_text_type(sizeof SHARD_FORMAT), SHARD_FORMAT);
#define X(name) \
    if (status >= 0) status = write_attribute(file, #name, H5Tcopy(H5T_STD_U64LE), &info->name);
    SHARD_COUNTS(X)
#undef X
    if (status >= 0 && info->bos >= 0) status = write_attribute(file, "bos", H5Tcopy(H5T_STD_U64LE), &info->bos);
    if (status >= 0) status = write_attribute(file, "checksum", H5Tcopy(H5T_STD_U64LE), &image->checksum);
    for (int a = 0; a < SHARD_ARRAYS && status >= 0; a++) {
        const enum shard_array_kind kind = (enum shard_array_kind)a;
        const struct shard_array *array = &image->arrays[a];
        status = write_list(file, shard_array_dataset(kind), shard_array_type(kind, array->elem_bytes), array->elems,
                            array->data);
        if (status >= 0) {
            status =
                write_list(file, shard_array_checksums(kind), H5Tcopy(H5T_STD_U64LE), array->blocks, array->sums);
        }
    }
    for (int t = 0; t < SHARD_TABLES && status >= 0; t++) {
        const struct shard_table *table = &image->tables[t];
        status = write_list(file, shard_table_dataset((enum shard_table_kind)t), shard_text_type(table->text_bytes),
                            table->rows, table->texts);
    }
    return status;
}

static int check_space(const char *folder, uint64_t bytes)
{
    struct statvfs fs;
    if (statvfs(folder, &fs) != 0) FAIL_FS("cannot write to", folder, ERR_SYSTEM, NULL);
    const uint64_t free_bytes = (uint64_t)fs.f_bavail * fs.f_frsize;
    if (free_bytes < bytes + STRUCTURE_BYTES) {
        FAIL(ERR_SYSTEM,
             "the disk of %s is full: a shard needs %" PRIu64 " MiB, %" PRIu64 " MiB are free; make room there",
             folder, (bytes + STRUCTURE_BYTES) >> 20, free_bytes >> 20);
    }
    return 0;
}

static int write_file(const struct shard_info *info, const struct image *image, const char *path)
{
    h5_start();
    errno = 0;
    const hid_t access = shard_file_access(), create = H5Pcreate(H5P_FILE_CREATE);
    hid_t file = H5I_INVALID_HID;
    if (access >= 0 && create >= 0 && H5Pset_obj_track_times(create, 0) >= 0) {
        file = H5Fcreate(path, H5F_ACC_TRUNC, create, access);
    }
    herr_t status = file < 0 ? -1 : write_image(file, info, image);
    int reason = errno;
    if (file >= 0 && H5Fclose(file) < 0) {
        status = -1;
        reason = errno;
    }
    if (access >= 0) (void)H5Pclose(access);
    if (create >= 0) (void)H5Pclose(create);
    if (status >= 0) return 0;
    if (reason == 0) FAIL(ERR_SYSTEM, "cannot write the shard %s: HDF5 failed; choose another folder", path);
    return fs_raise(__FILE__, __LINE__, "cannot write the shard", path, reason, ERR_SYSTEM, "choose another folder");
}

/* Opens what was written and compares it all. */
static int verify_file(const char *path)
{
    struct shard *shard = NULL;
    TRY(shard_open(&shard, path));
    const int rc = shard_verify(shard);
    shard_close(shard);
    return rc;
}

static int write_whole(const struct shard_builder *builder, const struct image *image, const char *path,
                       const char *temporary, const char *folder)
{
    TRY(check_space(folder, image->bytes));
    TRY(write_file(&builder->info, image, temporary));
    TRY(file_sync(temporary));
    TRY(verify_file(temporary));
    if (rename(temporary, path) != 0)
        FAIL(ERR_SYSTEM, "cannot rename %s to %s: %s", temporary, path, strerror(errno));
    return fs_sync_folder(folder);
}

int shard_builder_write(struct shard_builder *builder, const char *path)
{
    int rc = 0;
    struct image image = {.checksum = 0};
    ASSERT(builder->info.documents > 0);
    const size_t bytes = strlen(path) + sizeof ".tmp";
    char *temporary = malloc(bytes), *copy = strdup(path);
    if (!temporary || !copy) FAIL_GOTO(done, ERR_SYSTEM, "out of memory");
    (void)snprintf(temporary, bytes, "%s.tmp", path);
    TRY_GOTO(make_image(builder, &image), done);
    rc = write_whole(builder, &image, path, temporary, dirname(copy));
    if (rc != 0) (void)unlink(temporary);
done:
    free_image(&image);
    free(temporary);
    free(copy);
    forget_documents(builder);
    return rc;
}
