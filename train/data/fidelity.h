/* What a tokenizer does not give back: documents are encoded, decoded and compared. Counts, which add up over documents
 * and ranks. Threads: nothing is shared. */
#ifndef TATARA_FIDELITY_H
#define TATARA_FIDELITY_H

#include "data/tokenizer.h"

#include <jansson.h>

/* In what ways a text changes: name, words after a number. */
#define FIDELITY_LIST(X)                                                                                 \
    X(characters, "characters changed or dropped by normalisation")                                      \
    X(newlines, "newlines lost")                                                                         \
    X(space_runs, "runs of spaces cut to one")                                                           \
    X(trimmed, "document(s) without the spaces at their ends")                                           \
    X(spaces, "spaces come back as \xE2\x96\x81, having no piece (--user_defined_symbols=\xE2\x96\x81)") \
    X(otherwise, "document(s) changed otherwise")

struct fidelity {
    int64_t unknown;   /* tokens that are <unk>, of all documents */
    int64_t end_marks; /* tokens within the text that are the piece which ends documents, of all documents */
    int64_t documents, text_bytes, changed; /* that were compared; documents that did not come back as they were */
#define X(name, words) int64_t name;
    FIDELITY_LIST(X)
#undef X
};

/* Of a document no more than its first bytes is compared. */
#define FIDELITY_BYTES_MAX ((size_t)32 * 1024)

/* Compares the beginning of a document, at most so many bytes. The text, which has no NUL, became these tokens. */
int fidelity_measure(struct fidelity *fidelity, const struct tokenizer *tokenizer, const char *text, size_t bytes,
                     const int32_t *tokens, int64_t n);
void fidelity_add(struct fidelity *sum, const struct fidelity *more);
/* What dataset.json says of it, where all documents have so many tokens. NULL when memory is out. */
json_t *fidelity_json(const struct fidelity *fidelity, const struct tokenizer *tokenizer, int64_t tokens);
/* Puts that into words; returns whether anything is lost. */
bool fidelity_words(const json_t *json, char *words, size_t room);
/* How to make a tokenizer that loses nothing. */
#define FIDELITY_REMEDY                                                                      \
    "train the tokenizer with spm_train --byte_fallback --normalization_rule_name=identity " \
    "--remove_extra_whitespaces=false --add_dummy_prefix=false"

#endif
