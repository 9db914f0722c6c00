/* The loader (see loader.h).
 *
 * Threads: one reader thread fills the ring; the thread that opened the loader takes from it. Everything under "shared"
 * is guarded by the mutex; the reader fills a slot without holding it, which is safe because only the reader touches a
 * slot that is neither ready nor lent. A seek raises `seeks`; a slot that was being filled when it happened is dropped.
 * Shards and scratch belong to the reader thread once it runs.
 *
 * Invariant: the slots [first, first + ready) hold the next batches in order; the one before first is lent to the caller
 * while `lent`. Memory is taken once, in loader_open. */
#include "data/loader.h"

#include "clock.h"
#include "data/dataset.h"
#include "data/overlap.h"
#include "data/sampler.h"
#include "data/search.h"
#include "data/shard.h"
#include "data/tokenizer.h"
#include "err.h"
#include "log.h"
#include "mix.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A dataset's shards, and the number of sequences before each. */
struct dataset {
    int shards;
    struct shard **shard;
    int64_t *first_sequence; /* [shards + 1] */
};

struct loader {
    struct loader_options options;
    int datasets;
    struct dataset *dataset;
    struct sampler sampler;
    int64_t tokens, sequences;
    int64_t micro_batches; /* of this rank in a step, or in a pass */
    int slots;
    int32_t *memory;  /* [slots][tok, target, start][micro · seq_len], then pos[micro · seq_len] */
    int32_t *scratch; /* [seq_len + 1] */
    double wait_s;
    bool running;
    pthread_t thread;

    pthread_mutex_t mutex; /* shared from here on */
    pthread_cond_t changed;
    int first, ready;
    bool lent, stopping, failed;
    uint64_t seeks;
    int64_t batch, in_step; /* what is filled next: where its global batch begins, and which micro-batch of that */
    struct err_record error;
};

enum part { PART_TOK, PART_TARGET, PART_START, PARTS };

static int32_t *slot_part(const struct loader *loader, int slot, enum part part)
{
    const int64_t elems = loader->options.micro * loader->options.seq_len;
    return loader->memory + ((int64_t)slot * PARTS + part) * elems;
}

/* Position in the sequence where each token's document begins; 0 for the document that began before it. */
static int find_starts(struct shard *shard, int64_t begin, int64_t seq_len, int32_t *start)
{
    const int64_t *offset = NULL;
    TRY(shard_offsets(shard, &offset));
    int64_t document = search_part(offset, (int64_t)shard_get_info(shard)->documents, begin);
    int32_t at = 0;
    for (int64_t t = 0; t < seq_len; t++) {
        if (offset[document + 1] == begin + t) {
            document++;
            at = (int32_t)t;
        }
        start[t] = at;
    }
    return 0;
}

/* Sequence `sequence` of the dataset into one row. */
static int read_row(struct loader *loader, const struct dataset *dataset, int64_t sequence, int slot, int64_t row)
{
    const int64_t seq_len = loader->options.seq_len;
    const int64_t s = search_part(dataset->first_sequence, dataset->shards, sequence);
    struct shard *shard = dataset->shard[s];
    const int64_t begin = (sequence - dataset->first_sequence[s]) * seq_len;
    TRY(shard_read(shard, (uint64_t)begin, (uint64_t)seq_len + 1, loader->scratch));
    const size_t bytes = (size_t)seq_len * sizeof(int32_t);
    int32_t *start = slot_part(loader, slot, PART_START) + row * seq_len;
    memcpy(slot_part(loader, slot, PART_TOK) + row * seq_len, loader->scratch, bytes);
    memcpy(slot_part(loader, slot, PART_TARGET) + row * seq_len, loader->scratch + 1, bytes);
    if (loader->options.document_mask) return find_starts(shard, begin, seq_len, start);
    memset(start, 0, bytes);
    return 0;
}

static void pad_row(struct loader *loader, int slot, int64_t row)
{
    const int64_t seq_len = loader->options.seq_len;
    for (int64_t t = row * seq_len; t < (row + 1) * seq_len; t++) {
        slot_part(loader, slot, PART_TOK)[t] = 0;
        slot_part(loader, slot, PART_TARGET)[t] = -1;
        slot_part(loader, slot, PART_START)[t] = 0;
    }
}

/* This rank's micro-batch number `in_step` of the global batch that begins at sample `batch` (or pass) into the slot. */
static int fill_slot(struct loader *loader, int slot, int64_t batch, int64_t in_step)
{
    const struct loader_options *options = &loader->options;
    const int64_t micro_batch = options->rank + in_step * options->ranks;
    for (int64_t row = 0; row < options->micro; row++) {
        const int64_t position = micro_batch * options->micro + row;
        struct sample sample = {.dataset = 0, .sequence = position, .epoch = 0};
        if (!options->sequential) {
            sample = sampler_at(&loader->sampler, batch + position);
        } else if (position >= loader->sequences) {
            pad_row(loader, slot, row);
            continue;
        } else {
            const struct dataset *dataset = loader->dataset;
            for (; sample.sequence >= dataset->first_sequence[dataset->shards]; dataset++) {
                sample.sequence -= dataset->first_sequence[dataset->shards];
                sample.dataset++;
            }
        }
        TRY(read_row(loader, &loader->dataset[sample.dataset], sample.sequence, slot, row));
    }
    return 0;
}

/* The reader thread: fills slots as long as there is room. */
static void *read_ahead(void *argument)
{
    struct loader *loader = argument;
    (void)pthread_mutex_lock(&loader->mutex);
    while (!loader->stopping) {
        if (loader->failed || loader->ready + (loader->lent ? 1 : 0) >= loader->slots) {
            (void)pthread_cond_wait(&loader->changed, &loader->mutex);
            continue;
        }
        const int slot = (loader->first + loader->ready) % loader->slots;
        const int64_t batch = loader->batch, in_step = loader->in_step;
        const uint64_t seeks = loader->seeks;
        (void)pthread_mutex_unlock(&loader->mutex);
        const int rc = fill_slot(loader, slot, batch, in_step);
        (void)pthread_mutex_lock(&loader->mutex);
        if (seeks != loader->seeks) {
            err_clear();
            continue;
        }
        if (rc != 0) {
            err_take(&loader->error, rc);
            loader->failed = true;
        } else {
            loader->ready++;
            loader->in_step = in_step + 1 == loader->micro_batches ? 0 : in_step + 1;
            loader->batch = loader->in_step == 0 ? batch + loader->options.global : batch;
        }
        (void)pthread_cond_broadcast(&loader->changed);
    }
    (void)pthread_mutex_unlock(&loader->mutex);
    return NULL;
}

/* A model learns one way in which documents begin and end, and one meaning of each token. */
static int check_alike(const struct shard *shard, const struct shard_info *like)
{
    const struct shard_info *info = shard_get_info(shard);
    if (info->tokenizer_id != like->tokenizer_id) {
        FAIL(ERR_DATA,
             "%s was made with the tokenizer %016" PRIx64 ", and other shards of this run with %016" PRIx64
             "; prepare all text with one tokenizer",
             shard_path(shard), info->tokenizer_id, like->tokenizer_id);
    }
    if (info->bos != like->bos || info->eos != like->eos) {
        FAIL(ERR_DATA,
             "%s has BOS %" PRId64 " and EOS %" PRIu64
             " around its documents, and other shards of this run BOS %" PRId64 " and EOS %" PRIu64
             " (-1: none); prepare all text with the same --bos and --eos-piece",
             shard_path(shard), info->bos, info->eos, like->bos, like->eos);
    }
    return 0;
}

static int check_shard(const struct loader_options *options, const struct shard *shard)
{
    const struct shard_info *info = shard_get_info(shard);
    if (options->tokenizer_id != 0 && info->tokenizer_id != options->tokenizer_id) {
        FAIL(ERR_DATA,
             "%s was made with the tokenizer %016" PRIx64 ", but data.tokenizer is %016" PRIx64
             "; give the one that made the shards, or prepare the text again",
             shard_path(shard), info->tokenizer_id, options->tokenizer_id);
    }
    if (info->vocab_size > (uint64_t)options->vocab_size) {
        FAIL(ERR_DATA,
             "%s has tokens of a vocabulary of %" PRIu64 ", but the model has %" PRId64 "; see model.vocab_size",
             shard_path(shard), info->vocab_size, options->vocab_size);
    }
    return 0;
}

static int open_shards(struct loader *loader, struct dataset *dataset, const struct path_list *paths)
{
    dataset->shard = calloc((size_t)paths->n, sizeof(struct shard *));
    dataset->first_sequence = calloc((size_t)paths->n + 1, sizeof *dataset->first_sequence);
    if (!dataset->shard || !dataset->first_sequence) FAIL(ERR_SYSTEM, "out of memory for %d shards", paths->n);
    for (int i = 0; i < paths->n; i++) {
        TRY(shard_open(&dataset->shard[i], paths->path[i]));
        dataset->shards = i + 1;
        TRY(check_shard(&loader->options, dataset->shard[i]));
        TRY(check_alike(dataset->shard[i], loader->options.like ? loader->options.like : loader_shard_info(loader)));
        const int64_t tokens = (int64_t)shard_get_info(dataset->shard[i])->tokens;
        dataset->first_sequence[i + 1] = dataset->first_sequence[i] + (tokens - 1) / loader->options.seq_len;
        loader->tokens += tokens;
    }
    return 0;
}

static int open_dataset(struct loader *loader, struct dataset *dataset, const char *path)
{
    struct path_list paths = {.path = NULL};
    int rc = dataset_shards(&paths, path);
    if (rc == 0) rc = open_shards(loader, dataset, &paths);
    path_list_free(&paths);
    if (rc != 0) return rc;
    const int64_t sequences = dataset->first_sequence[dataset->shards];
    loader->sequences += sequences;
    if (sequences == 0 && !loader->options.sequential) {
        FAIL(ERR_DATA,
             "%s has no whole sequence of %" PRId64 " tokens; choose a smaller model.seq_len or prepare more text",
             path, loader->options.seq_len);
    }
    return 0;
}

/* Versions of SentencePiece do not all make the same tokens of a text: a mixture of them is worth a line. */
static int compare_versions(const struct loader *loader)
{
    char first[TOKENIZER_VERSION_MAX] = "";
    const struct dataset_list *sets = loader->options.sets;
    for (int d = 0; d < sets->n && loader->options.rank == 0; d++) {
        json_t *report = NULL;
        TRY(dataset_report(&report, sets->entry[d].path));
        const char *version = json_string_value(json_object_get(report, "sentencepiece"));
        if (version && first[0] == '\0') (void)snprintf(first, sizeof first, "%s", version);
        const bool other = version && strcmp(first, version) != 0;
        if (other) {
            log_warn(
                "%s was made with SentencePiece %s, data before it with %s: equal text can be of other tokens in it",
                sets->entry[d].path, version, first);
        }
        json_decref(report);
        if (other) break;
    }
    return 0;
}

static int open_datasets(struct loader *loader)
{
    const struct dataset_list *sets = loader->options.sets;
    if (sets->n < 1) FAIL(ERR_CONFIG, "no dataset is given; name folders of shards in data.train or data.valid");
    loader->dataset = calloc((size_t)sets->n, sizeof *loader->dataset);
    if (!loader->dataset) FAIL(ERR_SYSTEM, "out of memory for %d datasets", sets->n);
    int64_t sequences[CONFIG_DATASETS_MAX];
    double weights[CONFIG_DATASETS_MAX];
    for (int d = 0; d < sets->n; d++) {
        loader->datasets = d + 1;
        TRY(open_dataset(loader, &loader->dataset[d], sets->entry[d].path));
        sequences[d] = loader->dataset[d].first_sequence[loader->dataset[d].shards];
        weights[d] = sets->entry[d].weight;
    }
    if (loader->sequences == 0) {
        FAIL(ERR_DATA,
             "%s and the other held-out shards have no whole sequence of %" PRId64
             " tokens; hold out more text or choose a smaller model.seq_len",
             sets->entry[0].path, loader->options.seq_len);
    }
    if (loader->options.sequential) return 0;
    TRY(compare_versions(loader));
    return sampler_open(&loader->sampler, loader->options.seed, sets->n, sequences, weights);
}

/* Shares the micro-batches of a step (or pass) out: this rank's number of them. */
static int64_t count_micro_batches(const struct loader *loader)
{
    const struct loader_options *options = &loader->options;
    const int64_t sequences = options->sequential ? loader->sequences : options->global;
    const int64_t micro_batches = (sequences + options->micro - 1) / options->micro;
    return micro_batches > options->rank ? (micro_batches - options->rank - 1) / options->ranks + 1 : 0;
}

static int take_memory(struct loader *loader)
{
    const int64_t seq_len = loader->options.seq_len, elems = loader->options.micro * seq_len;
    loader->slots = loader->options.prefetch + 1;
    loader->memory = calloc((size_t)(((int64_t)loader->slots * PARTS + 1) * elems), sizeof *loader->memory);
    loader->scratch = calloc((size_t)seq_len + 1, sizeof *loader->scratch);
    if (!loader->memory || !loader->scratch) FAIL(ERR_SYSTEM, "out of memory for the loader; lower data.prefetch");
    int32_t *pos = slot_part(loader, loader->slots, PART_TOK);
    for (int64_t i = 0; i < elems; i++)
        pos[i] = (int32_t)(i % seq_len);
    return 0;
}

int loader_open(struct loader **out, const struct loader_options *options)
{
    int rc = 0;
    ASSERT(options->seq_len >= 1 && options->micro >= 1 && options->prefetch >= 1);
    ASSERT(options->sequential || options->global % options->micro == 0);
    *out = NULL;
    struct loader *loader = calloc(1, sizeof *loader);
    if (!loader) FAIL(ERR_SYSTEM, "out of memory");
    loader->options = *options;
    if (pthread_mutex_init(&loader->mutex, NULL) != 0) {
        free(loader);
        FAIL(ERR_SYSTEM, "cannot make a mutex");
    }
    if (pthread_cond_init(&loader->changed, NULL) != 0) {
        (void)pthread_mutex_destroy(&loader->mutex);
        free(loader);
        FAIL(ERR_SYSTEM, "cannot make a condition variable");
    }
    TRY_GOTO(open_datasets(loader), done);
    loader->options.sets = NULL;
    loader->micro_batches = count_micro_batches(loader);
    TRY_GOTO(take_memory(loader), done);
    if (loader->micro_batches > 0) {
        if (pthread_create(&loader->thread, NULL, read_ahead, loader) != 0) {
            FAIL_GOTO(done, ERR_SYSTEM, "cannot start the loader's thread");
        }
        loader->running = true;
    }
    *out = loader;
    loader = NULL;
done:
    loader_close(loader);
    return rc;
}

int loader_seek(struct loader *loader, int64_t position)
{
    ASSERT(position >= 0);
    (void)pthread_mutex_lock(&loader->mutex);
    loader->seeks++;
    loader->batch = position;
    loader->in_step = 0;
    loader->ready = 0;
    loader->lent = false;
    loader->failed = false;
    (void)pthread_cond_broadcast(&loader->changed);
    (void)pthread_mutex_unlock(&loader->mutex);
    return 0;
}

int loader_next(struct loader *loader, struct batch *batch)
{
    int rc = 0;
    ASSERT(loader->micro_batches > 0);
    const double begin_s = now_s();
    (void)pthread_mutex_lock(&loader->mutex);
    if (loader->lent) {
        loader->lent = false;
        (void)pthread_cond_broadcast(&loader->changed);
    }
    while (loader->ready == 0 && !loader->failed)
        (void)pthread_cond_wait(&loader->changed, &loader->mutex);
    if (loader->ready > 0) {
        const int slot = loader->first;
        *batch = (struct batch){.sequences = loader->options.micro,
                                .seq_len = loader->options.seq_len,
                                .tok = slot_part(loader, slot, PART_TOK),
                                .target = slot_part(loader, slot, PART_TARGET),
                                .start = slot_part(loader, slot, PART_START),
                                .pos = slot_part(loader, loader->slots, PART_TOK)};
        loader->first = (slot + 1) % loader->slots;
        loader->ready--;
        loader->lent = true;
    } else {
        rc = err_give(&loader->error);
    }
    (void)pthread_mutex_unlock(&loader->mutex);
    loader->wait_s += now_s() - begin_s;
    return rc;
}

int64_t loader_micro_batches(const struct loader *loader)
{
    return loader->micro_batches;
}

const struct shard_info *loader_shard_info(const struct loader *loader)
{
    return shard_get_info(loader->dataset[0].shard[0]);
}

int64_t loader_tokens(const struct loader *loader)
{
    return loader->tokens;
}

int64_t loader_sequences(const struct loader *loader)
{
    return loader->sequences;
}

uint64_t loader_fingerprint(const struct loader *loader, int d)
{
    const struct dataset *dataset = &loader->dataset[d];
    uint64_t hash = (uint64_t)dataset->shards;
    for (int i = 0; i < dataset->shards; i++)
        hash = mix64(hash ^ mix64(shard_fingerprint(dataset->shard[i])));
    return hash;
}

int loader_add_shards(const struct loader *loader, struct overlap *overlap)
{
    for (int d = 0; d < loader->datasets; d++) {
        const struct dataset *dataset = &loader->dataset[d];
        for (int i = 0; i < dataset->shards; i++)
            TRY(overlap_add(overlap, dataset->shard[i], loader->options.sequential));
    }
    return 0;
}

double loader_take_wait_s(struct loader *loader)
{
    const double wait_s = loader->wait_s;
    loader->wait_s = 0;
    return wait_s;
}

static void close_dataset(struct dataset *dataset)
{
    for (int i = 0; i < dataset->shards; i++)
        shard_close(dataset->shard[i]);
    free(dataset->shard);
    free(dataset->first_sequence);
}

void loader_close(struct loader *loader)
{
    if (!loader) return;
    if (loader->running) {
        (void)pthread_mutex_lock(&loader->mutex);
        loader->stopping = true;
        (void)pthread_cond_broadcast(&loader->changed);
        (void)pthread_mutex_unlock(&loader->mutex);
        (void)pthread_join(loader->thread, NULL);
    }
    for (int d = 0; d < loader->datasets; d++)
        close_dataset(&loader->dataset[d]);
    free(loader->dataset);
    free(loader->memory);
    free(loader->scratch);
    (void)pthread_cond_destroy(&loader->changed);
    (void)pthread_mutex_destroy(&loader->mutex);
    free(loader);
}
