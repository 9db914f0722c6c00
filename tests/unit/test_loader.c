/* The loader: its batches are those of the sampler, whatever the ranks, seeks and prefetch; damage is an error. */
#include "data/loader.h"

#include "data/sampler.h"
#include "err.h"
#include "unit/shard_fixture.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <sys/stat.h>

#include <cmocka.h>

enum { SEQ_LEN = 16, MICRO = 2, GLOBAL = 12 };

static char folder[FIXTURE_PATH_BYTES];
static struct dataset_list sets;

static void path_in(char *path, size_t bytes, const char *name)
{
    (void)snprintf(path, bytes, "%s/%s", folder, name);
}

/* Two datasets: a folder of two shards (salts 0 and 1), and a single shard (salt 2). */
static int make_sets(void **state)
{
    (void)state;
    if (fixture_folder(folder) != 0) return -1;
    char path[2 * FIXTURE_PATH_BYTES];
    path_in(path, sizeof path, "set");
    if (mkdir(path, 0777) != 0) return -1;
    static const char *const names[] = {"set/a.h5", "set/b.h5", "single.h5"};
    static const uint64_t documents[] = {30, 17, 45};
    for (uint64_t i = 0; i < 3; i++) {
        path_in(path, sizeof path, names[i]);
        if (fixture_write(path, documents[i], i, FIXTURE_VOCAB) != 0) return -1;
    }
    sets.n = 2;
    path_in(sets.entry[0].path, sizeof sets.entry[0].path, "set");
    path_in(sets.entry[1].path, sizeof sets.entry[1].path, "single.h5");
    sets.entry[0].weight = 3;
    sets.entry[1].weight = 1;
    return 0;
}

static int remove_sets(void **state)
{
    (void)state;
    fixture_remove(folder);
    return 0;
}

static struct loader_options options_of(int rank, int ranks)
{
    return (struct loader_options){.sets = &sets,
                                   .seq_len = SEQ_LEN,
                                   .micro = MICRO,
                                   .global = GLOBAL,
                                   .seed = 1234,
                                   .rank = rank,
                                   .ranks = ranks,
                                   .prefetch = 3,
                                   .document_mask = true,
                                   .tokenizer_id = FIXTURE_TOKENIZER,
                                   .vocab_size = FIXTURE_VOCAB};
}

static int64_t tokens_of(uint64_t documents)
{
    int64_t tokens = 0;
    for (uint64_t d = 0; d < documents; d++)
        tokens += (int64_t)fixture_document_tokens(d);
    return tokens;
}

/* A sequence of a dataset, straight from the formula of the fixture. */
static void expect_sequence(int dataset, int64_t sequence, int32_t *tok, int32_t *target, int32_t *start)
{
    const int64_t in_a = (tokens_of(30) - 1) / SEQ_LEN;
    const uint64_t salt = dataset == 1 ? 2 : sequence < in_a ? 0 : 1;
    const uint64_t begin = (uint64_t)(salt == 1 ? sequence - in_a : sequence) * SEQ_LEN;
    uint64_t at = 0; /* where document d begins */
    for (uint64_t d = 0; at <= begin + SEQ_LEN; at += fixture_document_tokens(d), d++) {
        const uint64_t n = fixture_document_tokens(d);
        for (uint64_t i = at; i < at + n; i++) {
            const int32_t token = i + 1 < at + n ? fixture_token(salt, i) : FIXTURE_EOS;
            if (i >= begin && i < begin + SEQ_LEN) {
                tok[i - begin] = token;
                start[i - begin] = at < begin ? 0 : (int32_t)(at - begin);
            }
            if (i > begin && i <= begin + SEQ_LEN) target[i - begin - 1] = token;
        }
    }
}

static void expect_row(const struct batch *batch, int64_t row, struct sample sample)
{
    int32_t tok[SEQ_LEN] = {0}, target[SEQ_LEN] = {0}, start[SEQ_LEN] = {0};
    expect_sequence(sample.dataset, sample.sequence, tok, target, start);
    assert_memory_equal(batch->tok + row * SEQ_LEN, tok, sizeof tok);
    assert_memory_equal(batch->target + row * SEQ_LEN, target, sizeof target);
    assert_memory_equal(batch->start + row * SEQ_LEN, start, sizeof start);
    for (int t = 0; t < SEQ_LEN; t++)
        assert_int_equal(batch->pos[row * SEQ_LEN + t], t);
}

static void expect_step(struct loader *loader, const struct sampler *sampler, int64_t step, int rank, int ranks)
{
    for (int64_t i = rank; i < GLOBAL / MICRO; i += ranks) {
        struct batch batch;
        assert_int_equal(loader_next(loader, &batch), 0);
        assert_int_equal(batch.sequences, MICRO);
        assert_int_equal(batch.seq_len, SEQ_LEN);
        for (int64_t row = 0; row < MICRO; row++) {
            expect_row(&batch, row, sampler_at(sampler, step * GLOBAL + i * MICRO + row));
        }
    }
}

static void make_sampler(struct sampler *sampler)
{
    const int64_t in_a = (tokens_of(30) - 1) / SEQ_LEN, in_b = (tokens_of(17) - 1) / SEQ_LEN;
    const int64_t sequences[] = {in_a + in_b, (tokens_of(45) - 1) / SEQ_LEN};
    const double weights[] = {3, 1};
    assert_int_equal(sampler_open(sampler, 1234, 2, sequences, weights), 0);
}

static void batches_are_those_of_the_sampler(void **state)
{
    (void)state;
    struct sampler sampler;
    make_sampler(&sampler);
    for (int ranks = 1; ranks <= 4; ranks++) {
        for (int rank = 0; rank < ranks; rank++) {
            const struct loader_options options = options_of(rank, ranks);
            struct loader *loader = NULL;
            assert_int_equal(loader_open(&loader, &options), 0);
            assert_int_equal(loader_micro_batches(loader), (GLOBAL / MICRO - rank + ranks - 1) / ranks);
            assert_int_equal(loader_tokens(loader), tokens_of(30) + tokens_of(17) + tokens_of(45));
            assert_int_equal(loader_sequences(loader), sampler.sequences[0] + sampler.sequences[1]);
            for (int64_t step = 0; step < 20; step++)
                expect_step(loader, &sampler, step, rank, ranks);
            loader_close(loader);
        }
    }
}

static void a_rank_without_work_opens_and_closes(void **state)
{
    (void)state;
    const struct loader_options options = options_of(GLOBAL / MICRO, GLOBAL / MICRO + 1);
    struct loader *loader = NULL;
    assert_int_equal(loader_open(&loader, &options), 0);
    assert_int_equal(loader_micro_batches(loader), 0);
    assert_int_equal(loader_seek(loader, (int64_t)3 * GLOBAL), 0);
    loader_close(loader);
}

/* Seeks at any time: at once, in mid-step, backwards, far ahead, and many in a row. */
static void after_a_seek_all_is_as_if_fresh(void **state)
{
    (void)state;
    static const int64_t steps[] = {7, 7, 0, 100000, 6, 5};
    struct sampler sampler;
    make_sampler(&sampler);
    struct loader_options options = options_of(0, 1);
    for (options.prefetch = 1; options.prefetch <= 5; options.prefetch += 2) {
        struct loader *loader = NULL;
        assert_int_equal(loader_open(&loader, &options), 0);
        for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) {
            assert_int_equal(loader_seek(loader, steps[i] * GLOBAL), 0);
            expect_step(loader, &sampler, steps[i], 0, 1);
            expect_step(loader, &sampler, steps[i] + 1, 0, 1);
            struct batch batch; /* one more, so that the next seek falls into a step */
            assert_int_equal(loader_next(loader, &batch), 0);
        }
        for (int64_t step = 0; step < 200; step++)
            assert_int_equal(loader_seek(loader, step * GLOBAL), 0);
        expect_step(loader, &sampler, 199, 0, 1);
        assert_true(loader_take_wait_s(loader) > 0);
        assert_true(loader_take_wait_s(loader) == 0);
        loader_close(loader);
    }
}

static void without_a_mask_documents_begin_at_0(void **state)
{
    (void)state;
    struct loader_options options = options_of(0, 1);
    options.document_mask = false;
    struct loader *loader = NULL;
    struct batch batch;
    assert_int_equal(loader_open(&loader, &options), 0);
    assert_int_equal(loader_next(loader, &batch), 0);
    for (int i = 0; i < MICRO * SEQ_LEN; i++)
        assert_int_equal(batch.start[i], 0);
    loader_close(loader);
}

/* Each sequence of the sets once, in order, shared out over the ranks; the last batch padded; then the same again. */
static void a_sequential_pass_sees_all_once(void **state)
{
    (void)state;
    struct sampler sampler;
    make_sampler(&sampler);
    const int64_t total = sampler.sequences[0] + sampler.sequences[1];
    const int ranks = 2;
    for (int rank = 0; rank < ranks; rank++) {
        struct loader_options options = options_of(rank, ranks);
        options.sequential = true;
        options.micro = 5;
        assert_int_not_equal(total % options.micro, 0);
        struct loader *loader = NULL;
        assert_int_equal(loader_open(&loader, &options), 0);
        const int64_t batches = (total + options.micro - 1) / options.micro;
        assert_int_equal(loader_micro_batches(loader), (batches - rank + ranks - 1) / ranks);
        for (int pass = 0; pass < 2; pass++) {
            for (int64_t i = rank; i < batches; i += ranks) {
                struct batch batch;
                assert_int_equal(loader_next(loader, &batch), 0);
                for (int64_t row = 0; row < options.micro; row++) {
                    const int64_t at = i * options.micro + row, in_first = sampler.sequences[0];
                    for (int t = 0; at >= total && t < SEQ_LEN; t++) {
                        assert_int_equal(batch.target[row * SEQ_LEN + t], -1);
                    }
                    const struct sample sample = {.dataset = at >= in_first,
                                                  .sequence = at >= in_first ? at - in_first : at};
                    if (at < total) expect_row(&batch, row, sample);
                }
            }
        }
        loader_close(loader);
    }
}

/* Opening must fail with this code and name `part` in its message. */
static void expect_refused(const struct loader_options *options, int code, const char *part)
{
    struct loader *loader = NULL;
    assert_int_equal(loader_open(&loader, options), code);
    assert_null(loader);
    if (!strstr(err_message(), part)) fail_msg("\"%s\" does not say \"%s\"", err_message(), part);
}

static void what_does_not_fit_is_refused(void **state)
{
    (void)state;
    struct loader_options options = options_of(0, 1);
    options.tokenizer_id = 0x1234;
    expect_refused(&options, ERR_DATA, "0000000000001234");
    expect_refused(&options, ERR_DATA, "000000000000004d"); /* FIXTURE_TOKENIZER */
    options = options_of(0, 1);
    options.vocab_size = FIXTURE_VOCAB - 1;
    expect_refused(&options, ERR_DATA, "499");
    options = options_of(0, 1);
    options.seq_len = 100000;
    expect_refused(&options, ERR_DATA, "no whole sequence");
    options.sequential = true;
    expect_refused(&options, ERR_DATA, "no whole sequence");
    static struct dataset_list none;
    options = options_of(0, 1);
    options.sets = &none;
    expect_refused(&options, ERR_CONFIG, "data.train");
    none.n = 1;
    path_in(none.entry[0].path, sizeof none.entry[0].path, "nowhere");
    none.entry[0].weight = 1;
    expect_refused(&options, ERR_DATA, "nowhere");
}

/* A flipped bit is found before it is trained on, the good batches before it arrive, and the error stays until a seek. */
static void a_flipped_bit_is_an_error(void **state)
{
    (void)state;
    static struct dataset_list damaged;
    damaged.n = 1;
    damaged.entry[0].weight = 1;
    char path[2 * FIXTURE_PATH_BYTES];
    path_in(path, sizeof path, "damaged.h5");
    (void)snprintf(damaged.entry[0].path, sizeof damaged.entry[0].path, "%s", path);
    assert_int_equal(fixture_write(path, 60000, 5, FIXTURE_VOCAB), 0); /* over a MiB: several blocks */
    struct stat st;
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(fixture_flip(path, 2L << 20), 0); /* in the second or third block of the tokens */
    struct loader_options options = options_of(0, 1);
    options.sets = &damaged;
    options.sequential = true;
    struct loader *loader = NULL;
    assert_int_equal(loader_open(&loader, &options), 0);
    for (int pass = 0; pass < 2; pass++) {
        struct batch batch;
        int64_t good = 0;
        while (good < loader_micro_batches(loader) && loader_next(loader, &batch) == 0)
            good++;
        assert_in_range(good, (1 << 20) / 2 / SEQ_LEN / MICRO - 1, loader_micro_batches(loader) - 1);
        assert_int_equal(loader_next(loader, &batch), ERR_DATA);
        assert_non_null(strstr(err_message(), path));
        assert_non_null(strstr(err_message(), "of /tokens is damaged"));
        assert_int_equal(loader_seek(loader, 0), 0);
    }
    loader_close(loader);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(batches_are_those_of_the_sampler), cmocka_unit_test(a_rank_without_work_opens_and_closes),
        cmocka_unit_test(after_a_seek_all_is_as_if_fresh),  cmocka_unit_test(without_a_mask_documents_begin_at_0),
        cmocka_unit_test(a_sequential_pass_sees_all_once),  cmocka_unit_test(what_does_not_fit_is_refused),
        cmocka_unit_test(a_flipped_bit_is_an_error),
    };
    return cmocka_run_group_tests(tests, make_sets, remove_sets);
}
