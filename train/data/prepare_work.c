/* The work of one rank of `tatara prepare` (see prepare_work.h).
 *
 * Parts of files are gathered into groups of about equal size; a group becomes the shards shard-GROUP-NUMBER.h5 of the
 * rank whose turn it is. Within a group, documents are read in order into batches; while the threads encode one batch,
 * one of them first reads the next. Encoded documents are appended in order, so threads leave no trace in the result.
 *
 * Threads: OpenMP, inside encode_batch only; everything else is one thread's. */
#include "data/prepare_work.h"

#include "clock.h"
#include "data/files.h"
#include "err.h"
#include "log.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <xxhash.h>

enum { BATCH_DOCUMENTS = 512 };
#define BATCH_BYTES ((size_t)8 << 20)
/* Of each group's text one part in so many is compared at its beginning, and one more spread over all of it, and of the
 * first group this much more: all of a small corpus, and of a large one what costs half a percent of the time. */
#define COMPARED_PART 2048
#define COMPARED_BYTES ((uint64_t)128 * 1024)

struct batch {
    struct document document[BATCH_DOCUMENTS];
    int n;
};

/* A group while it is worked on. */
struct group {
    struct prepare_work *work;
    int number;
    int unit, unit_end; /* parts of the list that are still to be read */
    struct source_reader *reader;
    struct shard_builder *builder[2];
    int64_t written[2]; /* shards */
    uint64_t read_bytes, compared_bytes;
    struct batch *batch[2];
};

/* What a person sees while it runs. */
struct progress {
    uint64_t total_bytes, done_bytes; /* of this rank's files */
    double begin_s, last_s;
    bool terminal;
};

/* One line that is written over on a terminal; a line now and then elsewhere. Rank 0 speaks of its own share. */
static void show_progress(struct progress *progress, const struct prepare_work *work, uint64_t bytes_in_unit)
{
    const double at_s = now_s();
    if (work->rank != 0 || at_s - progress->last_s < (progress->terminal ? 0.2 : 15)) return;
    progress->last_s = at_s;
    const double total = (double)(progress->total_bytes + 1); /* a pipe's is not known */
    const double done = fmin(1, (double)(progress->done_bytes + bytes_in_unit) / total);
    const double elapsed_s = at_s - progress->begin_s;
    const int64_t tokens = work->counts.tokens[0] + work->counts.tokens[1];
    char line[160], bar[31];
    const int filled = (int)(done * 30);
    for (int i = 0; i < 30; i++)
        bar[i] = i < filled ? '=' : ' ';
    bar[30] = '\0';
    (void)snprintf(line, sizeof line, "prepare [%s] %3.0f%%  %.2f M tokens  %.0f k tokens/s a rank  %.0f s left", bar,
                   100 * done, 1e-6 * (double)tokens, 1e-3 * (double)tokens / elapsed_s,
                   done > 0 ? elapsed_s * (1 - done) / done : 0);
    if (progress->terminal) {
        (void)fprintf(stderr, "\r%s", line);
    } else {
        log_info("%s", line);
    }
}

/* The next record of the group into `document`; *end when there is none. */
static int read_document(struct group *group, struct progress *progress, struct document *document, bool *end)
{
    struct prepare_work *work = group->work;
    for (;;) {
        if (!group->reader) {
            *end = group->unit == group->unit_end;
            if (*end) return 0;
            TRY(source_reader_open(&group->reader, work->list, &work->list->unit[group->unit], work->rules.text_split,
                                   document_max_record_bytes(&work->rules)));
        }
        const struct source_unit *unit = &work->list->unit[group->unit];
        document->file = &work->list->file[unit->file];
        document->unit = group->unit;
        TRY(source_reader_next(group->reader, &document->record, end));
        if (!*end) return 0;
        progress->done_bytes += unit->file_bytes;
        work->unit_lines[group->unit] = source_reader_lines(group->reader);
        source_reader_close(group->reader);
        group->reader = NULL;
        group->unit++;
    }
}

/* Whether the document just read is one of those that are compared: by what lies before it in the group, so that neither
 * ranks nor threads change the choice. */
static bool choose_compared(struct group *group, uint64_t bytes)
{
    const uint64_t allowed = (group->work->group_bytes + group->read_bytes) / COMPARED_PART;
    const bool compared = group->compared_bytes <= allowed + (group->number == 0 ? COMPARED_BYTES : 0);
    group->read_bytes += bytes;
    if (compared) group->compared_bytes += bytes < FIDELITY_BYTES_MAX ? bytes : FIDELITY_BYTES_MAX;
    return compared;
}

static int read_batch(struct group *group, struct progress *progress, struct batch *batch)
{
    size_t bytes = 0;
    batch->n = 0;
    while (batch->n < BATCH_DOCUMENTS && bytes < BATCH_BYTES) {
        bool end = false;
        struct document *document = &batch->document[batch->n];
        TRY(read_document(group, progress, document, &end));
        if (end) return 0;
        document->compared = choose_compared(group, document->record.text.used);
        bytes += document->record.text.used;
        batch->n++;
    }
    return 0;
}

/* Keeps the first error that any thread had. */
static void keep_error(struct err_record *error, int rc)
{
    if (rc == 0) return;
#pragma omp critical(prepare_error)
    {
        if (error->code == 0) err_take(error, rc);
    }
}

/* Encodes one batch and meanwhile reads the next. */
static int encode_batch(struct group *group, struct progress *progress, struct batch *batch, struct batch *next)
{
    const struct prepare_work *work = group->work;
    struct err_record error = {.code = 0};
#pragma omp parallel num_threads(work->threads)
    {
#pragma omp single nowait
        keep_error(&error, read_batch(group, progress, next));
#pragma omp for schedule(dynamic, 1)
        for (int i = 0; i < batch->n; i++)
            keep_error(&error, document_make(&batch->document[i], &work->rules, work->tokenizer));
    }
    return err_give(&error);
}

/* Is the document held out? By its id alone, so that it stays where it is when the corpus grows. */
static int side_of(const struct prepare_work *work, const char *id)
{
    const double drawn = ldexp((double)XXH3_64bits(id, strlen(id)), -64);
    return drawn < work->valid_fraction ? 1 : 0;
}

static int write_shard(struct group *group, int side)
{
    struct prepare_work *work = group->work;
    char name[64], *path = NULL;
    if (shard_builder_tokens(group->builder[side]) == 0) return 0;
    (void)snprintf(name, sizeof name, "shard-%06d-%03" PRId64 ".h5", group->number, group->written[side]);
    TRY(path_join(&path, work->outputs[side].partial, name));
    const int rc = shard_builder_write(group->builder[side], path);
    free(path);
    if (rc == 0) {
        group->written[side]++;
        work->counts.shards[side]++;
    }
    return rc;
}

static int append_document(struct group *group, const struct document *document)
{
    struct prepare_work *work = group->work;
    struct prepare_counts *counts = &work->counts;
    for (int f = 0; f < FIELDS; f++)
        counts->found[f] += document->found[f];
    if (document->drop != DROP_NONE) {
        if (counts->dropped[document->drop]++ == 0) {
            drop_note(&work->first[document->drop], document, &work->rules);
        }
        return 0;
    }
    const int side = side_of(work, document->label.id);
    const uint64_t tokens = shard_builder_tokens(group->builder[side]);
    if (tokens + (uint64_t)document->n > (uint64_t)work->shard_tokens) TRY(write_shard(group, side));
    TRY(shard_builder_add(group->builder[side], document->tokens, (uint64_t)document->n, document->text_bytes,
                          &document->label));
    counts->documents[side]++;
    counts->tokens[side] += document->n;
    counts->text_bytes[side] += (int64_t)document->text_bytes;
    fidelity_add(&counts->fidelity, &document->fidelity);
    return 0;
}

static int append_batch(struct group *group, struct batch *batch)
{
    for (int i = 0; i < batch->n; i++) {
        TRY(append_document(group, &batch->document[i]));
        document_clear(&batch->document[i]);
    }
    return 0;
}

/* Has another rank failed? */
static bool others_failed(const struct prepare_work *work)
{
    char *path = NULL;
    if (work->ranks == 1 || path_join(&path, work->outputs[0].partial, OUTPUT_FAILED) != 0) return false;
    const bool failed = access(path, F_OK) == 0;
    free(path);
    return failed;
}

static int run_batches(struct group *group, struct progress *progress, bool *stop)
{
    int current = 0;
    TRY(read_batch(group, progress, group->batch[0]));
    while (group->batch[current]->n > 0) {
        *stop = others_failed(group->work);
        if (*stop) return 0;
        TRY(encode_batch(group, progress, group->batch[current], group->batch[1 - current]));
        TRY(append_batch(group, group->batch[current]));
        show_progress(progress, group->work, group->reader ? source_reader_file_bytes(group->reader) : 0);
        current = 1 - current;
    }
    return 0;
}

static void free_batch(struct batch *batch)
{
    for (int i = 0; batch && i < BATCH_DOCUMENTS; i++) {
        document_clear(&batch->document[i]);
        buffer_free(&batch->document[i].record.text);
    }
    free(batch);
}

static int run_group(struct group *group, struct progress *progress, bool *stop)
{
    int rc = 0;
    const struct prepare_work *work = group->work;
    for (int i = 0; i < 2; i++) {
        group->batch[i] = calloc(1, sizeof *group->batch[i]);
        if (!group->batch[i]) FAIL_GOTO(done, ERR_SYSTEM, "out of memory");
        TRY_GOTO(shard_builder_open(&group->builder[i], (uint64_t)tokenizer_vocab_size(work->tokenizer),
                                    work->rules.bos, (uint64_t)work->rules.eos, tokenizer_id(work->tokenizer)),
                 done);
    }
    TRY_GOTO(run_batches(group, progress, stop), done);
    for (int side = 0; side < 2 && !*stop; side++)
        TRY_GOTO(write_shard(group, side), done);
done:
    for (int i = 0; i < 2; i++) {
        free_batch(group->batch[i]);
        shard_builder_close(group->builder[i]);
    }
    source_reader_close(group->reader);
    return rc;
}

/* The end of the group that begins at this part. */
static int group_end(const struct prepare_work *work, int unit)
{
    uint64_t bytes = 0;
    while (unit < work->list->units && bytes < work->group_bytes)
        bytes += source_unit_text_bytes(work->list, &work->list->unit[unit++]);
    return unit;
}

int prepare_run(struct prepare_work *work)
{
    bool stop = false;
    struct progress progress = {.begin_s = now_s(), .last_s = now_s(), .terminal = isatty(STDERR_FILENO) == 1};
    for (int number = 0, unit = 0; unit < work->list->units; number++) {
        const int end = group_end(work, unit);
        for (; unit < end; unit++) {
            if (number % work->ranks == work->rank) progress.total_bytes += work->list->unit[unit].file_bytes;
        }
    }
    for (int number = 0, unit = 0; unit < work->list->units && !stop; number++) {
        struct group group = {.work = work, .number = number, .unit = unit, .unit_end = group_end(work, unit)};
        unit = group.unit_end;
        if (number % work->ranks == work->rank) TRY(run_group(&group, &progress, &stop));
    }
    if (work->rank == 0 && progress.terminal) (void)fprintf(stderr, "\r\033[K");
    return 0;
}
