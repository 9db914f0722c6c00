/* manifest.json: what a checkpoint holds, and the checksums that let its absence of damage be known.
 *
 * One JSON object, one line for each file and tensor, closed by a checksum of every byte before it, so that the manifest
 * itself is covered: the last line is always `"checksum": "<16 hex digits>"`. Numbers are printed such that they read
 * back to the same bits. Any thread. */
#include "ckpt_internal.h"

#include <ctype.h>
#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#define FORMAT "tatara checkpoint"
#define FORMAT_VERSION 1
#define HEX_DIGITS 16
#define TENSOR_ELEMS_MAX ((int64_t)1 << 50)

/* The end of a manifest, of fixed length. */
#define TAIL ",\n\"checksum\": \"%016llx\"\n}\n"
#define TAIL_MAX 64

int64_t ckpt_tensor_elems(int ndim, const int64_t *shape)
{
    int64_t elems = 1;
    for (int i = 0; i < ndim; i++) {
        elems *= shape[i];
    }
    return elems;
}

static int compare_ranges(const void *a, const void *b)
{
    const struct ckpt_range *x = a, *y = b;
    return (x->begin > y->begin) - (x->begin < y->begin);
}

bool ckpt_ranges_tile(struct ckpt_tensor *tensor)
{
    int64_t at = 0;
    if (tensor->n_ranges > 1) {
        qsort(tensor->ranges, (size_t)tensor->n_ranges, sizeof *tensor->ranges, compare_ranges);
    }
    for (int i = 0; i < tensor->n_ranges; i++) {
        const struct ckpt_range *range = &tensor->ranges[i];
        if (range->begin != at || range->end <= range->begin) return false;
        at = range->end;
    }
    return at == ckpt_tensor_elems(tensor->ndim, tensor->shape);
}

bool ckpt_name_valid(const char *name)
{
    const size_t length = strlen(name);
    if (length == 0 || length >= CKPT_NAME_MAX || name[0] == '/' || name[length - 1] == '/') return false;
    for (size_t i = 0; i < length; i++) {
        const unsigned char c = (unsigned char)name[i];
        if (!isalnum(c) && !strchr("._-/", c)) return false;
        if (c == '/' && name[i + 1] == '/') return false;
    }
    return true;
}

/* ---- writing ---- */

static int write_entry(FILE *out, json_t *entry, const char *before)
{
    const bool ok = entry && fputs(before, out) >= 0 && json_dumpf(entry, out, JSON_COMPACT) == 0;
    json_decref(entry);
    return ok ? 0 : -1;
}

static void format_hex(char text[HEX_DIGITS + 1], uint64_t value)
{
    snprintf(text, HEX_DIGITS + 1, "%016llx", (unsigned long long)value);
}

static int write_meta(FILE *out, const struct ckpt_meta *meta)
{
    char model_id[HEX_DIGITS + 1], tokenizer_id[HEX_DIGITS + 1];
    format_hex(model_id, meta->model_id);
    format_hex(tokenizer_id, meta->tokenizer_id);
    return write_entry(
        out,
        json_pack("{s:I, s:I, s:I, s:I, s:I, s:f, s:f, s:f, s:I, s:I, s:I, s:f, s:f, s:I, s:s, s:s, s:s, s:s, s:o*}",
                  "step", (json_int_t)meta->step, "sequences", (json_int_t)meta->sequences, "optim_steps",
                  (json_int_t)meta->optim_steps, "bos", (json_int_t)meta->bos, "eos", (json_int_t)meta->eos, "tokens",
                  meta->tokens, "grad_scale", meta->grad_scale, "grad_norm", meta->grad_norm, "faults",
                  (json_int_t)meta->faults, "batches_skipped", (json_int_t)meta->batches_skipped, "loss_seen",
                  (json_int_t)meta->loss_seen, "loss_mean", meta->loss_mean, "loss_variance", meta->loss_variance,
                  "began", (json_int_t)meta->began, "model_id", model_id, "tokenizer_id", tokenizer_id, "version",
                  meta->version, "config_yaml", meta->config_yaml ? meta->config_yaml : "", "record",
                  meta->record ? json_loads(meta->record, 0, NULL) : NULL),
        "\"meta\": ");
}

static int write_file_entry(FILE *out, const struct ckpt_file *file, const char *before)
{
    char xxh3[HEX_DIGITS + 1];
    format_hex(xxh3, file->xxh3);
    return write_entry(
        out, json_pack("{s:s, s:I, s:s}", "name", file->name, "bytes", (json_int_t)file->bytes, "xxh3", xxh3),
        before);
}

static int write_tensor_entry(FILE *out, const struct ckpt_tensor *tensor, const char *before)
{
    char digest[HEX_DIGITS + 1];
    json_t *shape = json_array(), *ranges = json_array();
    format_hex(digest, tensor->digest);
    for (int i = 0; i < tensor->ndim; i++) {
        (void)json_array_append_new(shape, json_integer((json_int_t)tensor->shape[i]));
    }
    for (int i = 0; i < tensor->n_ranges; i++) {
        const struct ckpt_range *range = &tensor->ranges[i];
        (void)json_array_append_new(
            ranges, json_pack("[i, I, I]", range->file, (json_int_t)range->begin, (json_int_t)range->end));
    }
    const bool whole =
        json_array_size(shape) == (size_t)tensor->ndim && json_array_size(ranges) == (size_t)tensor->n_ranges;
    json_t *entry = json_pack("{s:s, s:s, s:s, s:o, s:o}", "name", tensor->name, "dtype", "f32", "digest", digest,
                              "shape", shape, "ranges", ranges);
    if (!whole) {
        json_decref(entry);
        return -1;
    }
    return write_entry(out, entry, before);
}

/* Everything but the tail. */
static int write_body(FILE *out, const struct ckpt_manifest *manifest)
{
    int bad = 0;
    bad |= fprintf(out, "{\n\"format\": \"%s\",\n\"format_version\": %d,\n\"saved_at\": \"%s\",\n", FORMAT,
                   FORMAT_VERSION, manifest->saved_at) < 0;
    bad |= write_meta(out, &manifest->meta) != 0;
    bad |= fputs(",\n\"files\": [", out) < 0;
    for (int i = 0; i < manifest->n_files; i++) {
        bad |= write_file_entry(out, &manifest->files[i], i == 0 ? "\n" : ",\n") != 0;
    }
    bad |= fputs("\n],\n\"tensors\": [", out) < 0;
    for (int i = 0; i < manifest->n_tensors; i++) {
        bad |= write_tensor_entry(out, &manifest->tensors[i], i == 0 ? "\n" : ",\n") != 0;
    }
    bad |= fputs("\n]", out) < 0;
    return bad ? -1 : 0;
}

/* JSON has no NaN and no infinity, and a checkpoint should not either. */
static int check_numbers(const char *folder, const struct ckpt_meta *meta)
{
    const struct {
        const char *name;
        double value;
    } number[] = {{"grad_scale", meta->grad_scale},
                  {"grad_norm", meta->grad_norm},
                  {"tokens", meta->tokens},
                  {"loss_mean", meta->loss_mean},
                  {"loss_variance", meta->loss_variance}};
    for (size_t i = 0; i < sizeof number / sizeof *number; i++) {
        if (!isfinite(number[i].value)) {
            FAIL(ERR_NUMERIC, "%s is not saved: %s is %g; resume from an earlier checkpoint", folder, number[i].name,
                 number[i].value);
        }
    }
    return 0;
}

int ckpt_manifest_write(const char *folder, const struct ckpt_manifest *manifest)
{
    int rc = 0;
    char path[CKPT_PATH_MAX], tail[TAIL_MAX];
    char *text = NULL;
    size_t bytes = 0;
    TRY(ckpt_path(path, folder, CKPT_MANIFEST));
    TRY(check_numbers(folder, &manifest->meta));
    FILE *out = open_memstream(&text, &bytes);
    if (!out) FAIL(ERR_SYSTEM, "%s: no memory left to write it", path);
    const int bad = write_body(out, manifest);
    if (fflush(out) != 0 || bad) {
        FAIL_GOTO(done, ERR_SYSTEM, "%s: cannot be composed: out of memory, or the configuration is not UTF-8", path);
    }
    snprintf(tail, sizeof tail, TAIL, (unsigned long long)XXH3_64bits(text, bytes));
    if (fputs(tail, out) < 0 || fflush(out) != 0) FAIL_GOTO(done, ERR_SYSTEM, "%s: no memory left to write it", path);
    TRY_GOTO(ckpt_file_write(path, text, bytes), done);
done:
    (void)fclose(out);
    free(text);
    return rc;
}

/* ---- reading ---- */

/* Fails unless the text ends with the checksum of what comes before it. */
static int check_text(const char *path, const char *text, size_t bytes)
{
    char tail[TAIL_MAX];
    snprintf(tail, sizeof tail, TAIL, 0ULL);
    const size_t tail_bytes = strlen(tail);
    bool good = bytes > tail_bytes;
    if (good) {
        const size_t body = bytes - tail_bytes;
        snprintf(tail, sizeof tail, TAIL, (unsigned long long)XXH3_64bits(text, body));
        good = memcmp(text + body, tail, tail_bytes) == 0;
    }
    if (!good) FAIL(ERR_DATA, "%s is damaged: it does not match its own checksum; " CKPT_REMEDY_DAMAGED, path);
    return 0;
}

static int parse_hex(const char *text, uint64_t *value)
{
    if (strlen(text) != HEX_DIGITS || strspn(text, "0123456789abcdef") != HEX_DIGITS) return -1;
    *value = strtoull(text, NULL, 16);
    return 0;
}

/* Copies text that must fit. */
static int copy_text(char *to, size_t size, const char *from)
{
    if (strlen(from) >= size) return -1;
    snprintf(to, size, "%s", from);
    return 0;
}

static int parse_meta(json_t *root, struct ckpt_manifest *manifest)
{
    struct ckpt_meta *meta = &manifest->meta;
    json_int_t step = 0, sequences = -1, bos = -1, eos = -1;
    json_int_t optim_steps = INT64_MIN, began = INT64_MIN; /* older checkpoints have none: `step` */
    const char *model_id = NULL, *tokenizer_id = NULL, *version = NULL, *yaml = NULL, *saved_at = NULL;
    json_int_t faults = 0, skipped = 0, seen = 0; /* checkpoints of before there were any have none */
    if (json_unpack(
            root,
            "{s:s, s:{s?I, s?I, s?I, s?I, s?I, s?I, s?I, s?F, s?F, s?I, s:I, s:F, s:F, s:F, s:s, s:s, s:s, s:s}}",
            "saved_at", &saved_at, "meta", "sequences", &sequences, "optim_steps", &optim_steps, "bos", &bos, "eos",
            &eos, "faults", &faults, "batches_skipped", &skipped, "loss_seen", &seen, "loss_mean", &meta->loss_mean,
            "loss_variance", &meta->loss_variance, "began", &began, "step", &step, "tokens", &meta->tokens,
            "grad_scale", &meta->grad_scale, "grad_norm", &meta->grad_norm, "model_id", &model_id, "tokenizer_id",
            &tokenizer_id, "version", &version, "config_yaml", &yaml) != 0) {
        return -1;
    }
    meta->step = step;
    meta->sequences = sequences;
    meta->optim_steps = optim_steps == INT64_MIN ? step : optim_steps;
    meta->began = began == INT64_MIN ? step : began;
    meta->bos = bos;
    meta->eos = eos;
    meta->faults = faults;
    meta->batches_skipped = skipped;
    meta->loss_seen = seen;
    if (step < 0 || sequences < -1 || bos < -1 || bos > INT32_MAX || eos < -1 || eos > INT32_MAX ||
        meta->optim_steps < step || meta->began < 0 || meta->began > step || faults < 0 || skipped < 0 || seen < 0 ||
        parse_hex(model_id, &meta->model_id) != 0 || parse_hex(tokenizer_id, &meta->tokenizer_id) != 0 ||
        copy_text(meta->version, sizeof meta->version, version) != 0 ||
        copy_text(manifest->saved_at, sizeof manifest->saved_at, saved_at) != 0) {
        return -1;
    }
    json_t *record = json_object_get(json_object_get(root, "meta"), "record"); /* older checkpoints have none */
    meta->config_yaml = strdup(yaml);
    if (record) meta->record = json_dumps(record, JSON_COMPACT | JSON_REAL_PRECISION(17));
    return meta->config_yaml && (!record || meta->record) ? 0 : -1;
}

static int parse_file(json_t *entry, struct ckpt_file *file)
{
    const char *name = NULL, *xxh3 = NULL;
    json_int_t bytes = 0;
    if (json_unpack(entry, "{s:s, s:I, s:s}", "name", &name, "bytes", &bytes, "xxh3", &xxh3) != 0) return -1;
    file->bytes = bytes;
    const bool plain = name[0] != '.' && !strchr(name, '/'); /* in the folder, nowhere else */
    return plain && bytes >= 0 && copy_text(file->name, sizeof file->name, name) == 0 ? parse_hex(xxh3, &file->xxh3)
                                                                                      : -1;
}

static int parse_shape(json_t *shape, struct ckpt_tensor *tensor)
{
    const size_t ndim = json_array_size(shape);
    if (ndim < 1 || ndim > CKPT_DIMS_MAX) return -1;
    tensor->ndim = (int)ndim;
    int64_t elems = 1;
    for (size_t i = 0; i < ndim; i++) {
        const json_int_t size = json_integer_value(json_array_get(shape, i));
        if (size < 1 || size > TENSOR_ELEMS_MAX / elems) return -1;
        tensor->shape[i] = size;
        elems *= size;
    }
    return 0;
}

static int parse_ranges(json_t *ranges, struct ckpt_tensor *tensor, int n_files)
{
    const size_t n = json_array_size(ranges);
    if (n < 1 || n > (size_t)n_files) return -1;
    tensor->ranges = calloc(n, sizeof *tensor->ranges);
    if (!tensor->ranges) return -1;
    tensor->n_ranges = (int)n;
    for (size_t i = 0; i < n; i++) {
        json_int_t begin = 0, end = 0;
        struct ckpt_range *range = &tensor->ranges[i];
        if (json_unpack(json_array_get(ranges, i), "[i, I, I]", &range->file, &begin, &end) != 0) return -1;
        if (range->file < 0 || range->file >= n_files) return -1;
        range->begin = begin;
        range->end = end;
    }
    return ckpt_ranges_tile(tensor) ? 0 : -1;
}

static int parse_tensor(json_t *entry, struct ckpt_tensor *tensor, int n_files)
{
    const char *name = NULL, *dtype = NULL, *digest = "0000000000000000"; /* old checkpoints have none */
    json_t *shape = NULL, *ranges = NULL;
    if (json_unpack(entry, "{s:s, s:s, s?s, s:o, s:o}", "name", &name, "dtype", &dtype, "digest", &digest, "shape",
                    &shape, "ranges", &ranges) != 0 ||
        parse_hex(digest, &tensor->digest) != 0) {
        return -1;
    }
    if (!ckpt_name_valid(name) || copy_text(tensor->name, sizeof tensor->name, name) != 0) return -1;
    if (strcmp(dtype, "f32") != 0 || parse_shape(shape, tensor) != 0) return -1;
    return parse_ranges(ranges, tensor, n_files);
}

/* The files of the ranks, in order, then the index; returns how many ranks there are, or -1. */
static int count_ranks(const struct ckpt_manifest *manifest)
{
    char name[CKPT_FILE_MAX];
    for (int rank = 0; rank < manifest->n_files; rank++) {
        ckpt_file_name(name, rank);
        if (strcmp(manifest->files[rank].name, name) == 0) continue;
        return strcmp(manifest->files[rank].name, CKPT_INDEX) == 0 && rank > 0 ? rank : -1;
    }
    return -1;
}

static int parse_lists(json_t *root, struct ckpt_manifest *manifest)
{
    json_t *files = json_object_get(root, "files"), *tensors = json_object_get(root, "tensors");
    const size_t n_files = json_array_size(files), n_tensors = json_array_size(tensors);
    if (n_files < 2 || n_files > INT32_MAX || n_tensors < 1 || n_tensors > INT32_MAX) return -1;
    manifest->files = calloc(n_files, sizeof *manifest->files);
    manifest->tensors = calloc(n_tensors, sizeof *manifest->tensors);
    if (!manifest->files || !manifest->tensors) return -1;
    manifest->n_files = (int)n_files;
    manifest->n_tensors = (int)n_tensors;
    for (size_t i = 0; i < n_files; i++) {
        if (parse_file(json_array_get(files, i), &manifest->files[i]) != 0) return -1;
    }
    manifest->n_ranks = count_ranks(manifest);
    if (manifest->n_ranks < 0) return -1;
    for (size_t i = 0; i < n_tensors; i++) {
        if (parse_tensor(json_array_get(tensors, i), &manifest->tensors[i], manifest->n_ranks) != 0) return -1;
    }
    return 0;
}

static int parse(const char *path, json_t *root, struct ckpt_manifest *manifest)
{
    const char *format = NULL;
    int version = 0;
    if (json_unpack(root, "{s:s, s:i}", "format", &format, "format_version", &version) != 0 ||
        strcmp(format, FORMAT) != 0) {
        FAIL(ERR_DATA, "%s is not the manifest of a Tatara checkpoint", path);
    }
    if (version != FORMAT_VERSION) {
        FAIL(ERR_DATA, "%s has format %d, and this program reads format %d; use the program that wrote it", path,
             version, FORMAT_VERSION);
    }
    if (parse_meta(root, manifest) != 0 || parse_lists(root, manifest) != 0) {
        FAIL(ERR_DATA, "%s: an entry is missing, of a wrong kind or out of range; " CKPT_REMEDY_DAMAGED, path);
    }
    return 0;
}

int ckpt_manifest_read(const char *folder, struct ckpt_manifest *manifest)
{
    int rc = 0;
    char path[CKPT_PATH_MAX];
    char *text = NULL;
    size_t bytes = 0;
    json_t *root = NULL;
    json_error_t error;
    memset(manifest, 0, sizeof *manifest);
    TRY(ckpt_path(path, folder, CKPT_MANIFEST));
    TRY_GOTO(ckpt_file_read(path, &text, &bytes), done);
    TRY_GOTO(check_text(path, text, bytes), done);
    root = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, &error);
    if (!root) FAIL_GOTO(done, ERR_DATA, "%s:%d: is not JSON: %s", path, error.line, error.text);
    TRY_GOTO(parse(path, root, manifest), done);
done:
    json_decref(root);
    free(text);
    if (rc != 0) ckpt_manifest_free(manifest);
    return rc;
}

void ckpt_manifest_free(struct ckpt_manifest *manifest)
{
    ckpt_meta_free(&manifest->meta);
    for (int i = 0; i < manifest->n_tensors; i++) {
        free(manifest->tensors[i].ranges);
    }
    free(manifest->tensors);
    free(manifest->files);
    memset(manifest, 0, sizeof *manifest);
}

int ckpt_meta_copy(struct ckpt_meta *to, const struct ckpt_meta *from)
{
    *to = *from;
    to->config_yaml = strdup(from->config_yaml ? from->config_yaml : "");
    to->record = from->record ? strdup(from->record) : NULL;
    if (to->config_yaml && (!from->record || to->record)) return 0;
    FAIL(ERR_SYSTEM, "no memory left to save step %lld", (long long)from->step);
}

void ckpt_meta_free(struct ckpt_meta *meta)
{
    free(meta->config_yaml);
    free(meta->record);
    meta->config_yaml = meta->record = NULL;
}
