/* What the checkpoint tests share: a temporary folder, tensors whose every element is known, and ways to cut them. */
#ifndef TATARA_CKPT_FIXTURE_H
#define TATARA_CKPT_FIXTURE_H

#include "ckpt/ckpt_internal.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#define FIXTURE_TENSORS 7
#define FIXTURE_SPLITS 4

struct fixture {
    struct comm *comm;
    char dir[CKPT_PATH_MAX]; /* shared by all ranks, removed by fixture_close */
    struct ckpt_run run;     /* opened in dir */
};

/* Runs the tests given and closes comm. A failed assertion ends the job at once, so that no rank waits in a
 * collective for one that has left its test. Returns main's status. */
int fixture_main(struct comm *comm, const char *name, const struct CMUnitTest *tests, size_t n);

/* A folder of its own for each test, opened as a run. Collective. */
void fixture_open(struct fixture *fix, struct comm *comm);
void fixture_close(struct fixture *fix);

/* Element i of tensor t at a step: exact in f32, different for every (t, i) and step. */
float fixture_value(int t, int64_t step, int64_t i);
/* The part of each tensor that `rank` of `ranks` holds under one of FIXTURE_SPLITS ways to cut, filled with the values
 * of `step`; free with fixture_slabs_free. */
struct ckpt_slab *fixture_slabs(int split, int rank, int ranks, int64_t step);
void fixture_slabs_free(struct ckpt_slab *slabs);
/* Elements of the slabs that are not the step's values. */
int64_t fixture_errors(const struct ckpt_slab *slabs, int64_t step);

/* Metadata with numbers that only an exact conversion keeps. config_yaml is not owned. */
struct ckpt_meta fixture_meta(int64_t step);
/* Saves `step`, cut by `split`, keeping many. Collective; returns ckpt_save's code. */
int fixture_save(struct fixture *fix, int split, int64_t step);
/* dir/step-…/file; file NULL: the folder. */
void fixture_path(const struct fixture *fix, int64_t step, const char *file, char path[CKPT_PATH_MAX]);
/* Whether exactly one rank holds an error message and it contains `text`. Collective; clears the message. */
bool fixture_told(struct comm *comm, const char *text);
/* Entries of the run's folder whose name starts with `prefix`, counted on rank 0. Collective. */
int fixture_count(struct fixture *fix, const char *prefix);
/* What the newest usable checkpoint of the run's folder is, or -1. Collective. */
int64_t fixture_newest(struct fixture *fix);

#endif
