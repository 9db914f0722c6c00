/* UTF-8 told from other bytes, and any bytes shown to a person. */
#include "utf8.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

static void utf8_is_told_from_other_bytes(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        bool good;
    } cases[] = {{"", true},
                 {"abc", true},
                 {"\xC2\x80", true},
                 {"\xDF\xBF", true},
                 {"\xE0\xA0\x80", true},
                 {"\xED\x9F\xBF", true},
                 {"\xEE\x80\x80", true},
                 {"\xF0\x90\x80\x80", true},
                 {"\xF4\x8F\xBF\xBF", true},
                 {"鉄", true},
                 {"\x80", false},             /* continuation alone */
                 {"\xC1\xBF", false},         /* overlong */
                 {"\xE0\x9F\xBF", false},     /* overlong */
                 {"\xF0\x8F\xBF\xBF", false}, /* overlong */
                 {"\xED\xA0\x80", false},     /* surrogate */
                 {"\xF4\x90\x80\x80", false}, /* above U+10FFFF */
                 {"\xF5\x80\x80\x80", false},
                 {"\xE9\x89", false}, /* cut off */
                 {"\xE9\x89z", false},
                 {"\xFF", false}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        assert_int_equal(utf8_valid_bytes(cases[i].text, strlen(cases[i].text)) == strlen(cases[i].text),
                         cases[i].good);
    }
}

static void fault_is_found_behind_ascii(void **state)
{
    (void)state;
    for (size_t at = 0; at < 40; at++) {
        char text[40];
        memset(text, 'a', sizeof text);
        text[at] = '\x80';
        assert_int_equal(utf8_valid_bytes(text, sizeof text), at);
        assert_int_equal(utf8_valid_bytes(text, at), at);
    }
}

static void any_bytes_are_shown(void **state)
{
    (void)state;
    static const struct {
        const char *text, *shown;
        size_t room;
    } cases[] = {
        {"鉄.txt", "鉄.txt", 64},
        {"\x93\xFA\x96{.txt", "\\x93\\xFA\\x96{.txt", 64},
        {"a\x1B[31m\n", "a\\x1B[31m\\x0A", 64},
        {"a\tb", "a\tb", 64},
        {"\xC2\x9B", "\\xC2\\x9B", 64}, /* C1 */
        {"鉄鉄", "鉄", 6},
        {"\xFF", "", 4},
        {"", "", 1},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char shown[64];
        assert_string_equal(utf8_show(cases[i].text, "\t", shown, cases[i].room), cases[i].shown);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(utf8_is_told_from_other_bytes),
        cmocka_unit_test(fault_is_found_behind_ascii),
        cmocka_unit_test(any_bytes_are_shown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
