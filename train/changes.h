/* What differs between a checkpoint and the run that goes on from it, named before the first step.
 *
 * The column `change` of options.def says what a difference means; data and tokenizer are compared by their contents, not by
 * their paths. What makes the same weights another model is refused, unless run.allow_changes names the key; what changes
 * the course of the run, or the arithmetic below it, is said in a line each. */
#ifndef TATARA_CHANGES_H
#define TATARA_CHANGES_H

#include "ckpt/ckpt.h"
#include "config.h"

struct changes {
    bool course;      /* something is trained differently from here on */
    void *list;       /* jansson array of {key, before, now}, for metrics.jsonl; owned */
    void *arithmetic; /* the same of the arithmetic's versions */
};

/* The configuration of a checkpoint, which the caller frees; NULL: of a version that this one cannot read. */
struct config *changes_before(const struct ckpt_meta *meta);

/* Compares. `before`: of the checkpoint `folder` with this `meta`; vocab_size, tokenizer_id and record are those of this
 * start. whole: a resume; else only the model counts, as for checkpoint.init_from. Says what it finds on rank 0; ERR_CONFIG
 * for another model, on every rank alike. Not collective. */
int changes_find(struct changes *changes, const struct config *before, const struct config *now, const char *folder,
                 const struct ckpt_meta *meta, int64_t vocab_size, uint64_t tokenizer_id, const char *record,
                 bool whole);
void changes_close(struct changes *changes);

#endif
