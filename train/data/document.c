/* From a record to a document (see document.h). */
#include "data/document.h"

#include "err.h"
#include "utf8.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A record's memory is kept for the next record unless it is large: there are a thousand of them. */
#define KEPT_BYTES_MAX ((size_t)64 * 1024)

/* A field lies at FIELD_…, and at FIELDS more under another usual key. */
enum { MEMBERS = 2 * FIELDS };

const char *drop_name(enum drop drop)
{
    static const char *const names[] = {
#define X(name, text) text,
        DROP_LIST(X)
#undef X
    };
    return names[drop];
}

/* Nothing but ASCII white space and U+3000, the ideographic space. */
static bool is_blank(const char *text, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++) {
        if (bytes - i >= 3 && memcmp(text + i, "\xE3\x80\x80", 3) == 0) {
            i += 2;
        } else if (text[i] == '\0' || !strchr(" \t\n\r\v\f", text[i])) {
            return false;
        }
    }
    return true;
}

/* Where the text stops being UTF-8, at the latest where it changes into the two-byte codes of ISO-2022-JP. */
static size_t sound_bytes(const char *text, size_t bytes)
{
    const char *const escape = memchr(text, '\x1B', bytes);
    const size_t at = escape ? (size_t)(escape - text) : bytes;
    const bool jis = bytes - at >= 3 && escape[1] == '$' && (escape[2] == 'B' || escape[2] == '@');
    return utf8_valid_bytes(text, jis ? at : bytes);
}

/* The members that hold the fields, two for each: under its key, or under both of its usual keys. */
static void want_fields(const struct document_rules *rules, struct jsonl_member member[MEMBERS])
{
    static const char *const usual[FIELDS][2] = {
#define X(name, key, other) {key, other},
        FIELD_LIST(X)
#undef X
    };
    for (int f = 0; f < FIELDS; f++) {
        member[f] = (struct jsonl_member){.path = rules->key[f] ? rules->key[f] : usual[f][0]};
        member[FIELDS + f] = (struct jsonl_member){.path = rules->key[f] ? NULL : usual[f][1]};
    }
}

/* Scans the record; what it lacks to be one with a text. */
static enum drop scan_record(struct document *document, const struct document_rules *rules,
                             struct jsonl_member member[MEMBERS])
{
    static const enum drop drops[] = {
        [JSONL_SOUND] = DROP_NONE, [JSONL_NO_OBJECT] = DROP_NO_OBJECT, [JSONL_CUT_OFF] = DROP_CUT_OFF,
        [JSONL_NAN] = DROP_NAN,    [JSONL_TOO_DEEP] = DROP_TOO_DEEP,   [JSONL_MALFORMED] = DROP_MALFORMED};
    struct buffer *text = &document->record.text;
    want_fields(rules, member);
    const enum drop drop = drops[jsonl_scan(text->data, text->used, member, MEMBERS, &document->fault_at)];
    if (drop != DROP_NONE) return drop;
    for (int m = 0; m < MEMBERS; m++) {
        const enum jsonl_kind kind = member[m].kind;
        if (kind != JSONL_ABSENT && kind != JSONL_OBJECT && kind != JSONL_ARRAY) document->found[m % FIELDS] = true;
    }
    const enum jsonl_kind kind = member[FIELD_TEXT].kind;
    return kind == JSONL_STRING   ? DROP_NONE
           : kind == JSONL_ABSENT ? DROP_NO_TEXT
           : kind == JSONL_NULL   ? DROP_NULL_TEXT
                                  : DROP_NO_STRING;
}

/* Brings the members into the form that they have in the document. */
static enum drop unescape(struct jsonl_member member[MEMBERS])
{
    for (int m = 0; m < MEMBERS; m++) {
        int same = 0; /* one value may be taken twice */
        while (same < m && (member[same].kind != member[m].kind || member[same].text != member[m].text))
            same++;
        if (same < m) {
            member[m] = member[same];
        } else if (member[m].kind == JSONL_STRING || member[m].kind == JSONL_NUMBER) {
            if (!jsonl_unescape(&member[m])) return DROP_SURROGATE;
        }
    }
    return DROP_NONE;
}

/* The field as it is in one of its two members, else the fallback. */
static const char *label_of(const struct jsonl_member member[MEMBERS], enum field field, const char *fallback)
{
    for (int m = (int)field; m < MEMBERS; m += FIELDS) {
        const bool usable = member[m].kind == JSONL_STRING || member[m].kind == JSONL_NUMBER;
        if (usable && member[m].bytes > 0) return member[m].text;
    }
    return fallback;
}

/* Sets the label. The id is the record's own, or the file's name and the place in it. */
static int set_label(struct document *document, const struct document_rules *rules,
                     const struct jsonl_member member[MEMBERS])
{
    const struct source_file *file = document->file;
    struct shard_label *label = &document->label;
    label->source = label_of(member, FIELD_SOURCE, rules->source ? rules->source : file->origin);
    label->licence = label_of(member, FIELD_LICENCE, rules->licence);
    label->language = label_of(member, FIELD_LANGUAGE, rules->language);
    label->id = label_of(member, FIELD_ID, NULL);
    if (label->id) return 0;
    const size_t bytes = strlen(file->name) + 32;
    document->own_id = malloc(bytes);
    if (!document->own_id) FAIL(ERR_SYSTEM, "out of memory for an id");
    (void)snprintf(document->own_id, bytes, "%s@%" PRIu64, file->name, document->record.offset);
    label->id = document->own_id;
    return 0;
}

/* Finds the text in the record; the reason when there is none. */
static enum drop find_document(struct document *document, const struct document_rules *rules,
                               struct jsonl_member member[MEMBERS], const char **text, size_t *bytes)
{
    *text = document->record.text.data;
    *bytes = document->record.text.used;
    if (document->record.too_large) return DROP_TOO_LARGE;
    document->fault_at = sound_bytes(*text, *bytes);
    if (document->fault_at < *bytes) return DROP_NOT_UTF8;
    if (document->file->jsonl) {
        enum drop drop = scan_record(document, rules, member);
        if (drop == DROP_NONE) drop = unescape(member);
        if (drop != DROP_NONE) return drop;
        *text = member[FIELD_TEXT].text;
        *bytes = member[FIELD_TEXT].bytes;
        for (int m = 0; m < MEMBERS; m++) {
            if (m != FIELD_TEXT && member[m].kind == JSONL_STRING && strlen(member[m].text) < member[m].bytes)
                return DROP_NUL;
        }
    }
    if (is_blank(*text, *bytes)) return DROP_EMPTY;
    if (*bytes > rules->max_bytes) return DROP_TOO_LARGE;
    return memchr(*text, '\0', *bytes) ? DROP_NUL : DROP_NONE;
}

static int encode(struct document *document, const struct document_rules *rules, struct tokenizer *tokenizer,
                  const char *text, size_t bytes)
{
    TRY(tokenizer_encode(tokenizer, text, bytes, &document->tokens, &document->n));
    if (document->n == 0) { /* characters that the tokenizer's normalisation takes away */
        document->drop = DROP_EMPTY;
        return 0;
    }
    document->fidelity = (struct fidelity){.unknown = 0};
    for (int64_t i = 0; i < document->n; i++) {
        document->fidelity.unknown += document->tokens[i] == rules->unk;
        document->fidelity.end_marks += document->tokens[i] == rules->eos;
    }
    if (document->compared)
        TRY(fidelity_measure(&document->fidelity, tokenizer, text, bytes, document->tokens, document->n));
    int32_t *tokens = realloc(document->tokens, ((size_t)document->n + 2) * sizeof *tokens);
    if (!tokens) FAIL(ERR_SYSTEM, "out of memory for %" PRId64 " tokens", document->n);
    document->tokens = tokens;
    if (rules->bos >= 0) {
        memmove(tokens + 1, tokens, (size_t)document->n++ * sizeof *tokens);
        tokens[0] = rules->bos;
    }
    tokens[document->n++] = rules->eos;
    document->text_bytes = bytes;
    return 0;
}

uint64_t document_max_record_bytes(const struct document_rules *rules)
{
    return 6 * rules->max_bytes + ((uint64_t)1 << 20);
}

int document_make(struct document *document, const struct document_rules *rules, struct tokenizer *tokenizer)
{
    struct jsonl_member member[MEMBERS] = {{.path = NULL}};
    const char *text = NULL;
    size_t bytes = 0;
    memset(document->found, 0, sizeof document->found);
    document->drop = find_document(document, rules, member, &text, &bytes);
    if (document->drop != DROP_NONE) return 0;
    TRY(set_label(document, rules, member));
    return encode(document, rules, tokenizer, text, bytes);
}

void document_clear(struct document *document)
{
    free(document->own_id);
    free(document->tokens);
    document->own_id = NULL;
    document->tokens = NULL;
    document->n = 0;
    if (document->record.text.capacity > KEPT_BYTES_MAX) buffer_free(&document->record.text);
}
