/* From a record to a document (see document.h). */
#include "data/document.h"

#include "err.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A record's memory is kept for the next record unless it is large: there are a thousand of them. */
#define KEPT_BYTES_MAX ((size_t)64 * 1024)

const char *drop_name(enum drop drop)
{
    static const char *const names[] = {
#define X(name, text) text,
        DROP_LIST(X)
#undef X
    };
    return names[drop];
}

/* Well-formed UTF-8 (The Unicode Standard, table 3-7): no overlong forms, no surrogates, nothing above U+10FFFF. */
bool document_is_utf8(const char *text, size_t bytes)
{
    const unsigned char *p = (const unsigned char *)text, *const end = p + bytes;
    while (p < end) {
        const unsigned char lead = *p++;
        if (lead < 0x80) continue;
        const int more = lead >= 0xC2 && lead < 0xE0   ? 1
                         : lead >= 0xE0 && lead < 0xF0 ? 2
                         : lead >= 0xF0 && lead < 0xF5 ? 3
                                                       : 0;
        if (more == 0 || end - p < more) return false;
        const unsigned char least = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
        const unsigned char most = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
        if (*p < least || *p > most) return false;
        for (int i = 1; i < more; i++) {
            if ((p[i] & 0xC0U) != 0x80U) return false;
        }
        p += more;
    }
    return true;
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

/* The text of the first of the keys that has one, else the fallback. */
static const char *find_text(const json_t *json, const char *key, const char *other_key, const char *fallback)
{
    const char *text = json_string_value(json_object_get(json, key));
    if (!text || *text == '\0') text = json_string_value(json_object_get(json, other_key));
    return text && *text != '\0' ? text : fallback;
}

/* The id: the record's own, or the file's name and the place in it. */
static int set_id(struct document *document, const struct document_rules *rules)
{
    const json_t *id = json_object_get(document->json, rules->id_key);
    const char *text = json_string_value(id);
    if (text && *text != '\0') {
        document->label.id = text;
        return 0;
    }
    const size_t bytes = strlen(document->file->name) + 32;
    document->own_id = malloc(bytes);
    if (!document->own_id) FAIL(ERR_SYSTEM, "out of memory for an id");
    if (json_is_integer(id)) {
        (void)snprintf(document->own_id, bytes, "%" JSON_INTEGER_FORMAT, json_integer_value(id));
    } else {
        (void)snprintf(document->own_id, bytes, "%s@%" PRIu64, document->file->name, document->record.offset);
    }
    document->label.id = document->own_id;
    return 0;
}

/* Finds the text in the record; the reason when there is none. */
static enum drop find_document(struct document *document, const struct document_rules *rules, const char **text,
                               size_t *bytes)
{
    *text = document->record.text.data;
    *bytes = document->record.text.used;
    if (document->record.too_large) return DROP_TOO_LARGE;
    if (!document_is_utf8(*text, *bytes)) return DROP_NOT_UTF8;
    if (document->file->jsonl) {
        document->json = json_loadb(*text, *bytes, JSON_ALLOW_NUL, NULL);
        if (!json_is_object(document->json)) return DROP_MALFORMED;
        const json_t *field = json_object_get(document->json, rules->text_key);
        if (!json_is_string(field)) return DROP_NO_TEXT;
        *text = json_string_value(field);
        *bytes = json_string_length(field);
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
    int32_t *tokens = realloc(document->tokens, ((size_t)document->n + 1) * sizeof *tokens);
    if (!tokens) FAIL(ERR_SYSTEM, "out of memory for %" PRId64 " tokens", document->n);
    tokens[document->n++] = rules->eos;
    document->tokens = tokens;
    document->text_bytes = bytes;
    return 0;
}

uint64_t document_max_record_bytes(const struct document_rules *rules)
{
    return 6 * rules->max_bytes + ((uint64_t)1 << 20);
}

int document_make(struct document *document, const struct document_rules *rules, struct tokenizer *tokenizer)
{
    const char *text = NULL;
    size_t bytes = 0;
    document->drop = find_document(document, rules, &text, &bytes);
    if (document->drop != DROP_NONE) return 0;
    const char *source = rules->source ? rules->source : document->file->origin;
    document->label.source = find_text(document->json, "source", "source", source);
    document->label.licence = find_text(document->json, "licence", "license", rules->licence);
    document->label.language = find_text(document->json, "language", "lang", rules->language);
    TRY(set_id(document, rules));
    return encode(document, rules, tokenizer, text, bytes);
}

void document_clear(struct document *document)
{
    json_decref(document->json);
    free(document->own_id);
    free(document->tokens);
    document->json = NULL;
    document->own_id = NULL;
    document->tokens = NULL;
    document->n = 0;
    if (document->record.text.capacity > KEPT_BYTES_MAX) buffer_free(&document->record.text);
}
