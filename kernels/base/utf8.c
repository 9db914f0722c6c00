/* UTF-8 (see utf8.h). */
#include "utf8.h"

#include <stdint.h>
#include <stdio.h>
#include <string.h>

/* The Unicode Standard, table 3-7: no overlong forms, no surrogates, nothing above U+10FFFF. */
size_t utf8_char_bytes(const char *text, size_t bytes)
{
    const unsigned char *p = (const unsigned char *)text;
    if (bytes == 0) return 0;
    const unsigned char lead = p[0];
    if (lead < 0x80) return 1;
    const size_t n = lead >= 0xC2 && lead < 0xE0   ? 2
                     : lead >= 0xE0 && lead < 0xF0 ? 3
                     : lead >= 0xF0 && lead < 0xF5 ? 4
                                                   : 0;
    if (n == 0 || bytes < n) return 0;
    const unsigned char least = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
    const unsigned char most = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
    if (p[1] < least || p[1] > most) return 0;
    for (size_t i = 2; i < n; i++) {
        if ((p[i] & 0xC0U) != 0x80U) return 0;
    }
    return n;
}

size_t utf8_valid_bytes(const char *text, size_t bytes)
{
    size_t at = 0;
    while (at < bytes) {
        uint64_t eight;
        if (bytes - at >= sizeof eight) { /* ASCII */
            memcpy(&eight, text + at, sizeof eight);
            if ((eight & UINT64_C(0x8080808080808080)) == 0) {
                at += sizeof eight;
                continue;
            }
        }
        const size_t n = utf8_char_bytes(text + at, bytes - at);
        if (n == 0) return at;
        at += n;
    }
    return bytes;
}

/* C0, DEL and C1: what a terminal could take for a command. */
static bool is_control(const char *text, size_t n)
{
    const unsigned char first = (unsigned char)text[0];
    return n == 1 ? first < 0x20 || first == 0x7F : n == 2 && first == 0xC2 && (unsigned char)text[1] < 0xA0;
}

char *utf8_show(const char *text, const char *kept, char *shown, size_t room)
{
    size_t used = 0;
    const size_t bytes = strlen(text);
    for (size_t at = 0; at < bytes;) {
        const size_t n = utf8_char_bytes(text + at, bytes - at);
        const bool escape = n == 0 || (is_control(text + at, n) && !strchr(kept, text[at]));
        const size_t from = escape ? 1 : n, to = escape ? 4 : n;
        if (room < used + to + 1) break;
        if (escape) {
            (void)snprintf(shown + used, 5, "\\x%02X", (unsigned)(unsigned char)text[at]);
        } else {
            memcpy(shown + used, text + at, n);
        }
        used += to;
        at += from;
    }
    shown[used] = '\0';
    return shown;
}
