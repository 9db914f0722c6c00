/* The list of inputs, and its division into work (see source.h). */
#include "data/source.h"

#include "data/files.h"
#include "data/stream.h"
#include "err.h"
#include "utf8.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

/* Text is about so much larger than its compressed file. */
#define USUAL_PACKING 4

/* A copy that is UTF-8, without control characters; NULL without memory. */
static char *copy_shown(const char *name, size_t bytes)
{
    char *copy = strndup(name, bytes), *shown = malloc(4 * bytes + 1);
    if (copy && shown) (void)utf8_show(copy, "", shown, 4 * bytes + 1);
    free(copy);
    return shown;
}

int source_add_file(struct source_list *list, const struct source_file *wanted)
{
    if (list->files == list->file_capacity) {
        const int capacity = 2 * list->file_capacity + 64;
        struct source_file *file = realloc(list->file, (size_t)capacity * sizeof *file);
        if (!file) FAIL(ERR_SYSTEM, "out of memory for %d files", capacity);
        list->file = file;
        list->file_capacity = capacity;
    }
    struct source_file *file = &list->file[list->files++];
    *file = *wanted;
    /* The origin is the name up to its first dot, which may also be its first byte. */
    const size_t stem_bytes = *wanted->origin == '\0' ? 0 : strcspn(wanted->origin + 1, ".") + 1;
    file->path = strdup(wanted->path);
    file->name = copy_shown(wanted->name, strlen(wanted->name));
    file->origin = copy_shown(wanted->origin, stem_bytes);
    if (!file->path || !file->name || !file->origin) FAIL(ERR_SYSTEM, "out of memory for %d files", list->files);
    return 0;
}

int source_leave_out(struct source_list *list, enum left why, const char *path)
{
    if (list->left[why].n++ > 0) return 0;
    list->left[why].first = copy_shown(path, strlen(path));
    return list->left[why].first ? 0 : err_raise(ERR_SYSTEM, __FILE__, __LINE__, "out of memory");
}

const char *source_describe_left(const struct source_list *list, char *words, size_t room)
{
    static const char *const names[] = {
#define X(name, text) text,
        LEFT_LIST(X)
#undef X
    };
    words[0] = '\0';
    for (int l = 0; l < LEFTS; l++) {
        const size_t used = strlen(words);
        if (list->left[l].n == 0) continue;
        (void)snprintf(words + used, room - used, "%s%" PRId64 " %s (%s%s)", used ? ", " : "", list->left[l].n,
                       names[l], list->left[l].first, list->left[l].n > 1 ? ", ..." : "");
    }
    return words;
}

static void free_file(struct source_file *file)
{
    stream_close(file->pipe);
    free(file->path);
    free(file->name);
    free(file->origin);
}

/* By file, then by place in the list. */
static int compare_files(const void *a, const void *b)
{
    const struct source_file *const x = *(struct source_file *const *)a, *const y = *(struct source_file *const *)b;
    if (x->device != y->device) return x->device < y->device ? -1 : 1;
    if (x->inode != y->inode) return x->inode < y->inode ? -1 : 1;
    return x < y ? -1 : x > y;
}

/* Takes out files that come a second time, under whatever name. */
static int drop_repeated(struct source_list *list)
{
    int rc = 0, kept = 0;
    const int files = list->files;
    struct source_file **sorted = malloc((size_t)files * sizeof(struct source_file *));
    bool *repeated = calloc((size_t)files, sizeof *repeated);
    if (!sorted || !repeated) FAIL_GOTO(done, ERR_SYSTEM, "out of memory for %d files", files);
    for (int f = 0; f < files; f++)
        sorted[f] = &list->file[f];
    qsort(sorted, (size_t)files, sizeof(struct source_file *), compare_files);
    for (int f = 1; f < files; f++) {
        const struct source_file *const before = sorted[f - 1], *const file = sorted[f];
        repeated[file - list->file] = before->device == file->device && before->inode == file->inode;
    }
    for (int f = 0; f < files && rc == 0; f++) {
        if (repeated[f]) {
            rc = source_leave_out(list, LEFT_TWICE, list->file[f].path);
            free_file(&list->file[f]);
        } else {
            list->file[kept++] = list->file[f];
        }
    }
    if (rc == 0) list->files = kept;
done:
    free(sorted);
    free(repeated);
    return rc;
}

int source_settle(struct source_list *list, const struct source_rules *rules)
{
    const struct arg_words *const patterns[] = {&rules->include, &rules->exclude};
    for (int p = 0; p < 2; p++) {
        for (int i = 0; i < patterns[p]->n; i++) {
            if (patterns[p]->used[i]) continue;
            FAIL(ERR_DATA, "--%s %s matches nothing%s; correct it or leave it out", p == 0 ? "include" : "exclude",
                 patterns[p]->word[i], p == 0 ? " in the folders" : "");
        }
    }
    return drop_repeated(list);
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
        while (by_line && !file->packed && file->bytes - begin > part_bytes) {
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
    return unit->file_bytes * (list->file[unit->file].packed ? USUAL_PACKING : 1);
}

uint64_t source_text_bytes(const struct source_list *list)
{
    uint64_t bytes = 0;
    for (int f = 0; f < list->files; f++) {
        bytes += list->file[f].bytes * (list->file[f].packed ? USUAL_PACKING : 1);
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
    for (int f = 0; f < list->files; f++)
        free_file(&list->file[f]);
    for (int l = 0; l < LEFTS; l++)
        free(list->left[l].first);
    free(list->fields);
    free(list->file);
    free(list->unit);
}
