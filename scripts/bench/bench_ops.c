/* Times the matmuls of a linear layer and attention on the CPU device, and prints GFLOP/s: the best of several calls.
 *
 *   bench_ops matmul [threads [tokens [in [out]]]]
 *   bench_ops attention [threads [sequences [seq_len [heads [kv_heads [head_dim]]]]]] */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "err.h"
#include "ops.h"

#define SECONDS 0.5 /* spent on each line */

/* One call to be timed. */
struct bench {
    struct device dev;
    struct tensor y, a, b, packed; /* matmul */
    unsigned flags;
    struct tensor qkv, o, lse, dqkv, dout, delta; /* attention */
    int seq_len, heads, kv_heads;
};

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Device memory for `shape`, filled with small numbers. */
static int make(struct device *dev, struct tensor shape, struct tensor *out)
{
    *out = shape;
    TRY(dev->table->alloc(dev, tensor_bytes(shape), &out->data));
    return op_fill(dev, *out, 0.125);
}

static void drop(struct device *dev, struct tensor t)
{
    if (t.data) dev->table->free(dev, t.data, tensor_bytes(t));
}

static int run_matmul(struct bench *b)
{
    return op_matmul(&b->dev, b->y, b->a, b->b, b->packed, TENSOR_NONE, b->flags);
}

static int run_pack(struct bench *b)
{
    return op_pack(&b->dev, b->packed, b->b, b->flags & MATMUL_TB);
}

static int run_attention_fwd(struct bench *b)
{
    return op_attention_fwd(&b->dev, b->o, b->lse, b->qkv, TENSOR_NONE, b->seq_len, b->heads, b->kv_heads);
}

static int run_attention_bwd(struct bench *b)
{
    return op_attention_bwd(&b->dev, b->dqkv, b->dout, b->o, b->lse, b->delta, b->qkv, TENSOR_NONE, b->seq_len,
                            b->heads, b->kv_heads);
}

static int time_call(struct bench *b, const char *what, int (*call)(struct bench *), double flop)
{
    double best = 1e30;
    for (const double begin = now_s(); now_s() - begin < SECONDS;) {
        const double from = now_s();
        TRY(call(b));
        const double took = now_s() - from;
        if (took < best) best = took;
    }
    printf("  %-34s %9.3f ms  %8.1f GFLOP/s\n", what, best * 1e3, flop / best * 1e-9);
    return 0;
}

/* y = x·Wᵀ, dx = dy·W and dW += dyᵀ·x, W with and without packing. */
static int bench_matmul(struct bench *b, enum dtype act, int64_t tokens, int64_t in, int64_t out)
{
    int rc = 0;
    const double flop = 2.0 * (double)tokens * (double)in * (double)out;
    struct tensor x = TENSOR_NONE, dy = TENSOR_NONE, w = TENSOR_NONE, dw = TENSOR_NONE, packed = TENSOR_NONE;
    printf("matmul %s, tokens %" PRId64 ", in %" PRId64 ", out %" PRId64 ", %d threads\n", dtype_name(act), tokens,
           in, out, b->dev.threads);
    TRY_GOTO(make(&b->dev, tensor_2d(NULL, act, tokens, in), &x), done);
    TRY_GOTO(make(&b->dev, tensor_2d(NULL, act, tokens, out), &dy), done);
    TRY_GOTO(make(&b->dev, tensor_2d(NULL, act, out, in), &w), done);
    TRY_GOTO(make(&b->dev, tensor_2d(NULL, DT_F32, out, in), &dw), done);
    for (int forward = 1; forward >= 0; forward--) {
        const unsigned flags = forward ? MATMUL_TB : 0;
        const size_t bytes = b->dev.table->pack_bytes(&b->dev, w, flags);
        TRY_GOTO(make(&b->dev, tensor_1d(NULL, act, (int64_t)(bytes / dtype_bytes(act))), &packed), done);
        b->flags = flags;
        b->y = flags ? dy : x;
        b->a = flags ? x : dy;
        b->b = w;
        b->packed = packed;
        TRY_GOTO(time_call(b, flags ? "pack W for y" : "pack W for dx", run_pack, 0), done);
        TRY_GOTO(time_call(b, flags ? "y = x W^T, packed" : "dx = dy W, packed", run_matmul, flop), done);
        b->packed = TENSOR_NONE;
        TRY_GOTO(time_call(b, flags ? "y = x W^T" : "dx = dy W", run_matmul, flop), done);
        drop(&b->dev, packed);
        packed = TENSOR_NONE;
    }
    b->flags = MATMUL_TA | MATMUL_ADD;
    b->y = dw;
    b->a = dy;
    b->b = x;
    TRY_GOTO(time_call(b, "dW += dy^T x", run_matmul, flop), done);
done:
    drop(&b->dev, x);
    drop(&b->dev, dy);
    drop(&b->dev, w);
    drop(&b->dev, dw);
    drop(&b->dev, packed);
    return rc;
}

/* FLOP are counted for the causal half: 4·S²/2·D a head forward, 2.5 times that backward. */
static int bench_attention(struct bench *b, enum dtype act, int64_t sequences, int64_t head_dim)
{
    int rc = 0;
    const int64_t tokens = sequences * b->seq_len, width = (b->heads + 2 * (int64_t)b->kv_heads) * head_dim;
    const double flop = 2.0 * (double)tokens * b->seq_len * b->heads * (double)head_dim;
    printf("attention %s, sequences %" PRId64 " of %d, heads %d/%d of %" PRId64 ", %d threads\n", dtype_name(act),
           sequences, b->seq_len, b->heads, b->kv_heads, head_dim, b->dev.threads);
    TRY_GOTO(make(&b->dev, tensor_2d(NULL, act, tokens, width), &b->qkv), done);
    TRY_GOTO(make(&b->dev, tensor_2d(NULL, act, tokens, width), &b->dqkv), done);
    TRY_GOTO(make(&b->dev, tensor_2d(NULL, act, tokens, b->heads * head_dim), &b->o), done);
    TRY_GOTO(make(&b->dev, tensor_2d(NULL, act, tokens, b->heads * head_dim), &b->dout), done);
    TRY_GOTO(make(&b->dev, tensor_3d(NULL, DT_F32, sequences, b->heads, b->seq_len), &b->lse), done);
    TRY_GOTO(make(&b->dev, tensor_3d(NULL, DT_F32, sequences, b->heads, b->seq_len), &b->delta), done);
    TRY_GOTO(time_call(b, "forward", run_attention_fwd, flop), done);
    TRY_GOTO(time_call(b, "backward", run_attention_bwd, 2.5 * flop), done);
done:
    drop(&b->dev, b->qkv);
    drop(&b->dev, b->dqkv);
    drop(&b->dev, b->o);
    drop(&b->dev, b->dout);
    drop(&b->dev, b->lse);
    drop(&b->dev, b->delta);
    return rc;
}

static int run(struct bench *b, bool attention, const int64_t arg[5])
{
    static const enum dtype types[] = {DT_BF16, DT_F32};
    for (int i = 0; i < 2; i++) {
        if (attention) {
            b->seq_len = (int)arg[1];
            b->heads = (int)arg[2];
            b->kv_heads = (int)arg[3];
            TRY(bench_attention(b, types[i], arg[0], arg[4]));
        } else {
            TRY(bench_matmul(b, types[i], arg[0], arg[1], arg[2]));
        }
    }
    return 0;
}

int main(int argc, char **argv)
{
    int rc = 0;
    struct bench b = {.flags = 0};
    const bool attention = argc > 1 && strcmp(argv[1], "attention") == 0;
    int64_t arg[5] = {2048, 1024, 1024, 0, 0};
    if (attention) memcpy(arg, (const int64_t[5]){4, 1024, 12, 4, 64}, sizeof arg);
    if (argc < 2 || (!attention && strcmp(argv[1], "matmul") != 0) || argc > 8) {
        fprintf(stderr, "usage: bench_ops matmul [threads [tokens [in [out]]]]\n"
                        "       bench_ops attention [threads [sequences [seq_len [heads [kv_heads [head_dim]]]]]]\n");
        return ERR_USAGE;
    }
    for (int i = 3; i < argc; i++)
        arg[i - 3] = strtoll(argv[i], NULL, 10);
    TRY_GOTO(device_open(&b.dev, DEVICE_CPU, 0, argc > 2 ? (int)strtol(argv[2], NULL, 10) : 1), done);
    b.dev.workspace_bytes = b.dev.table->workspace_bytes(&b.dev, NULL, ATTENTION_FLASH);
    TRY_GOTO(b.dev.table->alloc(&b.dev, b.dev.workspace_bytes, &b.dev.workspace), done);
    TRY_GOTO(run(&b, attention, arg), done);
done:
    if (rc) fprintf(stderr, "bench_ops: %s\n", err_message());
    if (b.dev.workspace) b.dev.table->free(&b.dev, b.dev.workspace, b.dev.workspace_bytes);
    device_close(&b.dev);
    return rc;
}
