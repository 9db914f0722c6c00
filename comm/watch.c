#include "watch.h"

#include "err.h"
#include "log.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define LOOK_NS 200000000L
#define GATHER_S 3.0 /* for the other ranks' time-outs to come, too, and their files to be seen */
#define FOLDER_MAX 1024

struct watch {
    int rank, ranks;
    double timeout_s;
    char folder[FOLDER_MAX];
    pthread_t thread;
    atomic_bool ending;
    atomic_ullong count;        /* collectives entered */
    _Atomic(const char *) what; /* NULL: in none */
    atomic_size_t bytes;
    atomic_llong since_ns;
};

static long long now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (long long)t.tv_sec * 1000000000 + t.tv_nsec;
}

void watch_enter(struct watch *w, const char *what, size_t bytes)
{
    if (!w) return;
    atomic_store_explicit(&w->since_ns, now_ns(), memory_order_relaxed);
    atomic_store_explicit(&w->bytes, bytes, memory_order_relaxed);
    atomic_fetch_add_explicit(&w->count, 1, memory_order_relaxed);
    atomic_store_explicit(&w->what, what, memory_order_release);
}

void watch_leave(struct watch *w)
{
    if (w) atomic_store_explicit(&w->what, NULL, memory_order_release);
}

/* Seconds in the collective in hand; 0 outside. */
static double waiting_s(struct watch *w)
{
    if (!atomic_load_explicit(&w->what, memory_order_acquire)) return 0;
    return (double)(now_ns() - atomic_load_explicit(&w->since_ns, memory_order_relaxed)) * 1e-9;
}

static void pause_s(double s)
{
    const struct timespec t = {.tv_sec = (time_t)s, .tv_nsec = (long)((s - (double)(time_t)s) * 1e9)};
    nanosleep(&t, NULL);
}

static void path_of(const struct watch *w, int rank, char path[FOLDER_MAX + 32])
{
    snprintf(path, FOLDER_MAX + 32, "%s/hang-%05d", w->folder, rank);
}

/* How many collectives the rank says it has entered; 0 when it says nothing. */
static unsigned long long count_of(const struct watch *w, int rank)
{
    static const char begins[] = "collective ";
    char path[FOLDER_MAX + 32], line[256] = "";
    path_of(w, rank, path);
    FILE *file = fopen(path, "r");
    const bool read = file && fgets(line, sizeof line, file);
    if (file) (void)fclose(file);
    return read && strncmp(line, begins, sizeof begins - 1) == 0 ? strtoull(line + sizeof begins - 1, NULL, 10) : 0;
}

/* This rank's line. */
static void testify(struct watch *w, const char *what)
{
    char path[FOLDER_MAX + 32];
    path_of(w, w->rank, path);
    FILE *file = fopen(path, "w");
    if (!file) return; /* then it counts as one that did not arrive; the others report */
    fprintf(file, "collective %llu: rank %d has waited %.0f s in %s of %zu bytes\n",
            (unsigned long long)atomic_load(&w->count), w->rank, waiting_s(w), what, atomic_load(&w->bytes));
    (void)fclose(file);
}

/* Names those that are not as far as this rank, which is the lowest that waits. */
static void accuse(struct watch *w, const char *what)
{
    char list[512] = "";
    size_t used = 0;
    int missing = 0;
    const unsigned long long mine = atomic_load(&w->count);
    for (int rank = 0; rank < w->ranks; rank++) {
        if (rank == w->rank || count_of(w, rank) >= mine) continue;
        missing++;
        if (used + 16 < sizeof list) used += (size_t)snprintf(list + used, sizeof list - used, " %d", rank);
    }
    log_error(
        "hung: for %.0f s (run.hang_timeout_s) ranks have waited in %s, number %llu, of %zu bytes; %d of %d ranks "
        "did not arrive:%s. Where each stood is in %s/hang-*. Look at those ranks' nodes; the same command resumes "
        "from the last checkpoint",
        w->timeout_s, what, mine, atomic_load(&w->bytes), missing, w->ranks, missing > 0 ? list : " none", w->folder);
}

/* The job ends here. */
static void end_job(struct watch *w, const char *what)
{
    int lowest = 0;
    testify(w, what);
    pause_s(GATHER_S);
    while (lowest < w->rank && count_of(w, lowest) == 0)
        lowest++;
    if (lowest == w->rank) accuse(w, what);
    if (lowest != w->rank) pause_s(GATHER_S); /* let that one speak and exit first */
    _exit(ERR_COMM);
}

static void *look(void *watch)
{
    static const struct timespec pause = {.tv_nsec = LOOK_NS};
    struct watch *w = watch;
    while (!atomic_load(&w->ending)) {
        nanosleep(&pause, NULL);
        const char *what = atomic_load_explicit(&w->what, memory_order_acquire);
        if (what && waiting_s(w) > w->timeout_s) end_job(w, what);
    }
    return NULL;
}

int watch_open(struct watch **watch, const struct comm *comm, const char *folder, double timeout_s)
{
    char path[FOLDER_MAX + 32];
    struct watch *w = *watch = calloc(1, sizeof *w);
    if (!w) FAIL(ERR_SYSTEM, "no memory for watching the collectives");
    w->rank = comm->rank;
    w->ranks = comm->ranks;
    w->timeout_s = timeout_s;
    snprintf(w->folder, sizeof w->folder, "%s", folder);
    path_of(w, w->rank, path);
    if (unlink(path) != 0 && errno != ENOENT) log_warn("%s: cannot be removed: %s", path, strerror(errno));
    const int error = pthread_create(&w->thread, NULL, look, w);
    if (error != 0) {
        free(w);
        *watch = NULL;
        FAIL(ERR_SYSTEM, "no thread for watching the collectives: %s", strerror(error));
    }
    return 0;
}

void watch_close(struct watch *w)
{
    if (!w) return;
    atomic_store(&w->ending, true);
    (void)pthread_join(w->thread, NULL);
    free(w);
}
