/* Which device a rank computes on, and with how many threads. */
#include "device.h"

#include "err.h"
#include "log.h"
#include "ops.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

/* Opens the GPU of this rank: the local-rank'th of those that the launcher lets it see. */
static int open_gpu(struct device *dev, const struct comm *comm, int threads)
{
    const int devices = cuda_backend() ? cuda_backend()->count() : 0;
    return device_open(dev, DEVICE_CUDA, devices > 0 ? comm->local_rank % devices : 0, threads);
}

/* Opens a GPU on all ranks or, saying why, a CPU on all. */
static int open_auto(struct device *dev, struct comm *comm, int threads)
{
    if (!cuda_backend()) return device_open(dev, DEVICE_CPU, 0, threads);
    const int rc = open_gpu(dev, comm, threads);
    int64_t failed = rc != 0;
    TRY(comm_max_i64(comm, &failed, 1));
    if (!failed) return 0;
    if (rc != 0) log_info("device: auto takes the CPU: %s", err_message());
    if (rc == 0) device_close(dev);
    err_clear();
    return device_open(dev, DEVICE_CPU, 0, threads);
}

int device_choose(struct device *dev, enum device_choice choice, int threads, struct comm *comm)
{
    switch (choice) {
    case CHOOSE_CUDA:
        return open_gpu(dev, comm, threads);
    case CHOOSE_CPU:
        return device_open(dev, DEVICE_CPU, 0, threads);
    case CHOOSE_AUTO:
    default:
        return open_auto(dev, comm, threads);
    }
}

/* The number of threads, where it comes from, and what of the machine stays unused. */
static void say_threads(const struct device *dev, const struct config *cfg, const struct comm *comm)
{
    char quota[400] = "", idle[300] = "";
    const int fair = comm->node_cores > comm->local_ranks ? comm->node_cores / comm->local_ranks : 1;
    const char *from = cfg->run.threads > 0        ? ", as run.threads says"
                       : getenv("OMP_NUM_THREADS") ? ", as OMP_NUM_THREADS says (run.threads overrides it)"
                                                   : "";
    if (comm->limits.cpus > 0)
        snprintf(quota, sizeof quota, ", and of the %.3g CPUs that the quota of %s leaves it", comm->limits.cpus,
                 comm->limits.cpus_of);
    if (comm->idle_cores > 0 && (comm->limits.cpus == 0 || comm->limits.cpus > comm->allowed_cores))
        snprintf(
            idle, sizeof idle,
            "; %d of this node's %d cores stay idle, for the ranks are bound to the others: `mpirun --bind-to none`, "
            "or `--map-by slot:PE=%d` (srun: --cpus-per-task=%d), would use them",
            comm->idle_cores, comm->node_cores, fair, fair);
    log_info("threads: %d a rank%s, of the %d core%s that this rank may use%s%s", dev->threads, from,
             comm->allowed_cores, comm->allowed_cores == 1 ? "" : "s", quota, idle);
}

/* Ranks and threads that gain nothing. */
static void warn_of_waste(const struct device *dev, const struct config *cfg, const struct comm *comm)
{
    const int64_t micro_batches = cfg->batch.global / cfg->batch.micro;
    const double cpus = comm->limits.cpus;
    if (comm->ranks > micro_batches) {
        log_warn("%lld of the %d ranks have nothing to do: a step has %lld micro-batch%s (batch.global / batch.micro "
                 "= %lld "
                 "/ %lld); start %lld rank%s, or lower batch.micro",
                 (long long)(comm->ranks - micro_batches), comm->ranks, (long long)micro_batches,
                 micro_batches == 1 ? "" : "es", (long long)cfg->batch.global, (long long)cfg->batch.micro,
                 (long long)micro_batches, micro_batches == 1 ? "" : "s");
    }
    if (dev->kind != DEVICE_CPU) return;
    if (comm->local_ranks > 1 && comm->core_share < 1 - 1e-6) {
        const int enough = (int)(comm->core_share * comm->local_ranks + 1e-6);
        log_warn(
            "%d ranks of this node share %.3g core%s and take turns, a step as slow as the last of them; start %d",
            comm->local_ranks, comm->core_share * comm->local_ranks,
            comm->core_share * comm->local_ranks > 1 ? "s" : "", enough > 1 ? enough : 1);
    }
    if (cpus > 0 && dev->threads > ceil(cpus - 1e-6)) {
        log_warn("%s is %d, but the processor quota of %s leaves a rank %.3g CPUs: more threads only wait for "
                 "each other; lower it to %.0f, or raise the quota",
                 cfg->run.threads > 0 ? "run.threads" : "OMP_NUM_THREADS", dev->threads, comm->limits.cpus_of, cpus,
                 ceil(cpus - 1e-6));
    }
}

int device_start(struct device *dev, const struct config *cfg, struct comm *comm)
{
    char text[256];
    const int threads = cfg->run.threads > 0 ? (int)cfg->run.threads : comm->threads;
    TRY(device_choose(dev, (enum device_choice)cfg->top.device, threads, comm));
    TRY(device_choose_product(dev, (enum product_choice)cfg->precision.product));
    device_describe(dev, text, sizeof text);
    log_info("device: %s a rank, %d rank%s, %d on this node%s", text, comm->ranks, comm->ranks == 1 ? "" : "s",
             comm->local_ranks,
             cfg->top.device == CHOOSE_AUTO && !cuda_backend() ? " (auto: this build has no CUDA backend)" : "");
    if (dev->kind == DEVICE_CPU) say_threads(dev, cfg, comm);
    if (comm->limits.memory_bytes > 0)
        log_info("memory: %.0f MiB are left to a rank by %s, which is %.0f MiB",
                 (double)comm->limits.memory_bytes / (1 << 20), comm->limits.memory_of,
                 (double)comm->limits.memory_limit_bytes / (1 << 20));
    if (comm->rank == 0) warn_of_waste(dev, cfg, comm);
    return 0;
}
