/* The log: levelled lines on stderr with the rank in front where there are several, the only global state we keep.
 *
 * Ranks other than 0 print warnings and errors only, so that a job of a thousand ranks reads like one program. */
#ifndef TATARA_LOG_H
#define TATARA_LOG_H

#include <stdbool.h>

enum log_level { LOG_DEBUG, LOG_INFO, LOG_WARN, LOG_ERROR };

/* Says who is talking; call once after MPI is up. Before it the program counts as rank 0 of 1. The level comes from
 * the environment's TATARA_LOG (debug, info, warn, error); default info. */
void log_set_rank(int rank, int ranks);
/* Writes one line. Safe from any thread. */
void log_write(enum log_level level, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Flushes standard output, where a run's progress goes. When it cannot be written, for its reader is gone, the run goes on
 * without; that is said once. By one thread. */
void log_flush(void);

/* Whether lines of this level are written. */
bool log_shows(enum log_level level);

#define log_debug(...) log_write(LOG_DEBUG, __VA_ARGS__)
#define log_info(...) log_write(LOG_INFO, __VA_ARGS__)
#define log_warn(...) log_write(LOG_WARN, __VA_ARGS__)
#define log_error(...) log_write(LOG_ERROR, __VA_ARGS__)

#endif
