/* Finding the inputs and dividing them into work (see source.h). */
#include "data/source.h"

#include "data/files.h"
#include "data/stream.h"
#include "err.h"
#include "fs.h"

#include <errno.h>
#include <glob.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <xxhash.h>

/* Text is about so much larger than its compressed file. */
#define USUAL_PACKING 4
#define FOLDER_DEPTH_MAX 64

/* The name's bytes without the ending of a compressed file. */
static size_t unpacked_bytes(const char *name)
{
    return stream_is_compressed(name) ? (size_t)(strrchr(name, '.') - name) : strlen(name);
}

static bool ends_in(const char *name, const char *const *endings)
{
    const size_t bytes = unpacked_bytes(name);
    for (; *endings; endings++) {
        const size_t n = strlen(*endings);
        if (bytes > n && strncmp(name + bytes - n, *endings, n) == 0) return true;
    }
    return false;
}

static bool is_jsonl(const char *name)
{
    static const char *const endings[] = {".jsonl", ".ndjson", ".json", NULL};
    return ends_in(name, endings);
}

static bool is_text(const char *name)
{
    static const char *const endings[] = {".txt", ".text", ".md", NULL};
    return ends_in(name, endings);
}

/* The name up to its first dot, which may also be its first byte. */
static char *copy_stem(const char *name)
{
    const size_t bytes = name[0] == '\0' ? 0 : strcspn(name + 1, ".") + 1;
    return strndup(name, bytes);
}

static int add_file(struct source_list *list, const char *path, const char *name, const char *input_name,
                    uint64_t bytes)
{
    if (list->files == list->file_capacity) {
        const int capacity = 2 * list->file_capacity + 64;
        struct source_file *file = realloc(list->file, (size_t)capacity * sizeof *file);
        if (!file) FAIL(ERR_SYSTEM, "out of memory for %d files", capacity);
        list->file = file;
        list->file_capacity = capacity;
    }
    struct source_file *file = &list->file[list->files++];
    *file = (struct source_file){.path = strdup(path),
                                 .name = strdup(name),
                                 .origin = copy_stem(input_name),
                                 .bytes = bytes,
                                 .jsonl = is_jsonl(name)};
    if (!file->path || !file->name || !file->origin) FAIL(ERR_SYSTEM, "out of memory for %d files", list->files);
    return 0;
}

static int skip_file(struct source_list *list, const char *path)
{
    list->skipped++;
    if (list->skipped_name) return 0;
    list->skipped_name = strdup(path);
    return list->skipped_name ? 0 : err_raise(ERR_SYSTEM, __FILE__, __LINE__, "out of memory");
}

static int add_folder(struct source_list *list, const char *path, const char *name, const char *input_name,
                      int depth);

/* A file or folder found in a folder: hidden ones and files that are not text by their name are left out. */
static int add_entry(struct source_list *list, const char *path, const char *name, const char *input_name, int depth)
{
    struct stat st;
    if (stat(path, &st) != 0) FAIL_FS("cannot read", path, ERR_DATA, NULL);
    if (S_ISDIR(st.st_mode)) return add_folder(list, path, name, input_name, depth + 1);
    if (!S_ISREG(st.st_mode) || (!is_jsonl(name) && !is_text(name))) return skip_file(list, path);
    return add_file(list, path, name, input_name, (uint64_t)st.st_size);
}

static int add_folder(struct source_list *list, const char *path, const char *name, const char *input_name, int depth)
{
    int rc = 0;
    char *inner = NULL, *inner_name = NULL;
    struct path_list entries = {.path = NULL};
    if (depth > FOLDER_DEPTH_MAX) FAIL(ERR_DATA, "%s: folders go too deep; is a link pointing upwards?", path);
    TRY_GOTO(path_list_folder(&entries, path), done);
    for (int i = 0; i < entries.n; i++) {
        if (entries.path[i][0] == '.') continue;
        TRY_GOTO(path_join(&inner, path, entries.path[i]), done);
        TRY_GOTO(path_join(&inner_name, name, entries.path[i]), done);
        TRY_GOTO(add_entry(list, inner, inner_name, input_name, depth), done);
        free(inner);
        free(inner_name);
        inner = inner_name = NULL;
    }
done:
    free(inner);
    free(inner_name);
    path_list_free(&entries);
    return rc;
}

/* A file or folder that was named: taken whatever its ending is. */
static int add_named(struct source_list *list, const char *path)
{
    int rc = 0;
    struct stat st;
    char *trimmed = strdup(path);
    if (!trimmed) FAIL(ERR_SYSTEM, "out of memory");
    for (size_t n = strlen(trimmed); n > 1 && trimmed[n - 1] == '/'; n--)
        trimmed[n - 1] = '\0';
    const char *name = path_name(trimmed);
    if (stat(trimmed, &st) != 0) FAIL_FS_GOTO(done, "cannot read", path, ERR_DATA, NULL);
    rc = S_ISDIR(st.st_mode) ? add_folder(list, trimmed, name, name, 0)
                             : add_file(list, trimmed, name, name, (uint64_t)st.st_size);
done:
    free(trimmed);
    return rc;
}

int source_add(struct source_list *list, const char *input)
{
    struct stat st;
    const int before = list->files;
    if (stat(input, &st) == 0) {
        TRY(add_named(list, input));
    } else if (errno != ENOENT && errno != ENOTDIR && errno != ENAMETOOLONG) {
        FAIL_FS("cannot read", input, ERR_DATA, NULL);
    } else {
        glob_t found;
        const int status = glob(input, 0, NULL, &found);
        if (status != 0) FAIL(ERR_DATA, "no input file, folder or pattern matches %s", input);
        int rc = 0;
        for (size_t i = 0; i < found.gl_pathc && rc == 0; i++)
            rc = add_named(list, found.gl_pathv[i]);
        globfree(&found);
        TRY(rc);
    }
    if (list->files == before) {
        FAIL(ERR_DATA,
             "%s holds no text: wanted are .txt, .text, .md, .jsonl, .ndjson or .json, plain, .gz or .zst; name "
             "other files themselves",
             input);
    }
    return 0;
}

static int add_unit(struct source_list *list, struct source_unit unit)
{
    if (list->units == list->unit_capacity) {
        const int capacity = 2 * list->unit_capacity + 64;
        struct source_unit *units = realloc(list->unit, (size_t)capacity * sizeof *units);
        if (!units) FAIL(ERR_SYSTEM, "out of memory for %d parts of files", capacity);
        list->unit = units;
        list->unit_capacity = capacity;
    }
    list->unit[list->units++] = unit;
    return 0;
}

int source_divide(struct source_list *list, enum source_split text_split, uint64_t part_bytes)
{
    ASSERT(part_bytes > 0);
    for (int f = 0; f < list->files; f++) {
        const struct source_file *file = &list->file[f];
        const bool by_line = file->jsonl || text_split == SPLIT_LINE;
        uint64_t begin = 0;
        while (by_line && !stream_is_compressed(file->path) && file->bytes - begin > part_bytes) {
            TRY(add_unit(list, (struct source_unit){
                                   .file = f, .begin = begin, .end = begin + part_bytes, .file_bytes = part_bytes}));
            begin += part_bytes;
        }
        TRY(add_unit(list, (struct source_unit){
                               .file = f, .begin = begin, .end = UINT64_MAX, .file_bytes = file->bytes - begin}));
    }
    return 0;
}

uint64_t source_unit_text_bytes(const struct source_list *list, const struct source_unit *unit)
{
    return unit->file_bytes * (stream_is_compressed(list->file[unit->file].path) ? USUAL_PACKING : 1);
}

uint64_t source_text_bytes(const struct source_list *list)
{
    uint64_t bytes = 0;
    for (int f = 0; f < list->files; f++) {
        bytes += list->file[f].bytes * (stream_is_compressed(list->file[f].path) ? USUAL_PACKING : 1);
    }
    return bytes;
}

uint64_t source_fingerprint(const struct source_list *list)
{
    uint64_t hash = (uint64_t)list->files;
    for (int f = 0; f < list->files; f++) {
        hash = XXH3_64bits_withSeed(list->file[f].name, strlen(list->file[f].name), hash ^ list->file[f].bytes);
    }
    return hash;
}

void source_free(struct source_list *list)
{
    for (int f = 0; f < list->files; f++) {
        free(list->file[f].path);
        free(list->file[f].name);
        free(list->file[f].origin);
    }
    free(list->file);
    free(list->unit);
    free(list->skipped_name);
}
