/* Which device a rank computes on. */
#include "device.h"

#include "err.h"
#include "log.h"
#include "ops.h"

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
