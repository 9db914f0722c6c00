/* From a record of a file to a document: its text, its label, and the reason why it is dropped if it is.
 *
 * Threads: documents are independent of each other; each belongs to one thread at a time. */
#ifndef TATARA_DOCUMENT_H
#define TATARA_DOCUMENT_H

#include "data/shard.h"
#include "data/source.h"
#include "data/tokenizer.h"

#include <jansson.h>

/* Why a document is not used: name, what the report calls it. */
#define DROP_LIST(X)                       \
    X(DROP_EMPTY, "empty")                 \
    X(DROP_NOT_UTF8, "not UTF-8")          \
    X(DROP_NUL, "with NUL bytes")          \
    X(DROP_TOO_LARGE, "too large")         \
    X(DROP_MALFORMED, "not a JSON object") \
    X(DROP_NO_TEXT, "without a text field")

enum drop {
    DROP_NONE = -1,
#define X(name, text) name,
    DROP_LIST(X)
#undef X
        DROPS
};

const char *drop_name(enum drop drop);

struct document_rules {
    const char *text_key, *id_key;           /* of JSON objects */
    const char *source, *licence, *language; /* for documents that name none; source NULL: the file's origin */
    uint64_t max_bytes;                      /* of text */
    int32_t eos;
};

struct document {
    struct record record;
    const struct source_file *file;
    json_t *json; /* of the record; the label may point into it */
    char *own_id; /* when the record has none that is a text */
    enum drop drop;
    struct shard_label label;
    uint64_t text_bytes;
    int32_t *tokens; /* with EOS */
    int64_t n;
};

/* The largest record that can hold a document within the rules: in JSON a byte may be written as six. */
uint64_t document_max_record_bytes(const struct document_rules *rules);
/* Fills all of the document from record and file. A bad document is no error: it gets its reason in `drop`. */
int document_make(struct document *document, const struct document_rules *rules, struct tokenizer *tokenizer);
/* Frees all but a small record's memory, which the next record uses again. */
void document_clear(struct document *document);
bool document_is_utf8(const char *text, size_t bytes);

#endif
