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

/* The pairs of bytes of a text in a code of East Asia, but for one cut off at its end. */
struct pairs {
    bool sound; /* all of the text is such a code */
    size_t all, kana, hangul;
};

static struct pairs scan_euc(const unsigned char *p, const unsigned char *end)
{
    struct pairs pairs = {.sound = true};
    while (p < end) {
        const int more = *p < 0x80 ? 0 : *p == 0x8F ? 2 : *p == 0x8E || within(*p, 0xA1, 0xFE) ? 1 : -1;
        pairs.sound = pairs.sound && more >= 0;
        for (int i = 1; i <= more && p + i < end; i++)
            pairs.sound = pairs.sound && within(p[i], 0xA1, 0xFE);
        pairs.all += more > 0;
        pairs.kana += within(*p, 0xA4, 0xA5);
        pairs.hangul += within(*p, 0xB0, 0xC8);
        p += 1 + (more > 0 ? more : 0);
    }
    return pairs;
}

static struct pairs scan_shift_jis(const unsigned char *p, const unsigned char *end)
{
    struct pairs pairs = {.sound = true};
    while (p < end) {
        const bool pair = within(*p, 0x81, 0x9F) || within(*p, 0xE0, 0xFC);
        pairs.sound = pairs.sound && (pair || *p < 0x80 || within(*p, 0xA1, 0xDF));
        if (pair && p + 1 < end) pairs.sound = pairs.sound && (within(p[1], 0x40, 0x7E) || within(p[1], 0x80, 0xFC));
        pairs.all += pair;
        pairs.kana += within(*p, 0x82, 0x83);
        p += 1 + pair;
    }
    return pairs;
}

/* Is so much of it kana as in Japanese? */
static bool is_japanese(struct pairs pairs)
{
    return pairs.sound && pairs.kana > 0 && 8 * pairs.kana >= pairs.all;
}

/* Are nearly all of these characters those of English or Japanese, and many of them letters of ASCII or kana? `low` is the
 * place of the lower byte in each pair. */
static bool is_utf16_text(const unsigned char *p, size_t bytes, size_t low)
{
    size_t all = 0, good = 0, usual = 0;
    for (size_t i = 0; i + 1 < bytes; i += 2, all++) {
        const unsigned c = (unsigned)p[i + 1 - low] << 8 | p[i + low];
        const bool is_usual =
            (c >= 0x20 && c < 0x7F) || c == '\n' || c == '\r' || c == '\t' || (c >= 0x3000 && c < 0x3100);
        usual += is_usual;
        good += is_usual || (c >= 0xA0 && c < 0x100) || (c >= 0x4E00 && c < 0xA000) || c >= 0xFF00;
    }
    return all > 0 && 10 * good >= 9 * all && 5 * usual >= all;
}

/* UTF-16 or UTF-32, by its mark, by where its zeros are, or by what it would say; NULL: neither. The record begins at
 * `offset` of its file: a line may begin in the middle of a character. */
static const char *wide_encoding(const char *text, size_t bytes, uint64_t offset)
{
    const size_t skip = (size_t)(-offset % 4 < bytes ? -offset % 4 : bytes);
    const unsigned char *const p = (const unsigned char *)text + skip;
    const size_t n = bytes - skip, quads = n / 4;
    size_t zeros[4] = {0, 0, 0, 0};
    for (size_t i = 0; i < 4 * quads; i++)
        zeros[i % 4] += p[i] == 0;
    const size_t most = quads - quads / 8; /* there may be characters above U+FFFF */
    if (zeros[0] < quads && zeros[2] >= most && zeros[3] == quads) return "UTF-32LE";
    if (zeros[3] < quads && zeros[1] >= most && zeros[0] == quads) return "UTF-32BE";
    if (bytes >= 2 && (memcmp(text, "\xFF\xFE", 2) == 0 || memcmp(text, "\xFE\xFF", 2) == 0)) return "UTF-16";
    if (is_utf16_text(p, n, 0)) return "UTF-16LE";
    return is_utf16_text(p, n, 1) ? "UTF-16BE" : NULL;
}

/* Has it control characters such as no text has? */
static bool is_binary(const unsigned char *p, size_t bytes)
{
    size_t control = 0;
    for (size_t i = 0; i < bytes; i++)
        control += p[i] < 0x20 && (p[i] == '\0' || !strchr("\t\n\v\f\r\x1B", p[i]));
    return 50 * control > bytes;
}

/* Does it end within a character? */
static bool is_cut_off(const char *text, size_t bytes, size_t fault_at)
{
    const size_t left = bytes - fault_at;
    if (left > 3 || !within((unsigned char)text[fault_at], 0xC2, 0xF4)) return false;
    for (size_t i = 1; i < left; i++) {
        if (!within((unsigned char)text[fault_at + i], 0x80, 0xBF)) return false;
    }
    return left > 1 || (fault_at > 0 && (unsigned char)text[fault_at - 1] >= 0x80);
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

#define BINARY "is it text? Leave binary files out"

/* What makes UTF-8 of the text, which is none. */
static void explain_encoding(const struct document *document, char *words, size_t room)
{
    const char *const text = document->record.text.data;
    const size_t bytes = document->record.text.used, n = bytes < GUESS_BYTES_MAX ? bytes : GUESS_BYTES_MAX;
    const unsigned char *const p = (const unsigned char *)text;
    const struct pairs euc = scan_euc(p, p + n);
    const char *encoding = wide_encoding(text, n, document->record.offset);
    if (!encoding && is_binary(p, n)) {
        (void)snprintf(words, room, BINARY);
    } else if (!encoding && is_cut_off(text, bytes, document->fault_at)) {
        (void)snprintf(words, room, "its last character is cut off: iconv -f UTF-8 -t UTF-8 -c takes it out");
    } else if (!encoding && text[document->fault_at] != '\x1B' && is_mostly_utf8(text, n)) {
        (void)snprintf(words, room, "most of it is UTF-8: iconv -f UTF-8 -t UTF-8 -c takes out what is not");
    } else {
        if (!encoding && text[document->fault_at] == '\x1B') encoding = "ISO-2022-JP";
        if (!encoding && is_japanese(euc)) encoding = "EUC-JP";
        if (!encoding && is_japanese(scan_shift_jis(p, p + n))) encoding = "CP932";
        if (!encoding && euc.sound && 4 * euc.hangul > 3 * euc.all) encoding = "EUC-KR";
        (void)snprintf(words, room, "%s%s: convert it with iconv -f %s -t UTF-8",
                       encoding ? "it looks like " : "text must be UTF-8", encoding ? encoding : "",
                       encoding ? encoding : "ENCODING");
    }
}

#define ONE_A_LINE "JSONL has one object a line; jq -c makes it (jq -c '.[]' of an array)"

void document_explain(const struct document *document, const struct document_rules *rules, char *words, size_t room)
{
    char names[NAMES_BYTES] = "";
    const struct buffer *text = &document->record.text;
    const char *const key = rules->key[FIELD_TEXT] ? rules->key[FIELD_TEXT] : "text";
    const bool whole_file = !document->file->jsonl && rules->text_split == SPLIT_FILE;
    const size_t at = document->fault_at;
    if (document->drop != DROP_NOT_UTF8 && text->used > 0 && memchr(text->data, '\0', text->used) &&
        wide_encoding(text->data, text->used, document->record.offset)) {
        explain_encoding(document, words, room);
        return;
    }
    switch (document->drop) {
    case DROP_NOT_UTF8:
        (void)snprintf(words, room, "its byte %zu is 0x%02X; ", at + 1, (unsigned)(unsigned char)text->data[at]);
        explain_encoding(document, words + strlen(words), room - strlen(words));
        break;
    case DROP_NUL:
        (void)snprintf(words, room, BINARY);
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
