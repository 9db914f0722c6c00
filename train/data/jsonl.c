/* A strict scanner of JSON (see jsonl.h): one function for each rule of RFC 8259's grammar, over a pointer that advances. */
#include "data/jsonl.h"

#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>

/* The names that are gathered for a person. */
struct names {
    char *text;
    size_t used, room;
    const char *outer; /* the member of the outermost object that is being scanned */
    size_t outer_bytes;
};

struct scan {
    char *at, *end;
    struct jsonl_member *wanted;
    int n;
    enum jsonl_fault fault;
    struct names *names; /* NULL: not wanted */
};

/* What is wanted of one object: for each wanted member the rest of its path, or NULL. */
struct wants {
    const char *rest[JSONL_WANTED_MAX];
};

static bool fail(struct scan *s, enum jsonl_fault fault)
{
    s->fault = fault == JSONL_MALFORMED && s->at == s->end ? JSONL_CUT_OFF : fault;
    return false;
}

static void skip_space(struct scan *s)
{
    while (s->at < s->end && (*s->at == ' ' || *s->at == '\t' || *s->at == '\n' || *s->at == '\r'))
        s->at++;
}

/* Passes over white space and this character. */
static bool expect(struct scan *s, char c)
{
    skip_space(s);
    if (s->at == s->end || *s->at != c) return fail(s, JSONL_MALFORMED);
    s->at++;
    return true;
}

static int hex_digit(char c)
{
    return c >= '0' && c <= '9'   ? c - '0'
           : c >= 'a' && c <= 'f' ? c - 'a' + 10
           : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                  : -1;
}

/* From the opening quote past the closing one. */
static bool scan_string(struct scan *s)
{
    s->at++;
    for (;;) {
        while (s->at < s->end && *s->at != '"' && *s->at != '\\' && (unsigned char)*s->at >= 0x20)
            s->at++;
        if (s->at == s->end || (unsigned char)*s->at < 0x20) return fail(s, JSONL_MALFORMED);
        if (*s->at++ == '"') return true;
        if (s->at == s->end || *s->at == '\0' || !strchr("\"\\/bfnrtu", *s->at)) return fail(s, JSONL_MALFORMED);
        if (*s->at++ != 'u') continue;
        for (int i = 0; i < 4; i++, s->at++) {
            if (s->at == s->end || hex_digit(*s->at) < 0) return fail(s, JSONL_MALFORMED);
        }
    }
}

static bool scan_digits(struct scan *s)
{
    const char *const from = s->at;
    while (s->at < s->end && *s->at >= '0' && *s->at <= '9')
        s->at++;
    return s->at > from ? true : fail(s, JSONL_MALFORMED);
}

/* Does the rest begin with NaN, nan, Infinity, inf? */
static bool at_nan(const struct scan *s)
{
    return s->end - s->at >= 3 && (strncasecmp(s->at, "nan", 3) == 0 || strncasecmp(s->at, "inf", 3) == 0);
}

static bool scan_number(struct scan *s)
{
    if (*s->at == '-') s->at++;
    if (at_nan(s)) return fail(s, JSONL_NAN);
    if (s->at < s->end && *s->at == '0') {
        s->at++;
    } else if (!scan_digits(s)) {
        return false;
    }
    if (s->at < s->end && *s->at == '.') {
        s->at++;
        if (!scan_digits(s)) return false;
    }
    if (s->at < s->end && (*s->at == 'e' || *s->at == 'E')) {
        s->at++;
        if (s->at < s->end && (*s->at == '+' || *s->at == '-')) s->at++;
        if (!scan_digits(s)) return false;
    }
    return true;
}

static bool scan_word(struct scan *s, const char *word)
{
    if (at_nan(s)) return fail(s, JSONL_NAN);
    for (; *word; word++, s->at++) {
        if (s->at == s->end || *s->at != *word) return fail(s, JSONL_MALFORMED);
    }
    return true;
}

static bool scan_value(struct scan *s, int depth, const struct wants *wants);

static enum jsonl_kind kind_of(char c)
{
    switch (c) {
    case '{':
        return JSONL_OBJECT;
    case '[':
        return JSONL_ARRAY;
    case '"':
        return JSONL_STRING;
    case 't':
    case 'f':
        return JSONL_BOOL;
    case 'n':
        return JSONL_NULL;
    default:
        return JSONL_NUMBER;
    }
}

/* How many bytes of the path the member's name makes up; 0: it is not that name. Escapes in the name are undone. */
static size_t match_name(const char *path, char *name, size_t bytes)
{
    char plain[256];
    if (memchr(name, '\\', bytes) && bytes < sizeof plain) {
        struct jsonl_member copy = {.kind = JSONL_STRING, .text = plain, .bytes = bytes};
        memcpy(plain, name, bytes);
        if (!jsonl_unescape(&copy)) return 0;
        name = plain;
        bytes = copy.bytes;
    }
    if (strncmp(path, name, bytes) != 0 || memchr(name, '\0', bytes)) return 0;
    return path[bytes] == '\0' || path[bytes] == '.' ? bytes : 0;
}

/* Notes the name of a member of the outermost object, or of an object in it. */
static void note_name(struct scan *s, const char *name, size_t bytes, int depth)
{
    struct names *names = s->names;
    if (!names || depth > 2) return;
    const char *const comma = names->used > 0 ? ", " : "", *const dot = depth == 2 ? "." : "";
    const size_t outer_bytes = depth == 2 ? names->outer_bytes : 0, left = names->room - names->used;
    const size_t wanted = strlen(comma) + outer_bytes + strlen(dot) + bytes;
    if (depth == 1) {
        names->outer = name;
        names->outer_bytes = bytes;
    }
    if (wanted + sizeof ", ..." > left) {
        if (left > sizeof ", ...") (void)snprintf(names->text + names->used, left, ", ...");
        names->room = names->used; /* no more */
        return;
    }
    names->used += (size_t)snprintf(names->text + names->used, left, "%s%.*s%s%.*s", comma, (int)outer_bytes,
                                    names->outer, dot, (int)bytes, name);
}

static bool scan_member(struct scan *s, int depth, const struct wants *wants)
{
    struct wants inner = {.rest = {NULL}};
    bool whole[JSONL_WANTED_MAX] = {false}, descend = s->names && depth == 1;
    skip_space(s);
    if (s->at == s->end || *s->at != '"') return fail(s, JSONL_MALFORMED);
    char *const name = s->at + 1;
    if (!scan_string(s)) return false;
    const size_t bytes = (size_t)(s->at - 1 - name);
    note_name(s, name, bytes, depth);
    for (int i = 0; wants && i < s->n; i++) {
        const char *const rest = wants->rest[i];
        const size_t matched = rest && bytes > 0 ? match_name(rest, name, bytes) : 0;
        if (matched == 0) continue;
        whole[i] = rest[matched] == '\0';
        inner.rest[i] = whole[i] ? NULL : rest + matched + 1;
        descend = descend || inner.rest[i];
        s->wanted[i].kind = JSONL_ABSENT;
    }
    if (!expect(s, ':')) return false;
    skip_space(s);
    char *const from = s->at;
    if (!scan_value(s, depth, descend ? &inner : NULL)) return false;
    for (int i = 0; i < s->n; i++) {
        if (!whole[i]) continue;
        const enum jsonl_kind kind = kind_of(*from);
        const int quote = kind == JSONL_STRING;
        s->wanted[i].kind = kind;
        s->wanted[i].text = from + quote;
        s->wanted[i].bytes = (size_t)(s->at - from - quote - quote);
    }
    return true;
}

/* An object or array from its bracket past the closing one. */
static bool scan_list(struct scan *s, int depth, bool object, const struct wants *wants)
{
    const char closing = object ? '}' : ']';
    if (depth > JSONL_DEPTH_MAX) return fail(s, JSONL_TOO_DEEP);
    s->at++;
    skip_space(s);
    if (s->at < s->end && *s->at == closing) {
        s->at++;
        return true;
    }
    for (;;) {
        if (!(object ? scan_member(s, depth, wants) : scan_value(s, depth, NULL))) return false;
        skip_space(s);
        if (s->at == s->end || (*s->at != ',' && *s->at != closing)) return fail(s, JSONL_MALFORMED);
        if (*s->at++ == closing) return true;
    }
}

static bool scan_value(struct scan *s, int depth, const struct wants *wants)
{
    skip_space(s);
    if (s->at == s->end) return fail(s, JSONL_CUT_OFF);
    switch (*s->at) {
    case '{':
        return scan_list(s, depth + 1, true, wants);
    case '[':
        return scan_list(s, depth + 1, false, NULL);
    case '"':
        return scan_string(s);
    case 't':
        return scan_word(s, "true");
    case 'f':
        return scan_word(s, "false");
    case 'n':
        return scan_word(s, "null");
    default:
        return at_nan(s) ? fail(s, JSONL_NAN) : scan_number(s);
    }
}

/* The one value of a line. */
static enum jsonl_fault scan_line(struct scan *s)
{
    struct wants wants = {.rest = {NULL}};
    for (int i = 0; i < s->n; i++) {
        wants.rest[i] = s->wanted[i].path;
        s->wanted[i].kind = JSONL_ABSENT;
    }
    skip_space(s);
    const bool object = s->at < s->end && *s->at == '{';
    if (!scan_value(s, 0, &wants)) return s->fault;
    skip_space(s);
    if (s->at < s->end) return JSONL_MALFORMED;
    return object ? JSONL_SOUND : JSONL_NO_OBJECT;
}

enum jsonl_fault jsonl_scan(char *text, size_t bytes, struct jsonl_member *wanted, int n, size_t *at)
{
    struct scan s = {.at = text, .end = text + bytes, .wanted = wanted, .n = n};
    const enum jsonl_fault fault = scan_line(&s);
    *at = (size_t)(s.at - text);
    return fault;
}

void jsonl_names(char *text, size_t bytes, char *names, size_t room)
{
    struct names found = {.text = names, .room = room};
    struct scan s = {.at = text, .end = text + bytes, .names = &found};
    names[0] = '\0';
    (void)scan_line(&s);
}

static unsigned read_hex(const char *from)
{
    unsigned value = 0;
    for (int i = 0; i < 4; i++)
        value = value << 4 | (unsigned)hex_digit(from[i]);
    return value;
}

/* Writes a character of the basic plane or above as UTF-8. Returns the end. */
static char *put_char(char *to, unsigned c)
{
    if (c < 0x80) {
        *to++ = (char)c;
        return to;
    }
    if (c < 0x800) {
        *to++ = (char)(0xC0 | c >> 6);
    } else {
        if (c < 0x10000) {
            *to++ = (char)(0xE0 | c >> 12);
        } else {
            *to++ = (char)(0xF0 | c >> 18);
            *to++ = (char)(0x80 | (c >> 12 & 0x3F));
        }
        *to++ = (char)(0x80 | (c >> 6 & 0x3F));
    }
    *to++ = (char)(0x80 | (c & 0x3F));
    return to;
}

/* An escape \uXXXX, or two of a pair: *from stands behind its u, and is moved past it. false: unpaired. */
static bool put_escaped(char **to, const char **from, const char *end)
{
    unsigned c = read_hex(*from);
    *from += 4;
    if (c >= 0xD800 && c < 0xE000) {
        if (c >= 0xDC00 || end - *from < 6 || (*from)[0] != '\\' || (*from)[1] != 'u') return false;
        const unsigned low = read_hex(*from + 2);
        if (low < 0xDC00 || low >= 0xE000) return false;
        c = 0x10000 + ((c - 0xD800) << 10) + (low - 0xDC00);
        *from += 6;
    }
    *to = put_char(*to, c);
    return true;
}

bool jsonl_unescape(struct jsonl_member *member)
{
    static const char escapes[] = "bfnrt", plain[] = "\b\f\n\r\t";
    const char *from = member->text;
    const char *const end = from + member->bytes;
    char *to = member->text;
    for (; member->kind == JSONL_STRING;) { /* an escape is never shorter than what it stands for */
        const char *const slash = memchr(from, '\\', (size_t)(end - from));
        const size_t n = (size_t)((slash ? slash : end) - from);
        if (to != from) memmove(to, from, n);
        to += n;
        if (!slash) break;
        from = slash + 2;
        const char *const known = strchr(escapes, slash[1]);
        if (slash[1] == 'u') {
            if (!put_escaped(&to, &from, end)) return false;
        } else {
            *to++ = known ? plain[known - escapes] : slash[1];
        }
    }
    if (member->kind == JSONL_STRING) member->bytes = (size_t)(to - member->text);
    member->text[member->bytes] = '\0';
    return true;
}
