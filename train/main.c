/* Subcommands, and the one place where an error reaches a person and becomes an exit status. */
#include "ckpt/ckpt.h"
#include "comm.h"
#include "data/prepare.h"
#include "data/show.h"
#include "err.h"
#include "log.h"
#include "run.h"
#include "signals.h"

#include <fcntl.h>
#include <hdf5.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static const struct command {
    const char *name;
    int (*run)(struct comm *comm, int argc, char **argv);
    bool parallel; /* runs on all ranks of mpirun; the others only on one */
    const char *help;
} commands[] = {
    {"prepare", prepare_command, true, "turn text into token shards"},
    {"init", init_command, false, "write a first configuration, fitted to shards, tokenizer and machine"},
    {"train", run_command, true, "train a model, or go on training it"},
    {"sample", sample_command, false, "continue prompts with a trained model"},
    {"plan", plan_command, false, "parameters and memory of a configuration, without running it"},
    {"data", data_command, false, "show: documents, tokens and sources of shards"},
    {"ckpt", ckpt_command, false, "ls, show, verify, diff: look at checkpoints"},
};

enum { COMMANDS = sizeof commands / sizeof *commands };

static void usage(void)
{
    printf("Tatara %s", run_version);
    puts(": trains language models on GPU and CPU clusters.\n"
         "\n"
         "usage: tatara COMMAND ...\n");
    for (int i = 0; i < COMMANDS; i++)
        printf("  %-9s %s\n", commands[i].name, commands[i].help);
    puts("\n`tatara COMMAND --help` says more. train and prepare run on several ranks under mpirun.\n"
         "Exit status:\n"
         "   0  success\n"
         "   1  ckpt diff: tensors differ");
#define X(name, status, meaning) printf("  %2d  %s\n", status, meaning);
    ERR_LIST(X)
#undef X
    puts("Launchers change it; with TATARA_STATUS_FILE=FILE the first rank that ends leaves it in FILE, too.");
}

static int dispatch(struct comm *comm, int argc, char **argv)
{
    for (int i = 0; i < COMMANDS && argc > 1; i++) {
        if (strcmp(argv[1], commands[i].name) != 0) continue;
        if (!commands[i].parallel && comm->ranks > 1) {
            return comm_agree(comm, err_raise(ERR_USAGE, __FILE__, __LINE__,
                                              "tatara %s runs on one rank; start it without mpirun", argv[1]));
        }
        return commands[i].run(comm, argc - 2, argv + 2);
    }
    if (argc > 1 && (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "help") == 0)) {
        if (comm->rank == 0) usage();
        return 0;
    }
    if (argc > 1 && strcmp(argv[1], "--version") == 0) {
        if (comm->rank == 0) printf("tatara %s\n", run_version);
        return 0;
    }
    return comm_agree(comm, err_raise(ERR_USAGE, __FILE__, __LINE__, "%s%s; see `tatara --help`",
                                      argc > 1 ? "no such command: " : "which command?", argc > 1 ? argv[1] : ""));
}

/* Where standard input, output or error is closed, the next file to be opened would take its place, and get what is printed. */
static void fill_standard_files(void)
{
    int fd = 0;
    while (fd >= 0 && fd <= STDERR_FILENO)
        fd = open("/dev/null", O_RDWR);
    if (fd >= 0) (void)close(fd);
}

int main(int argc, char **argv)
{
    struct comm comm = {.ranks = 1};
    fill_standard_files();
    /* After a close that failed on a full disk, HDF5's own clean-up at exit would crash; it must be told beforehand. */
    if (H5dont_atexit() < 0) return ERR_SYSTEM;
    /* Before MPI's start, which takes a while. */
    int rc = argc > 1 && strcmp(argv[1], "train") == 0 ? signal_open() : 0;
    if (rc == 0) rc = comm_open(&comm, &argc, &argv);
    static char help[] = "--help";
    for (int i = 1; i < 3 && i < argc; i++) /* the command, or its first word */
        if (strcmp(argv[i], "-h") == 0) argv[i] = help;
    if (rc == 0) {
        log_set_rank(comm.rank, comm.ranks);
        rc = dispatch(&comm, argc, argv);
    }
    if (rc != 0 && err_message()[0] != '\0') {
        log_error("%s", err_message());
        log_debug("%s at\n%s", err_name(rc), err_trace_text());
    }
    /* An error that the other ranks do not know of must end them too; one they agreed on ends all alike. */
    const bool alone = rc != 0 && comm.ranks > 1 && !err_shared();
    if (alone || comm.rank == 0) err_leave_status(rc);
    if (alone) comm_abort(&comm, rc);
    comm_close(&comm);
    return rc;
}
