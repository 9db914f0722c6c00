/* One line of JSONL: a strict scanner of JSON (RFC 8259) that takes the wanted members out of an object.
 *
 * No tree is made, numbers stay as they are written, and what nobody wants is only checked. Threads: any. */
#ifndef TATARA_JSONL_H
#define TATARA_JSONL_H

#include <stdbool.h>
#include <stddef.h>

enum { JSONL_WANTED_MAX = 10, JSONL_DEPTH_MAX = 500 };

/* What is wrong with a line. */
enum jsonl_fault {
    JSONL_SOUND,
    JSONL_NO_OBJECT, /* sound JSON of another kind */
    JSONL_CUT_OFF,   /* it ends before the object does */
    JSONL_NAN,       /* NaN or Infinity, which JSON has not */
    JSONL_TOO_DEEP,  /* more than JSONL_DEPTH_MAX objects and arrays in each other */
    JSONL_MALFORMED
};

enum jsonl_kind { JSONL_ABSENT, JSONL_NULL, JSONL_BOOL, JSONL_NUMBER, JSONL_STRING, JSONL_OBJECT, JSONL_ARRAY };

struct jsonl_member {
    const char *path; /* its name; "a.b" is also member b of the object a; NULL: nothing is wanted */
    enum jsonl_kind kind;
    char *text; /* the value as it is written, a string without its quotes */
    size_t bytes;
};

/* Scans `bytes` bytes of UTF-8, changing nothing, and finds the n wanted members; of equal names the last counts, as in
 * Python. *at is where the fault lies. */
enum jsonl_fault jsonl_scan(char *text, size_t bytes, struct jsonl_member *wanted, int n, size_t *at);
/* Writes the names of the object's members, those of objects in it as a.b, for a person: "id, text, meta.url". */
void jsonl_names(char *text, size_t bytes, char *names, size_t room);
/* Undoes the escapes of a string, in place, and ends any value with a NUL: to be called after scanning, once a value.
 * false: a surrogate is not one of a pair, so the string is no text. */
bool jsonl_unescape(struct jsonl_member *member);

#endif
