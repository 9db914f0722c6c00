/* `tatara data show`: documents, tokens, sources and licences of datasets, some of their text, and whether they are
 * whole. */
#include "data/show.h"

#include "data/args.h"
#include "data/dataset.h"
#include "data/fidelity.h"
#include "data/shard.h"
#include "data/tokenizer.h"
#include "err.h"
#include "log.h"
#include "utf8.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OPTIONS = 5, SAMPLE_TOKENS_MAX = 400, COUNT_TOKENS = 65536, SHOWN_BYTES = 4 * SHARD_TEXT_MAX_BYTES + 1 };

struct options {
    const char *tokenizer;
    int64_t sample;
    bool verify, entropy, help;
};

/* What is counted of a dataset. */
struct totals {
    uint64_t documents, tokens, text_bytes, file_bytes;
    struct shard_info first; /* of the first shard: all must have been made with the same tokenizer */
    int token_bytes;
    json_t *names[3]; /* of sources, licences, languages: name -> [documents, tokens] */
};

static int count_name(json_t *names, const char *name, uint64_t tokens)
{
    json_t *row = json_object_get(names, name);
    if (!row) {
        row = json_pack("[I, I]", (json_int_t)0, (json_int_t)0);
        if (json_object_set_new(names, name, row) != 0) FAIL(ERR_DATA, "the name \"%s\" is not UTF-8", name);
    }
    json_t *documents = json_array_get(row, 0), *all = json_array_get(row, 1);
    (void)json_integer_set(documents, json_integer_value(documents) + 1);
    (void)json_integer_set(all, json_integer_value(all) + (json_int_t)tokens);
    return 0;
}

static int count_documents(struct totals *totals, struct shard *shard)
{
    const int64_t *offset = NULL;
    TRY(shard_offsets(shard, &offset));
    for (uint64_t d = 0; d < shard_get_info(shard)->documents; d++) {
        struct shard_label label;
        const uint64_t tokens = (uint64_t)(offset[d + 1] - offset[d]);
        TRY(shard_get_label(shard, d, &label));
        TRY(count_name(totals->names[0], label.source, tokens));
        TRY(count_name(totals->names[1], label.licence, tokens));
        TRY(count_name(totals->names[2], label.language, tokens));
    }
    return 0;
}

static int count_shard(struct totals *totals, struct shard *shard)
{
    const struct shard_info *info = shard_get_info(shard);
    if (totals->documents == 0) {
        totals->first = *info;
        totals->token_bytes = shard_token_bytes(shard);
    }
    if (info->tokenizer_id != totals->first.tokenizer_id) {
        FAIL(ERR_DATA,
             "%s was made with the tokenizer %016" PRIx64 ", the shards before it with %016" PRIx64
             "; keep them in different folders",
             shard_path(shard), info->tokenizer_id, totals->first.tokenizer_id);
    }
    totals->documents += info->documents;
    totals->tokens += info->tokens;
    totals->text_bytes += info->text_bytes;
    totals->file_bytes += shard_file_bytes(shard);
    return count_documents(totals, shard);
}

/* Checks every shard and names each that is damaged, not only the first. */
static int verify_shards(const char *path, const struct path_list *shards)
{
    int damaged = 0;
    for (int i = 0; i < shards->n; i++) {
        struct shard *shard = NULL;
        int rc = shard_open(&shard, shards->path[i]);
        if (rc == 0) rc = shard_verify(shard);
        shard_close(shard);
        if (rc == 0) continue;
        damaged++;
        log_error("%s", err_message());
    }
    if (damaged > 0) FAIL(ERR_DATA, "%s: %d of %d shards are damaged", path, damaged, shards->n);
    printf("verified: all checksums of %d shards match\n", shards->n);
    return 0;
}

static void print_names(const char *title, json_t *names)
{
    printf("%s:\n", title);
    const char *name = NULL;
    json_t *row = NULL;
    json_object_foreach(names, name, row)
    {
        char shown[SHOWN_BYTES];
        printf("  %-24s %" JSON_INTEGER_FORMAT " documents, %" JSON_INTEGER_FORMAT " tokens\n",
               utf8_show(name, "", shown, sizeof shown), json_integer_value(json_array_get(row, 0)),
               json_integer_value(json_array_get(row, 1)));
    }
}

static void print_totals(const char *path, int shards, const struct totals *totals)
{
    char shown[SHOWN_BYTES];
    printf("%s: %d shards, %" PRIu64 " documents, %" PRIu64
           " tokens (u%d), %.2f bytes/token, %.1f MB of text, %.1f MB on "
           "disk\n",
           utf8_show(path, "", shown, sizeof shown), shards, totals->documents, totals->tokens,
           8 * totals->token_bytes, (double)totals->text_bytes / (double)totals->tokens,
           1e-6 * (double)totals->text_bytes, 1e-6 * (double)totals->file_bytes);
    printf("tokenizer: %016" PRIx64 ", vocabulary %" PRIu64 ", EOS %" PRIu64, totals->first.tokenizer_id,
           totals->first.vocab_size, totals->first.eos);
    if (totals->first.bos >= 0) printf(", BOS %" PRId64 " before each document", totals->first.bos);
    putchar('\n');
    static const char *const titles[] = {"sources", "licences", "languages"};
    for (int t = 0; t < 3; t++)
        print_names(titles[t], totals->names[t]);
}

/* What the dataset's list says of how the tokens were made. */
static int show_report(const char *path)
{
    json_t *report = NULL;
    TRY(dataset_report(&report, path));
    const char *version = json_string_value(json_object_get(report, "sentencepiece"));
    const json_t *fidelity = json_object_get(report, "fidelity");
    if (version) printf("made with SentencePiece %s\n", version);
    if (fidelity) {
        char words[ERR_MESSAGE_MAX];
        const bool lossy = fidelity_words(fidelity, words, sizeof words);
        printf("%s: %s\n", lossy ? "the tokenizer did not give the text back as it was" : "tokenizer on the text",
               words);
    }
    json_decref(report);
    return 0;
}

static int show_document(struct shard *shard, uint64_t document, struct tokenizer *tokenizer)
{
    const int64_t *offset = NULL;
    struct shard_label label;
    int32_t tokens[SAMPLE_TOKENS_MAX];
    char *text = NULL;
    TRY(shard_offsets(shard, &offset));
    TRY(shard_get_label(shard, document, &label));
    const int64_t all = offset[document + 1] - offset[document],
                  n = all < SAMPLE_TOKENS_MAX ? all : SAMPLE_TOKENS_MAX;
    TRY(shard_read(shard, (uint64_t)offset[document], (uint64_t)n, tokens));
    TRY(tokenizer_decode(tokenizer, tokens, n, &text));
    const char *const words[] = {label.id, path_name(shard_path(shard)), label.source, label.licence, label.language};
    char shown[5][SHOWN_BYTES];
    for (int w = 0; w < 5; w++)
        (void)utf8_show(words[w], "", shown[w], sizeof shown[w]);
    printf("--- %s (%s): source %s, licence %s, language %s, %" PRId64 " tokens\n%s%s\n", shown[0], shown[1],
           shown[2], shown[3], shown[4], all, text, n < all ? " ..." : "");
    free(text);
    return 0;
}

/* Shows `sample` documents, spread evenly over the dataset. */
static int show_sample(const struct path_list *shards, const struct totals *totals, const struct options *o)
{
    int rc = 0;
    struct tokenizer *tokenizer = NULL;
    struct shard *shard = NULL;
    TRY_GOTO(tokenizer_open(&tokenizer, o->tokenizer), done);
    if (tokenizer_id(tokenizer) != totals->first.tokenizer_id) {
        FAIL_GOTO(done, ERR_DATA,
                  "the shards were made with the tokenizer %016" PRIx64 ", but %s is %016" PRIx64
                  "; give the one that made them",
                  totals->first.tokenizer_id, o->tokenizer, tokenizer_id(tokenizer));
    }
    const uint64_t wanted = (uint64_t)o->sample < totals->documents ? (uint64_t)o->sample : totals->documents;
    uint64_t shown = 0, before = 0;
    for (int i = 0; i < shards->n; i++) {
        TRY_GOTO(shard_open(&shard, shards->path[i]), done);
        const uint64_t documents = shard_get_info(shard)->documents;
        for (; shown < wanted && shown * totals->documents / wanted < before + documents; shown++) {
            TRY_GOTO(show_document(shard, shown * totals->documents / wanted - before, tokenizer), done);
        }
        before += documents;
        shard_close(shard);
        shard = NULL;
    }
done:
    shard_close(shard);
    tokenizer_close(tokenizer);
    return rc;
}

/* Adds the shard's tokens to counts[vocab_size]; tokens[COUNT_TOKENS] is scratch. */
static int count_tokens(struct shard *shard, uint64_t vocab_size, uint64_t *counts, int32_t *tokens)
{
    const uint64_t all = shard_get_info(shard)->tokens;
    for (uint64_t begin = 0; begin < all; begin += COUNT_TOKENS) {
        const uint64_t n = all - begin < COUNT_TOKENS ? all - begin : COUNT_TOKENS;
        TRY(shard_read(shard, begin, n, tokens));
        for (const int32_t *token = tokens; token < tokens + n; token++) {
            if (*token < 0 || (uint64_t)*token >= vocab_size) {
                FAIL(ERR_DATA, "%s: token %" PRId32 " is not in its vocabulary of %" PRIu64, shard_path(shard),
                     *token, vocab_size);
            }
            counts[*token]++;
        }
    }
    return 0;
}

/* Prints the entropy of single tokens: the loss of a model that knows how frequent each is and nothing of the context. */
static int show_entropy(const struct path_list *shards, const struct totals *totals)
{
    int rc = 0;
    struct shard *shard = NULL;
    double entropy = 0;
    const uint64_t vocab_size = totals->first.vocab_size;
    uint64_t *counts = calloc(vocab_size + 1, sizeof *counts);
    int32_t *tokens = calloc(COUNT_TOKENS, sizeof *tokens);
    if (!counts || !tokens) FAIL_GOTO(done, ERR_SYSTEM, "out of memory for counting tokens");
    for (int i = 0; i < shards->n; i++) {
        TRY_GOTO(shard_open(&shard, shards->path[i]), done);
        TRY_GOTO(count_tokens(shard, vocab_size, counts, tokens), done);
        shard_close(shard);
        shard = NULL;
    }
    for (uint64_t t = 0; t < vocab_size; t++) {
        const double share = (double)counts[t] / (double)totals->tokens;
        if (counts[t] > 0) entropy -= share * log(share);
    }
    printf("unigram entropy: %.4f nats/token\n", entropy);
done:
    shard_close(shard);
    free(tokens);
    free(counts);
    return rc;
}

static int count_shards(struct totals *totals, const struct path_list *shards)
{
    for (int t = 0; t < 3; t++)
        totals->names[t] = json_object();
    for (int i = 0; i < shards->n; i++) {
        struct shard *shard = NULL;
        int rc = shard_open(&shard, shards->path[i]);
        if (rc == 0) rc = count_shard(totals, shard);
        shard_close(shard);
        TRY(rc);
    }
    return 0;
}

static int show_dataset(const char *path, const struct options *o)
{
    int rc = 0;
    struct path_list shards = {.path = NULL};
    struct totals totals = {.documents = 0};
    TRY_GOTO(dataset_shards(&shards, path), done);
    if (o->verify) TRY_GOTO(verify_shards(path, &shards), done);
    TRY_GOTO(count_shards(&totals, &shards), done);
    print_totals(path, shards.n, &totals);
    TRY_GOTO(show_report(path), done);
    if (o->entropy) TRY_GOTO(show_entropy(&shards, &totals), done);
    if (o->sample > 0) TRY_GOTO(show_sample(&shards, &totals, o), done);
done:
    for (int t = 0; t < 3; t++)
        json_decref(totals.names[t]);
    path_list_free(&shards);
    return rc;
}

static int show(const struct options *o, int paths, char **path)
{
    if (paths == 0) FAIL(ERR_USAGE, "which shards? Give a folder or a shard; see `tatara data show --help`");
    if (o->sample > 0 && !o->tokenizer) FAIL(ERR_USAGE, "--sample needs the tokenizer: add --tokenizer FILE");
    for (int i = 0; i < paths; i++)
        TRY(show_dataset(path[i], o));
    return 0;
}

int data_command(struct comm *comm, int argc, char **argv)
{
    struct options o = {.tokenizer = NULL};
    const struct arg args[OPTIONS] = {
        {"verify", NULL, ARG_FLAG, &o.verify, 0, 0, "compare all data with the checksums first"},
        {"entropy", NULL, ARG_FLAG, &o.entropy, 0, 0, "count all tokens; print the entropy of their frequencies"},
        {"sample", "N", ARG_INT, &o.sample, 0, 1e9, "print the text of N documents, spread evenly"},
        {"tokenizer", "FILE", ARG_PATH, &o.tokenizer, 0, 0, "SentencePiece model that made the shards, for --sample"},
        {"help", NULL, ARG_FLAG, &o.help, 0, 0, "this text"},
    };
    (void)comm;
    const bool named = argc > 0 && strcmp(argv[0], "show") == 0;
    int paths = 0;
    TRY(args_parse(args, OPTIONS, "data show", argc - named, argv + named, &paths));
    if (!named && !o.help) FAIL(ERR_USAGE, "`tatara data` knows one command: tatara data show PATH...");
    if (o.help) {
        puts(
            "usage: tatara data show [options] PATH...\n"
            "\n"
            "Documents, tokens, sources, licences and languages of datasets: folders of shards, or single shards.\n");
        args_help(args, OPTIONS);
        return 0;
    }
    return show(&o, paths, argv + named);
}
