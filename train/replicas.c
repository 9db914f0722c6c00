/* Checks that what ranks hold in common is the same on all of them: by checksums, of which the majority is right. */
#include "replicas.h"

#include "err.h"

#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#define BUFFER_BYTES ((size_t)16 << 20)

/* XXH3 of a tensor. */
static int hash_tensor(struct device *dev, struct tensor t, void *buffer, XXH3_state_t *state, uint64_t *hash)
{
    const size_t bytes = tensor_bytes(t);
    XXH3_64bits_reset(state);
    for (size_t at = 0; at < bytes; at += BUFFER_BYTES) {
        const size_t n = bytes - at < BUFFER_BYTES ? bytes - at : BUFFER_BYTES;
        TRY(dev->table->download(dev, buffer, (const char *)t.data + at, n));
        XXH3_64bits_update(state, buffer, n);
    }
    *hash = XXH3_64bits_digest(state);
    return 0;
}

/* hash[i] of parameter i; hash[n] is the number of steps. */
static int hash_all(struct step *step, int64_t steps, uint64_t *hash)
{
    int rc = 0;
    const struct params *p = &step->params;
    void *buffer = malloc(BUFFER_BYTES);
    XXH3_state_t *state = XXH3_createState();
    if (!buffer || !state) FAIL_GOTO(done, ERR_SYSTEM, "no memory for comparing the ranks' weights");
    for (int i = 0; i < p->n; i++) {
        const struct param *param = &p->param[i];
        const struct tensor t = tensor_range(step->model.unit[param->unit], param->offset, param->elems);
        TRY_GOTO(zero_need(&step->zero, param->unit), done);
        TRY_GOTO(hash_tensor(step->model.dev, t, buffer, state, &hash[i]), done);
    }
    hash[p->n] = (uint64_t)steps;
done:
    XXH3_freeState(state);
    free(buffer);
    return rc;
}

/* The rank whose value most others do not share, from those of all ranks; −1 when all are equal. */
static int odd_one(const uint64_t *all, int ranks, int stride, int at)
{
    int odd = -1, fewest = ranks;
    for (int r = 0; r < ranks; r++) {
        int like = 0;
        for (int other = 0; other < ranks; other++)
            like += all[other * stride + at] == all[r * stride + at];
        if (like >= fewest) continue;
        fewest = like;
        odd = r;
    }
    return odd;
}

/* On rank 0. */
static int compare(const struct step *step, int64_t steps, const uint64_t *all)
{
    const struct params *p = &step->params;
    for (int i = 0; i <= p->n; i++) {
        const int rank = odd_one(all, step->comm->ranks, p->n + 1, i);
        if (rank < 0) continue;
        FAIL(ERR_NUMERIC,
             "after step %lld rank %d holds another %s than %s: memory, a GPU or the network corrupts data there. "
             "Take "
             "that node out; the same command resumes from the last checkpoint, which may be damaged too if it is "
             "younger than run.check_replicas_every",
             (long long)steps, rank, i < p->n ? p->param[i].name : "number of steps",
             step->comm->ranks > 2 ? "the other ranks" : "the other rank (or the other is wrong)");
    }
    return 0;
}

int replicas_check(struct step *step, int64_t steps)
{
    int rc = 0;
    struct comm *comm = step->comm;
    const size_t n = (size_t)step->params.n + 1;
    if (comm->ranks == 1) return 0;
    uint64_t *hash = calloc(n, sizeof *hash), *all = calloc(n * (size_t)comm->ranks, sizeof *all);
    if (!hash || !all) rc = err_raise(ERR_SYSTEM, __FILE__, __LINE__, "no memory for comparing the ranks' weights");
    ASSERT(rc != 0 || (hash && all));
    if (rc == 0) rc = comm_finish(comm);
    if (rc == 0) rc = hash_all(step, steps, hash);
    TRY_GOTO(comm_agree(comm, rc), done);
    TRY_GOTO(comm_gather(comm, hash, all, n * sizeof *hash), done);
    TRY_GOTO(comm_agree(comm, comm->rank == 0 ? compare(step, steps, all) : 0), done);
done:
    free(hash);
    free(all);
    return rc;
}
