/* Requests from outside, looked for at step boundaries. */
#include "requests.h"

#include "err.h"
#include "signals.h"

#include <stdio.h>
#include <unistd.h>

/* True when run_dir holds a file of this name, which is then removed. */
static bool take_file(const char *run_dir, const char *name)
{
    char path[2048];
    snprintf(path, sizeof path, "%s/%s", run_dir, name);
    return unlink(path) == 0;
}

int request_poll(struct comm *comm, const struct ckpt_run *folder, bool busy, struct request *request)
{
    int64_t asked[4] = {signal_stop_asked(), 0, busy, 0};
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
