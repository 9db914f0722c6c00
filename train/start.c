/* Where a start begins. One rule, for the command line, the YAML file and every scheduler's script:
 *
 *   checkpoint.resume   run.dir holds                              the run begins
 *   -----------------   ----------------------------------------   ---------------------------------------------------
 *   auto                no checkpoint                              at step 0, or with checkpoint.init_from's weights
 *   auto                checkpoints                                from the newest that verifies
 *   never               no checkpoint                              at step 0, or with checkpoint.init_from's weights
 *   never               checkpoints, of this job's attempts        from the newest that verifies
 *   never               checkpoints, else                          not: refused
 *   FOLDER              no checkpoint                              from FOLDER
 *   FOLDER              checkpoints, the newest of the same word   from the newest that verifies
 *   FOLDER, elsewhere   other checkpoints                          from the newest that verifies; FOLDER is passed over
 *   FOLDER, not there   other checkpoints                          not: refused
 *   FOLDER, in run.dir  none newer that verifies                   from FOLDER
 *   FOLDER, in run.dir  newer ones, which are not of this word     not: refused
 *
 * So FOLDER counts until the run has a checkpoint of its own, and the same command always goes on; a checkpoint is "of the
 * same word" when checkpoint.resume was the same in the configuration that it holds. A run never trains towards steps whose
 * checkpoints are there already. A FOLDER that is a run's stands for the newest checkpoint in it. */
#define _XOPEN_SOURCE 700 /* for realpath */
#include "start.h"

#include "err.h"
#include "log.h"

#include <libgen.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum start start_choose(const struct start_facts *facts)
{
    switch (facts->resume) {
    case RESUME_AUTO:
        return facts->own ? START_NEWEST : START_ANEW;
    case RESUME_NEVER:
        if (!facts->own) return START_ANEW;
        return facts->same_job ? START_NEWEST : START_REFUSED;
    case RESUME_FOLDER:
    default:
        if (facts->own && facts->offspring) return START_NEWEST;
        if (!facts->own || !facts->there || (facts->inside && facts->latest)) return START_FOLDER;
        return facts->inside ? START_REFUSED : START_NEWEST;
    }
}

/* ---- the facts ---- */

/* Whether two paths lead to the same file; false when one of them leads nowhere. */
static bool same_file(const char *a, const char *b)
{
    struct stat x, y;
    return stat(a, &x) == 0 && stat(b, &y) == 0 && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
}

static bool lies_in(const char *folder, const char *run_dir)
{
    char *whole = realpath(folder, NULL); /* past links, "." and slashes at the end */
    const bool inside = whole && same_file(dirname(whole), run_dir);
    free(whole);
    return inside;
}

/* Whether the checkpoint `newest` is of a later step than the one that is named. What cannot be read is not: its
 * verification says why. */
static bool is_newer(const char *newest, const char *named)
{
    struct ckpt_meta a = {.step = 0}, b = {.step = 0};
    const bool newer = ckpt_read_meta(newest, &a) == 0 && ckpt_read_meta(named, &b) == 0 && a.step > b.step;
    err_clear();
    ckpt_meta_free(&a);
    ckpt_meta_free(&b);
    return newer;
}

/* Whether the checkpoint came of a start with the same checkpoint.resume. */
static int is_offspring(const char *newest, const char *word, bool *offspring)
{
    struct ckpt_meta meta = {0};
    TRY(ckpt_read_meta(newest, &meta));
    struct config *before = changes_before(&meta);
    *offspring = before && strcmp(before->checkpoint.resume, word) == 0;
    free(before);
    ckpt_meta_free(&meta);
    return 0;
}

/* Rank 0. */
static int look(const struct saving *saving, const char *newest, struct start_facts *facts)
{
    const char *word = saving->cfg->checkpoint.resume;
    facts->own = newest[0] != '\0';
    facts->same_job = saving->folder.continued;
    facts->resume = strcmp(word, "auto") == 0    ? RESUME_AUTO
                    : strcmp(word, "never") == 0 ? RESUME_NEVER
                                                 : RESUME_FOLDER;
    if (facts->resume != RESUME_FOLDER || !facts->own) return 0;
    const bool whole = same_file(word, saving->cfg->run.dir); /* the run itself: its newest */
    facts->inside = whole || lies_in(word, saving->cfg->run.dir);
    facts->there = access(word, F_OK) == 0;
    facts->latest = whole || !is_newer(newest, word);
    return is_offspring(newest, word, &facts->offspring);
}

static int refuse(const struct saving *saving, const char *newest)
{
    const struct config *cfg = saving->cfg;
    if (strcmp(cfg->checkpoint.resume, "never") == 0) {
        FAIL(ERR_CONFIG,
             "checkpoint.resume is never, but %s exists; remove it, or choose another run.dir, so that no run is "
             "mixed "
             "with another",
             newest);
    }
    FAIL(ERR_CONFIG,
         "checkpoint.resume is %s, but %s has later checkpoints, up to %s, which a run from there would meet again; "
         "choose "
         "another run.dir for the branch, or move the later ones away",
         cfg->checkpoint.resume, cfg->run.dir, newest);
}

/* The checkpoint to go on from, which verifies; "" when the run starts anew. Collective. */
static int find_checkpoint(struct saving *saving, char folder[CKPT_PATH_MAX])
{
    const struct config *cfg = saving->cfg;
    struct comm *comm = saving->comm;
    struct start_facts facts = {.own = false};
    char newest[CKPT_PATH_MAX], from[CKPT_PATH_MAX] = "";
    enum start start = START_ANEW;
    int rc = 0;
    folder[0] = '\0';
    TRY(ckpt_find_newest(comm, cfg->run.dir, 0, INT64_MAX, 1, newest));
    if (comm->rank == 0) rc = look(saving, newest, &facts);
    start = start_choose(&facts);
    if (rc == 0 && comm->rank == 0 && start == START_FOLDER) rc = ckpt_choose(cfg->checkpoint.resume, from);
    TRY(comm_agree(comm, rc));
    TRY(comm_bcast(comm, &start, sizeof start, 0));
    TRY(comm_bcast(comm, from, sizeof from, 0));
    switch (start) {
    case START_NEWEST:
        if (facts.resume == RESUME_FOLDER && !facts.offspring)
            log_warn(
                "checkpoint.resume=%s is passed over: %s has checkpoints of its own; choose another run.dir to begin "
                "from there",
                cfg->checkpoint.resume, cfg->run.dir);
        memcpy(folder, newest, CKPT_PATH_MAX);
        return 0;
    case START_FOLDER:
        memcpy(folder, from, CKPT_PATH_MAX);
        return ckpt_verify(comm, folder);
    case START_REFUSED:
        return comm_agree(comm, comm->rank == 0 ? refuse(saving, newest) : 0);
    case START_ANEW:
    default:
        return 0;
    }
}

/* ---- the start ---- */

/* What the checkpoint does not say itself, and what another length of sequences makes of where it stands. */
static void place_data(struct ckpt_meta *meta, const struct config *before, const struct config *now)
{
    if (before && meta->sequences < 0) meta->sequences = (meta->step + meta->batches_skipped) * before->batch.global;
    if (before && before->model.seq_len != now->model.seq_len) meta->sequences = 0;
}

static int resume(struct saving *saving, const char *folder, struct start_outcome *outcome)
{
    int rc = 0;
    struct step *step = saving->step;
    const struct config *cfg = saving->cfg;
    struct ckpt_meta meta = {0};
    struct config *before = NULL;
    TRY(step_start(step, false));
    TRY_GOTO(comm_agree(saving->comm, ckpt_read_meta(folder, &meta)), done);
    log_info("resume: from %s, step %lld of %lld", folder, (long long)meta.step, (long long)cfg->run.steps);
    before = changes_before(&meta);
    if (meta.model_id == step->params.id) { /* else state_load says what is wrong */
        rc = changes_find(&outcome->changes, before, cfg, folder, &meta, saving->vocab_size, saving->tokenizer_id,
                          saving->record, true);
    }
    TRY_GOTO(comm_agree(saving->comm, rc), done);
    place_data(&meta, before, cfg);
    TRY_GOTO(state_load(step, folder, &meta), done);
    outcome->done = meta.step;
    outcome->resumed = true;
    /* A run keeps the attention that it began with: what a clock would choose now could give other bits. */
    if (before && cfg->top.attention == ATTENTION_AUTO) outcome->attention = before->top.attention;
    saving_resume(saving, lies_in(folder, cfg->run.dir), &meta, outcome->changes.course ? NULL : before);
    if (config_rewinds(cfg) && saving->began == meta.step)
        log_info(
            "rewind: no fault goes back further than to step %lld: what came before was another folder or course",
            (long long)meta.step);
done:
    free(before);
    ckpt_meta_free(&meta);
    return rc;
}

int start_begin(struct saving *saving, struct start_outcome *outcome)
{
    char folder[CKPT_PATH_MAX];
    *outcome = (struct start_outcome){.attention = saving->cfg->top.attention};
    TRY(find_checkpoint(saving, folder));
    return folder[0] == '\0' ? saving_begin(saving) : resume(saving, folder, outcome);
}
