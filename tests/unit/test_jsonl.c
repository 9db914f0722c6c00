/* The scanner of JSON lines against RFC 8259: what is sound and what is not, and where the wanted members lie. */
#include "data/jsonl.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static const char *const fault_names[] = {"sound", "no object", "cut off", "NaN", "too deep", "malformed"};

/* Scans a copy of the text of just its size, so that a sanitizer sees a read beyond it. */
static enum jsonl_fault scan(const char *text, size_t bytes, char **copy, struct jsonl_member *wanted, int n)
{
    size_t at = 0;
    *copy = malloc(bytes + 1);
    assert_non_null(*copy);
    memmove(*copy + 1, text, bytes);
    const enum jsonl_fault fault = jsonl_scan(*copy + 1, bytes, wanted, n, &at);
    assert_in_range(at, 0, bytes);
    assert_memory_equal(*copy + 1, text, bytes);
    return fault;
}

static void lines_are_judged_as_rfc_8259_does(void **state)
{
    (void)state;
    static const struct {
        const char *line;
        enum jsonl_fault fault;
    } cases[] = {
        {"{}", JSONL_SOUND},
        {" {\t\"a\" : 1 ,\r\"b\":[ ] }  ", JSONL_SOUND},
        {"{\"a\":12345678901234567890123456789012345678901234567890}", JSONL_SOUND},
        {"{\"a\":[-0,0.5,-1.25E+400,1e-99999,0e0]}", JSONL_SOUND},
        {"{\"a\":{\"b\":[true,false,null,{\"c\":\"\\\"\\\\\\/\\b\\f\\n\\r\\t\\u00e9\"}]}}", JSONL_SOUND},
        {"{\"a\\u0000b\":\"c\\u0000d\",\"\":0}", JSONL_SOUND},
        {"{\"a\":\"\\ud83d\"}", JSONL_SOUND}, /* RFC 8259, 8.2: the grammar allows it */
        {"{\"a\":1,\"a\":2}", JSONL_SOUND},
        {"{\"a\":\"\x7F\"}", JSONL_SOUND},
        {"[{}]", JSONL_NO_OBJECT},
        {"\"text\"", JSONL_NO_OBJECT},
        {"12", JSONL_NO_OBJECT},
        {"null", JSONL_NO_OBJECT},
        {"", JSONL_CUT_OFF},
        {"{", JSONL_CUT_OFF},
        {"{\"a", JSONL_CUT_OFF},
        {"{\"a\\", JSONL_CUT_OFF},
        {"{\"a\\u00", JSONL_CUT_OFF},
        {"{\"a\"", JSONL_CUT_OFF},
        {"{\"a\":", JSONL_CUT_OFF},
        {"{\"a\":tru", JSONL_CUT_OFF},
        {"{\"a\":-", JSONL_CUT_OFF},
        {"{\"a\":1.", JSONL_CUT_OFF},
        {"{\"a\":1e", JSONL_CUT_OFF},
        {"{\"a\":[1,", JSONL_CUT_OFF},
        {"{\"a\":1,", JSONL_CUT_OFF},
        {"{\"a\":NaN}", JSONL_NAN},
        {"{\"a\":[1,-Infinity]}", JSONL_NAN},
        {"{\"a\":Infinity}", JSONL_NAN},
        {"{\"a\":nan}", JSONL_NAN},
        {"NaN", JSONL_NAN},
        {"{a:1}", JSONL_MALFORMED},
        {"{'a':1}", JSONL_MALFORMED},
        {"{\"a\":1,}", JSONL_MALFORMED},
        {"{\"a\":[1,]}", JSONL_MALFORMED},
        {"{\"a\" 1}", JSONL_MALFORMED},
        {"{\"a\":1 \"b\":2}", JSONL_MALFORMED},
        {"{\"a\":01}", JSONL_MALFORMED},
        {"{\"a\":+1}", JSONL_MALFORMED},
        {"{\"a\":.5}", JSONL_MALFORMED},
        {"{\"a\":1.}", JSONL_MALFORMED},
        {"{\"a\":0x10}", JSONL_MALFORMED},
        {"{\"a\":True}", JSONL_MALFORMED},
        {"{\"a\":nul1}", JSONL_MALFORMED},
        {"{\"a\":\"\t\"}", JSONL_MALFORMED},
        {"{\"a\":\"\\x41\"}", JSONL_MALFORMED},
        {"{\"a\":\"\\u12G4\"}", JSONL_MALFORMED},
        {"{\"a\":[1}", JSONL_MALFORMED},
        {"{\"a\":1}]", JSONL_MALFORMED},
        {"{\"a\":1}{\"a\":2}", JSONL_MALFORMED},
        {"text", JSONL_MALFORMED},
        {"# {}", JSONL_MALFORMED},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char *copy = NULL;
        struct jsonl_member member = {.path = "a"};
        const enum jsonl_fault fault = scan(cases[i].line, strlen(cases[i].line), &copy, &member, 1);
        if (fault != cases[i].fault) {
            fail_msg("%s is found %s, not %s", cases[i].line, fault_names[fault], fault_names[cases[i].fault]);
        }
        free(copy);
    }
}

/* Any beginning of a sound line is cut off: nothing else, and no read beyond it. */
static void every_beginning_is_cut_off(void **state)
{
    (void)state;
    static const char line[] =
        "{\"id\": -12.5e+3, \"a\": [true, null, {\"b\\n\\u00e9\": \"\xE9\x89\x84\"}], \"text\": \"x\"}";
    for (size_t bytes = 0; bytes < sizeof line; bytes++) {
        char *copy = NULL;
        struct jsonl_member member = {.path = "a.b"};
        assert_int_equal(scan(line, bytes, &copy, &member, 1), bytes + 1 < sizeof line ? JSONL_CUT_OFF : JSONL_SOUND);
        free(copy);
    }
}

static void depth_has_a_bound(void **state)
{
    (void)state;
    for (int deeper = 0; deeper < 2; deeper++) {
        const int depth = JSONL_DEPTH_MAX - 1 + deeper; /* of arrays in the object */
        char line[2 * JSONL_DEPTH_MAX + 16] = "{\"a\":";
        memset(line + 5, '[', (size_t)depth);
        memset(line + 5 + depth, ']', (size_t)depth);
        line[5 + 2 * depth] = '}';
        char *copy = NULL;
        assert_int_equal(scan(line, strlen(line), &copy, NULL, 0), deeper ? JSONL_TOO_DEEP : JSONL_SOUND);
        free(copy);
    }
}

static void members_are_found(void **state)
{
    (void)state;
    static const struct {
        const char *line, *path;
        enum jsonl_kind kind;
        const char *value;
    } cases[] = {
        {"{\"a\":\"x\"}", "a", JSONL_STRING, "x"},
        {"{\"a\":\"x\"}", "b", JSONL_ABSENT, ""},
        {"{\"ab\":\"x\"}", "a", JSONL_ABSENT, ""},
        {"{\"a\":\"x\"}", "ab", JSONL_ABSENT, ""},
        {"{\"a\":1,\"a\":\"last\"}", "a", JSONL_STRING, "last"},
        {"{\"a\":{\"b\":\"x\"}}", "a.b", JSONL_STRING, "x"},
        {"{\"a\":{\"b\":\"x\"},\"a\":{}}", "a.b", JSONL_ABSENT, ""}, /* as in Python */
        {"{\"a\":[{\"b\":\"x\"}]}", "a.b", JSONL_ABSENT, ""},
        {"{\"a.b\":\"x\"}", "a.b", JSONL_STRING, "x"},
        {"{\"a\":{\"b\":{\"c\":1}}}", "a.b", JSONL_OBJECT, "{\"c\":1}"},
        {"{\"a\":{\"b\":{\"c\":1}}}", "a.b.c", JSONL_NUMBER, "1"},
        {"{\"\\u0061\":\"x\"}", "a", JSONL_STRING, "x"},
        {"{\"a\\u0000\":\"x\"}", "a", JSONL_ABSENT, ""},
        {"{\"a\":12345678901234567890}", "a", JSONL_NUMBER, "12345678901234567890"},
        {"{\"a\": -1.5e400 }", "a", JSONL_NUMBER, "-1.5e400"},
        {"{\"a\":null}", "a", JSONL_NULL, "null"},
        {"{\"a\":true}", "a", JSONL_BOOL, "true"},
        {"{\"a\":[]}", "a", JSONL_ARRAY, "[]"},
        {"{\"a\":\"\"}", "a", JSONL_STRING, ""},
        {"{\"a\":\"\\\"\\\\\\/\\b\\f\\n\\r\\t\"}", "a", JSONL_STRING, "\"\\/\b\f\n\r\t"},
        {"{\"a\":\"\\u9244\\u00e9\\u007F \\uD83D\\uDE00\"}", "a", JSONL_STRING, "鉄é\x7F 😀"},
        {"{\"a\":\"\\uDBFF\\uDFFF\\uD800\\uDC00\"}", "a", JSONL_STRING, "\xF4\x8F\xBF\xBF\xF0\x90\x80\x80"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char *copy = NULL;
        struct jsonl_member member[2] = {{.path = NULL}, {.path = cases[i].path}};
        assert_int_equal(scan(cases[i].line, strlen(cases[i].line), &copy, member, 2), JSONL_SOUND);
        if (member[1].kind != cases[i].kind) fail_msg("%s of %s", cases[i].path, cases[i].line);
        assert_int_equal(member[0].kind, JSONL_ABSENT);
        if (member[1].kind != JSONL_ABSENT) {
            assert_true(jsonl_unescape(&member[1]));
            assert_int_equal(member[1].bytes, strlen(cases[i].value));
            assert_string_equal(member[1].text, cases[i].value);
        }
        free(copy);
    }
}

static void surrogates_stand_in_pairs(void **state)
{
    (void)state;
    static const char *const texts[] = {"\\ud83d", "\\ud83dx",       "\\ud83d\\n",   "\\ud83d\\ud83d",
                                        "\\ude00", "\\ude00\\ud83d", "a\\ud83d\\u00"};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        char text[32];
        (void)snprintf(text, sizeof text, "%s\"", texts[i]);
        struct jsonl_member member = {.kind = JSONL_STRING, .text = text, .bytes = strlen(texts[i])};
        if (jsonl_unescape(&member)) fail_msg("%s is taken for text", texts[i]);
    }
}

static void names_are_listed_for_a_person(void **state)
{
    (void)state;
    static const struct {
        const char *line, *names;
        size_t room;
    } cases[] = {
        {"{\"id\":1,\"meta\":{\"url\":\"u\",\"x\":{\"y\":1}},\"raw\":[{\"z\":1}]}", "id, meta, meta.url, meta.x, raw",
         100},
        {"{}", "", 100},
        {"{\"id\":1,\"cut", "id", 100},
        {"{\"abcdefgh\":1,\"ijklmnop\":2}", "abcdefgh, ...", 16},
        {"{\"abcdefghijklmnop\":1}", "", 5},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char line[128], names[100];
        (void)snprintf(line, sizeof line, "%s", cases[i].line);
        jsonl_names(line, strlen(line), names, cases[i].room);
        assert_string_equal(names, cases[i].names);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(lines_are_judged_as_rfc_8259_does),
        cmocka_unit_test(every_beginning_is_cut_off),
        cmocka_unit_test(depth_has_a_bound),
        cmocka_unit_test(members_are_found),
        cmocka_unit_test(surrogates_stand_in_pairs),
        cmocka_unit_test(names_are_listed_for_a_person),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
