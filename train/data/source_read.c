/* Reading the records of a part of a file (see source.h).
 *
 * A record belongs to the part in which its first byte lies, so parts neither overlap nor leave anything out. */
#include "data/source.h"

#include "data/stream.h"
#include "err.h"

#include <stdlib.h>
#include <string.h>

#define CHUNK_BYTES ((size_t)256 * 1024)

struct source_reader {
    struct stream *stream;
    enum source_split split;
    uint64_t max_bytes;
    uint64_t offset, end; /* of the next byte, of the part */
    int64_t line;         /* the number of the next line in the part */
    bool skip_blank;      /* lines of white space are no records */
    bool at_end;          /* of the file */
    bool blank;           /* the line read last was white space only */
    char *chunk;
    size_t used, filled; /* the bytes [used, filled) of chunk come next */
};

/* Makes sure that the chunk has a byte, unless the file has ended. */
static int fill_chunk(struct source_reader *reader)
{
    if (reader->used < reader->filled || reader->at_end) return 0;
    reader->used = 0;
    TRY(stream_read(reader->stream, reader->chunk, CHUNK_BYTES, &reader->filled));
    reader->at_end = reader->filled == 0;
    return 0;
}

/* Appends bytes as far as the limit allows. */
static int append(const struct source_reader *reader, struct record *record, const char *data, size_t bytes)
{
    const uint64_t room = reader->max_bytes - record->text.used;
    if (bytes > room) record->too_large = true;
    return buffer_add(&record->text, data, bytes > room ? room : bytes);
}

static bool is_blank(const char *text, size_t bytes)
{
    size_t i = 0;
    while (i < bytes && strchr(" \t\r\v\f", text[i]) && text[i] != '\0')
        i++;
    return i == bytes;
}

/* Appends the rest of the line without its newline, or all of the file with its newlines. */
static int read_until(struct source_reader *reader, struct record *record, bool whole_file)
{
    reader->blank = true;
    for (;;) {
        TRY(fill_chunk(reader));
        if (reader->at_end) return 0;
        const char *from = reader->chunk + reader->used;
        const size_t left = reader->filled - reader->used;
        const char *newline = whole_file ? NULL : memchr(from, '\n', left);
        const size_t bytes = newline ? (size_t)(newline - from) : left;
        TRY(append(reader, record, from, bytes));
        reader->blank = reader->blank && is_blank(from, bytes);
        reader->used += bytes + (newline ? 1 : 0);
        reader->offset += bytes + (newline ? 1 : 0);
        if (newline) {
            reader->line++;
            return 0;
        }
    }
}

static int begin_record(const struct source_reader *reader, struct record *record)
{
    record->text.used = 0;
    record->too_large = false;
    record->offset = reader->offset;
    record->line = reader->line;
    return buffer_reserve(&record->text, 1); /* so that even empty text has an address */
}

/* Takes out the byte-order mark that some editors put in front of UTF-8, and with it `cat` into the middle of a file. */
static void drop_mark(struct source_reader *reader, struct record *record, size_t from)
{
    static const char mark[] = {'\xEF', '\xBB', '\xBF'};
    char *const text = record->text.data + from;
    if (record->text.used - from < sizeof mark || memcmp(text, mark, sizeof mark) != 0) return;
    record->text.used -= sizeof mark;
    memmove(text, text + sizeof mark, record->text.used - from);
    if (from == 0) record->offset += sizeof mark;
    reader->blank = !record->too_large && is_blank(text, record->text.used - from);
}

static int read_line(struct source_reader *reader, struct record *record)
{
    const size_t from = record->text.used;
    TRY(read_until(reader, record, false));
    drop_mark(reader, record, from);
    if (record->text.used > 0 && record->text.data[record->text.used - 1] == '\r') record->text.used--;
    return 0;
}

/* Lines up to a blank one; leading blank lines are passed over. */
static int read_paragraph(struct source_reader *reader, struct record *record)
{
    bool begun = false;
    for (;;) {
        const size_t before = record->text.used;
        TRY(fill_chunk(reader));
        if (reader->at_end) break;
        TRY(read_line(reader, record));
        if (reader->blank) record->text.used = before;
        if (reader->blank && begun) break;
        if (reader->blank) {
            TRY(begin_record(reader, record));
            continue;
        }
        begun = true;
        TRY(append(reader, record, "\n", 1));
    }
    if (record->text.used > 0 && !record->too_large) record->text.used--; /* the last newline */
    return 0;
}

/* Goes to the first record that begins in the part: the first line that begins at or after `begin`. */
static int go_to(struct source_reader *reader, uint64_t begin)
{
    if (begin == 0) return 0;
    reader->offset = begin - 1;
    TRY(stream_seek(reader->stream, begin - 1));
    const uint64_t max_bytes = reader->max_bytes;
    struct record passed = {.text = {.data = NULL}};
    reader->max_bytes = 0;
    const int rc = read_until(reader, &passed, false);
    reader->max_bytes = max_bytes;
    reader->line = 1;
    buffer_free(&passed.text);
    return rc;
}

static int start(struct source_reader *reader, struct source_file *file, uint64_t begin)
{
    reader->chunk = malloc(CHUNK_BYTES);
    if (!reader->chunk) FAIL(ERR_SYSTEM, "out of memory");
    if (file->pipe) {
        reader->stream = file->pipe;
        file->pipe = NULL;
    } else {
        TRY(stream_open(&reader->stream, file->path));
    }
    return go_to(reader, begin);
}

int source_reader_open(struct source_reader **out, const struct source_list *list, const struct source_unit *unit,
                       enum source_split text_split, uint64_t max_bytes)
{
    struct source_file *file = &list->file[unit->file];
    *out = NULL;
    struct source_reader *reader = calloc(1, sizeof *reader);
    if (!reader) FAIL(ERR_SYSTEM, "out of memory");
    reader->split = file->jsonl ? SPLIT_LINE : text_split;
    reader->skip_blank = file->jsonl;
    reader->max_bytes = max_bytes;
    reader->end = unit->end;
    reader->line = 1;
    const int rc = start(reader, file, unit->begin);
    if (rc == 0) {
        *out = reader;
    } else {
        source_reader_close(reader);
    }
    return rc;
}

/* The record that begins here; the file has not ended. */
static int read_record(struct source_reader *reader, struct record *record)
{
    switch (reader->split) {
    case SPLIT_FILE:
        TRY(read_until(reader, record, true));
        drop_mark(reader, record, 0);
        return 0;
    case SPLIT_LINE:
        return read_line(reader, record);
    case SPLIT_BLANK_LINE:
        return read_paragraph(reader, record);
    }
    return 0;
}

/* Was there only white space between records? */
static bool is_nothing(const struct source_reader *reader, const struct record *record)
{
    if (reader->split == SPLIT_BLANK_LINE) return record->text.used == 0 && !record->too_large;
    return reader->skip_blank && reader->blank;
}

int source_reader_next(struct source_reader *reader, struct record *record, bool *end)
{
    do {
        TRY(fill_chunk(reader));
        TRY(begin_record(reader, record));
        *end = reader->at_end || reader->offset >= reader->end;
        if (*end) break;
        TRY(read_record(reader, record));
    } while (is_nothing(reader, record));
    /* An empty file is one empty document, to be counted. */
    if (*end && reader->split == SPLIT_FILE && reader->offset == 0 && reader->end > 0) *end = false;
    if (reader->at_end) reader->end = 0;
    return 0;
}

int64_t source_reader_lines(const struct source_reader *reader)
{
    return reader->line - 1;
}

uint64_t source_reader_file_bytes(const struct source_reader *reader)
{
    return stream_file_bytes(reader->stream);
}

void source_reader_close(struct source_reader *reader)
{
    if (!reader) return;
    stream_close(reader->stream);
    free(reader->chunk);
    free(reader);
}
