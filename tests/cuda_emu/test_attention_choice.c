/* The choice of attention (kernels/cuda/attention_choice.cu), with a library that stands in for cuDNN: here it computes by
 * our own kernels, a sequence at a time, and then does what a test wants of it. */
#include "../../kernels/cuda/attention_library.h"
#include "err.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

enum {
    SEQUENCES = 2,
    SEQ_LEN = 40,
    HEADS = 4,
    KV_HEADS = 2,
    HEAD_DIM = 64,
    WIDTH = (HEADS + 2 * KV_HEADS) * HEAD_DIM
};

enum manner { FAST, SLOW, WRONG_OUTPUT, WRONG_GRADIENT, UNSTABLE, REFUSES, GREEDY };

#define MIB ((size_t)1 << 20)
#define LEAST_BYTES (64 * MIB)         /* of the workspace, whatever computes attention */
#define BOUND_BYTES (100 * MIB)        /* of what the library says that it may ask for */
#define WORKSPACE_BYTES (1 << 10)      /* that it asks for */
#define GREEDY_BYTES (2 * BOUND_BYTES) /* that it asks for when it is greedy */

struct library {
    struct device *dev;
    enum manner manner;
    int open, forwards, backwards;
};

static struct library library;
static const struct attention_case usual = {DT_BF16, SEQUENCES, SEQ_LEN, HEADS, KV_HEADS, HEAD_DIM, false};

static void must(int rc)
{
    if (rc != 0) fail_msg("%s\n%s", err_message(), err_trace_text());
}

static int library_open(struct device *dev, const struct attention_case *c, void **plans)
{
    *plans = NULL;
    assert_int_equal(c->seq_len, SEQ_LEN);
    if (library.manner == REFUSES) FAIL(ERR_UNSUPPORTED, "the stand-in refuses");
    library.dev = dev;
    library.open++;
    *plans = &library;
    return 0;
}

static void library_close(void *plans)
{
    if (plans) library.open--;
}

static size_t library_workspace_bound(const struct attention_case *c)
{
    return c->seq_len == SEQ_LEN ? BOUND_BYTES : c->seq_len == 1 ? 1 : 0;
}

static size_t library_workspace_bytes(const void *plans)
{
    assert_ptr_equal(plans, &library);
    return library.manner == GREEDY ? GREEDY_BYTES : WORKSPACE_BYTES;
}

/* Leaves its traces in the workspace, which must lie within the device's. */
static int use_workspace(void *workspace)
{
    struct device *dev = library.dev;
    const ptrdiff_t at = (char *)workspace - (char *)dev->workspace;
    assert_in_range(at, 0, dev->workspace_bytes - WORKSPACE_BYTES);
    return dev->table->fill(dev, tensor_1d(workspace, DT_F32, WORKSPACE_BYTES / 4), 1);
}

static struct tensor part(struct tensor t, int sequence)
{
    return tensor_rows(t, sequence * (t.shape[0] / SEQUENCES), t.shape[0] / SEQUENCES);
}

/* A call of one sequence is none of the shape that was chosen for, so it goes to our own kernels. When FAST, results that
 * are there already are left as they are. */
static int library_fwd(void *plans, void *workspace, struct tensor o, struct tensor lse, struct tensor qkv)
{
    struct device *dev = library.dev;
    assert_ptr_equal(plans, &library);
    TRY(use_workspace(workspace));
    const int times = library.manner == SLOW ? 4 : library.manner == FAST && library.forwards > 0 ? 0 : 1;
    library.forwards++;
    for (int i = 0; i < times * SEQUENCES; i++) {
        const int s = i % SEQUENCES;
        TRY(dev->table->attention_fwd(dev, part(o, s), part(lse, s), part(qkv, s), TENSOR_NONE, SEQ_LEN, HEADS,
                                      KV_HEADS));
    }
    return library.manner == WRONG_OUTPUT ? dev->table->fill(dev, tensor_rows(o, 7, 1), 0.25) : 0;
}

static int library_bwd(void *plans, void *workspace, struct tensor dqkv, struct tensor dout, struct tensor o,
                       struct tensor lse, struct tensor delta, struct tensor qkv)
{
    struct device *dev = library.dev;
    assert_ptr_equal(plans, &library);
    TRY(use_workspace(workspace));
    const int times = library.manner == SLOW ? 4 : library.manner == FAST && library.backwards > 0 ? 0 : 1;
    library.backwards++;
    for (int i = 0; i < times * SEQUENCES; i++) {
        const int s = i % SEQUENCES;
        TRY(dev->table->attention_bwd(dev, part(dqkv, s), part(dout, s), part(o, s), part(lse, s), part(delta, s),
                                      part(qkv, s), TENSOR_NONE, SEQ_LEN, HEADS, KV_HEADS));
    }
    if (library.manner == WRONG_GRADIENT) return dev->table->fill(dev, tensor_rows(dqkv, 3, 1), 0);
    if (library.manner == UNSTABLE) /* within the bound of bf16, yet never the same */
        return dev->table->fill(dev, tensor_range(dqkv, 5, 1), library.backwards * 1e-4);
    return 0;
}

static size_t library_version(void)
{
    return 1;
}

const struct attention_library *attention_cudnn(void)
{
    static const struct attention_library table = {.name = "stand-in",
                                                   .version = library_version,
                                                   .open = library_open,
                                                   .close = library_close,
                                                   .workspace_bound = library_workspace_bound,
                                                   .workspace_bytes = library_workspace_bytes,
                                                   .fwd = library_fwd,
                                                   .bwd = library_bwd};
    return &table;
}

/* Asks for `choice` with a library of that manner; what was chosen, and why. */
static enum attention_choice choose(struct device *dev, enum manner manner, enum attention_choice choice,
                                    const struct attention_case *c, char why[512])
{
    library = (struct library){.manner = manner, .open = library.open};
    must(dev->table->choose_attention(dev, c, &choice, why, 512));
    return choice;
}

static void test_auto(void **state)
{
    static const struct {
        enum manner manner;
        enum attention_choice choice;
        const char *why;
    } rows[] = {{FAST, ATTENTION_CUDNN, "cudnn: "},
                {SLOW, ATTENTION_FLASH, "flash: "},
                {WRONG_OUTPUT, ATTENTION_FLASH, "another output"},
                {WRONG_GRADIENT, ATTENTION_FLASH, "another gradient"},
                {UNSTABLE, ATTENTION_FLASH, "does not repeat"},
                {REFUSES, ATTENTION_FLASH, "the stand-in refuses"},
                {GREEDY, ATTENTION_FLASH, "a workspace of 200.0 MiB, and the planned one has 100.0 MiB"}};
    struct device *dev = *state;
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        char why[512] = "";
        assert_int_equal(choose(dev, rows[i].manner, ATTENTION_AUTO, &usual, why), rows[i].choice);
        if (!strstr(why, rows[i].why)) fail_msg("expected \"%s\" in: %s", rows[i].why, why);
        assert_int_equal(library.open, rows[i].choice == ATTENTION_CUDNN);
    }
}

/* What is asked for by name is taken, slow or not; but a wrong result never is. */
static void test_named(void **state)
{
    char why[512] = "";
    struct device *dev = *state;
    assert_int_equal(choose(dev, FAST, ATTENTION_FLASH, &usual, why), ATTENTION_FLASH);
    assert_int_equal(library.open + library.forwards, 0);
    assert_int_equal(choose(dev, SLOW, ATTENTION_CUDNN, &usual, why), ATTENTION_CUDNN);
    library.manner = WRONG_OUTPUT;
    enum attention_choice choice = ATTENTION_CUDNN;
    assert_int_equal(dev->table->choose_attention(dev, &usual, &choice, why, sizeof why), ERR_UNSUPPORTED);
    assert_non_null(strstr(err_message(), "another output"));
    err_clear();
    assert_int_equal(library.open, 0);
}

/* With nobody to fall back on, more than was planned is an error that says what to do. */
static void test_named_and_greedy(void **state)
{
    char why[512] = "";
    struct device *dev = *state;
    enum attention_choice choice = ATTENTION_CUDNN;
    library = (struct library){.manner = GREEDY};
    assert_int_equal(dev->table->choose_attention(dev, &usual, &choice, why, sizeof why), ERR_UNSUPPORTED);
    assert_non_null(strstr(err_message(), "200.0 MiB"));
    assert_non_null(strstr(err_message(), "100.0 MiB; use attention=flash"));
    err_clear();
    assert_int_equal(library.open + library.forwards, 0);
}

/* The workspace holds what the library may ask for, where it may be chosen; `tatara plan` asks without opening a GPU. */
static void test_workspace_bytes(void **state)
{
    const struct device *dev = *state;
    struct device unopened = {.kind = DEVICE_CUDA, .table = dev->table};
    struct attention_case modest = usual, refused = usual;
    modest.seq_len = 1;
    refused.seq_len = 2;
    for (int opened = 0; opened < 2; opened++) {
        struct device *const of = opened ? *state : &unopened;
        const size_t planned = dev->table->workspace_bytes(of, &usual, ATTENTION_AUTO);
        assert_in_range(planned, BOUND_BYTES, BOUND_BYTES + 4096);
        assert_int_equal(dev->table->workspace_bytes(of, &usual, ATTENTION_CUDNN), planned);
        assert_int_equal(dev->table->workspace_bytes(of, &usual, ATTENTION_FLASH), LEAST_BYTES);
        assert_int_equal(dev->table->workspace_bytes(of, NULL, ATTENTION_AUTO), LEAST_BYTES);
        assert_int_equal(dev->table->workspace_bytes(of, &modest, ATTENTION_AUTO), LEAST_BYTES);
        assert_int_equal(dev->table->workspace_bytes(of, &refused, ATTENTION_AUTO), LEAST_BYTES);
    }
    assert_string_equal(err_message(), "");
}

static void test_refused_cases(void **state)
{
    struct device *dev = *state;
    struct attention_case cases[3] = {usual, usual, usual};
    static const char *const why_not[3] = {"document mask", "bf16 only", "64 and 128"};
    cases[0].document_mask = true;
    cases[1].act = DT_F32;
    cases[2].head_dim = 32;
    for (int i = 0; i < 3; i++) {
        char why[512] = "";
        enum attention_choice choice = ATTENTION_CUDNN;
        assert_int_equal(choose(dev, FAST, ATTENTION_AUTO, &cases[i], why), ATTENTION_FLASH);
        assert_non_null(strstr(why, why_not[i]));
        assert_int_equal(dev->table->workspace_bytes(dev, &cases[i], ATTENTION_AUTO), LEAST_BYTES);
        assert_int_equal(dev->table->choose_attention(dev, &cases[i], &choice, why, sizeof why), ERR_UNSUPPORTED);
        assert_non_null(strstr(err_message(), why_not[i]));
        err_clear();
    }
}

/* Once chosen, the library gets calls of its shape, and no others. */
static void test_dispatch(void **state)
{
    char why[512];
    void *data = NULL;
    struct device *dev = *state;
    const size_t bytes = (size_t)1 << 20;
    assert_int_equal(choose(dev, SLOW, ATTENTION_CUDNN, &usual, why), ATTENTION_CUDNN);
    must(dev->table->alloc(dev, bytes, &data));
    const struct tensor qkv = tensor_2d(data, DT_BF16, SEQUENCES * SEQ_LEN, WIDTH);
    const struct tensor o =
        tensor_2d((char *)data + tensor_bytes(qkv), DT_BF16, SEQUENCES * SEQ_LEN, HEADS * HEAD_DIM);
    struct tensor lse = tensor_3d((char *)o.data + tensor_bytes(o), DT_F32, SEQUENCES, HEADS, SEQ_LEN);
    const int before = library.forwards;
    must(op_attention_fwd(dev, o, lse, qkv, TENSOR_NONE, SEQ_LEN, HEADS, KV_HEADS));
    assert_int_equal(library.forwards, before + 1);
    lse.shape[0] = 1;
    must(op_attention_fwd(dev, tensor_rows(o, 0, SEQ_LEN), lse, tensor_rows(qkv, 0, SEQ_LEN), TENSOR_NONE, SEQ_LEN,
                          HEADS, KV_HEADS));
    assert_int_equal(library.forwards, before + 1);
    must(dev->table->sync(dev));
    dev->table->free(dev, data, bytes);
}

int main(void)
{
    struct device dev;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_prestate(test_auto, &dev),
        cmocka_unit_test_prestate(test_named, &dev),
        cmocka_unit_test_prestate(test_named_and_greedy, &dev),
        cmocka_unit_test_prestate(test_workspace_bytes, &dev),
        cmocka_unit_test_prestate(test_refused_cases, &dev),
        cmocka_unit_test_prestate(test_dispatch, &dev),
    };
    if (device_open(&dev, DEVICE_CUDA, 0, 1) != 0) return 1;
    dev.workspace_bytes = dev.table->workspace_bytes(&dev, &usual, ATTENTION_AUTO);
    if (dev.table->alloc(&dev, dev.workspace_bytes, &dev.workspace) != 0) return 1;
    const int failed = cmocka_run_group_tests(tests, NULL, NULL);
    dev.table->free(&dev, dev.workspace, dev.workspace_bytes);
    device_close(&dev);
    return failed != 0 || library.open != 0;
}
