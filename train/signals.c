/* Signals that ask a run to stop: noted by their handlers. */
#include "signals.h"

#include "err.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* A person who presses Ctrl-C again means it; what sends a signal to a process and to its group does so within this. */
#define AGAIN_MS 1000
/* How often a thread notes that the process runs, and how long it has not where it was suspended. */
#define TICK_MS 100
#define SUSPENDED_MS 500

/* All that the handlers set. */
static volatile sig_atomic_t stop_asked;
static volatile int64_t first_interrupt_ms;   /* 0: none yet; SIGINT's handler alone uses it */
static _Atomic int64_t ticked_ms, resumed_ms; /* when the process was last seen to run, and to run again */

static int64_t now_ms(void)
{
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static void ask_to_stop(int number)
{
    (void)number;
    stop_asked = 1;
}

static void interrupt(int number)
{
    const int64_t ms = now_ms();
    stop_asked = 1;
    if (first_interrupt_ms == 0) {
        first_interrupt_ms = ms;
    } else if (ms - first_interrupt_ms >= AGAIN_MS) {
        (void)signal(number, SIG_DFL);
        (void)raise(number);
    }
}

/* Open MPI's mpirun, when it is asked to end, sends its ranks SIGCONT, SIGTERM a second later, and SIGKILL another second
 * later; asked twice, it ends after the SIGCONT, and they with it. */
static void continued(int number, siginfo_t *info, void *context)
{
    const int64_t now = now_ms();
    const bool suspended =
        now - atomic_load(&ticked_ms) > SUSPENDED_MS || now - atomic_load(&resumed_ms) < SUSPENDED_MS;
    (void)number;
    (void)context;
    if (info->si_pid == getppid() && !suspended) stop_asked = 1;
}

/* A thread that sees when the process was suspended: what SIGCONT then means is another thing. */
static void *tick(void *unused)
{
    const struct timespec pause = {.tv_nsec = (long)TICK_MS * 1000000};
    (void)unused;
    for (;;) {
        const int64_t now = now_ms(), last = atomic_exchange(&ticked_ms, now);
        if (now - last > SUSPENDED_MS) atomic_store(&resumed_ms, now);
        (void)nanosleep(&pause, NULL);
    }
    return NULL;
}

static int handle(int number, struct sigaction action)
{
    action.sa_flags |= SA_RESTART;
    sigemptyset(&action.sa_mask);
    if (sigaction(number, &action, NULL) != 0)
        FAIL(ERR_SYSTEM, "cannot handle signal %d: %s", number, strerror(errno));
    return 0;
}

/* Without the thread SIGCONT would be ambiguous, and says nothing. */
static int handle_continued(void)
{
    pthread_t thread;
    atomic_store(&ticked_ms, now_ms());
    if (!getenv("OMPI_MCA_orte_hnp_uri") || pthread_create(&thread, NULL, tick, NULL) != 0) return 0;
    (void)pthread_detach(thread);
    return handle(SIGCONT, (struct sigaction){.sa_sigaction = continued, .sa_flags = SA_SIGINFO});
}

int signal_open(void)
{
    const struct sigaction ask = {.sa_handler = ask_to_stop}, ignore = {.sa_handler = SIG_IGN};
    struct sigaction hangup;
    TRY(handle(SIGTERM, ask));
    TRY(handle(SIGUSR1, ask));
    TRY(handle(SIGXCPU, ask));
    TRY(handle(SIGINT, (struct sigaction){.sa_handler = interrupt}));
    TRY(handle(SIGPIPE, ignore));
    TRY(handle_continued());
    const bool ignored = sigaction(SIGHUP, NULL, &hangup) == 0 && hangup.sa_handler == SIG_IGN;
    return ignored ? 0 : handle(SIGHUP, ask);
}

bool signal_stop_asked(void)
{
    return stop_asked != 0;
}
