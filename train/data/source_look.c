/* What a file holds (see source_look.h). */
#include "data/source_look.h"

#include "data/files.h"
#include "data/jsonl.h"
#include "data/packing.h"
#include "data/stream.h"
#include "err.h"
#include "utf8.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

/* So much of a file's text is looked at, and at most so much when its first line is as long. */
#define LOOK_BYTES ((size_t)64 * 1024)
#define LOOK_BYTES_MAX ((size_t)32 << 20)

enum { NAMES_BYTES = 400 };

/* What the ending says. */
enum ending { ENDING_NONE, ENDING_TEXT, ENDING_LINES, ENDING_JSON, ENDING_TABLE };

/* What the content says. */
enum content { CONTENT_OTHER, CONTENT_LONG_LINE, CONTENT_JSON, CONTENT_LINES, CONTENT_LINES_WITH_TEXT };

static enum ending ending_of(const char *path)
{
    static const struct {
        const char *ending;
        enum ending kind;
    } known[] = {
        {".txt", ENDING_TEXT},     {".text", ENDING_TEXT}, {".md", ENDING_TEXT},   {".jsonl", ENDING_LINES},
        {".ndjson", ENDING_LINES}, {".json", ENDING_JSON}, {".csv", ENDING_TABLE}, {".tsv", ENDING_TABLE},
    };
    const char *const name = path_name(path);
    const size_t bytes = packing_stem_bytes(name);
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        const size_t n = strlen(known[i].ending);
        if (bytes > n && strncasecmp(name + bytes - n, known[i].ending, n) == 0) return known[i].kind;
    }
    return ENDING_NONE;
}

/* Files of other kinds that a person may take for text, by the bytes at some place: what they are, with what to do. */
static const char *foreign_kind(const char *text, size_t bytes)
{
    static const struct {
        size_t at, bytes;
        const char *magic, *kind;
    } kinds[] = {
        {0, 4, "PAR1", "a Parquet file; write its records as JSON lines (pyarrow, duckdb)"},
        {0, 6, "ARROW1", "an Arrow file; write its records as JSON lines (pyarrow)"},
        {0, 4, "\xFF\xFF\xFF\xFF", "an Arrow stream; write its records as JSON lines (pyarrow)"},
        {257, 5, "ustar", "a tar archive; unpack it and name the folder"},
        {0, 4, "PK\3\4", "a zip archive; unpack it and name the folder"},
        {0, 4, "7z\xBC\xAF", "a 7z archive; unpack it and name the folder"},
        {0, 4, "Rar!", "a RAR archive; unpack it and name the folder"},
        {0, 4, "\x04\x22\x4D\x18", "compressed with lz4; unpack it, or pack it with zstd"},
        {0, 3, "\x5D\0\0", "compressed as .lzma; unpack it with xz -d, or pack it with xz"},
        {0, 4, "LZIP", "compressed with lzip; unpack it, or pack it with xz"},
        {0, 5, "%PDF-", "a PDF; take the text out of it"},
        {0, 15, "SQLite format 3", "an SQLite database; write its records as JSON lines"},
        {0, 4, "\x89HDF", "an HDF5 file; is it a shard that prepare has made?"},
    };
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        const size_t at = kinds[i].at;
        if (bytes >= at + kinds[i].bytes && memcmp(text + at, kinds[i].magic, kinds[i].bytes) == 0) {
            return kinds[i].kind;
        }
    }
    return NULL;
}

/* Passes over blank lines and marks of byte order; the bytes up to the end of the line, or of the text. */
static size_t find_first_line(char **text, size_t *bytes)
{
    for (size_t n = 1; n > 0 && *bytes > 0; *text += n, *bytes -= n) {
        n = *bytes >= 3 && memcmp(*text, "\xEF\xBB\xBF", 3) == 0
                ? 3
                : **text != '\0' && strchr(" \t\r\n", **text) != NULL;
    }
    const char *const newline = memchr(*text, '\n', *bytes);
    return newline ? (size_t)(newline - *text) : *bytes;
}

/* What the beginning of a text says. */
static enum content content_of(char *text, size_t bytes, const char *text_key)
{
    size_t at = 0;
    struct jsonl_member member = {.path = text_key};
    const size_t line_bytes = find_first_line(&text, &bytes);
    if (bytes == 0 || (*text != '{' && *text != '[')) return CONTENT_OTHER;
    const enum jsonl_fault line = jsonl_scan(text, line_bytes, &member, 1, &at);
    if (line == JSONL_SOUND) return member.kind == JSONL_STRING ? CONTENT_LINES_WITH_TEXT : CONTENT_LINES;
    if (line == JSONL_CUT_OFF && line_bytes == bytes && *text == '{') return CONTENT_LONG_LINE;
    const enum jsonl_fault all = jsonl_scan(text, bytes, &member, 1, &at);
    if (all == JSONL_SOUND || all == JSONL_NO_OBJECT || all == JSONL_CUT_OFF) return CONTENT_JSON;
    /* A first line that is damaged. */
    const size_t space = strspn(text + 1, " ") + 1;
    return *text == '{' && space < line_bytes && text[space] == '"' ? CONTENT_LINES : CONTENT_OTHER;
}

/* Looks at as much text as the first line needs. */
static int read_content(struct stream *stream, const char *text_key, enum content *content, const char **foreign)
{
    char *text = NULL;
    const char *instead = NULL;
    size_t bytes = 0, wanted = LOOK_BYTES;
    for (;; wanted *= 8) {
        TRY(stream_peek(stream, wanted, &text, &bytes));
        *content = content_of(text, bytes, text_key);
        if (*content != CONTENT_LONG_LINE) break;
        *content = bytes < wanted ? CONTENT_LINES : CONTENT_LINES_WITH_TEXT;
        if (bytes < wanted || wanted > LOOK_BYTES_MAX) break;
    }
    *foreign =
        packing_find("", text, bytes, &instead) ? "compressed twice; unpack it once" : foreign_kind(text, bytes);
    return 0;
}

/* Decides by ending and content, for a file that the person named. */
static int look_at_named(struct source_file *file, enum ending ending, enum content content)
{
    file->jsonl = ending == ENDING_LINES || ending == ENDING_JSON || content >= CONTENT_LINES;
    if (ending == ENDING_LINES) return 0;
    if (ending == ENDING_TABLE) {
        FAIL(ERR_DATA,
             "%s is a table by its name, which is not read: write it as JSON lines, or call it --format text",
             file->path);
    }
    if (ending == ENDING_TEXT && content >= CONTENT_LINES) {
        FAIL(ERR_DATA, "%s is text by its name and holds JSON lines: say what it is, --format jsonl or --format text",
             file->path);
    }
    if (content == CONTENT_JSON) {
        FAIL(ERR_DATA,
             "%s holds JSON, but not an object on each line: make lines with jq -c . (jq -c '.[]' of an array), or "
             "call it --format text",
             file->path);
    }
    return 0;
}

/* The same for a file found in a folder, whose ending is not that of text: left out unless it is lines for certain. */
static int look_at_found(struct source_file *file, enum ending ending, enum content content, enum look *look)
{
    const bool lines = ending == ENDING_LINES || content == CONTENT_LINES_WITH_TEXT;
    file->jsonl = lines;
    *look = lines ? LOOK_TEXT : ending == ENDING_JSON || content == CONTENT_LINES ? LOOK_JSON : LOOK_OTHER;
    return 0;
}

static int look_into(struct source_file *file, const struct source_rules *rules, bool asked, enum look *look)
{
    const char *foreign = NULL;
    enum content content = CONTENT_OTHER;
    const enum ending ending = ending_of(file->path);
    const bool sure = ending == ENDING_LINES || (rules->format != FORMAT_AUTO && (asked || ending == ENDING_TEXT));
    *look = LOOK_TEXT;
    file->jsonl = rules->format == FORMAT_JSONL || ending == ENDING_LINES;
    if (!sure) {
        TRY(read_content(file->pipe, rules->text_key, &content, &foreign));
        if (foreign && asked && ending != ENDING_TEXT) FAIL(ERR_DATA, "%s is %s", file->path, foreign);
        TRY(asked || ending == ENDING_TEXT ? look_at_named(file, ending, content)
                                           : look_at_found(file, ending, content, look));
    }
    if (rules->format != FORMAT_AUTO) file->jsonl = rules->format == FORMAT_JSONL;
    return 0;
}

int source_look(struct source_file *file, const struct source_rules *rules, bool asked, enum look *look)
{
    TRY(stream_open(&file->pipe, file->path));
    file->packed = stream_is_packed(file->pipe);
    return look_into(file, rules, asked, look);
}

int source_look_fields(const struct source_file *file, char **words)
{
    size_t bytes = 0, at = 0;
    char *text = NULL, names[NAMES_BYTES], path[NAMES_BYTES];
    TRY(stream_peek(file->pipe, LOOK_BYTES, &text, &bytes));
    const size_t line_bytes = find_first_line(&text, &bytes);
    if (line_bytes == 0 || jsonl_scan(text, line_bytes, NULL, 0, &at) != JSONL_SOUND) return 0;
    jsonl_names(text, line_bytes, names, sizeof names);
    const size_t room = sizeof names + sizeof path + 32;
    *words = malloc(room);
    if (!*words) FAIL(ERR_SYSTEM, "out of memory");
    (void)snprintf(*words, room, "the fields of %s are %s", utf8_show(file->path, "", path, sizeof path), names);
    return 0;
}
