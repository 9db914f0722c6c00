/* Errors: the message and the trace on their way up, and from one thread to another. */
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "err.h"

static int read_header(int magic)
{
    if (magic != 42) FAIL(ERR_DATA, "the magic number is %d, not 42", magic);
    return 0;
}

static int open_file(int magic)
{
    TRY(read_header(magic));
    return 0;
}

/* An owner: frees on both ways. */
static int load(int magic, int *freed)
{
    int rc = 0;
    char *buffer = malloc(8);
    if (!buffer) FAIL_GOTO(done, ERR_SYSTEM, "no memory");
    TRY_GOTO(open_file(magic), done);
done:
    free(buffer);
    ++*freed;
    return rc;
}

static void test_try(void **state)
{
    (void)state;
    int freed = 0;
    err_clear();
    assert_int_equal(load(42, &freed), 0);
    assert_string_equal(err_message(), "");
    assert_string_equal(err_trace_text(), "");

    assert_int_equal(load(7, &freed), ERR_DATA);
    assert_int_equal(freed, 2);
    assert_string_equal(err_message(), "the magic number is 7, not 42");
    const char *raised = strstr(err_trace_text(), "ERR_DATA");
    const char *inner = strstr(err_trace_text(), "read_header(magic)");
    const char *outer = strstr(err_trace_text(), "open_file(magic)");
    assert_true(raised && inner && outer && raised < inner && inner < outer); /* innermost first */
    assert_non_null(strstr(err_trace_text(), "test_err.c:"));

    assert_int_equal(load(8, &freed), ERR_DATA); /* a new failure starts a new trace */
    assert_string_equal(err_message(), "the magic number is 8, not 42");
    assert_ptr_equal(strstr(strstr(err_trace_text(), "open_file(magic)") + 1, "open_file(magic)"), NULL);
    err_clear();
    assert_string_equal(err_message(), "");
}

static void test_long_message(void **state)
{
    (void)state;
    char name[3 * ERR_MESSAGE_MAX];
    memset(name, 'x', sizeof name - 1);
    name[sizeof name - 1] = '\0';
    assert_int_equal(err_raise(ERR_CONFIG, "a.c", 1, "cannot open %s", name), ERR_CONFIG);
    assert_int_equal(strlen(err_message()), ERR_MESSAGE_MAX - 1);
    for (int i = 0; i < 1000; i++)
        err_trace("a.c", i, name); /* a trace that is full stays a string */
    assert_true(strlen(err_trace_text()) < (size_t)1000 * 100);
    err_clear();
}

static void *fail_in_thread(void *arg)
{
    struct err_record *record = arg;
    err_take(record, open_file(9));
    return err_message()[0] == '\0' && err_trace_text()[0] == '\0' ? record : NULL;
}

static void test_between_threads(void **state)
{
    (void)state;
    struct err_record record = {0};
    pthread_t thread;
    void *cleared = NULL;
    assert_int_equal(open_file(1), ERR_DATA);
    assert_int_equal(pthread_create(&thread, NULL, fail_in_thread, &record), 0);
    assert_int_equal(pthread_join(thread, &cleared), 0);
    assert_non_null(cleared);
    assert_string_equal(err_message(), "the magic number is 1, not 42"); /* one message for each thread */
    assert_int_equal(err_give(&record), ERR_DATA);
    assert_string_equal(err_message(), "the magic number is 9, not 42");
    err_clear();
}

static void test_shared(void **state)
{
    (void)state;
    assert_int_equal(open_file(1), ERR_DATA);
    assert_false(err_shared());
    err_share();
    assert_true(err_shared());
    assert_int_equal(open_file(1), ERR_DATA);
    assert_false(err_shared());
    err_clear();
}

static void test_names(void **state)
{
    (void)state;
    assert_string_equal(err_name(ERR_DATA), "ERR_DATA");
    assert_string_equal(err_name(ERR_BUG), "ERR_BUG");
    assert_string_equal(err_name(1234), "?");
}

/* The file has the status of the process that ended first. */
static void test_leave_status(void **state)
{
    (void)state;
    char path[] = "/tmp/tatara-test-err-XXXXXX", text[16] = "";
    const int file = mkstemp(path);
    assert_true(file >= 0 && close(file) == 0 && unlink(path) == 0);
    err_leave_status(ERR_DATA); /* nowhere to leave it */
    assert_int_equal(setenv("TATARA_STATUS_FILE", path, 1), 0);
    err_leave_status(ERR_STOPPED);
    err_leave_status(ERR_COMM);
    FILE *left = fopen(path, "r");
    assert_non_null(left);
    assert_non_null(fgets(text, sizeof text, left));
    assert_string_equal(text, "11\n");
    assert_int_equal(fclose(left), 0);
    assert_int_equal(unlink(path), 0);
    assert_int_equal(unsetenv("TATARA_STATUS_FILE"), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_try),    cmocka_unit_test(test_long_message), cmocka_unit_test(test_between_threads),
        cmocka_unit_test(test_shared), cmocka_unit_test(test_names),        cmocka_unit_test(test_leave_status),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
