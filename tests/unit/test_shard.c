/* Shards: what is written is read back; whatever damage is done to the file, it is found and named. */
#include "err.h"
#include "unit/shard_fixture.h"

#include <hdf5.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <cmocka.h>

static char folder[FIXTURE_PATH_BYTES];

static const char *path_of(const char *name)
{
    static char path[2 * FIXTURE_PATH_BYTES];
    (void)snprintf(path, sizeof path, "%s/%s", folder, name);
    return path;
}

static int make_folder(void **state)
{
    (void)state;
    return fixture_folder(folder);
}

static int remove_folder(void **state)
{
    (void)state;
    fixture_remove(folder);
    return 0;
}

static void check_roundtrip(const char *path, uint64_t documents, uint64_t vocab_size, int token_bytes)
{
    struct shard *shard = NULL;
    assert_int_equal(fixture_write(path, documents, 9, vocab_size), 0);
    assert_int_equal(shard_open(&shard, path), 0);
    const struct shard_info *info = shard_get_info(shard);
    assert_int_equal(info->documents, documents);
    assert_int_equal(info->vocab_size, vocab_size);
    assert_int_equal(info->eos, FIXTURE_EOS);
    assert_int_equal(info->tokenizer_id, FIXTURE_TOKENIZER);
    assert_int_equal(info->text_bytes, 3 * info->tokens);
    assert_int_equal(shard_token_bytes(shard), token_bytes);

    const int64_t *offsets = NULL;
    assert_int_equal(shard_offsets(shard, &offsets), 0);
    for (uint64_t d = 0; d < documents; d++) {
        const uint64_t begin = (uint64_t)offsets[d], n = (uint64_t)offsets[d + 1] - begin;
        assert_int_equal(n, fixture_document_tokens(d));
        int32_t tokens[64];
        assert_int_equal(shard_read(shard, begin, n, tokens), 0);
        for (uint64_t i = 0; i < n; i++)
            assert_int_equal(tokens[i], i + 1 < n ? fixture_token(9, begin + i) : FIXTURE_EOS);
    }
    struct shard_label label;
    assert_int_equal(shard_get_label(shard, 3, &label), 0);
    assert_string_equal(label.id, "doc-3");
    assert_string_equal(label.source, "新聞");
    assert_string_equal(label.licence, "unknown");
    assert_string_equal(label.language, "ja");
    assert_int_equal(shard_verify(shard), 0);
    shard_close(shard);
}

static void what_is_written_is_read(void **state)
{
    (void)state;
    check_roundtrip(path_of("narrow.h5"), 200, FIXTURE_VOCAB, 2);
    check_roundtrip(path_of("limit.h5"), 200, 65536, 2);
    check_roundtrip(path_of("wide.h5"), 200, 65537, 4);
    check_roundtrip(path_of("one.h5"), 4, FIXTURE_VOCAB, 2);
    assert_int_equal(access(path_of("one.h5.tmp"), F_OK), -1);
}

static void equal_documents_make_equal_files(void **state)
{
    (void)state;
    char a[2 * FIXTURE_PATH_BYTES];
    (void)snprintf(a, sizeof a, "%s", path_of("a.h5"));
    assert_int_equal(fixture_write(a, 100, 1, FIXTURE_VOCAB), 0);
    assert_int_equal(fixture_write(path_of("b.h5"), 100, 1, FIXTURE_VOCAB), 0);
    FILE *one = fopen(a, "rb"), *two = fopen(path_of("b.h5"), "rb");
    assert_non_null(one);
    assert_non_null(two);
    int byte;
    do {
        byte = getc(one);
        assert_int_equal(byte, getc(two));
    } while (byte != EOF);
    (void)fclose(one);
    (void)fclose(two);
}

/* The function that fills an H5O_info_t and is told what of it. */
#if H5_VERSION_GE(1, 12, 0)
#define GET_INFO H5Oget_info_by_name3
#else
#define GET_INFO H5Oget_info_by_name2
#endif

/* Times would make files differ that hold the same. */
static void objects_have_no_times(void **state)
{
    (void)state;
    static const char *const names[] = {"/", "/documents", "/checksums", "/tokens", "/documents/id", "/sources"};
    assert_int_equal(fixture_write(path_of("times.h5"), 10, 1, FIXTURE_VOCAB), 0);
    const hid_t file = H5Fopen(path_of("times.h5"), H5F_ACC_RDONLY, H5P_DEFAULT);
    assert_true(file >= 0);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        H5O_info_t info;
        assert_true(GET_INFO(file, names[i], &info, H5O_INFO_TIME, H5P_DEFAULT) >= 0);
        assert_int_equal(info.atime, 0);
        assert_int_equal(info.mtime, 0);
        assert_int_equal(info.ctime, 0);
        assert_int_equal(info.btime, 0);
    }
    assert_true(H5Fclose(file) >= 0);
}

static void long_names_are_cut_and_stay_distinct(void **state)
{
    (void)state;
    char id[2][600] = {"", ""};
    struct shard_builder *builder = NULL;
    assert_int_equal(shard_builder_open(&builder, FIXTURE_VOCAB, -1, FIXTURE_EOS, 0), 0);
    for (int d = 0; d < 2; d++) {
        for (int i = 0; i < 199; i++)
            (void)snprintf(id[d] + (size_t)(3 * i), 4, "鋼"); /* three bytes each */
        id[d][597] = (char)('a' + d);
        id[d][598] = '\0';
        const struct shard_label label = {.id = id[d], .source = id[d], .licence = "", .language = "ja"};
        const int32_t eos = FIXTURE_EOS;
        assert_int_equal(shard_builder_add(builder, &eos, 1, 0, &label), 0);
    }
    assert_int_equal(shard_builder_write(builder, path_of("names.h5")), 0);
    shard_builder_close(builder);
    struct shard *shard = NULL;
    struct shard_label first, second;
    assert_int_equal(shard_open(&shard, path_of("names.h5")), 0);
    assert_int_equal(shard_get_label(shard, 0, &first), 0);
    assert_int_equal(shard_get_label(shard, 1, &second), 0);
    assert_int_equal(strlen(first.id), 79 * 3 + 17); /* 79 whole characters, then # and 16 hexadecimal digits */
    assert_memory_equal(first.id, id[0], (size_t)79 * 3);
    assert_string_not_equal(first.id, second.id);
    assert_string_not_equal(first.source, second.source);
    shard_close(shard);
}

/* Opens and verifies; the code of what went wrong. The message must name the file. */
static int open_and_verify(const char *path)
{
    struct shard *shard = NULL;
    err_clear();
    int rc = shard_open(&shard, path);
    if (rc == 0) rc = shard_verify(shard);
    shard_close(shard);
    if (rc != 0) assert_non_null(strstr(err_message(), path));
    return rc;
}

/* Where the dataset lies in the file, and its bytes. */
static long dataset_offset(const char *path, const char *name, long *bytes)
{
    const hid_t file = H5Fopen(path, H5F_ACC_RDONLY, H5P_DEFAULT);
    assert_true(file >= 0);
    const hid_t set = H5Dopen2(file, name, H5P_DEFAULT);
    assert_true(set >= 0);
    const long offset = (long)H5Dget_offset(set);
    *bytes = (long)H5Dget_storage_size(set);
    (void)H5Dclose(set);
    (void)H5Fclose(file);
    return offset;
}

static void every_flipped_bit_of_data_is_found(void **state)
{
    (void)state;
    static const char *const names[] = {"/tokens",           "/documents/offset",  "/documents/id",
                                        "/documents/source", "/documents/licence", "/documents/language",
                                        "/sources",          "/licences",          "/languages",
                                        "/checksums/tokens", "/checksums/offset",  "/checksums/id",
                                        "/checksums/source", "/checksums/licence", "/checksums/language"};
    char path[2 * FIXTURE_PATH_BYTES];
    (void)snprintf(path, sizeof path, "%s", path_of("flip.h5"));
    assert_int_equal(fixture_write(path, 50, 3, FIXTURE_VOCAB), 0);
    assert_int_equal(open_and_verify(path), 0);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        long bytes = 0;
        const long offset = dataset_offset(path, names[i], &bytes);
        for (long at = 0; at<bytes; at += bytes> 8 ? bytes / 8 : 1) {
            assert_int_equal(fixture_flip(path, offset + at), 0);
            assert_int_equal(open_and_verify(path), ERR_DATA);
            assert_int_equal(fixture_flip(path, offset + at), 0);
        }
    }
    assert_int_equal(open_and_verify(path), 0);
}

/* HDF5's own structures carry no checksum here: a flip there is either found or
 * changes nothing that is read (all of that is checksummed), and never crashes. */
static void a_flipped_bit_of_structure_crashes_nothing(void **state)
{
    (void)state;
    char path[2 * FIXTURE_PATH_BYTES];
    (void)snprintf(path, sizeof path, "%s", path_of("structure.h5"));
    assert_int_equal(fixture_write(path, 20, 3, FIXTURE_VOCAB), 0);
    struct stat st;
    assert_int_equal(stat(path, &st), 0);
    int found = 0;
    for (long at = 0; at < (long)st.st_size; at += 13) {
        assert_int_equal(fixture_flip(path, at), 0);
        const int rc = open_and_verify(path);
        if (rc != 0) {
            assert_int_equal(rc, ERR_DATA);
            found++;
        }
        assert_int_equal(fixture_flip(path, at), 0);
    }
    assert_true(found > 50);
    assert_int_equal(open_and_verify(path), 0);
}

static void truncated_files_are_refused(void **state)
{
    (void)state;
    char path[2 * FIXTURE_PATH_BYTES];
    (void)snprintf(path, sizeof path, "%s", path_of("short.h5"));
    assert_int_equal(fixture_write(path, 50, 3, FIXTURE_VOCAB), 0);
    struct stat st;
    assert_int_equal(stat(path, &st), 0);
    const off_t sizes[] = {st.st_size - 1, st.st_size / 2, 600, 100, 4, 0};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        assert_int_equal(truncate(path, sizes[i]), 0);
        assert_int_equal(open_and_verify(path), ERR_DATA);
    }
}

static void foreign_files_are_refused(void **state)
{
    (void)state;
    assert_int_equal(open_and_verify(path_of("absent.h5")), ERR_DATA);
    assert_non_null(strstr(err_message(), "No such file"));
    assert_int_equal(open_and_verify(folder), ERR_DATA);

    FILE *text = fopen(path_of("text.h5"), "w");
    assert_non_null(text);
    assert_true(fputs("this is no HDF5 file\n", text) >= 0);
    assert_int_equal(fclose(text), 0);
    assert_int_equal(open_and_verify(path_of("text.h5")), ERR_DATA);
    assert_non_null(strstr(err_message(), "not an HDF5 file"));

    const hid_t other = H5Fcreate(path_of("other.h5"), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
    assert_true(other >= 0);
    assert_true(H5Fclose(other) >= 0);
    assert_int_equal(open_and_verify(path_of("other.h5")), ERR_DATA);
    assert_non_null(strstr(err_message(), "not a token shard"));
}

/* A limit on the size of files stands for the full disk: writing fails half-way, and nothing may be left. */
static void a_full_disk_leaves_nothing(void **state)
{
    (void)state;
    const struct rlimit small = {.rlim_cur = 8192, .rlim_max = RLIM_INFINITY};
    struct rlimit before;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &before), 0);
    void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
    const int rc = fixture_write(path_of("full.h5"), 5000, 3, FIXTURE_VOCAB);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &before), 0);
    (void)signal(SIGXFSZ, handler);
    assert_int_equal(rc, ERR_SYSTEM);
    assert_non_null(strstr(err_message(), "full.h5"));
    assert_int_equal(access(path_of("full.h5"), F_OK), -1);
    assert_int_equal(access(path_of("full.h5.tmp"), F_OK), -1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_is_written_is_read),
        cmocka_unit_test(equal_documents_make_equal_files),
        cmocka_unit_test(objects_have_no_times),
        cmocka_unit_test(long_names_are_cut_and_stay_distinct),
        cmocka_unit_test(every_flipped_bit_of_data_is_found),
        cmocka_unit_test(a_flipped_bit_of_structure_crashes_nothing),
        cmocka_unit_test(truncated_files_are_refused),
        cmocka_unit_test(foreign_files_are_refused),
        cmocka_unit_test(a_full_disk_leaves_nothing),
    };
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
