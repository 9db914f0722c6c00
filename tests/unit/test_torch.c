/* Against PyTorch: loss, the gradient of every parameter and 20 AdamW steps of small Llama and GPT-2 models.
 *
 * tests/fixtures/make_fixtures.py has made the fixtures with PyTorch and says what lies in them. A rig is a model on
 * one device with the fixture's configuration and weights, on one rank and one thread: `test_torch` runs on the CPU,
 * `test_torch cuda` on a GPU. The error of a gradient is ||a - b|| / ||b|| over a parameter, b being PyTorch's. */
#include "err.h"
#include "optim.h"
#include "step.h"

#include <hdf5.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define BOUND_FP32 1e-5
#define BOUND_BF16 2e-2
#define BOUND_STEP_LOSS 1e-4
/* Sanitizers look at memory, which no later step uses in another way. */
#ifdef __SANITIZE_ADDRESS__
#define STEPS_MAX 3
#else
#define STEPS_MAX INT64_MAX
#endif

/* One test's case. */
struct row {
    const char *fixture;
    enum compute compute;
    enum recompute recompute;
    enum reduce reduce;
    enum device_kind device;
    struct comm *comm;
};

struct rig {
    hid_t file;
    struct config *cfg;
    struct device dev;
    struct arena arena;
    struct step step;
    int32_t *tok, *target, *start; /* [steps, micro-batches, sequences, seq_len] */
    int32_t *pos;                  /* [sequences, seq_len] */
    float **grad;                  /* by unit, as model_unit_done got them */
};

static void must(int rc)
{
    if (rc != 0) fail_msg("%s\n%s", err_message(), err_trace_text());
}

/* Reads a whole dataset of the fixture; elems (unless 0) is the size it must have. The caller frees. */
static void *fixture_read(hid_t file, const char *name, hid_t type, int64_t elems)
{
    const hid_t set = H5Dopen2(file, name, H5P_DEFAULT);
    if (set < 0) fail_msg("the fixture has no %s", name);
    const hid_t space = H5Dget_space(set);
    const int64_t found = (int64_t)H5Sget_simple_extent_npoints(space);
    if (elems != 0 && found != elems) fail_msg("%s has %lld elements", name, (long long)found);
    void *data = calloc((size_t)found + 1, H5Tget_size(type));
    assert_non_null(data);
    assert_true(H5Dread(set, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, data) >= 0);
    H5Sclose(space);
    H5Dclose(set);
    return data;
}

/* Element i of a parameter as make_fixtures.py's weight_at makes it: FNV-1a of the name, MurmurHash3's finaliser. */
static float weight_at(const struct param *param, int64_t i)
{
    uint32_t x = 2166136261U;
    for (const char *c = param->name; *c; c++)
        x = (x ^ (uint32_t)*c) * 16777619U;
    x += (uint32_t)i * 2654435769U;
    x = (x ^ (x >> 16)) * 0x85ebca6bU;
    x = (x ^ (x >> 13)) * 0xc2b2ae35U;
    x ^= x >> 16;
    const int k = (int)(x >> 24) - 128;
    if (param->init == INIT_ONE) return 1.0F + floorf((float)k / 4) / 128;
    return (float)k / (param->init == INIT_OUTPUT ? 4096 : 2048);
}

/* The whole unit, padding zero. The caller frees. */
static float *unit_weights(const struct params *params, int unit)
{
    float *out = calloc((size_t)params->unit[unit].elems, sizeof *out);
    assert_non_null(out);
    for (int k = 0; k < params->unit[unit].count; k++) {
        const struct param *param = &params->param[params->unit[unit].first + k];
        for (int64_t i = 0; i < param->elems; i++)
            out[param->offset + i] = weight_at(param, i);
    }
    return out;
}

/* Puts the fixture's weights into the model; every one is exact in bf16, so its upper half is its bf16. */
static void rig_set_weights(struct rig *rig)
{
    for (int u = 0; u < rig->step.params.n_units; u++) {
        const struct tensor to = rig->step.model.unit[u];
        float *from = unit_weights(&rig->step.params, u);
        if (to.dtype == DT_BF16) {
            for (int64_t i = 0; i < tensor_elems(to); i++) {
                uint32_t bits;
                memcpy(&bits, &from[i], sizeof bits);
                assert_int_equal(bits & 0xffff, 0);
                ((uint16_t *)from)[i] = (uint16_t)(bits >> 16);
            }
        }
        must(rig->dev.table->upload(&rig->dev, to.data, from, tensor_bytes(to)));
        free(from);
    }
    must(model_weights_changed(&rig->step.model));
}

static void rig_read(struct rig *rig, const struct row *row)
{
    char path[512];
    snprintf(path, sizeof path, "%s/fixtures/%s.h5", TESTS_DIR, row->fixture);
    *rig = (struct rig){.file = H5Fopen(path, H5F_ACC_RDONLY, H5P_DEFAULT), .cfg = calloc(1, sizeof *rig->cfg)};
    if (rig->file < 0) fail_msg("cannot open %s; tests/fixtures/make_fixtures.py makes it", path);
    assert_non_null(rig->cfg);
    char *yaml = fixture_read(rig->file, "config", H5T_NATIVE_CHAR, 0);
    must(config_parse(rig->cfg, path, yaml, strlen(yaml)));
    free(yaml);
    rig->cfg->precision.compute = (int)row->compute;
    rig->cfg->model.recompute = (int)row->recompute;
    rig->cfg->parallel.reduce = (int)row->reduce;
    const struct config *cfg = rig->cfg;
    const int64_t tokens = cfg->run.steps * cfg->batch.global * cfg->model.seq_len;
    rig->tok = fixture_read(rig->file, "tokens", H5T_NATIVE_INT32, tokens);
    rig->target = fixture_read(rig->file, "targets", H5T_NATIVE_INT32, tokens);
    rig->start = fixture_read(rig->file, "start", H5T_NATIVE_INT32, tokens);
}

static void rig_open(struct rig *rig, const struct row *row)
{
    rig_read(rig, row);
    must(device_open(&rig->dev, row->device, 0, 1));
    struct arena measure = arena_measure(&rig->dev);
    must(step_layout(&rig->step, rig->cfg, rig->cfg->model.vocab_size, &rig->dev, row->comm, &measure));
    step_close(&rig->step);
    must(arena_open(&rig->arena, &rig->dev, measure.used));
    must(step_layout(&rig->step, rig->cfg, rig->cfg->model.vocab_size, &rig->dev, row->comm, &rig->arena));
    must(step_start(&rig->step, false));
    rig_set_weights(rig);
    rig->grad = calloc((size_t)rig->step.params.n_units, sizeof *rig->grad);
    rig->pos = calloc((size_t)rig->step.model.tokens, sizeof *rig->pos);
    assert_true(rig->grad && rig->pos);
    for (int64_t i = 0; i < rig->step.model.tokens; i++)
        rig->pos[i] = (int32_t)(i % rig->cfg->model.seq_len);
}

static void rig_close(struct rig *rig)
{
    for (int u = 0; u < rig->step.params.n_units; u++)
        free(rig->grad[u]);
    free(rig->grad);
    step_close(&rig->step);
    arena_close(&rig->arena);
    device_close(&rig->dev);
    free(rig->tok);
    free(rig->target);
    free(rig->start);
    free(rig->pos);
    free(rig->cfg);
    H5Fclose(rig->file);
}

static int keep_grads(void *context, int unit, struct tensor grads)
{
    struct rig *rig = context;
    assert_null(rig->grad[unit]); /* once each */
    rig->grad[unit] = malloc(tensor_bytes(grads));
    assert_non_null(rig->grad[unit]);
    return rig->dev.table->download(&rig->dev, rig->grad[unit], grads.data, tensor_bytes(grads));
}

/* Forward and backward of one micro-batch, counted over all steps; its loss is added to the model's sum. */
static void rig_pass(struct rig *rig, int64_t micro_batch, int64_t tokens_in_mean, model_unit_done done,
                     void *context)
{
    struct model *m = &rig->step.model;
    const int64_t at = micro_batch * m->tokens;
    must(model_load_batch(m, rig->tok + at, rig->target + at, rig->start + at, rig->pos));
    must(model_forward(m, true, 1.0 / (double)tokens_in_mean));
    must(model_backward(m, done, context));
}

/* The mean loss, z-loss included, of the passes since the last call, over so many tokens. */
static double rig_take_loss(struct rig *rig, int64_t tokens)
{
    struct model *m = &rig->step.model;
    int64_t sum[2] = {0};
    int32_t fault = 0;
    must(rig->dev.table->download(&rig->dev, sum, m->loss_sum.data, sizeof sum));
    must(rig->dev.table->download(&rig->dev, &fault, m->fault.data, sizeof fault));
    must(op_fill(&rig->dev, m->loss_sum, 0));
    assert_int_equal(fault, 0);
    return (double)(sum[0] + sum[1]) / MODEL_LOSS_SCALE / (double)tokens;
}

/* Step 0's micro-batch 0: gradients into rig->grad. Returns its mean loss. */
static double rig_gradients(struct rig *rig)
{
    rig_pass(rig, 0, rig->step.model.tokens, keep_grads, rig);
    return rig_take_loss(rig, rig->step.model.tokens);
}

static double relative_error(const float *a, const float *b, int64_t n)
{
    double difference = 0, size = 0;
    for (int64_t i = 0; i < n; i++) {
        difference += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
        size += (double)b[i] * (double)b[i];
    }
    return sqrt(difference) / sqrt(size);
}

/* Written so that NaN is outside. */
static bool within(double error, double bound)
{
    return error <= bound;
}

static void test_gradients(void **state)
{
    const struct row *row = *state;
    const double bound = row->compute == COMPUTE_FP32 ? BOUND_FP32 : BOUND_BF16;
    struct rig rig;
    rig_open(&rig, row);
    const double loss = rig_gradients(&rig);
    double *expected = fixture_read(rig.file, "loss", H5T_NATIVE_DOUBLE, 1);
    double worst = fabs(loss - expected[0]) / expected[0];
    int outside = within(worst, bound) ? 0 : 1;
    if (outside) print_error("loss %.7f, PyTorch's is %.7f\n", loss, expected[0]);
    free(expected);
    for (int i = 0; i < rig.step.params.n; i++) {
        const struct param *param = &rig.step.params.param[i];
        char name[128];
        snprintf(name, sizeof name, "grad/%s", param->name);
        float *theirs = fixture_read(rig.file, name, H5T_NATIVE_FLOAT, param->elems);
        const double error = relative_error(rig.grad[param->unit] + param->offset, theirs, param->elems);
        free(theirs);
        worst = within(error, worst) ? worst : error;
        if (within(error, bound)) continue;
        print_error("gradient of %s: relative error %.2e\n", param->name, error);
        outside++;
    }
    print_message("loss and %d gradients, largest relative error %.2e\n", rig.step.params.n, worst);
    rig_close(&rig);
    if (outside) fail_msg("%s: %d values are further than %g from PyTorch's", row->fixture, outside, bound);
}

static void test_recompute_is_bitwise(void **state)
{
    struct row row = *(const struct row *)*state;
    struct rig kept, again;
    rig_open(&kept, &row);
    const double loss = rig_gradients(&kept);
    for (row.recompute = RECOMPUTE_ELEMENTWISE; row.recompute <= RECOMPUTE_BLOCK; row.recompute++) {
        rig_open(&again, &row);
        assert_true(again.arena.by_kind[ARENA_ACTS] < kept.arena.by_kind[ARENA_ACTS]);
        assert_true(rig_gradients(&again) == loss);
        for (int u = 0; u < kept.step.params.n_units; u++) {
            assert_memory_equal(again.grad[u], kept.grad[u], (size_t)kept.step.params.unit[u].elems * sizeof(float));
        }
        rig_close(&again);
    }
    rig_close(&kept);
}

static void test_adamw_steps(void **state)
{
    const struct row *row = *state;
    struct rig rig;
    rig_open(&rig, row);
    struct zero *z = &rig.step.zero;
    const int64_t steps = rig.cfg->run.steps, micros = rig.cfg->batch.global / rig.cfg->batch.micro;
    const int64_t tokens = micros * rig.step.model.tokens;
    double *losses = fixture_read(rig.file, "step_loss", H5T_NATIVE_DOUBLE, steps);
    double *norms = fixture_read(rig.file, "step_norm", H5T_NATIVE_DOUBLE, steps);
    double *lrs = fixture_read(rig.file, "lr", H5T_NATIVE_DOUBLE, steps);
    double worst = 0;
    int64_t step = 0;
    for (; step < steps && step < STEPS_MAX; step++) {
        struct step_control control;
        must(zero_begin(z));
        for (int64_t micro = 0; micro < micros; micro++) {
            z->last = micro == micros - 1;
            rig_pass(&rig, step * micros + micro, tokens, zero_accumulate, z);
        }
        must(zero_reduce(z));
        const double error = fabs(rig_take_loss(&rig, tokens) - losses[step]);
        if (!within(error, BOUND_STEP_LOSS)) fail_msg("step %d: loss is %.2e off", (int)step, error);
        worst = fmax(worst, error);
        must(zero_control(z, &control));
        assert_int_equal(control.fault, 0);
        assert_true(within(fabs(control.norm / norms[step] - 1), BOUND_STEP_LOSS));
        assert_true(within(fabs(optim_lr(rig.cfg, step) / lrs[step] - 1), 1e-12));
        must(optim_update(z, rig.cfg, step, step));
        must(model_weights_changed(&rig.step.model));
    }
    print_message("%d steps, largest difference of a loss %.2e\n", (int)step, worst);
    free(losses);
    free(norms);
    free(lrs);
    rig_close(&rig);
}

static void test_nan_is_never_within(void **state)
{
    (void)state;
    const float good[] = {1, 2}, bad[] = {1, NAN}, zero[] = {0, 0};
    assert_true(within(relative_error(good, good, 2), BOUND_FP32));
    assert_false(within(relative_error(bad, good, 2), BOUND_BF16));
    assert_false(within(relative_error(good, bad, 2), BOUND_BF16));
    assert_false(within(relative_error(zero, zero, 2), BOUND_BF16)); /* nothing to compare with */
}

int main(int argc, char **argv)
{
    static const char *const fixtures[] = {"llama_gqa_tied", "llama_qknorm_untied", "gpt2_tied"};
    static const struct {
        const char *name;
        CMUnitTestFunction test;
        struct row row;
    } kinds[] = {
        {"gradients fp32", test_gradients, {.compute = COMPUTE_FP32}},
        {"gradients bf16", test_gradients, {.compute = COMPUTE_BF16}},
        {"recompute is bitwise fp32", test_recompute_is_bitwise, {.compute = COMPUTE_FP32}},
        {"recompute is bitwise bf16", test_recompute_is_bitwise, {.compute = COMPUTE_BF16}},
        {"adamw steps, reduce exact", test_adamw_steps, {.compute = COMPUTE_FP32, .reduce = REDUCE_EXACT}},
        {"adamw steps, reduce fast", test_adamw_steps, {.compute = COMPUTE_FP32, .reduce = REDUCE_FAST}},
    };
    enum { FIXTURES = sizeof fixtures / sizeof *fixtures, KINDS = sizeof kinds / sizeof *kinds };
    struct comm comm;
    struct row rows[KINDS * FIXTURES];
    char names[KINDS * FIXTURES][64];
    struct CMUnitTest tests[KINDS * FIXTURES + 1] = {cmocka_unit_test(test_nan_is_never_within)};

    if (comm_open(&comm, &argc, &argv) != 0) return 1;
    const enum device_kind device = argc == 2 && strcmp(argv[1], "cuda") == 0 ? DEVICE_CUDA : DEVICE_CPU;
    for (int i = 0; i < KINDS * FIXTURES; i++) {
        rows[i] = kinds[i % KINDS].row;
        rows[i].fixture = fixtures[i / KINDS];
        rows[i].device = device;
        rows[i].comm = &comm;
        snprintf(names[i], sizeof names[i], "%s: %s", rows[i].fixture, kinds[i % KINDS].name);
        tests[i + 1] = (struct CMUnitTest){names[i], kinds[i % KINDS].test, NULL, NULL, &rows[i]};
    }
    const int failed = cmocka_run_group_tests(tests, NULL, NULL);
    comm_close(&comm);
    return failed;
}
