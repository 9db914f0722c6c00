/* The log: one line per call on stderr, whole even with many threads and ranks, and readable whatever bytes the names in
 * it have. */
#include "log.h"

#include "utf8.h"

#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const level_names[] = {"debug", "info", "warn", "error"};

static struct {
    int rank, ranks;
    enum log_level least;
} the_log = {.rank = 0, .ranks = 1, .least = LOG_INFO};

void log_set_rank(int rank, int ranks)
{
    the_log.rank = rank;
    the_log.ranks = ranks;
    const char *wanted = getenv("TATARA_LOG");
    the_log.least = rank == 0 ? LOG_INFO : LOG_WARN;
    for (int i = 0; wanted && i < 4; i++) {
        if (strcmp(wanted, level_names[i]) == 0) the_log.least = (enum log_level)i;
    }
}

bool log_shows(enum log_level level)
{
    return level >= the_log.least;
}

void log_write(enum log_level level, const char *format, ...)
{
    if (!log_shows(level)) return;
    char line[4096], shown[sizeof line];
    size_t used = 0;
    if (the_log.ranks > 1 && (the_log.rank > 0 || level >= LOG_WARN)) {
        used += (size_t)snprintf(line, sizeof line, "[rank %d] ", the_log.rank);
    }
    if (level == LOG_WARN) used += (size_t)snprintf(line + used, sizeof line - used, "warning: ");
    if (level == LOG_ERROR) used += (size_t)snprintf(line + used, sizeof line - used, "tatara: error: ");
    va_list args;
    va_start(args, format);
    vsnprintf(line + used, sizeof line - used - 1, format, args);
    va_end(args);
    used = strlen(utf8_show(line, "\n\t", shown, sizeof shown - 1));
    shown[used] = '\n';
    fwrite(shown, 1, used + 1, stderr);
}

void log_flush(void)
{
    static bool said = false;
    const bool failed = fflush(stdout) != 0;
    const int error = errno;
    clearerr(stdout);
    if (!failed || said) return;
    said = true;
    log_warn("standard output cannot be written: %s; the run goes on without progress lines", strerror(error));
}
