/* Signals that ask a run to stop. */
#ifndef TATARA_SIGNALS_H
#define TATARA_SIGNALS_H

#include <stdbool.h>

/* Installs the handlers. SIGTERM, SIGINT, SIGUSR1 and SIGXCPU (a scheduler's warnings before a limit), and SIGHUP where it
 * was not ignored, as nohup does, ask to stop; so does SIGCONT of Open MPI's launcher, which is the first that a rank hears
 * of the end, where the process was not suspended. However often they come, that is one request. Only a person's second
 * SIGINT, a second or more after the first, ends the process at once. SIGPIPE is ignored: who reads the progress may go
 * away. */
int signal_open(void);
/* Whether this rank was asked to stop; then it stays so. Not collective. */
bool signal_stop_asked(void);

#endif
