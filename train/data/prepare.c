/* `tatara prepare` (see prepare.h): options, division of the work, agreement of the ranks, report. */
#include "data/prepare.h"

#include "clock.h"
#include "data/args.h"
#include "data/dataset.h"
#include "data/prepare_work.h"
#include "err.h"
#include "log.h"
#include "utf8.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Without --shard-tokens: groups of a 256th of the text, so that many ranks find work, within these bounds. */
#define GROUP_BYTES_MIN ((uint64_t)16 << 20)
#define GROUP_BYTES_MAX ((uint64_t)512 << 20)
#define SHARD_TOKENS_MAX ((int64_t)1 << 28)
#define USUAL_BYTES_PER_TOKEN 4

#define VALID_FRACTION 0.01

struct options {
    const char *tokenizer, *out, *valid_out, *source, *licence, *language, *documents, *eos_piece;
    const char *key[FIELDS]; /* NULL: the usual ones */
    const char *format;
    struct source_rules files;
    double valid_fraction; /* negative: not given */
    int64_t max_document_bytes, shard_tokens, threads;
    bool bos, overwrite, help;
};

enum { OPTIONS = 23, PLACE_BYTES = 512, NAMES_BYTES = 400 };

static void describe_options(struct options *o, struct arg args[OPTIONS])
{
    const struct arg all[OPTIONS] = {
        {"tokenizer", "FILE", ARG_PATH, &o->tokenizer, 0, 0, "SentencePiece model"},
        {"out", "DIR", ARG_PATH, &o->out, 0, 0, "folder to make, with the shards"},
        {"valid-out", "DIR", ARG_PATH, &o->valid_out, 0, 0, "folder to make, with documents held out from --out"},
        {"valid-fraction", "X", ARG_NUM, &o->valid_fraction, 0, 1,
         "share of documents held out, chosen by a hash of the id (0.01)"},
        {"format", "WHAT", ARG_TEXT, &o->format, 0, 0,
         "what the inputs are: text, jsonl, or auto: by name, else by content (auto)"},
        {"include", "PATTERN", ARG_WORDS, &o->files.include, 0, 0,
         "of what folders hold, take what matches and no other; may be repeated"},
        {"exclude", "PATTERN", ARG_WORDS, &o->files.exclude, 0, 0,
         "leave out files and folders that match; may be repeated"},
        {"documents", "WHAT", ARG_TEXT, &o->documents, 0, 0,
         "what is a document in a text file: file, line or blank-line (file)"},
        {"text-key", "KEY", ARG_TEXT, &o->key[FIELD_TEXT], 0, 0,
         "field of JSONL that holds the text (text); a.b is b in the object a"},
        {"id-key", "KEY", ARG_TEXT, &o->key[FIELD_ID], 0, 0, "field that holds the id, a text or number (id)"},
        {"source-key", "KEY", ARG_TEXT, &o->key[FIELD_SOURCE], 0, 0, "field that holds the source (source)"},
        {"licence-key", "KEY", ARG_TEXT, &o->key[FIELD_LICENCE], 0, 0,
         "field that holds the licence (licence, else license)"},
        {"language-key", "KEY", ARG_TEXT, &o->key[FIELD_LANGUAGE], 0, 0,
         "field that holds the language (language, else lang)"},
        {"source", "NAME", ARG_TEXT, &o->source, 0, 0,
         "source of documents that name none (the input's name, without endings)"},
        {"licence", "NAME", ARG_TEXT, &o->licence, 0, 0, "licence of documents that name none (unknown)"},
        {"language", "NAME", ARG_TEXT, &o->language, 0, 0, "language of documents that name none (unknown)"},
        {"bos", NULL, ARG_FLAG, &o->bos, 0, 0, "put the tokenizer's BOS piece before each document"},
        {"eos-piece", "PIECE", ARG_TEXT, &o->eos_piece, 0, 0, "piece that ends a document (the tokenizer's EOS)"},
        {"max-document-bytes", "N", ARG_INT, &o->max_document_bytes, 1, 1e9,
         "larger documents are dropped and counted (8388608)"},
        {"shard-tokens", "N", ARG_INT, &o->shard_tokens, 1, 1e12,
         "about so many tokens a shard (by the size of the input)"},
        {"threads", "N", ARG_INT, &o->threads, 1, 4096, "threads of a rank (this rank's share of the cores)"},
        {"overwrite", NULL, ARG_FLAG, &o->overwrite, 0, 0, "replace shards that are in the folders"},
        {"help", NULL, ARG_FLAG, &o->help, 0, 0, "this text"},
    };
    memcpy(args, all, sizeof all);
}

static void print_help(const struct arg *args)
{
    puts("usage: tatara prepare --tokenizer FILE --out DIR [options] INPUT...\n"
         "\n"
         "Turns text into token shards, on all ranks of mpirun and all their threads; the result is the same\n"
         "on any number of them.\n"
         "\n"
         "INPUT is a file, a folder with all that lies below it, a pattern in quotes (** stands for any\n"
         "folders), or - for standard input, which is read without mpirun. Files may be compressed: gzip,\n"
         "xz, bzip2, and Zstandard with windows of up to 2 GiB (--long=31). Text is UTF-8. JSON lines are\n"
         "known by the ending .jsonl, .ndjson or .json, else by their content: objects with text, and if\n"
         "they have them id, source, licence and language.\n"
         "\n"
         "Of a folder, and of the pattern *, are taken: .txt, .text, .md, .jsonl, .ndjson, and JSON lines of\n"
         "any name that have the text. Cards, licences and scripts (README, LICENSE, .py ...), hidden files,\n"
         "backups, other JSON and all else are left out, and said; --include takes them. A pattern of --include or\n"
         "--exclude with a slash is matched with the path below the folder, one without with the name. A\n"
         "file that is named twice is read once.\n"
         "\n"
         "Documents that cannot be used are counted by reason; the first of each reason is named.\n");
    args_help(args, OPTIONS);
}

/* The number of the word among n. */
static int parse_choice(const char *option, const char *word, const char *const *words, int n, int *number)
{
    for (*number = 0; *number < n; ++*number) {
        if (strcmp(word, words[*number]) == 0) return 0;
    }
    FAIL(ERR_USAGE, "--%s takes %s, %s or %s, not \"%s\"", option, words[0], words[1], words[2], word);
}

/* The inputs, and how they are to be read. */
static int find_inputs(struct prepare_work *work, struct options *o, int inputs, char **input)
{
    static const char *const splits[] = {"file", "line", "blank-line"}, *const formats[] = {"auto", "text", "jsonl"};
    int split = 0, format = 0;
    TRY(parse_choice("documents", o->documents, splits, 3, &split));
    TRY(parse_choice("format", o->format, formats, 3, &format));
    work->rules.text_split = (enum source_split)split;
    o->files.format = (enum source_format)format;
    o->files.text_key = o->key[FIELD_TEXT] ? o->key[FIELD_TEXT] : "text";
    o->files.rank = work->rank;
    o->files.ranks = work->ranks;
    for (int i = 0; i < inputs; i++)
        TRY(source_add(work->list, &o->files, input[i]));
    return source_settle(work->list, &o->files);
}

static int check_options(struct options *o, int inputs)
{
    const char *const labels[] = {o->source ? o->source : "", o->licence, o->language};
    for (int l = 0; l < 3; l++) {
        if (utf8_valid_bytes(labels[l], strlen(labels[l])) < strlen(labels[l])) {
            FAIL(ERR_USAGE, "\"%s\" cannot be a source, licence or language: it is not UTF-8", labels[l]);
        }
    }
    const char *missing = !o->tokenizer ? "--tokenizer FILE" : !o->out ? "--out DIR" : inputs == 0 ? "INPUT" : NULL;
    if (missing) FAIL(ERR_USAGE, "%s is missing; see `tatara prepare --help`", missing);
    if (!o->valid_out && o->valid_fraction >= 0) {
        FAIL(ERR_USAGE, "--valid-fraction %g holds documents out for --valid-out DIR, which is missing",
             o->valid_fraction);
    }
    if (o->valid_out && o->valid_fraction < 0) o->valid_fraction = VALID_FRACTION;
    if (o->valid_out && !(o->valid_fraction > 0 && o->valid_fraction < 1)) {
        FAIL(ERR_USAGE, "--valid-fraction %g: with --valid-out it lies between 0 and 1", o->valid_fraction);
    }
    return 0;
}

/* The tokens before (−1: none) and after each document. */
static int find_marks(const struct tokenizer *tokenizer, const struct options *o, int32_t *bos, int32_t *eos)
{
    *bos = o->bos ? tokenizer_bos(tokenizer) : -1;
    *eos = o->eos_piece ? tokenizer_find_piece(tokenizer, o->eos_piece) : tokenizer_eos(tokenizer);
    if (o->bos && *bos < 0)
        FAIL(ERR_DATA, "%s has no BOS piece (spm_train --bos_id=1): leave out --bos", o->tokenizer);
    if (o->eos_piece && (*eos < 0 || *eos == tokenizer_unk(tokenizer))) {
        FAIL(ERR_DATA, "%s has no piece %s that could end documents; --eos-piece names one as it stands in the model",
             o->tokenizer, o->eos_piece);
    }
    if (*eos < 0) {
        FAIL(ERR_DATA,
             "%s has no EOS piece such as </s>; name the piece that ends a document with --eos-piece, for example "
             "--eos-piece '<|endoftext|>', or train the tokenizer with one (spm_train --eos_id=2)",
             o->tokenizer);
    }
    return 0;
}

/* Everything that a rank can find out alone: options, tokenizer, inputs and their division. */
static int plan_work(struct prepare_work *work, struct options *o, struct output *outputs, int inputs, char **input)
{
    TRY(check_options(o, inputs));
    TRY(output_name(&outputs[0], o->out));
    if (o->valid_out) {
        TRY(output_name(&outputs[1], o->valid_out));
        TRY(output_check_apart(&outputs[0], &outputs[1]));
    }
    TRY(tokenizer_open(&work->tokenizer, o->tokenizer));
    int32_t bos = -1, eos = -1;
    TRY(find_marks(work->tokenizer, o, &bos, &eos));
    work->rules = (struct document_rules){.source = o->source,
                                          .licence = o->licence,
                                          .language = o->language,
                                          .max_bytes = (uint64_t)o->max_document_bytes,
                                          .unk = tokenizer_unk(work->tokenizer),
                                          .bos = bos,
                                          .eos = eos};
    memcpy(work->rules.key, o->key, sizeof o->key);
    work->valid_fraction = o->valid_out ? o->valid_fraction : 0;
    TRY(find_inputs(work, o, inputs, input));
    uint64_t bytes = source_text_bytes(work->list) / 256;
    bytes = bytes < GROUP_BYTES_MIN ? GROUP_BYTES_MIN : bytes > GROUP_BYTES_MAX ? GROUP_BYTES_MAX : bytes;
    work->group_bytes = o->shard_tokens > 0 ? (uint64_t)o->shard_tokens * USUAL_BYTES_PER_TOKEN : bytes;
    work->shard_tokens = o->shard_tokens > 0 ? o->shard_tokens : SHARD_TOKENS_MAX;
    TRY(source_divide(work->list, work->rules.text_split, work->group_bytes));
    work->unit_lines = calloc((size_t)work->list->units, sizeof *work->unit_lines);
    if (!work->unit_lines) FAIL(ERR_SYSTEM, "out of memory for %d parts of files", work->list->units);
    return 0;
}

/* All ranks must divide the same files. Collective. */
static int check_same_inputs(struct comm *comm, const struct source_list *list)
{
    const int64_t hash = (int64_t)(source_fingerprint(list) >> 1);
    int64_t extremes[] = {hash, -hash};
    TRY(comm_max_i64(comm, extremes, 2));
    int rc = 0;
    if (extremes[0] != -extremes[1]) {
        rc = err_raise(ERR_DATA, __FILE__, __LINE__,
                       "the ranks see different input files; put them where every node sees the same");
    }
    return comm_agree(comm, rc);
}

static int begin_outputs(struct output *outputs, bool overwrite)
{
    for (int side = 0; side < 2; side++) {
        if (!outputs[side].final) continue;
        TRY(output_check(&outputs[side], overwrite));
        TRY(output_begin(&outputs[side]));
    }
    return 0;
}

/* Lets the other ranks know that this one failed, so that they stop soon. */
static void leave_failed(const struct output *output)
{
    struct err_record error;
    char *path = NULL;
    err_take(&error, 1);
    if (path_join(&path, output->partial, OUTPUT_FAILED) == 0) (void)file_write_text(path, "a rank failed\n");
    free(path);
    (void)err_give(&error);
}

/* "12 not UTF-8, the first corpus/a.txt:3: what is wrong and what to do" */
static const char *describe_drop(const struct prepare_work *work, enum drop d, char *words, size_t room)
{
    char place[PLACE_BYTES];
    drop_place(&work->first[d], work->list, work->unit_lines, place, sizeof place);
    (void)snprintf(words, room, "%" PRId64 " %s, the first %s%s%s", work->counts.dropped[d], drop_name(d), place,
                   work->first[d].words[0] ? ": " : "", work->first[d].words);
    return words;
}

/* Nothing is left: says why for each reason, the commonest in the error itself. */
static int refuse_all(const struct prepare_work *work, const struct options *o)
{
    char words[ERR_MESSAGE_MAX];
    enum drop most = DROP_EMPTY;
    const int64_t *dropped = work->counts.dropped;
    for (int d = 0; d < DROPS; d++) {
        if (dropped[d] > dropped[most]) most = (enum drop)d;
    }
    for (int d = 0; d < DROPS; d++) {
        if (dropped[d] > 0 && d != (int)most) log_warn("%s", describe_drop(work, (enum drop)d, words, sizeof words));
    }
    if (dropped[most] == 0 && work->counts.documents[1] == 0) {
        FAIL(ERR_DATA, "no document is left for %s: the %d input files are empty", o->out, work->list->files);
    }
    if (dropped[most] == 0) {
        FAIL(ERR_DATA, "no document is left for %s: %" PRId64 " were read, all held out; lower --valid-fraction %g",
             o->out, work->counts.documents[1], o->valid_fraction);
    }
    FAIL(ERR_DATA, "no document is left for %s: %" PRId64 " held out; dropped: %s", o->out, work->counts.documents[1],
         describe_drop(work, most, words, sizeof words));
}

/* The names of the first JSON record's fields; none when no input is JSONL, or it has gone by. */
static int name_fields(const struct prepare_work *work, char *names, size_t room)
{
    int unit = 0;
    bool end = true;
    struct record record = {.text = {.data = NULL}};
    struct source_reader *reader = NULL;
    names[0] = '\0';
    while (unit < work->list->units && !work->list->file[work->list->unit[unit].file].jsonl)
        unit++;
    if (unit == work->list->units || work->list->file[work->list->unit[unit].file].once) return 0;
    TRY(source_reader_open(&reader, work->list, &work->list->unit[unit], SPLIT_LINE,
                           document_max_record_bytes(&work->rules)));
    const int rc = source_reader_next(reader, &record, &end);
    if (rc == 0 && !end) jsonl_names(record.text.data, record.text.used, names, room);
    source_reader_close(reader);
    buffer_free(&record.text);
    return rc;
}

/* A field that was asked for and that no record has is a mistake. */
static int check_keys(const struct prepare_work *work, const struct options *o)
{
    static const char *const option[FIELDS] = {"text", "id", "source", "licence", "language"};
    for (int f = 0; f < FIELDS; f++) {
        char names[NAMES_BYTES];
        if (!o->key[f] || work->counts.found[f] > 0) continue;
        TRY(name_fields(work, names, sizeof names));
        FAIL(ERR_DATA, "--%s-key %s: no record of JSON lines has this field as a text or number%s%s", option[f],
             o->key[f], *names ? "; the first one's fields are " : "", names);
    }
    return 0;
}

static int check_counts(const struct prepare_work *work, const struct options *o)
{
    const struct prepare_counts *counts = &work->counts;
    if (counts->documents[0] == 0) return refuse_all(work, o);
    if (o->valid_out && counts->documents[1] == 0) {
        FAIL(ERR_DATA, "none of %" PRId64 " documents fell into the held-out part; raise --valid-fraction %g",
             counts->documents[0], o->valid_fraction);
    }
    return check_keys(work, o);
}

/* What dataset.json says of how the dataset was made. */
static json_t *make_report(const struct prepare_work *work, const struct options *o, int side, int inputs,
                           char **input)
{
    char id[17];
    const struct prepare_counts *c = &work->counts;
    json_t *dropped = json_object(), *first = json_object(), *names = json_array();
    for (int d = 0; d < DROPS; d++) {
        char place[PLACE_BYTES];
        (void)json_object_set_new(dropped, drop_name((enum drop)d), json_integer(c->dropped[d]));
        if (c->dropped[d] == 0) continue;
        drop_place(&work->first[d], work->list, work->unit_lines, place, sizeof place);
        (void)json_object_set_new(first, drop_name((enum drop)d), json_string(place));
    }
    for (int i = 0; i < inputs; i++) {
        char shown[PLACE_BYTES];
        (void)json_array_append_new(names, json_string(utf8_show(input[i], "", shown, sizeof shown)));
    }
    (void)snprintf(id, sizeof id, "%016" PRIx64, tokenizer_id(work->tokenizer));
    char tokenizer[PLACE_BYTES], version[TOKENIZER_VERSION_MAX];
    tokenizer_library_version(version);
    const struct document_rules *rules = &work->rules;
    return json_pack("{s:s, s:s, s:s, s:s, s:s*, s:s, s:o, s:I, s:I, s:I, s:b, s:f, s:o, s:o, s:o}", "format",
                     "tatara-dataset", "tokenizer", utf8_show(o->tokenizer, "", tokenizer, sizeof tokenizer),
                     "tokenizer_id", id, "sentencepiece", version, "bos_piece",
                     rules->bos >= 0 ? tokenizer_piece(work->tokenizer, rules->bos) : NULL, "eos_piece",
                     tokenizer_piece(work->tokenizer, rules->eos), "fidelity",
                     fidelity_json(&c->fidelity, work->tokenizer, c->tokens[0] + c->tokens[1]), "documents",
                     (json_int_t)c->documents[side], "tokens", (json_int_t)c->tokens[side], "text_bytes",
                     (json_int_t)c->text_bytes[side], "held_out", side, "valid_fraction", work->valid_fraction,
                     "inputs", names, "dropped_from_inputs", dropped, "first_dropped", first);
}

static int commit_outputs(const struct prepare_work *work, const struct options *o, struct output *outputs,
                          int inputs, char **input)
{
    TRY(check_counts(work, o));
    for (int side = 1; side >= 0; side--) {
        if (!outputs[side].final) continue;
        json_t *report = make_report(work, o, side, inputs, input);
        const int rc = report
                           ? output_commit(&outputs[side], report)
                           : err_raise(ERR_DATA, __FILE__, __LINE__, "a name of an input or tokenizer is not UTF-8");
        json_decref(report);
        TRY(rc);
    }
    return 0;
}

/* What the tokenizer does not give back of the text. */
static void report_fidelity(const struct prepare_work *work, const char *tokenizer)
{
    char words[ERR_MESSAGE_MAX];
    const struct prepare_counts *c = &work->counts;
    json_t *json = fidelity_json(&c->fidelity, work->tokenizer, c->tokens[0] + c->tokens[1]);
    if (fidelity_words(json, words, sizeof words)) {
        log_warn("%s does not give the text back as it was: %s; " FIDELITY_REMEDY, tokenizer, words);
    } else {
        printf("tokenizer: %s\n", words);
    }
    if (c->fidelity.end_marks > 0) {
        log_warn("%" PRId64
                 " times the text itself has the piece %s, with which documents end: training takes it for their "
                 "end; choose another --eos-piece, or take it out of the text",
                 c->fidelity.end_marks, tokenizer_piece(work->tokenizer, work->rules.eos));
    }
    json_decref(json);
}

static void print_report(const struct prepare_work *work, const struct output *outputs, double elapsed_s)
{
    const struct prepare_counts *c = &work->counts;
    const int64_t documents = c->documents[0] + c->documents[1], tokens = c->tokens[0] + c->tokens[1];
    const double bytes = (double)(c->text_bytes[0] + c->text_bytes[1]);
    int64_t dropped = 0;
    for (int d = 0; d < DROPS; d++)
        dropped += c->dropped[d];
    printf("%" PRId64 " documents of %d files: %" PRId64 " tokens, %.2f bytes/token, %.0f tokens/s in %.1f s\n",
           documents, work->list->files, tokens, bytes / (double)tokens, (double)tokens / elapsed_s, elapsed_s);
    printf("%" PRId64 " documents dropped%s", dropped, dropped ? ":" : "\n");
    for (int d = 0, shown = 0; d < DROPS; d++) {
        if (c->dropped[d] == 0) continue;
        printf("%s %" PRId64 " %s", shown++ ? "," : "", c->dropped[d], drop_name((enum drop)d));
    }
    if (dropped) printf("\n");
    for (int d = 0; d < DROPS; d++) {
        if (c->dropped[d] == 0) continue;
        char words[ERR_MESSAGE_MAX];
        printf("  %s\n", describe_drop(work, (enum drop)d, words, sizeof words));
    }
    char left[ERR_MESSAGE_MAX];
    if (*source_describe_left(work->list, left, sizeof left)) printf("left out: %s\n", left);
    for (int side = 0; side < 2; side++) {
        if (!outputs[side].final) continue;
        char shown[PLACE_BYTES];
        printf("wrote %s: %" PRId64 " shards, %" PRId64 " documents, %" PRId64 " tokens%s\n",
               utf8_show(outputs[side].final, "", shown, sizeof shown), c->shards[side], c->documents[side],
               c->tokens[side], side == 1 ? ", held out" : "");
    }
}

/* From the plan to the folders under their names. Collective. */
static int make_dataset(struct comm *comm, struct prepare_work *work, struct options *o, struct output *outputs,
                        int inputs, char **input)
{
    const double begin_s = now_s();
    TRY(comm_agree(comm, plan_work(work, o, outputs, inputs, input)));
    TRY(check_same_inputs(comm, work->list));
    TRY(comm_agree(comm, comm->rank == 0 ? begin_outputs(outputs, o->overwrite) : 0));
    const int rc = prepare_run(work);
    if (rc != 0) leave_failed(&outputs[0]);
    TRY(comm_agree(comm, rc));
    _Static_assert(sizeof work->counts % sizeof(int64_t) == 0, "counts are summed as a list");
    void *counts = &work->counts;
    TRY(drops_merge(comm, work->first, work->counts.dropped));
    TRY(comm_sum_i64(comm, work->unit_lines, work->list->units));
    TRY(comm_sum_i64(comm, counts, (int)(sizeof work->counts / sizeof(int64_t))));
    TRY(comm_agree(comm, comm->rank == 0 ? commit_outputs(work, o, outputs, inputs, input) : 0));
    if (comm->rank == 0) {
        print_report(work, outputs, now_s() - begin_s);
        report_fidelity(work, o->tokenizer);
    }
    return 0;
}

int prepare_command(struct comm *comm, int argc, char **argv)
{
    struct options o = {.licence = "unknown",
                        .language = "unknown",
                        .documents = "file",
                        .format = "auto",
                        .valid_fraction = -1,
                        .max_document_bytes = 8 << 20,
                        .threads = comm->threads};
    struct arg args[OPTIONS];
    int inputs = 0;
    describe_options(&o, args);
    TRY(comm_agree(comm, args_parse(args, OPTIONS, "prepare", argc, argv, &inputs)));
    if (o.help) {
        if (comm->rank == 0) print_help(args);
        return 0;
    }
    struct source_list list = {.file = NULL};
    struct output outputs[2] = {{.final = NULL}, {.final = NULL}};
    struct prepare_work work = {
        .list = &list, .outputs = outputs, .threads = (int)o.threads, .rank = comm->rank, .ranks = comm->ranks};
    const int rc = make_dataset(comm, &work, &o, outputs, inputs, argv);
    for (int side = 0; side < 2; side++) {
        output_discard(&outputs[side]);
        output_free(&outputs[side]);
    }
    free(work.unit_lines);
    tokenizer_close(work.tokenizer);
    source_free(&list);
    return rc;
}
