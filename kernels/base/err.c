/* Errors: the message and the trace, one of each per thread. */
#include "err.h"

#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define TRACE_MAX 2048

static _Thread_local char message[ERR_MESSAGE_MAX];
static _Thread_local char trace[TRACE_MAX];
static _Thread_local bool shared;

int err_raise(int code, const char *file, int line, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    trace[0] = '\0';
    shared = false;
    err_trace(file, line, err_name(code));
    return code;
}

void err_share(void)
{
    shared = true;
}

bool err_shared(void)
{
    return shared;
}

void err_trace(const char *file, int line, const char *call)
{
    const size_t used = strlen(trace);
    snprintf(trace + used, sizeof trace - used, "  %s:%d %.100s\n", file, line, call);
}

const char *err_message(void)
{
    return message;
}

const char *err_trace_text(void)
{
    return trace;
}

void err_clear(void)
{
    message[0] = '\0';
    trace[0] = '\0';
}

void err_take(struct err_record *record, int code)
{
    record->code = code;
    memcpy(record->message, message, sizeof message);
    err_clear();
}

int err_give(const struct err_record *record)
{
    memcpy(message, record->message, sizeof message);
    trace[0] = '\0';
    return record->code;
}

const char *err_name(int code)
{
    switch (code) {
#define X(name, status, meaning) \
    case name:                   \
        return #name;
        ERR_LIST(X)
#undef X
    default:
        return "?";
    }
}

void err_leave_status(int code)
{
    const char *path = getenv("TATARA_STATUS_FILE");
    const int file = path ? open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666) : -1;
    if (file < 0) return;
    (void)dprintf(file, "%d\n", code);
    (void)close(file);
}

void err_assert_failed(const char *file, int line, const char *what)
{
    fprintf(stderr, "tatara: bug: %s:%d: %s does not hold. Please report this with the command line.\n", file, line,
            what);
    abort();
}
