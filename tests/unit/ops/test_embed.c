/* embed_fwd and embed_bwd: the embeddings of tokens and, when wpe is given, of positions. */
#include "op_test.h"

enum { VOCAB = 11, POSITIONS = 9 };

struct embed {
    struct op_tensor y, tok, pos, wte, wpe, dy, dwte, dwpe;
};

static struct embed make_embed(struct op_test *test, enum dtype dtype, int64_t rows, int64_t width, bool positions)
{
    struct embed e = {
        .y = op_values(test, tensor_2d(NULL, dtype, rows, width), NULL),
        .tok = op_random(test, tensor_1d(NULL, DT_I32, rows), 0, VOCAB),
        .wte = op_random(test, tensor_2d(NULL, dtype, VOCAB, width), -1, 1),
        .dy = op_random(test, tensor_2d(NULL, dtype, rows, width), -1, 1),
        .dwte = op_random(test, tensor_2d(NULL, DT_F32, VOCAB, width), -1, 1),
    };
    if (positions) {
        e.pos = op_random(test, tensor_1d(NULL, DT_I32, rows), 0, POSITIONS);
        e.wpe = op_random(test, tensor_2d(NULL, dtype, POSITIONS, width), -1, 1);
        e.dwpe = op_random(test, tensor_2d(NULL, DT_F32, POSITIONS, width), -1, 1);
    }
    return e;
}

static int run_fwd(struct device *dev, const void *ctx)
{
    const struct embed *e = ctx;
    return op_embed_fwd(dev, e->y.t, e->tok.t, e->pos.t, e->wte.t, e->wpe.t);
}

static int run_bwd(struct device *dev, const void *ctx)
{
    const struct embed *e = ctx;
    return op_embed_bwd(dev, e->dwte.t, e->dwpe.t, e->dy.t, e->tok.t, e->pos.t);
}

static void check_fwd(struct op_test *test, const struct embed *e)
{
    const int64_t width = e->y.t.shape[1];
    op_run_on_threads(test, "embed_fwd", run_fwd, e, &e->y.t, 1);
    for (int64_t i = 0; i < tensor_elems(e->y.t); i++) {
        const int64_t row = i / width, column = i % width;
        e->y.v[i] = e->wte.v[(int64_t)e->tok.v[row] * width + column];
        if (e->wpe.v) e->y.v[i] += e->wpe.v[(int64_t)e->pos.v[row] * width + column];
    }
    op_expect(test, "embed_fwd: y", e->y.t, e->y.v, op_bound(e->y.t.dtype));
}

static void check_bwd(struct op_test *test, const struct embed *e)
{
    const int64_t width = e->dy.t.shape[1];
    const struct tensor outputs[] = {e->dwte.t, e->dwpe.t};
    op_run_on_threads(test, "embed_bwd", run_bwd, e, outputs, e->wpe.v ? 2 : 1);
    for (int64_t i = 0; i < tensor_elems(e->dy.t); i++) {
        const int64_t row = i / width, column = i % width;
        e->dwte.v[(int64_t)e->tok.v[row] * width + column] += e->dy.v[i];
        if (e->dwpe.v) e->dwpe.v[(int64_t)e->pos.v[row] * width + column] += e->dy.v[i];
    }
    op_expect(test, "embed_bwd: dwte", e->dwte.t, e->dwte.v, op_bound(DT_F32));
    if (e->dwpe.v) op_expect(test, "embed_bwd: dwpe", e->dwpe.t, e->dwpe.v, op_bound(DT_F32));
}

static void over_shapes(struct device *dev, void (*check)(struct op_test *test, const struct embed *e))
{
    const int64_t shapes[][2] = {{0, 5}, {1, 1}, {7, 5}, {70, 65}, {9, 72}, {3, 1030}, {4100, 3}};
    for (int k = 0; k < OP_ACT_TYPES; k++) {
        for (size_t s = 0; s < 2 * (sizeof shapes / sizeof shapes[0]); s++) {
            struct op_test test = op_test_begin(dev, 10 + s);
            const struct embed e = make_embed(&test, op_act_types[k], shapes[s / 2][0], shapes[s / 2][1], s % 2 != 0);
            check(&test, &e);
            op_test_end(&test);
        }
    }
}

void test_op_embed_fwd(struct device *dev)
{
    over_shapes(dev, check_fwd);

    struct op_test test = op_test_begin(dev, 11);
    struct embed e = make_embed(&test, DT_F32, 2, 5, true);
    const double outside[] = {-7, VOCAB + 100};
    e.tok = op_values(&test, e.tok.t, outside);
    e.pos = op_values(&test, e.pos.t, outside);
    op_ok(run_fwd(dev, &e)); /* a fault of the data, but nothing is read out of bounds (the sanitizers look) */
    op_ok(run_bwd(dev, &e));
    op_refused(op_embed_fwd(dev, e.y.t, tensor_range(e.tok.t, 0, 1), e.pos.t, e.wte.t, e.wpe.t), "embed_fwd: tok");
    op_refused(op_embed_fwd(dev, e.y.t, e.tok.t, TENSOR_NONE, e.wte.t, e.wpe.t), "embed_fwd: pos is absent");
    op_test_end(&test);
}

void test_op_embed_bwd(struct device *dev)
{
    over_shapes(dev, check_bwd);

    struct op_test test = op_test_begin(dev, 12);
    const struct embed e = make_embed(&test, DT_BF16, 2, 5, false);
    op_refused(op_embed_bwd(dev, e.wte.t, TENSOR_NONE, e.dy.t, e.tok.t, TENSOR_NONE), "embed_bwd: dwte is bf16");
    op_test_end(&test);
}
