/* Comparing texts with what a tokenizer gives back (see fidelity.h).
 *
 * Three forms of a text are compared: as it was, as the pieces spell it (before <unk> takes its place), and as it is
 * decoded. Changes of characters are counted as differences of multisets, since normalisation acts locally. */
#include "data/fidelity.h"

#include "err.h"
#include "utf8.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SPACE_SIGN "\xE2\x96\x81"

/* The bytes of the text's beginning that are compared: whole characters, the last one no space. */
static size_t cut(const char *text, size_t bytes)
{
    size_t end = FIDELITY_BYTES_MAX;
    if (bytes <= end) return bytes;
    while (end > 0 && (((unsigned char)text[end] & 0xC0U) == 0x80U || strchr(" \n", text[end - 1])))
        end--;
    return end;
}

static int64_t count_byte(const char *text, size_t bytes, char byte)
{
    int64_t n = 0;
    for (size_t i = 0; i < bytes; i++)
        n += text[i] == byte;
    return n;
}

static int64_t count_space_signs(const char *text, size_t bytes)
{
    int64_t n = 0;
    for (size_t i = 0; i + 3 <= bytes; i++)
        n += memcmp(text + i, SPACE_SIGN, 3) == 0;
    return n;
}

/* Runs of two or more spaces, those at the ends aside. */
static int64_t count_space_runs(const char *text, size_t bytes)
{
    int64_t n = 0;
    size_t begin = 0;
    while (begin < bytes && text[begin] == ' ')
        begin++;
    while (bytes > begin && text[bytes - 1] == ' ')
        bytes--;
    for (size_t i = begin + 2; i < bytes; i++)
        n += text[i] != ' ' && text[i - 1] == ' ' && text[i - 2] == ' ';
    return n;
}

/* Whether `a` has more spaces at one of its ends than `b`. */
static bool loses_ends(const char *a, size_t a_bytes, const char *b, size_t b_bytes)
{
    size_t i = 0, k = 0;
    while (i < a_bytes && i < b_bytes && a[i] == ' ' && b[i] == ' ')
        i++;
    while (k < a_bytes && k < b_bytes && a[a_bytes - 1 - k] == ' ' && b[b_bytes - 1 - k] == ' ')
        k++;
    return (i < a_bytes && a[i] == ' ') || (k < a_bytes && a[a_bytes - 1 - k] == ' ');
}

static int compare_characters(const void *a, const void *b)
{
    return memcmp(a, b, 4);
}

/* The characters of a text but spaces and newlines, each NUL-padded to four bytes, sorted. The caller frees them. */
static char (*sort_characters(const char *text, size_t bytes, size_t *n))[4]
{
    char(*list)[4] = calloc(bytes + 1, sizeof *list);
    *n = 0;
    for (size_t i = 0; list && i < bytes;) {
        size_t size = utf8_char_bytes(text + i, bytes - i);
        if (size == 0) size = 1;
        if (text[i] != ' ' && text[i] != '\n') memcpy(list[(*n)++], text + i, size);
        i += size;
    }
    if (list && *n > 1) qsort(list, *n, sizeof *list, compare_characters);
    return list;
}

/* How many characters of `a` are not in `b`, each as often as it stands there. */
static int count_lost(const char *a, size_t a_bytes, const char *b, size_t b_bytes, int64_t *lost)
{
    size_t n = 0, m = 0, k = 0;
    char(*of_a)[4] = sort_characters(a, a_bytes, &n), (*of_b)[4] = sort_characters(b, b_bytes, &m);
    *lost = 0;
    for (size_t i = 0; of_a && of_b && i < n; i++) {
        while (k < m && compare_characters(of_b[k], of_a[i]) < 0)
            k++;
        const bool there = k < m && compare_characters(of_b[k], of_a[i]) == 0;
        *lost += !there;
        k += there;
    }
    const bool ok = of_a && of_b;
    free(of_a);
    free(of_b);
    if (!ok) FAIL(ERR_SYSTEM, "out of memory for comparing a text of %zu bytes", a_bytes);
    return 0;
}

static int64_t at_least_0(int64_t n)
{
    return n > 0 ? n : 0;
}

/* Of a text that does not come back as it was. */
static int count_changes(struct fidelity *f, const struct tokenizer *tokenizer, const char *text, size_t bytes,
                         const char *decoded)
{
    struct fidelity here = {.changed = 1};
    char *spelled = NULL;
    size_t spelled_bytes = 0;
    int64_t unknown = 0;
    const size_t decoded_bytes = strlen(decoded);
    TRY(tokenizer_spell(tokenizer, text, bytes, &spelled, &spelled_bytes, &unknown));
    const int rc = count_lost(text, bytes, spelled, spelled_bytes, &here.characters);
    here.newlines = at_least_0(count_byte(text, bytes, '\n') - count_byte(decoded, decoded_bytes, '\n'));
    here.spaces = at_least_0(count_space_signs(decoded, decoded_bytes) - count_space_signs(text, bytes));
    if (here.spaces == 0) { /* else they are spelled as their sign, and counted */
        here.space_runs = at_least_0(count_space_runs(text, bytes) - count_space_runs(spelled, spelled_bytes));
        here.trimmed = loses_ends(text, bytes, spelled, spelled_bytes);
    }
    here.otherwise =
        unknown + here.characters + here.newlines + here.space_runs + here.spaces + here.trimmed == 0 ? 1 : 0;
    fidelity_add(f, &here);
    free(spelled);
    return rc;
}

int fidelity_measure(struct fidelity *f, const struct tokenizer *tokenizer, const char *text, size_t bytes,
                     const int32_t *tokens, int64_t n)
{
    int rc = 0;
    char *decoded = NULL;
    int32_t *tokens_of_part = NULL;
    const size_t part = cut(text, bytes);
    if (part < bytes) TRY(tokenizer_encode(tokenizer, text, part, &tokens_of_part, &n));
    TRY_GOTO(tokenizer_decode(tokenizer, part < bytes ? tokens_of_part : tokens, n, &decoded), done);
    f->documents++;
    f->text_bytes += (int64_t)part;
    const bool same = strncmp(decoded, text, part) == 0 && decoded[part] == '\0';
    if (!same) TRY_GOTO(count_changes(f, tokenizer, text, part, decoded), done);
done:
    free(decoded);
    free(tokens_of_part);
    return rc;
}

void fidelity_add(struct fidelity *sum, const struct fidelity *more)
{
    sum->unknown += more->unknown;
    sum->end_marks += more->end_marks;
    sum->documents += more->documents;
    sum->text_bytes += more->text_bytes;
    sum->changed += more->changed;
#define X(name, words) sum->name += more->name;
    FIDELITY_LIST(X)
#undef X
}

json_t *fidelity_json(const struct fidelity *f, const struct tokenizer *tokenizer, int64_t tokens)
{
    json_t *json = json_pack(
        "{s:b, s:b, s:I, s:I, s:I, s:I, s:I, s:I}", "byte_fallback", tokenizer_has_bytes(tokenizer), "adds_space",
        tokenizer_adds_space(tokenizer), "tokens", (json_int_t)tokens, "unknown_tokens", (json_int_t)f->unknown,
        "end_marks", (json_int_t)f->end_marks, "compared_documents", (json_int_t)f->documents, "compared_bytes",
        (json_int_t)f->text_bytes, "changed_documents", (json_int_t)f->changed);
#define X(name, words) (void)json_object_set_new(json, #name, json_integer(f->name));
    FIDELITY_LIST(X)
#undef X
    return json;
}

static json_int_t get(const json_t *json, const char *key)
{
    return json_integer_value(json_object_get(json, key));
}

/* Appends to the words as far as there is room. */
static void __attribute__((format(printf, 3, 4))) append(char *words, size_t room, const char *format, ...)
{
    const size_t used = strlen(words);
    va_list args;
    va_start(args, format);
    (void)vsnprintf(words + used, room - used, format, args);
    va_end(args);
}

bool fidelity_words(const json_t *json, char *words, size_t room)
{
    static const struct {
        const char *key, *words;
    } kinds[] = {
#define X(name, words) {#name, words},
        FIDELITY_LIST(X)
#undef X
    };
    const json_int_t unknown = get(json, "unknown_tokens"), tokens = get(json, "tokens");
    const json_int_t documents = get(json, "compared_documents"), changed = get(json, "changed_documents");
    words[0] = '\0';
    append(words, room, "%.3g%% of its tokens are <unk> (%" JSON_INTEGER_FORMAT ")",
           tokens > 0 ? 100 * (double)unknown / (double)tokens : 0, unknown);
    append(words, room,
           "; of %" JSON_INTEGER_FORMAT " documents that were decoded again (%.3g MB, at most %zu KiB of each), "
           "%" JSON_INTEGER_FORMAT " came back changed",
           documents, 1e-6 * (double)get(json, "compared_bytes"), FIDELITY_BYTES_MAX / 1024, changed);
    const char *before = ": ";
    for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++) {
        if (get(json, kinds[k].key) == 0) continue;
        append(words, room, "%s%" JSON_INTEGER_FORMAT " %s", before, get(json, kinds[k].key), kinds[k].words);
        before = ", ";
    }
    if (json_is_false(json_object_get(json, "byte_fallback"))) append(words, room, "; it has no byte fallback");
    if (json_is_true(json_object_get(json, "adds_space"))) {
        append(words, room, "; it puts a space before each document, and takes it away again");
    }
    const json_int_t end_marks = get(json, "end_marks");
    if (end_marks > 0) {
        append(words, room, "; %" JSON_INTEGER_FORMAT " times the text itself has the piece that ends documents",
               end_marks);
    }
    return unknown > 0 || changed > 0;
}
