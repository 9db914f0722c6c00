/* `tatara prepare`: the same shards on any number of ranks and threads; nothing dropped unseen; clear refusals that leave
 * nothing behind. */
#include "comm.h"
#include "data/dataset.h"
#include "data/prepare.h"
#include "data/show.h"
#include "err.h"
#include "log.h"
#include "unit/shard_fixture.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <xxhash.h>
#include <zlib.h>
#include <zstd.h>

#include <cmocka.h>

enum { PATH_BYTES = 2 * FIXTURE_PATH_BYTES, WORDS_MAX = 24, CORPUS_DOCUMENTS = 500 };

/* Made by make_corpus.sh. */
#define CORPUS TATARA_CORPUS "/corpus.jsonl"
#define TOKENIZER TATARA_CORPUS "/tok.model"

static struct comm comm;
static char folder[FIXTURE_PATH_BYTES];

/* folder/name, valid until the eighth call after it. */
static const char *in_folder(const char *name)
{
    static char path[8][PATH_BYTES];
    static int next;
    next = (next + 1) % 8;
    (void)snprintf(path[next], sizeof path[next], "%s/%s", folder, name);
    return path[next];
}

/* Runs prepare with the usual tokenizer, the output folder and further words up to NULL, on the ranks of `on`. */
static int prepare_on(struct comm *on, const char *out, const char *const *more)
{
    const char *word[WORDS_MAX] = {"--tokenizer", TOKENIZER, "--out", out};
    char *argv[WORDS_MAX] = {NULL}, *kept[WORDS_MAX];
    int n = 4;
    while (more[n - 4]) {
        word[n] = more[n - 4];
        n++;
    }
    for (int i = 0; i < n; i++)
        argv[i] = strdup(word[i]);
    memcpy(kept, argv, sizeof kept);
    err_clear();
    const int rc = prepare_command(on, n, argv);
    for (int i = 0; i < n; i++)
        free(kept[i]);
    return rc;
}

#define PREPARE(out, ...) prepare_on(&comm, (out), (const char *const[]){__VA_ARGS__, NULL})

/* Rank 0 writes a file, the others wait for it. */
static void write_file(const char *path, const void *data, size_t bytes)
{
    if (comm.rank == 0) {
        FILE *file = fopen(path, "wb");
        assert_non_null(file);
        assert_int_equal(fwrite(data, 1, bytes, file), bytes);
        assert_int_equal(fclose(file), 0);
    }
    assert_int_equal(comm_barrier(&comm), 0);
}

static char *read_file(const char *path, size_t *bytes)
{
    FILE *file = fopen(path, "rb");
    assert_non_null(file);
    assert_int_equal(fseek(file, 0, SEEK_END), 0);
    *bytes = (size_t)ftell(file);
    rewind(file);
    char *data = malloc(*bytes + 1);
    assert_non_null(data);
    assert_int_equal(fread(data, 1, *bytes, file), *bytes);
    data[*bytes] = '\0';
    (void)fclose(file);
    return data;
}

static bool exists(const char *path)
{
    return access(path, F_OK) == 0;
}

static void assert_nothing_left(const char *out)
{
    char partial[PATH_BYTES + 16];
    (void)snprintf(partial, sizeof partial, "%s.partial", out);
    assert_int_equal(comm_barrier(&comm), 0);
    assert_false(exists(out));
    assert_false(exists(partial));
}

static void assert_says(const char *part)
{
    if (comm.ranks == 1 && !strstr(err_message(), part)) fail_msg("\"%s\" does not say \"%s\"", err_message(), part);
}

/* A number of dataset.json, by one or two keys. */
static int64_t listed(const char *out, const char *key, const char *inner)
{
    char path[PATH_BYTES + 32];
    (void)snprintf(path, sizeof path, "%s/%s", out, DATASET_LIST);
    json_t *list = json_load_file(path, 0, NULL);
    const json_t *value = json_object_get(list, key);
    const int64_t number = json_integer_value(inner ? json_object_get(value, inner) : value);
    assert_true(json_is_integer(inner ? json_object_get(value, inner) : value));
    json_decref(list);
    return number;
}

/* A number that stands for all ids and tokens of a dataset in their order, however they are cut into shards. */
static uint64_t digest(const char *out)
{
    uint64_t hash = 0;
    struct path_list shards = {.path = NULL};
    assert_int_equal(dataset_shards(&shards, out), 0);
    for (int i = 0; i < shards.n; i++) {
        struct shard *shard = NULL;
        const int64_t *offset = NULL;
        assert_int_equal(shard_open(&shard, shards.path[i]), 0);
        assert_int_equal(shard_verify(shard), 0);
        assert_int_equal(shard_offsets(shard, &offset), 0);
        for (uint64_t d = 0; d < shard_get_info(shard)->documents; d++) {
            struct shard_label label;
            int32_t tokens[4096];
            const uint64_t n = (uint64_t)(offset[d + 1] - offset[d]);
            assert_in_range(n, 2, 4096);
            assert_int_equal(shard_get_label(shard, d, &label), 0);
            assert_int_equal(shard_read(shard, (uint64_t)offset[d], n, tokens), 0);
            assert_int_equal(tokens[n - 1], shard_get_info(shard)->eos);
            hash = XXH3_64bits_withSeed(label.id, strlen(label.id), hash);
            hash = XXH3_64bits_withSeed(tokens, n * sizeof *tokens, hash);
        }
        shard_close(shard);
    }
    path_list_free(&shards);
    return hash;
}

/* The same names with the same bytes in both folders. */
static void assert_same_folders(const char *a, const char *b)
{
    struct path_list in_a = {.path = NULL}, in_b = {.path = NULL};
    assert_int_equal(path_list_folder(&in_a, a), 0);
    assert_int_equal(path_list_folder(&in_b, b), 0);
    assert_int_equal(in_a.n, in_b.n);
    for (int i = 0; i < in_a.n; i++) {
        char path_a[2 * PATH_BYTES], path_b[2 * PATH_BYTES];
        size_t bytes_a = 0, bytes_b = 0;
        assert_string_equal(in_a.path[i], in_b.path[i]);
        (void)snprintf(path_a, sizeof path_a, "%s/%s", a, in_a.path[i]);
        (void)snprintf(path_b, sizeof path_b, "%s/%s", b, in_b.path[i]);
        char *data_a = read_file(path_a, &bytes_a), *data_b = read_file(path_b, &bytes_b);
        assert_int_equal(bytes_a, bytes_b);
        assert_memory_equal(data_a, data_b, bytes_a);
        free(data_a);
        free(data_b);
    }
    path_list_free(&in_a);
    path_list_free(&in_b);
}

/* Many small parts of one file over all ranks and several threads, against one rank with one thread. */
static void ranks_and_threads_leave_no_trace(void **state)
{
    (void)state;
    const char *input = CORPUS;
    assert_int_equal(PREPARE(in_folder("many"), "--threads", "3", "--shard-tokens", "3000", "--valid-out",
                             in_folder("many-valid"), "--valid-fraction", "0.2", input),
                     0);
    if (comm.rank == 0) {
        struct comm alone = comm;
        alone.ranks = 1;
        const char *const words[] = {"--threads",
                                     "1",
                                     "--shard-tokens",
                                     "3000",
                                     "--valid-out",
                                     in_folder("one-valid"),
                                     "--valid-fraction",
                                     "0.2",
                                     input,
                                     NULL};
        assert_int_equal(prepare_on(&alone, in_folder("one"), words), 0);
        assert_same_folders(in_folder("many"), in_folder("one"));
        assert_same_folders(in_folder("many-valid"), in_folder("one-valid"));
        assert_int_equal(listed(in_folder("one"), "documents", NULL) +
                             listed(in_folder("one-valid"), "documents", NULL),
                         CORPUS_DOCUMENTS);
    }
    /* Cut into parts or read as a whole: the same documents in the same order. */
    assert_int_equal(PREPARE(in_folder("parts"), "--shard-tokens", "1000", input), 0);
    assert_int_equal(PREPARE(in_folder("whole"), input), 0);
    assert_true(digest(in_folder("parts")) == digest(in_folder("whole")));
    assert_int_equal(listed(in_folder("whole"), "documents", NULL), CORPUS_DOCUMENTS);
}

static void compressed_text_is_the_same_text(void **state)
{
    (void)state;
    size_t bytes = 0;
    char *text = read_file(CORPUS, &bytes);
    if (comm.rank == 0) { /* two members each, as parallel compressors write them */
        for (int half = 0; half < 2; half++) {
            const size_t begin = half ? bytes / 2 : 0, n = half ? bytes - bytes / 2 : bytes / 2;
            gzFile gz = gzopen(in_folder("packed.jsonl.gz"), half ? "ab" : "wb");
            assert_int_equal(gzwrite(gz, text + begin, (unsigned)n), n);
            assert_int_equal(gzclose(gz), Z_OK);
            const size_t room = ZSTD_compressBound(n);
            char *packed = malloc(room);
            const size_t packed_bytes = ZSTD_compress(packed, room, text + begin, n, 3);
            FILE *zst = fopen(in_folder("packed.jsonl.zst"), half ? "ab" : "wb");
            assert_non_null(zst);
            assert_int_equal(fwrite(packed, 1, packed_bytes, zst), packed_bytes);
            assert_int_equal(fclose(zst), 0);
            free(packed);
        }
    }
    free(text);
    assert_int_equal(comm_barrier(&comm), 0);
    assert_int_equal(PREPARE(in_folder("plain"), CORPUS), 0);
    assert_int_equal(PREPARE(in_folder("gz"), in_folder("packed.jsonl.gz")), 0);
    assert_int_equal(PREPARE(in_folder("zst"), in_folder("packed.jsonl.zst")), 0);
    assert_true(digest(in_folder("gz")) == digest(in_folder("plain")));
    assert_true(digest(in_folder("zst")) == digest(in_folder("plain")));

    /* Cut off at the end, and with a byte changed in the middle: an error that names the file. */
    static const char *const names[] = {"packed.jsonl.gz", "packed.jsonl.zst"};
    for (int i = 0; i < 2; i++) {
        const char *path = in_folder(names[i]), *out = in_folder("damaged");
        struct stat st;
        assert_int_equal(stat(path, &st), 0);
        assert_int_equal(comm_barrier(&comm), 0);
        if (comm.rank == 0) assert_int_equal(truncate(path, st.st_size - 1), 0);
        assert_int_equal(comm_barrier(&comm), 0);
        assert_int_equal(PREPARE(out, path), ERR_DATA);
        assert_says(names[i]);
        assert_says("truncated");
        assert_nothing_left(out);
        if (comm.rank == 0) assert_int_equal(fixture_flip(path, (long)st.st_size / 3), 0);
        assert_int_equal(comm_barrier(&comm), 0);
        assert_int_equal(PREPARE(out, path), ERR_DATA);
        assert_says(names[i]);
        assert_nothing_left(out);
    }
}

static void every_dropped_document_is_counted(void **state)
{
    (void)state;
    static const char lines[] = "{\"id\": 7, \"text\": \"鉄を作る。\"}\n"
                                "{\"text\": \"\"}\n"
                                "{\"text\": \" \\n\\u3000\"}\r\n"
                                "{\"text\": \"\xE9\x89\"}\n"
                                "{\"text\": \"broken\"\n"
                                "[1, 2]\n"
                                "\n"
                                "{\"title\": \"no text\"}\n"
                                "{\"text\": 12}\n"
                                "{\"text\": \"a\\u0000b\"}\n"
                                "{\"text\": \"川と山と海と空の長い長い長い長い長い長い歌\"}\n"
                                "{\"text\": \"水\", \"license\": \"CC0-1.0\"}";
    write_file(in_folder("bad.jsonl"), lines, sizeof lines - 1);
    const char *out = in_folder("drops");
    assert_int_equal(PREPARE(out, "--max-document-bytes", "60", "--source", "test", in_folder("bad.jsonl")), 0);
    assert_int_equal(listed(out, "documents", NULL), 2);
    static const struct {
        const char *reason;
        int64_t n;
    } expected[] = {{"empty", 2},
                    {"not UTF-8", 1},
                    {"cut-off JSON", 1},
                    {"not a JSON object", 1},
                    {"without a text field", 1},
                    {"whose text is no string", 1},
                    {"with NUL bytes", 1},
                    {"too large", 1}};
    for (size_t i = 0; i < sizeof expected / sizeof *expected; i++) {
        assert_int_equal(listed(out, "dropped_from_inputs", expected[i].reason), expected[i].n);
    }
    struct path_list shards = {.path = NULL};
    struct shard *shard = NULL;
    struct shard_label label;
    assert_int_equal(dataset_shards(&shards, out), 0);
    assert_int_equal(shard_open(&shard, shards.path[0]), 0);
    assert_int_equal(shard_get_label(shard, 0, &label), 0);
    assert_string_equal(label.id, "7");
    assert_string_equal(label.source, "test");
    assert_string_equal(label.licence, "unknown");
    assert_int_equal(shard_get_label(shard, 1, &label), 0);
    char id[64];
    (void)snprintf(id, sizeof id, "bad.jsonl@%d", (int)(strstr(lines, "{\"text\": \"水") - lines));
    assert_string_equal(label.id, id);
    assert_string_equal(label.licence, "CC0-1.0");
    shard_close(shard);
    path_list_free(&shards);
}

static void text_files_are_split_as_asked(void **state)
{
    (void)state;
    static const char text[] = "\xEF\xBB\xBF鉄\r\n川\r\n\r\n \n山\n海\n\n\n";
    if (comm.rank == 0) {
        assert_int_equal(mkdir(in_folder("text"), 0777), 0);
        assert_int_equal(mkdir(in_folder("text/deeper"), 0777), 0);
    }
    write_file(in_folder("text/a.txt"), text, sizeof text - 1);
    write_file(in_folder("text/deeper/b.md"), "空", 3);
    write_file(in_folder("text/deeper/picture.png"), "\x89PNG", 4);
    write_file(in_folder("text/empty.txt"), "", 0);
    static const struct {
        const char *split;
        int64_t documents, empty;
    } cases[] = {{"file", 2, 1}, {"line", 5, 4}, {"blank-line", 3, 0}};
    for (int i = 0; i < 3; i++) {
        const char *out = in_folder(cases[i].split);
        assert_int_equal(PREPARE(out, "--documents", cases[i].split, in_folder("text")), 0);
        assert_int_equal(listed(out, "documents", NULL), cases[i].documents);
        assert_int_equal(listed(out, "dropped_from_inputs", "empty"), cases[i].empty);
    }
    const char *out = in_folder("pattern");
    assert_int_equal(PREPARE(out, in_folder("text/*.txt")), 0);
    assert_int_equal(listed(out, "documents", NULL), 1);
}

/* What is held out of half the corpus stays held out of the whole. */
static void held_out_documents_stay_held_out(void **state)
{
    (void)state;
    size_t bytes = 0;
    char *text = read_file(CORPUS, &bytes);
    size_t half = bytes / 2;
    while (text[half - 1] != '\n')
        half++;
    write_file(in_folder("half.jsonl"), text, half);
    free(text);
    static const char *const sizes[] = {"half", "all"};
    json_t *ids[2] = {json_object(), json_object()};
    for (int i = 0; i < 2; i++) {
        char out[32], valid[32];
        (void)snprintf(out, sizeof out, "held-%s", sizes[i]);
        (void)snprintf(valid, sizeof valid, "held-%s-valid", sizes[i]);
        assert_int_equal(PREPARE(in_folder(out), "--valid-out", in_folder(valid), "--valid-fraction", "0.3",
                                 i == 0 ? in_folder("half.jsonl") : CORPUS),
                         0);
        struct path_list shards = {.path = NULL};
        assert_int_equal(dataset_shards(&shards, in_folder(valid)), 0);
        for (int s = 0; s < shards.n; s++) {
            struct shard *shard = NULL;
            struct shard_label label;
            assert_int_equal(shard_open(&shard, shards.path[s]), 0);
            for (uint64_t d = 0; d < shard_get_info(shard)->documents; d++) {
                assert_int_equal(shard_get_label(shard, d, &label), 0);
                assert_int_equal(json_object_set_new(ids[i], label.id, json_true()), 0);
            }
            shard_close(shard);
        }
        path_list_free(&shards);
    }
    assert_in_range(json_object_size(ids[1]), CORPUS_DOCUMENTS / 5, CORPUS_DOCUMENTS * 2 / 5);
    const char *id = NULL;
    json_t *value = NULL;
    json_object_foreach(ids[0], id, value)
    {
        assert_non_null(json_object_get(ids[1], id));
    }
    json_decref(ids[0]);
    json_decref(ids[1]);
}

static void folders_of_others_are_left_alone(void **state)
{
    (void)state;
    const char *input = CORPUS, *out = in_folder("there");
    if (comm.rank == 0) assert_int_equal(mkdir(out, 0777), 0);
    assert_int_equal(comm_barrier(&comm), 0);
    assert_int_equal(PREPARE(out, input), 0); /* empty: taken */
    assert_int_equal(PREPARE(out, input), ERR_USAGE);
    assert_says("--overwrite");
    assert_int_equal(PREPARE(out, "--overwrite", input), 0);
    write_file(in_folder("there/thesis.txt"), "years of work", 13);
    assert_int_equal(PREPARE(out, "--overwrite", input), ERR_USAGE);
    assert_says("thesis.txt");
    assert_true(exists(in_folder("there/thesis.txt")));
    if (comm.rank == 0) {
        assert_int_equal(mkdir(in_folder("real"), 0777), 0);
        assert_int_equal(symlink("real", in_folder("link")), 0);
        assert_int_equal(symlink("nowhere", in_folder("dangling")), 0);
    }
    assert_int_equal(comm_barrier(&comm), 0);
    assert_int_equal(PREPARE(in_folder("link"), input), 0);
    assert_int_equal(PREPARE(in_folder("link/"), "--overwrite", input), 0);
    assert_true(exists(in_folder("real/dataset.json")));
    assert_int_equal(PREPARE(in_folder("dangling"), input), ERR_USAGE);
    assert_says("dangling");
    assert_int_equal(PREPARE("", input), ERR_USAGE);
    static const char *const pairs[][3] = {
        {"sx", "sx", "same folder"},         {"sx", "sx/", "same folder"},
        {"sx", "./sx", "same folder"},       {"sx", "none/..//sx/.", "same folder"},
        {"link", "real", "same folder"},     {"real/sx", "link/sx", "same folder"},
        {"sx", "sx/valid", "side by side"},  {"link/sx", "real", "side by side"},
        {"sx", "sx.partial", "side by side"}};
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++) {
        const char *const one = in_folder(pairs[i][0]), *const other = in_folder(pairs[i][1]);
        assert_int_equal(PREPARE(one, "--overwrite", "--valid-out", other, input), ERR_USAGE);
        assert_says(pairs[i][2]);
        assert_int_equal(PREPARE(other, "--overwrite", "--valid-out", one, input), ERR_USAGE);
    }
    assert_false(exists(in_folder("sx")) || exists(in_folder("sx.partial")));
}

static void wrong_words_are_refused(void **state)
{
    (void)state;
    const char *out = in_folder("wrong"), *input = CORPUS;
    assert_int_equal(PREPARE(out, "--colour", "red", input), ERR_USAGE);
    assert_says("--colour");
    assert_int_equal(PREPARE(out, "--shard-tokens", "many", input), ERR_USAGE);
    assert_says("--shard-tokens");
    assert_int_equal(PREPARE(out, "--documents", "page", input), ERR_USAGE);
    assert_int_equal(PREPARE(out, "--valid-fraction", "0.1", input), ERR_USAGE);
    assert_says("--valid-out");
    assert_int_equal(PREPARE(out, "--overwrite"), ERR_USAGE);
    assert_says("INPUT");
    assert_int_equal(PREPARE(out, in_folder("nowhere*.jsonl")), ERR_DATA);
    assert_says("nowhere");
    assert_int_equal(PREPARE(out, "--tokenizer", in_folder("nowhere.model"), input), ERR_DATA);
    assert_says("nowhere.model");
    assert_int_equal(PREPARE(out, "--tokenizer", input, input), ERR_DATA);
    assert_says("SentencePiece");
    assert_int_equal(PREPARE(out, "--text-key", "body", input), ERR_DATA);
    assert_says("no document is left");
    assert_nothing_left(out);
}

/* A limit on the size of files stands for the full disk, on one rank only: all must end, with nothing left. */
static void a_full_disk_ends_all_ranks(void **state)
{
    (void)state;
    const struct rlimit small = {.rlim_cur = 4096, .rlim_max = RLIM_INFINITY};
    struct rlimit before;
    const char *out = in_folder("full");
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &before), 0);
    void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
    if (comm.rank == comm.ranks - 1) assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
    const int rc = PREPARE(out, "--shard-tokens", "3000", CORPUS);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &before), 0);
    (void)signal(SIGXFSZ, handler);
    assert_int_equal(rc, ERR_SYSTEM);
    assert_says("cannot write the shard");
    assert_nothing_left(out);
}

static int show(const char *path, const char *option, const char *value)
{
    char words[4][PATH_BYTES];
    char *argv[4] = {words[0], words[1], words[2], words[3]};
    (void)snprintf(words[0], PATH_BYTES, "show");
    (void)snprintf(words[1], PATH_BYTES, "%s", path);
    (void)snprintf(words[2], PATH_BYTES, "%s", option);
    (void)snprintf(words[3], PATH_BYTES, "%s", value);
    err_clear();
    return data_command(&comm, *value ? 4 : 3, argv);
}

static void a_dataset_that_changed_is_refused(void **state)
{
    (void)state;
    const char *out = in_folder("kept");
    assert_int_equal(PREPARE(out, "--shard-tokens", "4000", CORPUS), 0);
    if (comm.rank != 0) return;
    assert_int_equal(show(out, "--verify", ""), 0);
    assert_int_equal(show(out, "--entropy", ""), 0);
    assert_int_equal(show(out, "--sample", "2"), ERR_USAGE);
    struct path_list shards = {.path = NULL};
    assert_int_equal(dataset_shards(&shards, out), 0);
    assert_true(shards.n > 2);
    const char *const victim = shards.path[1], *const aside = in_folder("kept/aside");
    struct path_list again = {.path = NULL};

    assert_int_equal(rename(victim, aside), 0);
    assert_int_equal(dataset_shards(&again, out), ERR_DATA);
    assert_non_null(strstr(err_message(), "is missing"));
    assert_non_null(strstr(err_message(), path_name(victim)));
    path_list_free(&again);
    assert_int_equal(rename(aside, victim), 0);

    assert_int_equal(link(victim, in_folder("kept/other.h5")), 0);
    assert_int_equal(dataset_shards(&again, out), ERR_DATA);
    path_list_free(&again);
    assert_int_equal(unlink(in_folder("kept/other.h5")), 0);

    struct stat st;
    assert_int_equal(stat(victim, &st), 0);
    assert_int_equal(fixture_flip(victim, (long)st.st_size / 3), 0);
    assert_int_equal(show(out, "--verify", ""), ERR_DATA);
    assert_int_equal(truncate(victim, st.st_size - 1), 0);
    assert_int_equal(dataset_shards(&again, out), ERR_DATA);
    assert_non_null(strstr(err_message(), path_name(victim)));
    path_list_free(&again);
    path_list_free(&shards);
}

static int make_folder(void **state)
{
    (void)state;
    const int rc = comm.rank == 0 ? fixture_folder(folder) : 0;
    return rc == 0 ? comm_bcast(&comm, folder, sizeof folder, 0) : rc;
}

static int remove_folder(void **state)
{
    (void)state;
    const int rc = comm_barrier(&comm);
    if (comm.rank == 0) fixture_remove(folder);
    return rc;
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(ranks_and_threads_leave_no_trace),  cmocka_unit_test(compressed_text_is_the_same_text),
        cmocka_unit_test(every_dropped_document_is_counted), cmocka_unit_test(text_files_are_split_as_asked),
        cmocka_unit_test(held_out_documents_stay_held_out),  cmocka_unit_test(folders_of_others_are_left_alone),
        cmocka_unit_test(wrong_words_are_refused),           cmocka_unit_test(a_full_disk_ends_all_ranks),
        cmocka_unit_test(a_dataset_that_changed_is_refused),
    };
    if (comm_open(&comm, &argc, &argv) != 0) return 1;
    log_set_rank(comm.rank, comm.ranks);
    const int failed = cmocka_run_group_tests(tests, make_folder, remove_folder);
    comm_close(&comm);
    return failed;
}
