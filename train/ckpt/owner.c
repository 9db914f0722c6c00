/* Who a run's folder belongs to.
 *
 * OWNER names the newest attempt of the run and says where its rank 0 lives. An attempt works in temporary folders that
 * carry its own name, and looks into OWNER after each step and before it lets a checkpoint appear: a job that goes on after
 * its successor has started can harm nothing, and soon ends.
 *
 * HEARTBEAT lies beside OWNER while the attempt lives: a thread of rank 0 touches it, and a clean end removes it. Ages are
 * told by the file system's own clock, which all nodes share. Who may take a folder over, in this order:
 *
 *   there is no OWNER, or no HEARTBEAT            the attempt before has ended
 *   the same job, or the same chain of jobs       it was an earlier attempt; the scheduler gave the job to this one
 *   rank 0's process is gone from this node       it was killed
 *   run.takeover                                  the user says so
 *   HEARTBEAT is not touched for SILENT_S         it was killed on another node: waited for, and said
 *   else                                          it is alive: refused, ERR_TAKEN */
#include "ckpt_internal.h"
#include "clock.h"
#include "fs.h"
#include "log.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define OWNER "OWNER"
#define HEARTBEAT "HEARTBEAT"
#define BEAT_S 2
#define SILENT_S 60.0
#define LOOK_S 0.25
#define FIELD_MAX 160
#define NO_JOB "none"

/* What OWNER says, a line each; `name` alone in files of older versions. */
struct owner {
    char name[CKPT_OWNER_MAX]; /* of the attempt */
    char job[FIELD_MAX];       /* the chain, or the batch system's job; NO_JOB without one */
    char place[FIELD_MAX];     /* host, boot and process namespace: where `process` means something */
    char process[FIELD_MAX];   /* id and start time */
    char host[FIELD_MAX];
    char since[FIELD_MAX];
};

#define OWNER_FIELDS(X) X(job) X(place) X(process) X(host) X(since)

/* ---- this attempt ---- */

/* The first line of a small file, without its end; "" when it cannot be read. */
static void first_line(const char *path, char text[FIELD_MAX])
{
    FILE *file = fopen(path, "r");
    if (!file || !fgets(text, FIELD_MAX, file)) text[0] = '\0';
    if (file) (void)fclose(file);
    text[strcspn(text, "\n")] = '\0';
}

/* "123 456789": the process and when it started, in the kernel's ticks since boot; "" when there is none of this id, or one
 * that has ended and that its parent has not seen to. */
static void describe_process(long pid, char text[FIELD_MAX])
{
    char path[FIELD_MAX], line[1024] = "";
    text[0] = '\0';
    snprintf(path, sizeof path, "/proc/%ld/stat", pid);
    FILE *file = fopen(path, "r");
    const bool read = file && fgets(line, sizeof line, file);
    if (file) (void)fclose(file);
    /* The name, in parentheses, may hold anything; the start time is the 20th field after it. */
    const char *at = read ? strrchr(line, ')') : NULL;
    if (at && at[1] == ' ' && (at[2] == 'Z' || at[2] == 'X')) return;
    for (int i = 0; at && i < 20; i++)
        at = strchr(at + 1, ' ');
    if (at) snprintf(text, FIELD_MAX, "%ld %llu", pid, strtoull(at, NULL, 10));
}

/* Text for one line of OWNER or for a file's name. */
static void make_plain(char *text, const char *allowed)
{
    for (char *c = text; *c; c++) {
        if (!isalnum((unsigned char)*c) && !strchr(allowed, *c)) *c = '_';
    }
}

static int describe_self(struct owner *self)
{
    static const char *const job_names[] = {"TATARA_CHAIN", "SLURM_JOB_ID", "PBS_JOBID", "PJM_JOBID", "JOB_ID"};
    const char *job = NULL, *restart = getenv("SLURM_RESTART_COUNT");
    char boot[FIELD_MAX], space[FIELD_MAX / 4] = "";
    uint64_t nonce = 0;
    struct tm utc;
    const time_t now = time(NULL);
    for (size_t i = 0; (!job || !job[0]) && i < sizeof job_names / sizeof *job_names; i++)
        job = getenv(job_names[i]);
    if (job && !job[0]) job = NULL;
    FILE *random = fopen("/dev/urandom", "rb");
    const size_t got = random ? fread(&nonce, sizeof nonce, 1, random) : 0;
    if (random) (void)fclose(random);
    if (got != 1) FAIL(ERR_SYSTEM, "/dev/urandom: no random number for this attempt's name");
    snprintf(self->name, sizeof self->name, "%.20s.%.8s-%016" PRIx64, job ? job : "local", restart ? restart : "0",
             nonce);
    make_plain(self->name, ".-");
    snprintf(self->job, sizeof self->job, "%s", job ? job : NO_JOB);
    make_plain(self->job, ".-[]");
    if (gethostname(self->host, sizeof self->host - 1) != 0) snprintf(self->host, sizeof self->host, "unknown");
    make_plain(self->host, ".-");
    first_line("/proc/sys/kernel/random/boot_id", boot);
    if (readlink("/proc/self/ns/pid", space, sizeof space - 1) < 0) space[0] = '\0';
    snprintf(self->place, sizeof self->place, "%.60s %.40s %.30s", self->host, boot, space);
    describe_process((long)getpid(), self->process);
    if (gmtime_r(&now, &utc)) (void)strftime(self->since, sizeof self->since, "%Y-%m-%dT%H:%M:%SZ", &utc);
    return 0;
}

/* ---- the files ---- */

static int read_owner(const char *run_dir, struct owner *owner)
{
    char path[CKPT_PATH_MAX];
    char *text = NULL;
    size_t bytes = 0;
    memset(owner, 0, sizeof *owner);
    TRY(ckpt_path(path, run_dir, OWNER));
    TRY(ckpt_file_read(path, &text, &bytes));
    snprintf(owner->name, sizeof owner->name, "%.*s", (int)strcspn(text, "\n"), text);
    for (const char *line = strchr(text, '\n'); line; line = strchr(line + 1, '\n')) {
#define X(field)                                                                                \
    if (strncmp(line + 1, #field " ", sizeof #field) == 0)                                      \
        snprintf(owner->field, FIELD_MAX, "%.*s", (int)strcspn(line + 1 + sizeof #field, "\n"), \
                 line + 1 + sizeof #field);
        OWNER_FIELDS(X)
#undef X
    }
    free(text);
    make_plain(owner->name, ".-");
    if (!owner->name[0]) snprintf(owner->name, sizeof owner->name, "unknown");
    return 0;
}

/* In one step: a reader sees the old owner or the new one. */
static int write_owner(const char *run_dir, const struct owner *owner)
{
    char path[CKPT_PATH_MAX], fresh[CKPT_PATH_MAX], text[8 * FIELD_MAX];
    TRY(ckpt_path(path, run_dir, OWNER));
    TRY(ckpt_path(fresh, run_dir, OWNER ".new"));
    int length = snprintf(text, sizeof text, "%s\n", owner->name);
#define X(field) length += snprintf(text + length, sizeof text - (size_t)length, #field " %s\n", owner->field);
    OWNER_FIELDS(X)
#undef X
    TRY(ckpt_file_write(fresh, text, (size_t)length));
    if (rename(fresh, path) != 0) FAIL(ERR_SYSTEM, "%s: cannot be replaced: %s", path, strerror(errno));
    return fs_sync_folder(run_dir);
}

int ckpt_check_owner(const struct ckpt_run *run)
{
    struct owner owner;
    if (read_owner(run->dir, &owner) != 0) {
        char why[ERR_MESSAGE_MAX / 2];
        snprintf(why, sizeof why, "%s", err_message());
        FAIL(ERR_SYSTEM, "%s. Was the run's folder removed or unmounted?", why);
    }
    if (strcmp(owner.name, run->owner) == 0) return 0;
    FAIL(ERR_TAKEN,
         "%s now belongs to a newer attempt of this run (%s%s%s, this one is %s): this one saves nothing more and "
         "ends",
         run->dir, owner.name, owner.host[0] ? " on " : "", owner.host, run->owner);
}

bool ckpt_run_taken(const struct ckpt_run *run)
{
    char path[CKPT_PATH_MAX + sizeof OWNER], name[FIELD_MAX];
    snprintf(path, sizeof path, "%s/" OWNER, run->dir);
    first_line(path, name);
    /* What cannot be read just now, may be read after the next step. */
    return name[0] && strcmp(name, run->owner) != 0;
}

/* ---- the heartbeat ---- */

/* A thread that touches HEARTBEAT until it is told to end. */
struct ckpt_heart {
    int fd;
    pthread_t thread;
    pthread_mutex_t mutex;
    pthread_cond_t ended;
    bool ending;
};

static void *beat(void *argument)
{
    struct ckpt_heart *heart = argument;
    (void)pthread_mutex_lock(&heart->mutex);
    while (!heart->ending) {
        struct timespec next;
        (void)futimens(heart->fd,
                       NULL); /* where that fails, it looks as if this attempt were dead: none can do more */
        (void)clock_gettime(CLOCK_REALTIME, &next);
        next.tv_sec += BEAT_S;
        (void)pthread_cond_timedwait(&heart->ended, &heart->mutex, &next);
    }
    (void)pthread_mutex_unlock(&heart->mutex);
    return NULL;
}

/* A new file under the name, so that the attempt before touches its own, which nobody sees. */
static int open_heartbeat(struct ckpt_heart *heart, const char *run_dir)
{
    char path[CKPT_PATH_MAX], fresh[CKPT_PATH_MAX];
    TRY(ckpt_path(path, run_dir, HEARTBEAT));
    TRY(ckpt_path(fresh, run_dir, HEARTBEAT ".new"));
    heart->fd = open(fresh, O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0666);
    if (heart->fd < 0) FAIL(ERR_SYSTEM, "%s: cannot be created: %s", fresh, strerror(errno));
    if (rename(fresh, path) != 0) FAIL(ERR_SYSTEM, "%s: cannot be replaced: %s", path, strerror(errno));
    return 0;
}

/* Signals are the main thread's. */
static int start_thread(struct ckpt_heart *heart)
{
    sigset_t all, before;
    (void)sigfillset(&all);
    (void)pthread_sigmask(SIG_SETMASK, &all, &before);
    const int error = pthread_create(&heart->thread, NULL, beat, heart);
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error != 0) FAIL(ERR_SYSTEM, "no thread for the run's heartbeat: %s", strerror(error));
    return 0;
}

static int open_heart(struct ckpt_run *run)
{
    int rc = 0;
    struct ckpt_heart *heart = calloc(1, sizeof *heart);
    if (!heart) FAIL(ERR_SYSTEM, "no memory for the run's heartbeat");
    heart->fd = -1;
    if (pthread_mutex_init(&heart->mutex, NULL) != 0 || pthread_cond_init(&heart->ended, NULL) != 0)
        FAIL_GOTO(done, ERR_SYSTEM, "no mutex for the run's heartbeat");
    TRY_GOTO(open_heartbeat(heart, run->dir), done);
    TRY_GOTO(start_thread(heart), done);
    run->heart = heart;
    heart = NULL;
done:
    if (heart && heart->fd >= 0) (void)close(heart->fd);
    free(heart);
    return rc;
}

void ckpt_close_run_dir(struct ckpt_run *run)
{
    char path[CKPT_PATH_MAX + sizeof HEARTBEAT];
    struct ckpt_heart *heart = run->heart;
    if (!heart) return;
    run->heart = NULL;
    (void)pthread_mutex_lock(&heart->mutex);
    heart->ending = true;
    (void)pthread_cond_signal(&heart->ended);
    (void)pthread_mutex_unlock(&heart->mutex);
    (void)pthread_join(heart->thread, NULL);
    (void)pthread_cond_destroy(&heart->ended);
    (void)pthread_mutex_destroy(&heart->mutex);
    (void)close(heart->fd);
    free(heart);
    snprintf(path, sizeof path, "%s/" HEARTBEAT, run->dir);
    if (!ckpt_run_taken(run)) (void)unlink(path); /* a successor's is not ours to remove */
}

/* ---- taking a folder over ---- */

/* Where the look at the attempt before stands. */
struct claim {
    const char *run_dir;
    struct owner before, self;
    struct timespec beat; /* when it was last touched */
    double age_s, seen_s; /* how old that was when it was first seen, and when that was; seen_s 0: not yet */
    const char *why;      /* it may be taken over; NULL: not known yet */
};

enum verdict { VERDICT_FREE, VERDICT_WAIT, VERDICT_ALIVE };

/* The file system's time, by a file that is touched for it. */
static int file_system_now(const char *run_dir, struct timespec *now)
{
    int rc = 0;
    char path[CKPT_PATH_MAX];
    struct stat info = {0};
    TRY(ckpt_path(path, run_dir, HEARTBEAT ".now"));
    const int fd = open(path, O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0666);
    if (fd < 0) FAIL(ERR_SYSTEM, "%s: cannot be created: %s", path, strerror(errno));
    if (futimens(fd, NULL) != 0 || fstat(fd, &info) != 0)
        rc = err_raise(ERR_SYSTEM, __FILE__, __LINE__, "%s: cannot be touched: %s", path, strerror(errno));
    (void)close(fd);
    (void)unlink(path);
    *now = info.st_mtim;
    return rc;
}

static double seconds_between(struct timespec from, struct timespec to)
{
    return (double)(to.tv_sec - from.tv_sec) + 1e-9 * (double)(to.tv_nsec - from.tv_nsec);
}

/* Whether its process was on this node and is there no more. */
static bool is_gone(const struct claim *claim)
{
    char process[FIELD_MAX];
    const struct owner *before = &claim->before;
    if (!before->place[0] || strcmp(before->place, claim->self.place) != 0) return false;
    describe_process(strtol(before->process, NULL, 10), process);
    return strcmp(process, before->process) != 0;
}

/* What needs no waiting for. */
static void decide_at_once(struct claim *claim, bool takeover)
{
    const struct owner *before = &claim->before, *self = &claim->self;
    if (before->job[0] && strcmp(before->job, NO_JOB) != 0 && strcmp(before->job, self->job) == 0) {
        claim->why = "an earlier attempt of this job";
    } else if (strcmp(self->process, before->process) == 0 && strcmp(self->place, before->place) == 0) {
        claim->why = "this process itself";
    } else if (takeover) {
        claim->why = "run.takeover says so";
    }
}

/* A look at the heartbeat. Rank 0. */
static int look(struct claim *claim, enum verdict *verdict)
{
    char path[CKPT_PATH_MAX];
    struct stat info;
    TRY(ckpt_path(path, claim->run_dir, HEARTBEAT));
    *verdict = VERDICT_FREE;
    if (stat(path, &info) != 0) {
        if (errno != ENOENT) FAIL(ERR_SYSTEM, "%s: cannot be looked at: %s", path, strerror(errno));
        claim->why = "it has ended";
        return 0;
    }
    if (is_gone(claim)) {
        claim->why = "its process is gone";
        return 0;
    }
    if (claim->seen_s == 0) {
        struct timespec now = {0};
        TRY(file_system_now(claim->run_dir, &now));
        claim->beat = info.st_mtim;
        claim->age_s = seconds_between(info.st_mtim, now);
        if (claim->age_s < 0) claim->age_s = 0; /* a clock was put back */
        claim->seen_s = now_s();
    }
    if (seconds_between(claim->beat, info.st_mtim) != 0) {
        *verdict = VERDICT_ALIVE;
    } else if (claim->age_s + (now_s() - claim->seen_s) < SILENT_S) {
        *verdict = VERDICT_WAIT;
    } else {
        claim->why = "no sign of life for a minute";
    }
    return 0;
}

/* The attempt, for a person. */
static void describe_attempt(const struct owner *owner, char *text, size_t bytes)
{
    const bool job = owner->job[0] && strcmp(owner->job, NO_JOB) != 0;
    snprintf(text, bytes, "attempt %s%s%s%s%s%s%.*s%s%s", owner->name, job ? ", job " : "", job ? owner->job : "",
             owner->host[0] ? ", rank 0 on " : "", owner->host, owner->process[0] ? " is process " : "",
             (int)strcspn(owner->process, " "), owner->process, owner->since[0] ? ", since " : "", owner->since);
}

/* Refuses while the attempt before lives. Collective: the ranks look together, so that none of them waits in vain. */
static int wait_for_verdict(struct comm *comm, struct claim *claim, struct ckpt_terms terms)
{
    char text[5 * FIELD_MAX] = "";
    enum verdict verdict = VERDICT_FREE;
    if (comm->rank == 0) describe_attempt(&claim->before, text, sizeof text);
    for (bool first = true;; first = false) {
        const int rc = comm->rank == 0 && claim->why == NULL ? look(claim, &verdict) : 0;
        TRY(comm_agree(comm, rc));
        TRY(comm_bcast(comm, &verdict, sizeof verdict, 0));
        if (verdict == VERDICT_FREE) break;
        if (verdict == VERDICT_ALIVE) {
            return comm_agree(
                comm, err_raise(ERR_TAKEN, __FILE__, __LINE__,
                                "%s belongs to a run that is alive (%s): stop that one first (touch %s/STOP), "
                                "choose another run.dir, or take it over with run.takeover=true",
                                claim->run_dir, text, claim->run_dir));
        }
        if (first && comm->rank == 0)
            log_info("run.dir: belongs to %s; looking for a sign of life, for a minute at most", text);
        int64_t stop = terms.stop_asked && terms.stop_asked();
        TRY(comm_max_i64(comm, &stop, 1));
        if (stop) {
            log_info("stopped on request before the run's folder was taken over");
            err_share();
            return ERR_STOPPED;
        }
        const struct timespec pause = {.tv_nsec = (long)(LOOK_S * 1e9)};
        (void)nanosleep(&pause, NULL);
    }
    if (comm->rank == 0) log_info("run.dir: taken over from %s: %s", text, claim->why);
    return 0;
}

/* Learns of the attempt before, if there is one, and whether it has left its heartbeat. Rank 0. */
static int open_claim(struct claim *claim, bool takeover, bool *owned)
{
    char owner[CKPT_PATH_MAX], heartbeat[CKPT_PATH_MAX];
    TRY(describe_self(&claim->self));
    TRY(ckpt_folder_make(claim->run_dir));
    TRY(ckpt_path(owner, claim->run_dir, OWNER));
    TRY(ckpt_path(heartbeat, claim->run_dir, HEARTBEAT));
    if (access(owner, F_OK) != 0) return 0;
    TRY(read_owner(claim->run_dir, &claim->before));
    *owned = access(heartbeat, F_OK) == 0;
    if (!*owned && !claim->before.place[0])
        log_warn("%s: taken over from %s, an attempt of an older version of the program, which does not tell whether "
                 "it is "
                 "still alive; if it is, it can save nothing more",
                 claim->run_dir, claim->before.name);
    if (*owned) decide_at_once(claim, takeover);
    return 0;
}

/* Rank 0. */
static int take_ownership(struct ckpt_run *run, const struct claim *claim)
{
    snprintf(run->owner, sizeof run->owner, "%s", claim->self.name);
    run->continued = claim->before.job[0] && strcmp(claim->before.job, NO_JOB) != 0 &&
                     strcmp(claim->before.job, claim->self.job) == 0;
    TRY(write_owner(run->dir, &claim->self));
    TRY(open_heart(run));
    return ckpt_remove_leftovers(run->dir);
}

/* Whether this rank sees what rank 0 wrote. */
static int check_shared(const struct comm *comm, const struct ckpt_run *run)
{
    struct owner owner;
    const int rc = read_owner(run->dir, &owner);
    if (rc == ERR_SYSTEM || (rc == 0 && strcmp(owner.name, run->owner) == 0)) return rc;
    FAIL(ERR_SYSTEM, "rank %d does not see %s as rank 0 does; set run.dir to a folder that all nodes share",
         comm->rank, run->dir);
}

int ckpt_open_run_dir(struct comm *comm, const char *run_dir, struct ckpt_terms terms, struct ckpt_run *run)
{
    int rc = 0;
    bool owned = false;
    struct claim claim = {.run_dir = run_dir};
    memset(run, 0, sizeof *run);
    const int length = snprintf(run->dir, sizeof run->dir, "%s", run_dir);
    if (length < 1 || length >= CKPT_PATH_MAX - 2 * (CKPT_OWNER_MAX + CKPT_FILE_MAX))
        rc = err_raise(ERR_CONFIG, __FILE__, __LINE__, "run.dir is empty or too long: '%.200s'", run_dir);
    if (rc == 0 && comm->rank == 0) rc = open_claim(&claim, terms.takeover, &owned);
    TRY(comm_agree(comm, rc));
    TRY(comm_bcast(comm, &owned, sizeof owned, 0));
    if (owned) TRY(wait_for_verdict(comm, &claim, terms));
    TRY(comm_agree(comm, comm->rank == 0 ? take_ownership(run, &claim) : 0));
    TRY(comm_bcast(comm, run->owner, sizeof run->owner, 0));
    TRY(comm_bcast(comm, &run->continued, sizeof run->continued, 0));
    return comm_agree(comm, check_shared(comm, run));
}
