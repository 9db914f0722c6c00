/* UTF-8: what is well-formed, and how bytes of any kind are shown to a person. */
#ifndef TATARA_UTF8_H
#define TATARA_UTF8_H

#include <stdbool.h>
#include <stddef.h>

/* Bytes of the well-formed character at the beginning of `text`; 0 when there is none. */
size_t utf8_char_bytes(const char *text, size_t bytes);
/* Where the first byte lies that belongs to no well-formed character; `bytes` when all is well-formed. */
size_t utf8_valid_bytes(const char *text, size_t bytes);
/* Copies a text for a person: what is not well-formed, and control characters but those of `kept`, become \xNN. At most
 * room − 1 bytes and a NUL are written, whole characters only. Returns `shown`. */
char *utf8_show(const char *text, const char *kept, char *shown, size_t room);

#endif
