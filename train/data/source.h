/* The inputs of `tatara prepare`: which files, how they are divided into work, and the records in them.
 *
 * Invariant: files, their order and the division depend on the inputs alone, never on ranks or threads. Threads: a
 * reader belongs to one thread at a time; the list is only read once it is made. */
#ifndef TATARA_SOURCE_H
#define TATARA_SOURCE_H

#include "data/args.h"
#include "data/buffer.h"

#include <stdbool.h>
#include <stdint.h>

/* What one record is. JSONL files are always read by line. */
enum source_split { SPLIT_FILE, SPLIT_LINE, SPLIT_BLANK_LINE };

/* What files hold: found out by name and content, or said by the person. */
enum source_format { FORMAT_AUTO, FORMAT_TEXT, FORMAT_JSONL };

/* Which files are taken. */
struct source_rules {
    enum source_format format;
    const char *text_key;              /* what JSON lines must hold to be told from other JSON */
    struct arg_words include, exclude; /* patterns: of what folders hold, of everything */
    int rank, ranks;                   /* 0 warns; a pipe can be read by one alone */
};

/* What is left out, and what the report calls it. */
#define LEFT_LIST(X)                                               \
    X(LEFT_HIDDEN, "hidden")                                       \
    X(LEFT_CARD, "cards, licences, scripts")                       \
    X(LEFT_LEFTOVER, "backups and unfinished files")               \
    X(LEFT_NAME, "not text by their names")                        \
    X(LEFT_JSON, "JSON that is no lines with the field of a text") \
    X(LEFT_UNASKED, "by --include or --exclude")                   \
    X(LEFT_TWICE, "named twice, and read once")

enum left {
#define X(name, text) name,
    LEFT_LIST(X)
#undef X
        LEFTS
};

struct stream;

struct source_file {
    char *path;
    char *name;   /* the input's last part, and what lies below it: names documents that have no id */
    char *origin; /* the input's last part without its endings: the source of documents that name none */
    uint64_t bytes, device, inode;
    bool jsonl, packed;
    bool once;           /* a pipe */
    struct stream *pipe; /* open until it is read */
};

/* A part of a file: the records that begin in [begin, end) of its text. Whole files end at UINT64_MAX. */
struct source_unit {
    int file;
    uint64_t begin, end;
    uint64_t file_bytes; /* to be read, before decompression */
};

struct source_list {
    struct source_file *file;
    int files, file_capacity;
    struct source_unit *unit;
    int units, unit_capacity;
    struct {
        int64_t n; /* files, and folders with all that they hold */
        char *first;
    } left[LEFTS];
    char *fields; /* "the fields of FILE are a, b", of JSON lines left out for want of a text; NULL: of none */
};

/* Adds a file, all text in a folder and below it, what a pattern matches, or standard input ("-"). Marks the patterns of
 * `rules` that match something. ERR_DATA when there is nothing, or what is named cannot be read as text. */
int source_add(struct source_list *list, struct source_rules *rules, const char *input);
/* To be called when all is added: takes out what was added twice, and refuses patterns that match nothing. */
int source_settle(struct source_list *list, const struct source_rules *rules);
/* Writes what was left out: "2 hidden (.git, ...), 1 ...". Returns `words`, empty when nothing was. */
const char *source_describe_left(const struct source_list *list, char *words, size_t room);
/* Keeps what was left out. */
int source_leave_out(struct source_list *list, enum left why, const char *path);
/* Adds a file whose path, names and content are known. The strings are copied, with what is no UTF-8 as \xNN in the names. */
int source_add_file(struct source_list *list, const struct source_file *wanted);
/* Divides all files: those that can be read from the middle into parts of about part_bytes. */
int source_divide(struct source_list *list, enum source_split text_split, uint64_t part_bytes);
/* All bytes, compressed ones counted as the text that they usually hold. */
uint64_t source_text_bytes(const struct source_list *list);
/* The same for one unit. */
uint64_t source_unit_text_bytes(const struct source_list *list, const struct source_unit *unit);
/* XXH3 over the files' names and sizes: ranks that see other files get another number. */
uint64_t source_fingerprint(const struct source_list *list);
void source_free(struct source_list *list);

/* A record as it stands in the file. */
struct record {
    struct buffer text;
    uint64_t offset; /* of its first byte in the file's text */
    int64_t line;    /* from 1, of the unit's */
    bool too_large;  /* longer than the limit; text is not all of it */
};

struct source_reader;

/* Reads the records of a unit, each of at most max_bytes. */
int source_reader_open(struct source_reader **out, const struct source_list *list, const struct source_unit *unit,
                       enum source_split text_split, uint64_t max_bytes);
/* The next record into `record`, whose text is written over; *end when there is none. */
int source_reader_next(struct source_reader *reader, struct record *record, bool *end);
/* Lines that began in the unit so far. */
int64_t source_reader_lines(const struct source_reader *reader);
/* Bytes read from the file so far, before decompression. */
uint64_t source_reader_file_bytes(const struct source_reader *reader);
void source_reader_close(struct source_reader *reader);

#endif
