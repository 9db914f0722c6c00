/* What is wrong with a dropped document, and what to do about it (document_explain). */
#include "data/document.h"

#include "utf8.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

/* So much of a record is looked at to guess its encoding. */
#define GUESS_BYTES_MAX ((size_t)64 * 1024)

enum { NAMES_BYTES = 200 };

static bool within(unsigned char c, unsigned char least, unsigned char most)
{
    return c >= least && c <= most;
}

/* Could all of the text be EUC-JP, but for a character cut off at its end? */
static bool is_euc_jp(const unsigned char *p, const unsigned char *end)
{
    while (p < end) {
        const int more = *p < 0x80 ? 0 : *p == 0x8F ? 2 : *p == 0x8E || within(*p, 0xA1, 0xFE) ? 1 : -1;
        if (more < 0) return false;
        for (int i = 1; i <= more && p + i < end; i++) {
            if (!within(p[i], 0xA1, 0xFE)) return false;
        }
        p += 1 + more;
    }
    return true;
}

/* The same of Shift-JIS. */
static bool is_shift_jis(const unsigned char *p, const unsigned char *end)
{
    while (p < end) {
        const bool pair = within(*p, 0x81, 0x9F) || within(*p, 0xE0, 0xFC);
        if (!pair && *p >= 0x80 && !within(*p, 0xA1, 0xDF)) return false;
        if (pair && p + 1 < end && !within(p[1], 0x40, 0x7E) && !within(p[1], 0x80, 0xFC)) return false;
        p += 1 + pair;
    }
    return true;
}

/* Half of it or nearly so are zeros, at every second byte, or it begins with a mark. */
static bool is_utf16(const char *text, size_t bytes)
{
    size_t zeros[2] = {0, 0};
    if (bytes >= 2 && (memcmp(text, "\xFF\xFE", 2) == 0 || memcmp(text, "\xFE\xFF", 2) == 0)) return true;
    for (size_t i = 0; i < bytes; i++)
        zeros[i % 2] += text[i] == '\0';
    return 4 * zeros[0] + 4 * zeros[1] > bytes && (10 * zeros[0] < zeros[1] || 10 * zeros[1] < zeros[0]);
}

/* Characters of several bytes far outnumber the bytes that are no part of any. */
static bool is_mostly_utf8(const char *text, size_t bytes)
{
    size_t good = 0, bad = 0;
    for (size_t at = 0, n = 0; at<bytes; at += n> 0 ? n : 1) {
        n = utf8_char_bytes(text + at, bytes - at);
        good += n > 1;
        bad += n == 0;
    }
    return good > 8 * bad;
}

/* What converts the text to UTF-8. */
static const char *conversion(const char *text, size_t bytes)
{
    const size_t n = bytes < GUESS_BYTES_MAX ? bytes : GUESS_BYTES_MAX;
    const unsigned char *const p = (const unsigned char *)text;
    if (is_utf16(text, n)) return "it looks like UTF-16: convert it with iconv -f UTF-16 -t UTF-8";
    if (utf8_valid_bytes(text, n) == n) return "it is ISO-2022-JP: convert it with iconv -f ISO-2022-JP -t UTF-8";
    if (is_mostly_utf8(text, n)) return "most of it is UTF-8: iconv -f UTF-8 -t UTF-8 -c takes out what is not";
    if (is_euc_jp(p, p + n)) return "it looks like EUC-JP: convert it to UTF-8 with iconv -f EUC-JP -t UTF-8";
    if (is_shift_jis(p, p + n)) return "it looks like Shift-JIS: convert it to UTF-8 with iconv -f CP932 -t UTF-8";
    return "text must be UTF-8: convert it with iconv -f ENCODING -t UTF-8";
}

#define ONE_A_LINE "JSONL has one object a line; jq -c makes it (jq -c '.[]' of an array)"

void document_explain(const struct document *document, const struct document_rules *rules, char *words, size_t room)
{
    char names[NAMES_BYTES] = "";
    const struct buffer *text = &document->record.text;
    const char *const key = rules->key[FIELD_TEXT] ? rules->key[FIELD_TEXT] : "text";
    const bool whole_file = !document->file->jsonl && rules->text_split == SPLIT_FILE;
    const size_t at = document->fault_at;
    if (document->drop != DROP_NOT_UTF8 && text->used > 0 && is_utf16(text->data, text->used)) {
        (void)snprintf(words, room, "%s", conversion(text->data, text->used));
        return;
    }
    switch (document->drop) {
    case DROP_NOT_UTF8:
        (void)snprintf(words, room, "its byte %zu is 0x%02X; %s", at + 1, (unsigned)(unsigned char)text->data[at],
                       conversion(text->data, text->used));
        break;
    case DROP_NUL:
        (void)snprintf(words, room, "is it text? Leave binary files out");
        break;
    case DROP_TOO_LARGE:
        (void)snprintf(words, room, "the limit is %" PRIu64 " bytes; raise it with --max-document-bytes%s",
                       rules->max_bytes, whole_file ? ", or cut files with --documents line or blank-line" : "");
        break;
    case DROP_MALFORMED:
        (void)snprintf(words, room, "it stops being JSON at byte %zu; " ONE_A_LINE, at + 1);
        break;
    case DROP_CUT_OFF:
    case DROP_NO_OBJECT:
        (void)snprintf(words, room, ONE_A_LINE);
        break;
    case DROP_NAN:
        (void)snprintf(words, room, "at byte %zu, which JSON does not allow; write null instead", at + 1);
        break;
    case DROP_TOO_DEEP:
        (void)snprintf(words, room, "more than %d objects or arrays in each other", JSONL_DEPTH_MAX);
        break;
    case DROP_SURROGATE:
        (void)snprintf(words, room, "half a character: \\ud800 to \\udfff stand in pairs only");
        break;
    case DROP_NO_TEXT:
    case DROP_NULL_TEXT:
    case DROP_NO_STRING:
        jsonl_names(text->data, text->used, names, sizeof names);
        (void)snprintf(words, room, "its fields are %s; name that of the text with --text-key (%s)", names, key);
        break;
    default: /* empty */
        (void)snprintf(words, room, "%s", "");
    }
}
