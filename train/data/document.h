/* From a record of a file to a document: its text, its label, and the reason why it is dropped if it is.
 *
 * Threads: documents are independent of each other; each belongs to one thread at a time. */
#ifndef TATARA_DOCUMENT_H
#define TATARA_DOCUMENT_H

#include "data/fidelity.h"
#include "data/jsonl.h"
#include "data/shard.h"
#include "data/source.h"
#include "data/tokenizer.h"

/* Why a document is not used: name, what the report calls it. */
#define DROP_LIST(X)                                \
    X(DROP_EMPTY, "empty")                          \
    X(DROP_NOT_UTF8, "not UTF-8")                   \
    X(DROP_NUL, "with NUL bytes")                   \
    X(DROP_TOO_LARGE, "too large")                  \
    X(DROP_MALFORMED, "not JSON")                   \
    X(DROP_CUT_OFF, "cut-off JSON")                 \
    X(DROP_NAN, "with NaN or Infinity")             \
    X(DROP_TOO_DEEP, "nested too deeply")           \
    X(DROP_SURROGATE, "with an unpaired surrogate") \
    X(DROP_NO_OBJECT, "not a JSON object")          \
    X(DROP_NO_TEXT, "without a text field")         \
    X(DROP_NULL_TEXT, "whose text is null")         \
    X(DROP_NO_STRING, "whose text is no string")

enum drop {
    DROP_NONE = -1,
#define X(name, text) name,
    DROP_LIST(X)
#undef X
        DROPS
};

const char *drop_name(enum drop drop);

/* What is taken from a JSON object: name, the usual key, another usual key. */
#define FIELD_LIST(X)                      \
    X(FIELD_TEXT, "text", NULL)            \
    X(FIELD_ID, "id", NULL)                \
    X(FIELD_SOURCE, "source", NULL)        \
    X(FIELD_LICENCE, "licence", "license") \
    X(FIELD_LANGUAGE, "language", "lang")

enum field {
#define X(name, key, other) name,
    FIELD_LIST(X)
#undef X
        FIELDS
};

struct document_rules {
    const char *key[FIELDS];                 /* where a field lies in a JSON object; NULL: under its usual keys */
    const char *source, *licence, *language; /* for documents that name none; source NULL: the file's origin */
    uint64_t max_bytes;                      /* of text */
    enum source_split text_split;
    int32_t unk;      /* the token for what the tokenizer does not know */
    int32_t bos, eos; /* tokens before and after each document; bos −1: none */
};

struct document {
    struct record record;
    const struct source_file *file;
    int unit;     /* of the list, in which the record begins */
    char *own_id; /* when the record has none */
    enum drop drop;
    size_t fault_at;    /* where the record stops to be JSON, or UTF-8 */
    bool found[FIELDS]; /* the record has the field, be it null */
    struct shard_label label;
    uint64_t text_bytes;
    int32_t *tokens; /* with BOS, if any, and EOS */
    int64_t n;
    bool compared; /* set by the reader: it is one of those of which is measured what the tokenizer gives back */
    struct fidelity fidelity;
};

/* The largest record that can hold a document within the rules: in JSON a byte may be written as six. */
uint64_t document_max_record_bytes(const struct document_rules *rules);
/* Fills all of the document from record and file. A bad document is no error: it gets its reason in `drop`. The record's
 * text is changed unless it is dropped for what it is. */
int document_make(struct document *document, const struct document_rules *rules, struct tokenizer *tokenizer);
/* Says in words what is wrong with a document just dropped, and the remedy. */
void document_explain(const struct document *document, const struct document_rules *rules, char *words, size_t room);
/* Frees all but a small record's memory, which the next record uses again. */
void document_clear(struct document *document);

#endif
