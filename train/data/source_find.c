/* Finding the input files: names, folders and patterns, and what of them is text (source_add). */
#include "data/source.h"

#include "data/files.h"
#include "data/source_look.h"
#include "data/stream.h"
#include "err.h"
#include "fs.h"
#include "log.h"

#include <errno.h>
#include <fnmatch.h>
#include <locale.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>

#define FOLDER_DEPTH_MAX 64

/* What one input finds: a folder or a file. */
struct search {
    struct source_list *list;
    struct source_rules *rules;
    const char *origin; /* the input's last part */
    size_t name_at,
        below_at; /* of a path: where its name in the list begins, and what lies below the folder, if one is */
};

/* Is this the part of a pattern that stands for any number of folders? */
static bool is_stars(const char *part, size_t bytes)
{
    return bytes == 2 && memcmp(part, "**", 2) == 0;
}

/* Does the name match the first `bytes` of the pattern, which hold no slash? A hidden one does only by its own dot. */
static bool name_matches(const char *pattern, size_t bytes, const char *name, size_t name_bytes)
{
    char *part = strndup(pattern, bytes), *copy = strndup(name, name_bytes);
    const bool matches = part && copy && fnmatch(part, copy, FNM_PERIOD) == 0;
    free(part);
    free(copy);
    return matches;
}

/* Does the whole path match the pattern, part by part? */
static bool path_matches(const char *pattern, const char *path)
{
    const size_t bytes = strcspn(pattern, "/"), path_bytes = strcspn(path, "/");
    const char *const rest = pattern[bytes] && pattern[bytes + 1] ? pattern + bytes + 1 : NULL;
    const char *const below = path[path_bytes] ? path + path_bytes + 1 : NULL;
    if (is_stars(pattern, bytes)) {
        return !rest || path_matches(rest, path) || (below && path_matches(pattern, below));
    }
    if (!name_matches(pattern, bytes, path, path_bytes)) return false;
    return !rest || !below ? !rest && !below : path_matches(rest, below);
}

/* Is a file or folder among the patterns? One without a slash speaks of the last part of the path, others of the path
 * below the input folder, or as the person wrote it. */
static bool is_among(struct arg_words *patterns, const char *path, const char *below)
{
    bool found = false;
    for (int i = 0; i < patterns->n; i++) {
        const char *const pattern = patterns->word[i];
        if (strchr(pattern, '/') ? !path_matches(pattern, below) && !path_matches(pattern, path)
                                 : !path_matches(pattern, path_name(path))) {
            continue;
        }
        patterns->used[i] = found = true;
    }
    return found;
}

/* Is the name that of what describes or makes a data set, rather than of its text? */
static bool is_card(const char *name)
{
    /* The first four may go on with - or _. */
    static const char *const stems[] = {
        "readme",     "license",         "licence",         "requirements", "copying",      "notice",
        "citation",   "authors",         "contributing",    "changelog",    "cmakelists",   "datacard",
        "data_card",  "dataset_card",    "datasheet",       "model_card",   "dataset-card", "use_policy",
        "use-policy", "code_of_conduct", "code-of-conduct", "security",     "terms",        "version",
        "robots",     "md5sum",          "md5sums",         "sha1sum",      "sha1sums",     "sha256sum",
        "sha256sums", "sha512sum",       "sha512sums",      "checksums"};
    static const char *const endings[] = {".py", ".sh", ".ipynb", ".yaml", ".yml", ".toml", ".cfg", ".ini"};
    const char *const ending = strrchr(name, '.');
    for (size_t i = 0; i < sizeof stems / sizeof *stems; i++) {
        const size_t bytes = strlen(stems[i]);
        if (strncasecmp(name, stems[i], bytes) != 0) continue;
        const char next = name[bytes];
        if (next == '\0' || next == '.' || (i < 4 && (next == '-' || next == '_'))) return true;
    }
    for (size_t i = 0; ending && i < sizeof endings / sizeof *endings; i++) {
        if (strcasecmp(ending, endings[i]) == 0) return true;
    }
    return false;
}

/* Is the name that of a backup, of an unfinished download, or of checksums beside a file? */
static bool is_leftover(const char *name)
{
    static const char *const endings[] = {".bak",  ".orig",    ".tmp",        ".temp",
                                          ".part", ".partial", ".incomplete", ".crc"};
    const char *const ending = strrchr(name, '.');
    for (size_t i = 0; ending && i < sizeof endings / sizeof *endings; i++) {
        if (strcasecmp(ending, endings[i]) == 0) return true;
    }
    return name[strlen(name) - 1] == '~';
}

/* Adds the file if it is text. asked: the person named it, or a pattern of theirs that says more than "all". */
static int add_file(const struct search *search, char *path, const struct stat *st, bool asked)
{
    struct source_list *const list = search->list;
    const bool regular = S_ISREG(st->st_mode);
    enum look look = LOOK_TEXT;
    struct source_file file = {.path = path,
                               .name = path + search->name_at,
                               .origin = (char *)search->origin,
                               .once = !regular,
                               .bytes = regular ? (uint64_t)st->st_size : 0,
                               .device = (uint64_t)st->st_dev,
                               .inode = (uint64_t)st->st_ino};
    if (!regular && !asked) return source_leave_out(list, LEFT_NAME, path);
    if (!asked && is_leftover(path_name(path))) return source_leave_out(list, LEFT_LEFTOVER, path);
    if (!regular && search->rules->ranks > 1) {
        FAIL(ERR_DATA, "%s can be read by one rank only: leave out mpirun, or put the text into files", path);
    }
    int rc = source_look(&file, search->rules, asked, &look);
    struct stream *const stream = file.pipe;
    const bool card = !file.jsonl && is_card(path_name(path)), left = card && !asked;
    const bool taken = rc == 0 && !left && look == LOOK_TEXT;
    if (regular && (taken || rc != 0 || stream_holds_instead(stream))) {
        const int fetched = file_check_fetched(path);
        if (fetched != 0) rc = fetched;
    }
    if (rc == 0 && !taken) {
        if (look == LOOK_JSON && !left && !list->fields) rc = source_look_fields(&file, &list->fields);
        if (rc == 0) rc = source_leave_out(list, left ? LEFT_CARD : look == LOOK_JSON ? LEFT_JSON : LEFT_NAME, path);
    } else if (rc == 0) {
        const char *const instead = stream_holds_instead(stream);
        if (instead && search->rules->rank == 0) {
            log_warn("%s holds %s, which is not what its name says, and is read as such", path, instead);
        }
        if (regular) file.pipe = NULL;
        rc = source_add_file(list, &file);
        if (card && search->below_at == 0 && search->rules->rank == 0) {
            log_warn("%s is taken as text because it is named; if it should not be, add --exclude %s", path,
                     path_name(path));
        }
        if (!regular) return rc; /* the list owns the stream */
    }
    stream_close(stream);
    return rc;
}

static int add_folder(const struct search *search, const char *path, int depth);

/* A file or folder found in a folder. */
static int add_entry(const struct search *search, char *path, int depth)
{
    struct stat st;
    struct source_rules *const rules = search->rules;
    const char *const below = path + search->below_at;
    if (path_name(path)[0] == '.') return source_leave_out(search->list, LEFT_HIDDEN, path);
    if (is_among(&rules->exclude, path, below)) return source_leave_out(search->list, LEFT_UNASKED, path);
    if (stat(path, &st) != 0) FAIL_FS("cannot read", path, ERR_DATA, NULL);
    if (S_ISDIR(st.st_mode)) return add_folder(search, path, depth + 1);
    if (rules->include.n == 0) return add_file(search, path, &st, false);
    if (!is_among(&rules->include, path, below)) return source_leave_out(search->list, LEFT_UNASKED, path);
    return add_file(search, path, &st, true);
}

static int add_folder(const struct search *search, const char *path, int depth)
{
    int rc = 0;
    char *inner = NULL;
    struct path_list entries = {.path = NULL};
    if (depth > FOLDER_DEPTH_MAX) FAIL(ERR_DATA, "%s: folders go too deep; is a link pointing upwards?", path);
    TRY_GOTO(path_list_folder(&entries, path), done);
    for (int i = 0; i < entries.n; i++) {
        TRY_GOTO(path_join(&inner, path, entries.path[i]), done);
        TRY_GOTO(add_entry(search, inner, depth), done);
        free(inner);
        inner = NULL;
    }
done:
    free(inner);
    path_list_free(&entries);
    return rc;
}

/* A file or folder that was named, or that a pattern found; asked as in add_file. */
static int add_named(struct source_list *list, struct source_rules *rules, const char *path, bool asked)
{
    int rc = 0;
    struct stat st;
    char *trimmed = strdup(path);
    if (!trimmed) FAIL(ERR_SYSTEM, "out of memory");
    for (size_t n = strlen(trimmed); n > 1 && trimmed[n - 1] == '/'; n--)
        trimmed[n - 1] = '\0';
    const char *const name = path_name(trimmed);
    struct search search = {.list = list, .rules = rules, .origin = name, .name_at = (size_t)(name - trimmed)};
    if (is_among(&rules->exclude, trimmed, name)) {
        TRY_GOTO(source_leave_out(list, LEFT_UNASKED, trimmed), done);
    } else if (stat(trimmed, &st) != 0) {
        FAIL_FS_GOTO(done, "cannot read", path, ERR_DATA, NULL);
    } else if (S_ISDIR(st.st_mode)) {
        search.below_at = strlen(trimmed) + 1;
        TRY_GOTO(add_folder(&search, trimmed, 0), done);
    } else {
        TRY_GOTO(add_file(&search, trimmed, &st, asked), done);
    }
done:
    free(trimmed);
    return rc;
}

/* Adds what `folder`/`pattern` finds, folder NULL being where the program runs: in the order of the names, part by part. As
 * in bash, ** stands for any number of folders, but for none that is hidden or a link. */
static int add_found(struct source_list *list, struct source_rules *rules, const char *folder, const char *pattern)
{
    int rc = 0;
    char *path = NULL, *part = NULL;
    struct path_list entries = {.path = NULL};
    const size_t bytes = strcspn(pattern, "/"), slashes = strspn(pattern + bytes, "/");
    const char *const rest = pattern + bytes + slashes;
    const bool stars = is_stars(pattern, bytes), last = *rest == '\0';
    struct stat st;
    part = strndup(pattern, bytes);
    if (!part) FAIL(ERR_SYSTEM, "out of memory");
    if (stars && last) { /* all that is in the folder */
        TRY_GOTO(add_named(list, rules, folder ? folder : ".", false), done);
    } else if (!stars && !strpbrk(part, "*?[\\")) {
        TRY_GOTO(path_join(&path, folder, part), done);
        if (stat(path, &st) == 0) {
            TRY_GOTO(last ? add_named(list, rules, path, true) : add_found(list, rules, path, rest), done);
        }
    } else {
        if (stars) TRY_GOTO(add_found(list, rules, folder, rest), done);
        TRY_GOTO(path_list_folder(&entries, folder ? folder : "."), done);
        for (int i = 0; i < entries.n; i++) {
            const char *const name = entries.path[i];
            if (stars ? name[0] == '.' : !name_matches(part, bytes, name, strlen(name))) continue;
            free(path);
            TRY_GOTO(path_join(&path, folder, name), done);
            const bool is_folder =
                stars ? lstat(path, &st) == 0 && S_ISDIR(st.st_mode) : stat(path, &st) == 0 && S_ISDIR(st.st_mode);
            if (!stars && last && (slashes == 0 || is_folder)) {
                TRY_GOTO(add_named(list, rules, path, strspn(part, "*") < bytes), done);
            } else if (!last && is_folder) {
                TRY_GOTO(add_found(list, rules, path, stars ? pattern : rest), done);
            }
        }
    }
done:
    free(path);
    free(part);
    path_list_free(&entries);
    return rc;
}

static int add_input(struct source_list *list, struct source_rules *rules, const char *input)
{
    struct stat st;
    char left[512];
    const int before = list->files;
    if (strcmp(input, "-") == 0) input = "/dev/stdin";
    if (stat(input, &st) == 0) {
        TRY(add_named(list, rules, input, true));
    } else if (errno != ENOENT && errno != ENOTDIR && errno != ENAMETOOLONG) {
        FAIL_FS("cannot read", input, ERR_DATA, NULL);
    } else if (strpbrk(input, "*?[")) {
        const size_t root = strspn(input, "/");
        TRY(add_found(list, rules, root > 0 ? "/" : NULL, input + root));
    } else {
        FAIL(ERR_DATA, "there is no input file or folder %s", input);
    }
    if (list->files > before) return 0;
    (void)source_describe_left(list, left, sizeof left);
    if (*left == '\0') FAIL(ERR_DATA, "nothing matches the input %s", input);
    if (rules->include.n > 0) {
        FAIL(ERR_DATA, "%s holds nothing that --include %s%s takes; left out: %s", input, rules->include.word[0],
             rules->include.n > 1 ? " ..." : "", left);
    }
    if (list->fields) {
        FAIL(ERR_DATA, "no JSON line in %s has the field %s; %s: name that of the text with --text-key. Left out: %s",
             input, rules->text_key, list->fields, left);
    }
    FAIL(
        ERR_DATA,
        "%s holds no text: wanted are .txt, .text, .md, .jsonl, .ndjson and JSON lines of any name; name other files "
        "themselves, or with --include. Left out: %s",
        input, left);
}

int source_add(struct source_list *list, struct source_rules *rules, const char *input)
{
    /* ? and [] stand for characters, not for bytes. */
    const locale_t utf8 = newlocale(LC_CTYPE_MASK, "C.UTF-8", (locale_t)0);
    const locale_t before = utf8 ? uselocale(utf8) : (locale_t)0;
    const int rc = add_input(list, rules, input);
    if (utf8) {
        (void)uselocale(before);
        freelocale(utf8);
    }
    return rc;
}
