/* Compressed files of all formats: one and several members, padding, and that no damage passes for a shorter text. */
#include "data/stream.h"

#include "err.h"
#include "unit/shard_fixture.h"

#include <bzlib.h>
#include <lzma.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <zlib.h>
#include <zstd.h>

#include <cmocka.h>

enum { TEXT_BYTES = 300000, PACKED_BYTES = 400000 };

static char folder[FIXTURE_PATH_BYTES], text[TEXT_BYTES];

static size_t pack_gzip(char *out, size_t room, char *in, size_t bytes)
{
    z_stream z = {.next_in = (unsigned char *)in, .avail_in = (unsigned)bytes, .next_out = (unsigned char *)out};
    z.avail_out = (unsigned)room;
    assert_int_equal(deflateInit2(&z, 6, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY), Z_OK);
    assert_int_equal(deflate(&z, Z_FINISH), Z_STREAM_END);
    assert_int_equal(deflateEnd(&z), Z_OK);
    return room - z.avail_out;
}

static size_t pack_zstd(char *out, size_t room, char *in, size_t bytes)
{
    ZSTD_CCtx *context = ZSTD_createCCtx();
    (void)ZSTD_CCtx_setParameter(context, ZSTD_c_checksumFlag, 1);
    const size_t packed = ZSTD_compress2(context, out, room, in, bytes);
    assert_false(ZSTD_isError(packed));
    (void)ZSTD_freeCCtx(context);
    return packed;
}

static size_t pack_xz(char *out, size_t room, char *in, size_t bytes)
{
    size_t used = 0;
    assert_int_equal(
        lzma_easy_buffer_encode(1, LZMA_CHECK_CRC64, NULL, (uint8_t *)in, bytes, (uint8_t *)out, &used, room),
        LZMA_OK);
    return used;
}

static size_t pack_bzip2(char *out, size_t room, char *in, size_t bytes)
{
    unsigned used = (unsigned)room;
    assert_int_equal(BZ2_bzBuffToBuffCompress(out, &used, in, (unsigned)bytes, 1, 0, 0), BZ_OK);
    return used;
}

static const struct {
    const char *names[3];
    size_t (*pack)(char *out, size_t room, char *in, size_t bytes);
} formats[] = {
    {{"a.gz", "a.txt.GZ", "a"}, pack_gzip},
    {{"a.zst", "a.zstd", "a.jsonl"}, pack_zstd},
    {{"a.xz", "a.XZ", "part-00000"}, pack_xz},
    {{"a.bz2", "a.jsonl.bz2", "a.txt"}, pack_bzip2},
};
enum { FORMATS = sizeof formats / sizeof *formats };

static const char *write_named(const char *name, const char *data, size_t bytes)
{
    static char path[2 * FIXTURE_PATH_BYTES];
    (void)snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(data, 1, bytes, file), bytes);
    assert_int_equal(fclose(file), 0);
    return path;
}

/* Reads a file of these bytes in pieces of this size; its text must be that of `copies` of the text, unless there is an
 * error, whose code it returns. */
static int read_back(const char *name, const char *packed, size_t packed_bytes, int copies, size_t piece)
{
    static char data[65536];
    struct stream *stream = NULL;
    size_t got = 1, total = 0, wrong = 0;
    err_clear();
    int rc = stream_open(&stream, write_named(name, packed, packed_bytes));
    while (rc == 0 && got > 0) {
        rc = stream_read(stream, data, piece, &got);
        for (size_t i = 0; rc == 0 && i < got; i++, total++)
            wrong += data[i] != text[total % TEXT_BYTES];
    }
    stream_close(stream);
    if (rc != 0) return rc;
    assert_int_equal(total, (size_t)copies * TEXT_BYTES);
    assert_int_equal(wrong, 0);
    return 0;
}

static void packed_text_is_the_same_text(void **state)
{
    (void)state;
    for (int f = 0; f < FORMATS; f++) {
        static char packed[2 * PACKED_BYTES + 16];
        size_t bytes = formats[f].pack(packed, PACKED_BYTES, text, TEXT_BYTES);
        for (int n = 0; n < 3; n++) {
            const char *const name = formats[f].names[n];
            assert_int_equal(read_back(name, packed, bytes, 1, 65536), 0);
            assert_int_equal(read_back(name, packed, bytes, 1, 1000), 0);
            assert_int_equal(read_back(formats[(f + 1) % FORMATS].names[n], packed, bytes, 1, 65536), 0);
        }
        const char *const name = formats[f].names[0];
        memset(packed + bytes, 0, 16);
        assert_int_equal(read_back(name, packed, bytes + 7, 1, 65536), 0); /* padding */
        const size_t second = formats[f].pack(packed + bytes + 8, PACKED_BYTES, text, TEXT_BYTES);
        assert_int_equal(read_back(name, packed, bytes + 8 + second, 2, 65536), 0);
        memmove(packed + bytes, packed + bytes + 8, second);
        assert_int_equal(read_back(name, packed, bytes + second, 2, 65536), 0);
    }
}

static void damage_is_named(void **state)
{
    (void)state;
    for (int f = 0; f < FORMATS; f++) {
        static char packed[PACKED_BYTES + 16];
        const char *const name = formats[f].names[0];
        const size_t bytes = formats[f].pack(packed, PACKED_BYTES, text, TEXT_BYTES);
        for (int cut = 0; cut < 20; cut++) {
            assert_int_equal(read_back(name, packed, bytes * (size_t)cut / 20, 1, 65536), ERR_DATA);
            assert_non_null(strstr(err_message(), cut == 0 ? "empty or truncated" : "truncated"));
            assert_non_null(strstr(err_message(), name));
        }
        assert_int_equal(read_back(name, packed, bytes - 1, 1, 65536), ERR_DATA);
        for (int at = 1; at < 20; at++) {
            packed[bytes * (size_t)at / 20] ^= 0x10;
            assert_int_equal(read_back(name, packed, bytes, 1, 65536), ERR_DATA);
            packed[bytes * (size_t)at / 20] ^= 0x10;
        }
        memset(packed + bytes, 'g', 16);
        assert_int_equal(read_back(name, packed, bytes + 16, 1, 65536), ERR_DATA);
        if (!strstr(err_message(), "damaged")) fail_msg("%s", err_message());
        assert_int_equal(read_back(name, text, TEXT_BYTES, 1, 65536), 0); /* plain text under this name */
        memset(packed, 0, 512);
        assert_int_equal(read_back(name, packed, 512, 1, 65536), ERR_DATA);
    }
}

/* A frame of Zstandard with one raw block that declares a window of 2^log bytes, as `zstd --long` writes it. */
static void long_windows_are_read(void **state)
{
    (void)state;
    for (int log = 27; log <= 32; log++) {
        char frame[9 + 1000] = {'\x28', '\xB5', '\x2F', '\xFD', 0, (char)((log - 10) << 3)};
        const unsigned header = 1000U << 3 | 1U;
        memcpy(frame + 6, &header, 3);
        memcpy(frame + 9, text, 1000);
        char *data = NULL;
        size_t got = 0;
        struct stream *stream = NULL;
        assert_int_equal(stream_open(&stream, write_named("long.zst", frame, sizeof frame)), 0);
        assert_int_equal(stream_peek(stream, 2000, &data, &got), log <= 31 ? 0 : ERR_DATA);
        if (log <= 31) {
            assert_int_equal(got, 1000);
            assert_memory_equal(data, text, 1000);
        } else {
            assert_non_null(strstr(err_message(), "larger than 2 GiB"));
        }
        stream_close(stream);
    }
}

/* A frame that names a dictionary is not damaged. */
static void dictionaries_are_named(void **state)
{
    (void)state;
    static const char frame[] = {'\x28', '\xB5', '\x2F', '\xFD', 1, 0x58, 7, 9, 0, 0, 'a'};
    char data[16];
    size_t got = 0;
    struct stream *stream = NULL;
    assert_int_equal(stream_open(&stream, write_named("a.zst", frame, sizeof frame)), 0);
    assert_int_equal(stream_read(stream, data, sizeof data, &got), ERR_DATA);
    assert_non_null(strstr(err_message(), "dictionary"));
    stream_close(stream);
}

static void peeked_text_is_read_again(void **state)
{
    (void)state;
    static const size_t wanted[] = {0, 1, 16, 1000, TEXT_BYTES, TEXT_BYTES + 1};
    static char packed[PACKED_BYTES], data[TEXT_BYTES + 1];
    const size_t bytes = pack_gzip(packed, PACKED_BYTES, text, TEXT_BYTES);
    for (int gz = 0; gz < 2; gz++) {
        struct stream *stream = NULL;
        const char *const path = gz ? write_named("a.gz", packed, bytes) : write_named("a", text, TEXT_BYTES);
        assert_int_equal(stream_open(&stream, path), 0);
        assert_int_equal(stream_is_packed(stream), gz);
        for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
            char *peeked = NULL;
            size_t n = 0;
            assert_int_equal(stream_peek(stream, wanted[i], &peeked, &n), 0);
            assert_int_equal(n, wanted[i] < TEXT_BYTES ? wanted[i] : TEXT_BYTES);
            assert_memory_equal(peeked, text, n);
        }
        size_t total = 0, got = 1;
        while (got > 0) {
            assert_int_equal(stream_read(stream, data + total, sizeof data - total, &got), 0);
            total += got;
        }
        assert_int_equal(total, TEXT_BYTES);
        assert_memory_equal(data, text, TEXT_BYTES);
        if (!gz) {
            assert_int_equal(stream_seek(stream, 5), 0);
            assert_int_equal(stream_read(stream, data, 100, &got), 0);
            assert_memory_equal(data, text + 5, got);
        }
        stream_close(stream);
    }
}

static int set_up(void **state)
{
    (void)state;
    unsigned seed = 1;
    for (size_t i = 0; i < TEXT_BYTES; i++) {
        seed = seed * 1664525U + 1013904223U;
        text[i] = (char)('a' + (seed >> 24) % 26);
    }
    return fixture_folder(folder);
}

static int tear_down(void **state)
{
    (void)state;
    fixture_remove(folder);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(packed_text_is_the_same_text), cmocka_unit_test(damage_is_named),
        cmocka_unit_test(long_windows_are_read),        cmocka_unit_test(dictionaries_are_named),
        cmocka_unit_test(peeked_text_is_read_again),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
