/* Errors: codes, the trace, and the macros that carry both upwards.
 *
 * A fallible function returns int: 0 for success, else an `enum err`. The first failure writes one message for the
 * person (what is wrong, where, what to do) with FAIL; each TRY on the way up adds its file and line to the trace, which
 * is printed at log level debug only. The message is kept per thread; a worker thread hands its own over with err_take
 * and err_give. The code is also the exit status of the program (see ERR_LIST), so that a scheduler can tell the cases
 * apart. */
#ifndef TATARA_ERR_H
#define TATARA_ERR_H

#include <stdbool.h>
#include <stddef.h>

/* name, exit status, what it means */
#define ERR_LIST(X)                                                                                      \
    X(ERR_USAGE, 2, "wrong command line")                                                                \
    X(ERR_CONFIG, 3, "the configuration is wrong")                                                       \
    X(ERR_DATA, 4, "a data file or a checkpoint is missing, damaged or of another kind")                 \
    X(ERR_NUMERIC, 5, "NaN, infinity or overflow in the numbers")                                        \
    X(ERR_SYSTEM, 6, "the operating system refused: memory, disk, files, threads")                       \
    X(ERR_COMM, 7, "MPI or NCCL failed, or a rank died or hung: try again")                              \
    X(ERR_DEVICE, 8, "a device or its library failed, or is not there")                                  \
    X(ERR_UNSUPPORTED, 9, "asked for something this build or machine does not support")                  \
    X(ERR_BUG, 10, "a mistake in Tatara itself")                                                         \
    X(ERR_STOPPED, 11, "asked to stop before the last step: all is saved, and the same command goes on") \
    X(ERR_TAKEN, 12, "the run's folder belongs to another attempt, which goes on there")

enum err {
    ERR_NONE = 0,
#define X(name, status, meaning) name = status,
    ERR_LIST(X)
#undef X
};

#define ERR_MESSAGE_MAX 1024

/* An error on its way from one thread to another. */
struct err_record {
    int code;
    char message[ERR_MESSAGE_MAX];
};

/* Keeps the message for this thread and returns `code`. Use FAIL. */
int err_raise(int code, const char *file, int line, const char *format, ...) __attribute__((format(printf, 4, 5)));
/* Adds one line to this thread's trace. Use TRY. */
void err_trace(const char *file, int line, const char *call);
/* This thread's message, "" when there is none. Valid until the next failure in this thread. */
const char *err_message(void);
/* This thread's trace, innermost first, a line each; "" when there is none. */
const char *err_trace_text(void);
/* Forgets this thread's message and trace. */
void err_clear(void);
/* Copies this thread's message into `record`, with the code given, and clears it here. */
void err_take(struct err_record *record, int code);
/* Makes `record` this thread's error and returns its code (0 when it holds none). */
int err_give(const struct err_record *record);
/* Marks this thread's error as known to all ranks (comm_agree does), until the next err_raise. */
void err_share(void);
/* True when the other ranks fail with this error too, so that ending them is not needed. */
bool err_shared(void);
/* "ERR_DATA" for 4, and so on; "?" for an unknown code. */
const char *err_name(int code);
/* Leaves the exit status in the file that TATARA_STATUS_FILE names, if it does: what a launcher makes of a rank's status
 * differs, so the job scripts read it there. The first process that ends leaves its own; later ones change nothing. */
void err_leave_status(int code);

/* Ends the process with a message: only for bugs, never for bad input. Use ASSERT. */
void err_assert_failed(const char *file, int line, const char *what) __attribute__((noreturn));

/* Fails with a message for the person. */
#define FAIL(code, ...) return err_raise((code), __FILE__, __LINE__, __VA_ARGS__)

/* The same in a function that owns something: sets `rc` and jumps to `label`. */
#define FAIL_GOTO(label, code, ...)                              \
    do {                                                         \
        rc = err_raise((code), __FILE__, __LINE__, __VA_ARGS__); \
        goto label;                                              \
    } while (0)

/* Returns from the caller when `call` fails. */
#define TRY(call)                                 \
    do {                                          \
        const int try_rc_ = (call);               \
        if (try_rc_ != 0) {                       \
            err_trace(__FILE__, __LINE__, #call); \
            return try_rc_;                       \
        }                                         \
    } while (0)

/* Sets the caller's `int rc` and jumps to `label` when `call` fails. */
#define TRY_GOTO(call, label)                     \
    do {                                          \
        rc = (call);                              \
        if (rc != 0) {                            \
            err_trace(__FILE__, __LINE__, #call); \
            goto label;                           \
        }                                         \
    } while (0)

/* Checks for bugs; stays in release builds. */
#define ASSERT(condition)                                                    \
    do {                                                                     \
        if (!(condition)) err_assert_failed(__FILE__, __LINE__, #condition); \
    } while (0)

#endif
