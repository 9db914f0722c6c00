/* What a refused file is called, and folders that cannot be brought to disk. */
#include "err.h"
#include "fs.h"

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

static int sync_error;

int __wrap_fsync(int fd);

int __wrap_fsync(int fd)
{
    (void)fd;
    errno = sync_error;
    return sync_error == 0 ? 0 : -1;
}

static void test_codes(void **state)
{
    static const struct {
        int error, code;
        const char *remedy;
    } rows[] = {
        {ENOENT, ERR_DATA, "check the path"},
        {ENOTDIR, ERR_DATA, "check the path"},
        {EMFILE, ERR_SYSTEM, "ulimit -n"},
        {ENFILE, ERR_SYSTEM, "fs.file-max"},
        {ENOLCK, ERR_SYSTEM, "unset HDF5_USE_FILE_LOCKING"},
        {EACCES, ERR_SYSTEM, "the rights"},
        {EPERM, ERR_SYSTEM, "the rights"},
        {EIO, ERR_SYSTEM, "the file system"},
        {ESTALE, ERR_SYSTEM, "the file system"},
        {ENOSPC, ERR_SYSTEM, "free space"},
        {EDQUOT, ERR_SYSTEM, "the quota"},
        {EROFS, ERR_SYSTEM, "read-only"},
        {ENOMEM, ERR_SYSTEM, "out of memory"},
        {ETIMEDOUT, ERR_SYSTEM, "the file system"},
    };
    (void)state;
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        const int code = fs_raise("here", 1, "cannot open", "/a/file", rows[i].error, ERR_DATA, "check the path");
        assert_int_equal(code, rows[i].code);
        assert_ptr_equal(strstr(err_message(), "cannot open /a/file: "), err_message());
        assert_non_null(strstr(err_message(), strerror(rows[i].error)));
        assert_non_null(strstr(err_message(), rows[i].remedy));
        assert_null(strstr(err_message(), "damaged"));
    }
    assert_int_equal(chdir("/tmp"), 0);
    assert_int_equal(fs_raise("here", 1, "cannot open", "./f", ENOENT, ERR_CONFIG, NULL), ERR_CONFIG);
    assert_string_equal(err_message(), "cannot open /tmp/f: No such file or directory");
}

static int log_lines(FILE *log, const char *text)
{
    char line[512];
    int n = 0;
    rewind(log);
    while (fgets(line, sizeof line, log))
        n += strstr(line, text) != NULL;
    return n;
}

/* Only what says that there is no such operation is passed over, with one warning in all. */
static void test_sync_folder(void **state)
{
    static const struct {
        int error, code;
    } rows[] = {{0, 0},
                {EINVAL, 0},
                {ENOTSUP, 0},
                {EINVAL, 0},
                {EIO, ERR_SYSTEM},
                {ENOSPC, ERR_SYSTEM},
                {EDQUOT, ERR_SYSTEM},
                {EROFS, ERR_SYSTEM}};
    FILE *log = tmpfile();
    const int kept = dup(STDERR_FILENO);
    (void)state;
    assert_non_null(log);
    assert_true(dup2(fileno(log), STDERR_FILENO) >= 0);
    int codes[sizeof rows / sizeof *rows];
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        sync_error = rows[i].error;
        codes[i] = fs_sync_folder("/");
    }
    assert_true(dup2(kept, STDERR_FILENO) >= 0);
    (void)close(kept);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        assert_int_equal(codes[i], rows[i].code);
    assert_int_equal(log_lines(log, "cannot bring a folder to disk"), 1);
    assert_int_equal(log_lines(log, "warning: "), 1);
    (void)fclose(log);
    assert_int_equal(fs_sync_folder("/no/such/folder"), ERR_SYSTEM);
    assert_non_null(strstr(err_message(), "/no/such/folder"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_codes),
        cmocka_unit_test(test_sync_folder),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
