/* Requests from outside, brought to one answer on all ranks at a step boundary. */
#include "signals.h"

#include "err.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* The one thing a signal handler may do is to set this. */
static volatile sig_atomic_t stop_asked;

static void ask_to_stop(int number)
{
    (void)number;
    stop_asked = 1;
}

int signal_open(void)
{
    static const int numbers[] = {SIGTERM, SIGINT, SIGUSR1};
    stop_asked = 0;
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        struct sigaction action = {.sa_handler = ask_to_stop};
        sigemptyset(&action.sa_mask);
        action.sa_flags = SA_RESTART;
        if (numbers[i] != SIGUSR1) action.sa_flags |= (int)SA_RESETHAND;
        if (sigaction(numbers[i], &action, NULL) != 0) {
            FAIL(ERR_SYSTEM, "cannot handle signal %d: %s", numbers[i], strerror(errno));
        }
    }
    return 0;
}

/* True when run_dir holds a file of this name, which is then removed. */
static bool take_file(const char *run_dir, const char *name)
{
    char path[2048];
    snprintf(path, sizeof path, "%s/%s", run_dir, name);
    return unlink(path) == 0;
}

int signal_poll(struct comm *comm, const struct ckpt_run *folder, bool busy, struct request *request)
{
    int64_t asked[4] = {stop_asked, 0, busy, 0};
    stop_asked = 0;
    if (comm->rank == 0) {
        asked[3] = ckpt_run_taken(folder);
        asked[0] |= !asked[3] && take_file(folder->dir, "STOP");
        asked[1] |= !asked[3] && take_file(folder->dir, "SAVE");
    }
    TRY(comm_max_i64(comm, asked, 4));
    if (asked[3]) return comm_agree(comm, comm->rank == 0 ? ckpt_check_owner(folder) : 0);
    *request = (struct request){.stop = asked[0] != 0, .save = asked[1] != 0, .busy = asked[2] != 0};
    return 0;
}
