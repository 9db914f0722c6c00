/* A small model ready for its first step, on the shards of a folder: see unit/shard_fixture.h. */
#ifndef TATARA_STEP_FIXTURE_H
#define TATARA_STEP_FIXTURE_H

#include "step.h"
#include "unit/shard_fixture.h"

#define FIXTURE_HIDDEN 48

struct step_fixture {
    struct config *cfg; /* owned */
    struct arena arena;
    struct step step;
    struct loader *loader;
};

/* The configuration of the small model; the caller may change it, and gives it to step_fixture_open. */
static inline struct config *step_fixture_config(const char *folder)
{
    struct config *cfg = calloc(1, sizeof *cfg);
    assert_non_null(cfg);
    config_defaults(cfg);
    cfg->model.layers = 2;
    cfg->model.hidden = FIXTURE_HIDDEN;
    cfg->model.heads = 3;
    cfg->model.kv_heads = 1;
    cfg->model.head_dim = 16;
    cfg->model.ffn_hidden = 80;
    cfg->model.seq_len = 32;
    cfg->batch.global = 10;
    cfg->batch.micro = 2;
    cfg->optim.warmup_steps = 0;
    cfg->optim.schedule = SCHEDULE_CONSTANT;
    cfg->data.train.n = 1;
    cfg->data.train.entry[0].weight = 1;
    (void)snprintf(cfg->data.train.entry[0].path, CONFIG_TEXT_MAX, "%s", folder);
    return cfg;
}

/* Collective. */
static inline void step_fixture_open(struct step_fixture *f, struct config *cfg, struct device *dev,
                                     struct comm *comm)
{
    *f = (struct step_fixture){.cfg = cfg};
    const struct loader_options options = {.sets = &cfg->data.train,
                                           .seq_len = cfg->model.seq_len,
                                           .micro = cfg->batch.micro,
                                           .global = cfg->batch.global,
                                           .seed = 1,
                                           .rank = comm->rank,
                                           .ranks = comm->ranks,
                                           .prefetch = 2,
                                           .document_mask = true,
                                           .tokenizer_id = FIXTURE_TOKENIZER,
                                           .vocab_size = FIXTURE_VOCAB};
    assert_int_equal(loader_open(&f->loader, &options), 0);
    struct arena measure = arena_measure(dev);
    assert_int_equal(step_layout(&f->step, cfg, FIXTURE_VOCAB, dev, comm, &measure), 0);
    step_close(&f->step);
    assert_int_equal(arena_open(&f->arena, dev, measure.used), 0);
    assert_int_equal(step_layout(&f->step, cfg, FIXTURE_VOCAB, dev, comm, &f->arena), 0);
    assert_int_equal(step_start(&f->step, true), 0);
    assert_int_equal(loader_seek(f->loader, 0), 0);
}

static inline void step_fixture_close(struct step_fixture *f)
{
    loader_close(f->loader);
    step_close(&f->step);
    arena_close(&f->arena);
    free(f->cfg);
}

/* One step, and its outcome. */
static inline int step_fixture_run(struct step_fixture *f, int64_t index, struct step_report *report)
{
    TRY(step_run(&f->step, f->loader, index, report));
    return step_settle(&f->step, f->loader, index + 1, report);
}

#endif
