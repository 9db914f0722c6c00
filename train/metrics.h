/* What a run says of itself: the progress line on stdout and metrics.jsonl in the run's folder. Rank 0 writes; the others
 * only take part in gathering peak memory and their times. */
#ifndef TATARA_METRICS_H
#define TATARA_METRICS_H

#include "comm.h"
#include "config.h"
#include "peak.h"
#include "step.h"

struct metrics {
    const struct config *cfg;
    void *file;   /* FILE of metrics.jsonl, on rank 0 */
    bool failing; /* the last line could not be written */
    double flops_per_token;
    struct peak peak;         /* what the rate is compared with */
    double mark_s;            /* start of the interval */
    int64_t steps;            /* in the interval */
    struct step_report total; /* times summed over the interval */
    int slow_rank;            /* slower than the median by more than SLOW_RATIO, for so many intervals in a row */
    int slow_intervals;
    int ranks;
    double *rank_s; /* on rank 0: each rank's own time for a micro-batch, then room to sort them */
};

/* Opens run_dir/metrics.jsonl to append. Rank 0's outcome holds for all. Collective. */
int metrics_open(struct metrics *metrics, struct comm *comm, const struct config *cfg, double flops_per_token,
                 const struct peak *peak);
void metrics_close(struct metrics *metrics);
/* One line for an event that is not a step: start, resume, checkpoint, evaluation, end. values: a jansson object of
 * further fields, or NULL; always consumed. Rank 0 only; others return 0. */
int metrics_event(struct metrics *metrics, const char *event, int64_t step, void *values);
/* Adds a step; at the log interval (or when `now`) prints the progress line and writes the metrics. data_wait_s: time
 * this rank waited for data. step counts from 1: steps done. Collective when it reports. */
int metrics_step(struct metrics *metrics, struct comm *comm, int64_t step, const struct step_report *report,
                 bool now);
/* Starts the clock again after something that is not training (a checkpoint, an evaluation). */
void metrics_skip(struct metrics *metrics, double since_s);
/* This process's resident memory now, and its peak, in bytes. */
size_t metrics_rss_bytes(void);
size_t metrics_peak_rss_bytes(void);

#endif
