/* The progress line and metrics.jsonl. */
#include "metrics.h"

#include "clock.h"
#include "err.h"
#include "log.h"
#include "proc.h"

#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define FORMAT_MAX 32
/* A rank is called slow when its own time for a micro-batch, waiting for others left out, exceeds the median's by this, so
 * many intervals in a row. */
#define SLOW_RATIO 1.2
#define SLOW_INTERVALS 3

size_t metrics_rss_bytes(void)
{
    return proc_bytes("/proc/self/status", "VmRSS:");
}

size_t metrics_peak_rss_bytes(void)
{
    return proc_bytes("/proc/self/status", "VmHWM:");
}

int metrics_open(struct metrics *metrics, struct comm *comm, const struct config *cfg, double flops_per_token,
                 const struct peak *peak)
{
    char path[CONFIG_TEXT_MAX + 32];
    *metrics = (struct metrics){
        .cfg = cfg, .ranks = comm->ranks, .flops_per_token = flops_per_token, .peak = *peak, .mark_s = now_s()};
    if (comm->rank != 0) return 0;
    metrics->rank_s = calloc(2 * (size_t)comm->ranks, sizeof *metrics->rank_s);
    if (!metrics->rank_s) FAIL(ERR_SYSTEM, "no memory for the times of %d ranks", comm->ranks);
    snprintf(path, sizeof path, "%s/metrics.jsonl", cfg->run.dir);
    FILE *file = metrics->file = fopen(path, "a+");
    if (!file) FAIL(ERR_SYSTEM, "cannot write %s: %s; check the folder's rights and space", path, strerror(errno));
    /* A power failure or a full disk may have left a line without its end, which would spoil the next one too. */
    const bool torn = fseek(file, -1, SEEK_END) == 0 && fgetc(file) != '\n';
    (void)fseek(file, 0, SEEK_END);
    if (torn) (void)fputc('\n', file);
    return 0;
}

void metrics_close(struct metrics *metrics)
{
    if (metrics->file) fclose(metrics->file);
    metrics->file = NULL;
    free(metrics->rank_s);
    metrics->rank_s = NULL;
}

/* "time": when the line is written, in UTC: "2026-11-29T23:52:11.048Z". */
static void add_time(json_t *object)
{
    struct timespec now;
    struct tm utc;
    char text[40], whole[64];
    if (clock_gettime(CLOCK_REALTIME, &now) != 0 || !gmtime_r(&now.tv_sec, &utc)) return;
    (void)strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%S", &utc);
    snprintf(whole, sizeof whole, "%s.%03ldZ", text, now.tv_nsec / 1000000);
    json_object_set_new(object, "time", json_string(whole));
}

/* Writes one JSON object as a line, with its time if `timed`, and frees it. A full disk must not end
 * a run that goes on computing: it is warned of once, and the next line that can be written starts afresh. */
static int write_line(struct metrics *metrics, json_t *object, bool timed)
{
    if (!object) FAIL(ERR_SYSTEM, "out of memory for a line of metrics.jsonl");
    if (timed) add_time(object);
    if (metrics->file) {
        bool failed = metrics->failing && fputc('\n', metrics->file) == EOF;
        failed |= json_dumpf(object, metrics->file, JSON_COMPACT | JSON_REAL_PRECISION(17)) != 0;
        failed |= fputc('\n', metrics->file) == EOF;
        failed |= fflush(metrics->file) != 0;
        if (failed && !metrics->failing) {
            log_warn("%s/metrics.jsonl cannot be written: %s; training goes on without it until it can",
                     metrics->cfg->run.dir, strerror(errno));
        }
        metrics->failing = failed;
        clearerr(metrics->file);
    }
    json_decref(object);
    return 0;
}

int metrics_event(struct metrics *metrics, const char *event, int64_t step, void *values)
{
    json_t *object = json_pack("{s:s, s:I}", "event", event, "step", (json_int_t)step);
    if (values) {
        json_object_update(object, values);
        json_decref(values);
    }
    /* An evaluation's line is the same text wherever it was computed. */
    return write_line(metrics, object, strcmp(event, "evaluation") != 0);
}

void metrics_skip(struct metrics *metrics, double since_s)
{
    metrics->mark_s += now_s() - since_s;
}

/* "1 h 05 min", "3 min 20 s", "12 s". */
static void format_duration(char text[FORMAT_MAX], double s)
{
    const long n = (long)(s + 0.5);
    if (n >= 3600) {
        snprintf(text, FORMAT_MAX, "%ld h %02ld min", n / 3600, n / 60 % 60);
    } else if (n >= 60) {
        snprintf(text, FORMAT_MAX, "%ld min %02ld s", n / 60, n % 60);
    } else {
        snprintf(text, FORMAT_MAX, "%ld s", n);
    }
}

static int compare_times(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Finds the slowest rank of the interval, and how often in a row it has been too slow. Times of 0: not known. Collective. */
static int find_slow(struct metrics *metrics, struct comm *comm, double own_s)
{
    double *times = metrics->rank_s;
    TRY(comm_gather(comm, &own_s, times, sizeof own_s));
    if (comm->rank != 0) return 0;
    const int n = comm->ranks;
    double *sorted = times + n;
    memcpy(sorted, times, (size_t)n * sizeof *times);
    qsort(sorted, (size_t)n, sizeof *sorted, compare_times);
    int slowest = 0;
    for (int r = 1; r < n; r++)
        slowest = times[r] > times[slowest] ? r : slowest;
    const bool slow = sorted[(n - 1) / 2] > 0 && times[slowest] > SLOW_RATIO * sorted[(n - 1) / 2];
    metrics->slow_intervals = !slow ? 0 : slowest == metrics->slow_rank ? metrics->slow_intervals + 1 : 1;
    metrics->slow_rank = slowest;
    return 0;
}

static void print_progress(struct metrics *metrics, int64_t step, const struct step_report *report,
                           double tokens_per_s, double interval_s)
{
    const struct config *cfg = metrics->cfg;
    char left[FORMAT_MAX];
    const double share = peak_share(&metrics->peak, tokens_per_s * metrics->flops_per_token, cfg->run.dir);
    format_duration(left, interval_s / (double)metrics->steps * (double)(cfg->run.steps - step));
    printf("step %lld/%lld  loss %.4f  lr %.2e  grad norm %.3f  %.0f tokens/s  %.0f%% of matmul peak  %s left",
           (long long)step, (long long)cfg->run.steps, report->loss, report->lr, report->grad_norm, tokens_per_s,
           100 * share, left);
    if (metrics->slow_intervals >= SLOW_INTERVALS) {
        printf("  rank %d is slow: %.3g s a micro-batch on its own, the median %.3g s", metrics->slow_rank,
               metrics->rank_s[metrics->slow_rank], metrics->rank_s[metrics->ranks + (metrics->ranks - 1) / 2]);
    }
    printf("\n");
    log_flush();
}

int metrics_step(struct metrics *metrics, struct comm *comm, int64_t step, const struct step_report *report, bool now)
{
    const struct config *cfg = metrics->cfg;
    struct step_report *total = &metrics->total;
    metrics->steps += !report->given_up;
    total->load_s += report->load_s;
    total->forward_s += report->forward_s;
    total->backward_s += report->backward_s;
    total->reduce_s += report->reduce_s;
    total->update_s += report->update_s;
    total->micro_batches += report->micro_batches;
    if (step % cfg->log.every != 0 && !now) return 0;

    double peak_bytes = (double)metrics_peak_rss_bytes();
    TRY(comm_max_f64(comm, &peak_bytes, 1));
    const double own_s = total->load_s + total->forward_s + total->backward_s;
    if (comm->ranks > 1)
        TRY(find_slow(metrics, comm, total->micro_batches > 0 ? own_s / (double)total->micro_batches : 0));
    const double interval_s = now_s() - metrics->mark_s, n = (double)metrics->steps;
    const double tokens_per_s = n * (double)(cfg->batch.global * cfg->model.seq_len) / interval_s;
    if (comm->rank == 0) {
        print_progress(metrics, step, report, tokens_per_s, interval_s);
        json_t *line = json_pack("{s:I, s:f, s:f, s:f, s:f, s:f, s:f, s:I, s:i}", "step", (json_int_t)step, "loss",
                                 report->loss, "lr", report->lr, "grad_norm", report->grad_norm, "tokens_per_s",
                                 tokens_per_s, "step_s", interval_s / n, "data_wait_s", total->load_s / n,
                                 "peak_rss_bytes", (json_int_t)peak_bytes, "redone", report->redone);
        if (line && cfg->model.z_loss > 0) json_object_set_new(line, "z_loss", json_real(report->z_loss));
        if (line && total->forward_s > 0) { /* on a GPU the phases are not told apart */
            json_object_set_new(line, "forward_s", json_real(total->forward_s / n));
            json_object_set_new(line, "backward_s", json_real(total->backward_s / n));
            json_object_set_new(line, "reduce_s", json_real(total->reduce_s / n));
            json_object_set_new(line, "update_s", json_real(total->update_s / n));
        }
        TRY(write_line(metrics, line, true));
    }
    metrics->mark_s = now_s();
    metrics->steps = 0;
    metrics->total = (struct step_report){0};
    return 0;
}
