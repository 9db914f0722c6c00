/* Limits of control groups (cgroups(7)).
 *
 * /proc/self/cgroup names a process's group in each hierarchy, by its path from the hierarchy's root as this process sees
 * it; /proc/self/mountinfo says which part of which hierarchy is mounted where. In a container the two need not agree: what
 * is mounted may be the container's own group, or begin above what the path is relative to. Then the mount's top is taken,
 * which is the nearest group that can be seen. Limits hold at every level: the walk is from the group up to the mount's
 * top. */
#include "cgroup.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define LINE_BYTES 8192

/* The walk's place. */
struct walk {
    const char *root;
    struct cgroup_level *level;
    int n;
};

/* The first line of a file, without its end. */
static bool read_line(const char *folder, const char *name, char *line, int bytes)
{
    char path[2 * CGROUP_FOLDER_MAX];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "r");
    const bool read = file && fgets(line, bytes, file);
    if (file) (void)fclose(file);
    if (read) line[strcspn(line, "\n")] = '\0';
    return read;
}

/* Bytes; 0 for "max", for what is not there, and for what version 1 writes when there is no limit. */
static uint64_t read_bytes(const char *folder, const char *name)
{
    char line[64] = "";
    if (!read_line(folder, name, line, sizeof line)) return 0;
    const uint64_t bytes = strtoull(line, NULL, 10);
    return bytes < (uint64_t)1 << 60 ? bytes : 0;
}

/* Processors' worth of time: version 2 has "quota period" or "max period" in one file, version 1 two files and −1. */
static double read_cpus(const char *folder)
{
    char text[2][64] = {"", ""};
    char *end = NULL;
    if (!read_line(folder, "cpu.max", text[0], sizeof text[0])) {
        if (!read_line(folder, "cpu.cfs_quota_us", text[0], sizeof text[0]) ||
            !read_line(folder, "cpu.cfs_period_us", text[1], sizeof text[1])) {
            return 0;
        }
    }
    const double quota = strtod(text[0], &end);
    const double period = strtod(text[1][0] != '\0' ? text[1] : end, NULL);
    return quota > 0 && period > 0 ? quota / period : 0;
}

/* Memory of the group that the kernel can give back: files that it keeps in case they are read again. */
static uint64_t read_reclaimable(const char *folder)
{
    static const char *const names[] = {"inactive_file ", "active_file ", "slab_reclaimable "};
    char path[2 * CGROUP_FOLDER_MAX], line[256];
    uint64_t bytes = 0, whole = 0; /* version 1 has the groups below it under names of their own */
    snprintf(path, sizeof path, "%s/memory.stat", folder);
    FILE *file = fopen(path, "r");
    while (file && fgets(line, sizeof line, file)) {
        const bool total = strncmp(line, "total_", 6) == 0;
        for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
            const char *value = line + (total ? 6 : 0);
            if (strncmp(value, names[i], strlen(names[i])) != 0) continue;
            *(total ? &whole : &bytes) += strtoull(value + strlen(names[i]), NULL, 10);
        }
    }
    if (file) (void)fclose(file);
    return whole > 0 ? whole : bytes;
}

static void read_memory(struct cgroup_level *level)
{
    static const char *const names[] = {"memory.max", "memory.high", "memory.limit_in_bytes"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        const uint64_t limit = read_bytes(level->folder, names[i]);
        if (limit == 0 || (level->limit_bytes > 0 && limit >= level->limit_bytes)) continue;
        level->limit_bytes = limit;
        level->limit_name = names[i];
    }
    if (level->limit_bytes == 0) return;
    const uint64_t used =
        read_bytes(level->folder, "memory.current") + read_bytes(level->folder, "memory.usage_in_bytes");
    const uint64_t back = read_reclaimable(level->folder);
    level->taken_bytes = used > back ? used - back : 0;
}

/* Adds a group that has a limit and is not in the list yet: a hierarchy may be mounted twice. */
static void add_level(struct walk *walk, const char *folder)
{
    struct stat st;
    struct cgroup_level level = {.id = 0};
    if (walk->n == CGROUP_LEVELS || stat(folder, &st) != 0) return;
    level.id = (uint64_t)st.st_dev << 48 ^ (uint64_t)st.st_ino;
    for (int i = 0; i < walk->n; i++)
        if (walk->level[i].id == level.id) return;
    snprintf(level.folder, sizeof level.folder, "%s", folder);
    level.cpus = read_cpus(folder);
    read_memory(&level);
    if (level.cpus > 0 || level.limit_bytes > 0) walk->level[walk->n++] = level;
}

/* The folders from `path` below the mount's top up to it. */
static void climb(struct walk *walk, const char *top, const char *path)
{
    char folder[CGROUP_FOLDER_MAX];
    const int length = snprintf(folder, sizeof folder, "%s%s%s", walk->root, top, path);
    const size_t least = strlen(walk->root) + strlen(top);
    if (length < 0 || (size_t)length >= sizeof folder) return;
    for (size_t end = (size_t)length; end >= least; end--) {
        if (end < (size_t)length && end > least && folder[end] != '/') continue;
        folder[end] = '\0';
        if (end > least && folder[end - 1] == '/') continue;
        add_level(walk, folder);
    }
}

/* Octal numbers stand for spaces and the like in mountinfo. */
static void unescape(char *text)
{
    char *to = text;
    for (const char *from = text; *from; to++) {
        const bool escaped = from[0] == '\\' && strspn(from + 1, "01234567") >= 3;
        *to = escaped ? (char)(((from[1] - '0') << 6) + ((from[2] - '0') << 3) + (from[3] - '0')) : *from;
        from += escaped ? 4 : 1;
    }
    *to = '\0';
}

/* Whether `word` is one of the words between commas. */
static bool has_word(const char *list, const char *word)
{
    const size_t bytes = strlen(word);
    for (const char *at = list; at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL)
        if (strncmp(at, word, bytes) == 0 && (at[bytes] == '\0' || at[bytes] == ',')) return true;
    return false;
}

/* The part of `path` below the mounted `base`; "" where that is not above it. */
static const char *below(const char *path, const char *base)
{
    const size_t bytes = strcmp(base, "/") == 0 ? 0 : strlen(base);
    if (strncmp(path, "/..", 3) == 0 || strncmp(path, base, bytes) != 0) return "";
    return path[bytes] == '/' && path[bytes + 1] != '\0' ? path + bytes : "";
}

/* The mounts of a hierarchy: of version 2 where controller is NULL. */
static void find_mounts(struct walk *walk, const char *controller, const char *path)
{
    char name[CGROUP_FOLDER_MAX], line[LINE_BYTES];
    char base[CGROUP_FOLDER_MAX], top[CGROUP_FOLDER_MAX], type[32], options[512];
    snprintf(name, sizeof name, "%s/proc/self/mountinfo", walk->root);
    FILE *file = fopen(name, "r");
    while (file && fgets(line, sizeof line, file)) {
        const char *rest = strstr(line, " - ");
        if (!rest || sscanf(line, "%*s %*s %*s %255s %255s", base, top) != 2) continue;
        if (sscanf(rest, " - %31s %*s %511s", type, options) != 2) continue;
        if (strcmp(type, controller ? "cgroup" : "cgroup2") != 0) continue;
        if (controller && !has_word(options, controller)) continue;
        unescape(base);
        unescape(top);
        climb(walk, top, below(path, base));
    }
    if (file) (void)fclose(file);
}

int cgroup_levels(const char *root, struct cgroup_level level[CGROUP_LEVELS])
{
    static const char *const controllers[] = {"cpu", "memory"};
    struct walk walk = {.root = root, .level = level};
    char name[CGROUP_FOLDER_MAX], line[LINE_BYTES];
    snprintf(name, sizeof name, "%s/proc/self/cgroup", root);
    FILE *file = fopen(name, "r");
    /* number:controllers:path; version 2 has no controllers */
    while (file && fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = '\0';
        char *list = strchr(line, ':'), *path = list ? strchr(list + 1, ':') : NULL;
        if (!path) continue;
        *path++ = '\0';
        if (list[1] == '\0') find_mounts(&walk, NULL, path);
        for (size_t i = 0; i < sizeof controllers / sizeof *controllers; i++)
            if (has_word(list + 1, controllers[i])) find_mounts(&walk, controllers[i], path);
    }
    if (file) (void)fclose(file);
    return walk.n;
}
