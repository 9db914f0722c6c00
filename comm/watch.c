#include "watch.h"

#include "clock.h"
#include "err.h"
#include "log.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define LOOK_S 0.2
#define GATHER_S 3.0 /* for the other ranks' time-outs to come, too, and their files to be seen */
#define END_S 6.0    /* after the time-out this rank ends, whether it could say something or not */
#define FOLDER_MAX 1024
#define PATH_MAX_BYTES (FOLDER_MAX + 32)
#define LINE_MAX_BYTES 256
#define RESUME "Look at those ranks' nodes; the same command resumes from the last checkpoint"
#define RESUME_ALONE \
    "Look at the file system and at those ranks' nodes; the same command resumes from the last checkpoint"
/* A rank that computes for less of the time than this stands still: one that reads 1 MB a second computes for more. */
#define WORK_SHARE 1e-4

/* How a line begins that a rank writes about itself: which collective it is in, or which it left last. */
static const char in_text[] = "in collective ", after_text[] = "after collective ", attempt_text[] = ", attempt ";

struct watch {
    int rank, ranks;
    uint64_t attempt;
    _Atomic double timeout_s;
    char folder[FOLDER_MAX];
    atomic_bool has_folder; /* folder does not change any more */
    pthread_t thread;
    atomic_bool ending;
    atomic_ullong count;        /* collectives entered */
    _Atomic(const char *) what; /* NULL: at work */
    atomic_size_t bytes;
    atomic_bool alone; /* not in a collective */
    _Atomic double since_s;
    const char *outer;    /* the main thread's: what it waits for between collectives; NULL: it is at work there */
    clockid_t clock;      /* of the time that the main thread computes */
    double worked_s;      /* the watching thread's: that clock, when the wait began or was last seen to go on */
    const char *stuck_in; /* what it waited for when the time-out came */
    atomic_int report;    /* enum report */
};

/* How far a rank that ends the job is with saying why. */
enum report { GATHERING, SPEAKING, SILENT /* another rank speaks */, SAID };

/* What a rank's file says. */
struct testimony {
    bool given;               /* and by this attempt */
    bool alone;               /* it waits for something that is no collective */
    unsigned long long count; /* of collectives that it entered */
    char text[LINE_MAX_BYTES];
};

static void enter(struct watch *w, const char *what, size_t bytes, bool alone)
{
    atomic_store_explicit(&w->since_s, now_s(), memory_order_relaxed);
    atomic_store_explicit(&w->bytes, bytes, memory_order_relaxed);
    atomic_store_explicit(&w->alone, alone, memory_order_relaxed);
    if (!alone) atomic_fetch_add_explicit(&w->count, 1, memory_order_relaxed);
    atomic_store_explicit(&w->what, what, memory_order_release);
}

void watch_enter(struct watch *w, const char *what, size_t bytes)
{
    if (w) enter(w, what, bytes, false);
}

void watch_leave(struct watch *w)
{
    if (!w) return;
    if (w->outer)
        enter(w, w->outer, 0, true);
    else
        atomic_store_explicit(&w->what, NULL, memory_order_release);
}

void watch_enter_alone(struct watch *w, const char *what)
{
    if (!w) return;
    w->outer = what;
    enter(w, what, 0, true);
}

void watch_leave_alone(struct watch *w)
{
    if (!w) return;
    w->outer = NULL;
    watch_leave(w);
}

/* Seconds since the last wait began. */
static double waited_s(struct watch *w)
{
    return now_s() - atomic_load_explicit(&w->since_s, memory_order_relaxed);
}

/* A wait that is no collective begins again when the main thread has computed meanwhile, as it does with what it reads. */
static void see_work(struct watch *w)
{
    struct timespec t = {0};
    if (!atomic_load(&w->alone) || clock_gettime(w->clock, &t) != 0) return;
    const double worked_s = (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
    if (worked_s - w->worked_s <= WORK_SHARE * atomic_load(&w->timeout_s)) return;
    w->worked_s = worked_s;
    atomic_store_explicit(&w->since_s, now_s(), memory_order_relaxed);
}

static void pause_s(double s)
{
    const struct timespec t = {.tv_sec = (time_t)s, .tv_nsec = (long)((s - (double)(time_t)s) * 1e9)};
    nanosleep(&t, NULL);
}

/* ---- the files ---- */

static void path_of(const struct watch *w, int rank, char path[PATH_MAX_BYTES])
{
    snprintf(path, PATH_MAX_BYTES, "%s/hang-%05d", w->folder, rank);
}

/* mkdir -p. What cannot be made is found when the file is opened. */
static void make_folder(const char *folder)
{
    char path[FOLDER_MAX];
    snprintf(path, sizeof path, "%s", folder);
    for (char *end = path + 1; *end; end++) {
        if (*end != '/') continue;
        *end = '\0';
        (void)mkdir(path, 0777);
        *end = '/';
    }
    (void)mkdir(path, 0777);
}

/* This rank's own words: "rank 2 has waited 600 s in agreement of 8 bytes". */
static void describe(struct watch *w, char text[LINE_MAX_BYTES])
{
    if (atomic_load(&w->alone)) {
        snprintf(text, LINE_MAX_BYTES, "rank %d has waited %.0f s for %s", w->rank, waited_s(w), w->stuck_in);
    } else {
        snprintf(text, LINE_MAX_BYTES, "rank %d has waited %.0f s in %s of %zu bytes", w->rank, waited_s(w),
                 w->stuck_in, atomic_load(&w->bytes));
    }
}

/* Writes this rank's line; false when there is no place for it. */
static bool testify(struct watch *w)
{
    char path[PATH_MAX_BYTES], text[LINE_MAX_BYTES];
    if (!atomic_load(&w->has_folder)) return false;
    make_folder(w->folder);
    path_of(w, w->rank, path);
    describe(w, text);
    FILE *file = fopen(path, "w");
    if (!file) return false;
    fprintf(file, "%s%llu%s%llx: %s\n", atomic_load(&w->alone) ? after_text : in_text,
            (unsigned long long)atomic_load(&w->count), attempt_text, (unsigned long long)w->attempt, text);
    return fclose(file) == 0;
}

static void parse(const struct watch *w, const char *line, struct testimony *t)
{
    const char *at = line;
    t->alone = strncmp(line, after_text, sizeof after_text - 1) == 0;
    if (!t->alone && strncmp(line, in_text, sizeof in_text - 1) != 0) return;
    at += t->alone ? sizeof after_text - 1 : sizeof in_text - 1;
    char *end = NULL;
    t->count = strtoull(at, &end, 10);
    if (strncmp(end, attempt_text, sizeof attempt_text - 1) != 0) return;
    const unsigned long long attempt = strtoull(end + sizeof attempt_text - 1, &end, 16);
    if (attempt != w->attempt || strncmp(end, ": ", 2) != 0) return;
    snprintf(t->text, sizeof t->text, "%.*s", (int)strcspn(end + 2, "\n"), end + 2);
    t->given = true;
}

static struct testimony testimony_of(const struct watch *w, int rank)
{
    struct testimony t = {.given = false};
    char path[PATH_MAX_BYTES], line[2 * LINE_MAX_BYTES] = "";
    path_of(w, rank, path);
    FILE *file = fopen(path, "r");
    if (file && fgets(line, sizeof line, file)) parse(w, line, &t);
    if (file) (void)fclose(file);
    return t;
}

/* ---- what is said ---- */

/* The ranks that are in no collective, as a list; returns how many. */
static int list_missing(const struct watch *w, const struct testimony *all, char *list, size_t bytes)
{
    int missing = 0;
    size_t used = 0;
    for (int rank = 0; rank < w->ranks; rank++) {
        const struct testimony *t = &all[rank];
        if (t->given && !t->alone) continue;
        missing++;
        if (used + LINE_MAX_BYTES + 32 > bytes) continue;
        used += (size_t)snprintf(list + used, bytes - used, t->given ? "%s %d (%s)" : "%s %d", missing > 1 ? "," : "",
                                 rank, t->text);
    }
    return missing;
}

/* Names those that are in no collective, while others are. A rank that came out of one which others are still in waits in
 * the next: each of them waits for those that are in none. */
static void accuse(struct watch *w, const struct testimony *all)
{
    char list[8 * LINE_MAX_BYTES] = " none";
    int waiting = 0;
    const struct testimony *first = &all[w->rank]; /* in the collective that is held up */
    for (int rank = 0; rank < w->ranks; rank++) {
        const struct testimony *t = &all[rank];
        waiting += t->given;
        if (t->given && !t->alone && (first->alone || t->count < first->count)) first = t;
    }
    if (first->alone) {
        log_error("hung: %s, longer than run.hang_timeout_s=%.0f, as have %d of %d ranks. Where each stood is in "
                  "%s/hang-*. " RESUME_ALONE,
                  first->text, w->timeout_s, waiting, w->ranks, w->folder);
        return;
    }
    const int missing = list_missing(w, all, list, sizeof list);
    log_error("hung: %s, collective number %llu, longer than run.hang_timeout_s=%.0f; %d of %d ranks did not "
              "arrive:%s. Where each stood is in %s/hang-*. " RESUME,
              first->text, first->count, w->timeout_s, missing, w->ranks, list, w->folder);
}

/* Without the others' words. */
static void speak_alone(struct watch *w)
{
    char text[LINE_MAX_BYTES];
    const bool has_folder = atomic_load(&w->has_folder);
    describe(w, text);
    if (atomic_load(&w->alone)) {
        log_error("hung: %s, longer than run.hang_timeout_s=%.0f; %s %s. " RESUME_ALONE, text, w->timeout_s,
                  has_folder ? w->folder : "the run's folder",
                  has_folder ? "cannot be written to or does not answer" : "is not known yet");
        return;
    }
    log_error(
        "hung: %s, collective number %llu, longer than run.hang_timeout_s=%.0f; %s %s, so look for the ranks that "
        "do not say this: they did not arrive. " RESUME,
        text, (unsigned long long)atomic_load(&w->count), w->timeout_s, has_folder ? w->folder : "the run's folder",
        has_folder ? "cannot be written to or does not answer" : "is not known yet");
}

/* The lowest rank that testified speaks for all. Returns false when this rank's own words find no place. */
static bool speak_for_all(struct watch *w)
{
    int lowest = 0;
    if (!testify(w)) return false;
    pause_s(GATHER_S);
    while (lowest < w->rank && !testimony_of(w, lowest).given)
        lowest++;
    if (lowest < w->rank) {
        atomic_store(&w->report, SILENT);
        pause_s(END_S); /* it ends first */
        return true;
    }
    struct testimony *all = calloc((size_t)w->ranks, sizeof *all);
    if (!all) return false;
    for (int rank = 0; rank < w->ranks; rank++)
        all[rank] = testimony_of(w, rank);
    atomic_store(&w->report, SPEAKING);
    accuse(w, all);
    free(all);
    return true;
}

/* The thread that deals with files. */
static void *report(void *watch)
{
    struct watch *w = watch;
    err_leave_status(ERR_COMM);
    if (!speak_for_all(w)) {
        atomic_store(&w->report, SPEAKING);
        speak_alone(w);
        pause_s(GATHER_S); /* for the others to say it, too */
    }
    atomic_store(&w->report, SAID);
    return NULL;
}

/* The job ends here. */
_Noreturn static void end_job(struct watch *w, const char *what)
{
    pthread_t reporter;
    w->stuck_in = what;
    const double began_s = now_s();
    if (pthread_create(&reporter, NULL, report, w) == 0) {
        while (atomic_load(&w->report) != SAID && now_s() - began_s < END_S)
            pause_s(LOOK_S / 4);
    }
    if (atomic_load(&w->report) == GATHERING) {
        speak_alone(w);
        pause_s(5 * LOOK_S); /* for the others to say it, too: some launchers end them at once */
    }
    _exit(ERR_COMM);
}

static void *look(void *watch)
{
    struct watch *w = watch;
    while (!atomic_load(&w->ending)) {
        pause_s(LOOK_S);
        const char *what = atomic_load_explicit(&w->what, memory_order_acquire);
        if (what) see_work(w);
        if (what && waited_s(w) > w->timeout_s) end_job(w, what);
    }
    return NULL;
}

/* ---- opening and closing ---- */

int watch_open(struct watch **watch, const struct comm *comm, uint64_t attempt, double timeout)
{
    struct watch *w = *watch = calloc(1, sizeof *w);
    if (!w) FAIL(ERR_SYSTEM, "no memory for watching the collectives");
    w->rank = comm->rank;
    w->ranks = comm->ranks;
    w->attempt = attempt;
    watch_set_timeout(w, timeout);
    int error = pthread_getcpuclockid(pthread_self(), &w->clock);
    if (error == 0) error = pthread_create(&w->thread, NULL, look, w);
    if (error != 0) {
        free(w);
        *watch = NULL;
        FAIL(ERR_SYSTEM, "no thread for watching the collectives: %s", strerror(error));
    }
    return 0;
}

void watch_set_timeout(struct watch *w, double timeout)
{
    atomic_store(&w->timeout_s, timeout);
}

void watch_set_folder(struct watch *w, const char *folder)
{
    char path[PATH_MAX_BYTES];
    ASSERT(!atomic_load(&w->has_folder));
    snprintf(w->folder, sizeof w->folder, "%s", folder);
    path_of(w, w->rank, path);
    if (unlink(path) != 0 && errno != ENOENT && errno != ENOTDIR)
        log_warn("%s: cannot be removed: %s", path, strerror(errno));
    atomic_store(&w->has_folder, true);
}

void watch_close(struct watch *w)
{
    if (!w) return;
    atomic_store(&w->ending, true);
    (void)pthread_join(w->thread, NULL);
    free(w);
}
