/* The layout of parameters: units, alignment, adjacency, and initial values that no division changes. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "mix.h"
#include "model/normal.h"
#include "model/params.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static struct config *small_config(enum arch arch)
{
    struct config *cfg = calloc(1, sizeof *cfg);
    assert_non_null(cfg);
    config_defaults(cfg);
    cfg->run.seed = 7;
    cfg->model.arch = arch;
    cfg->model.layers = 3;
    cfg->model.hidden = 24;
    cfg->model.heads = 3;
    cfg->model.kv_heads = arch == ARCH_GPT2 ? 3 : 1;
    cfg->model.head_dim = 8;
    cfg->model.ffn_hidden = 50;
    cfg->model.seq_len = 16;
    return cfg;
}

static void layout_counts_every_element_once(void **state)
{
    (void)state;
    for (int arch = ARCH_LLAMA; arch <= ARCH_GPT2; arch++) {
        struct config *cfg = small_config((enum arch)arch);
        cfg->model.tie_embeddings = arch == ARCH_GPT2;
        struct params p;
        int64_t elems = 0;
        assert_int_equal(params_open(&p, cfg, 101, 3), 0);
        assert_int_equal(p.n_units, 5);
        for (int u = 0; u < p.n_units; u++) {
            int64_t end = 0;
            for (int i = 0; i < p.unit[u].count; i++) {
                const struct param *param = &p.param[p.unit[u].first + i];
                assert_true(param->offset >= end);
                assert_int_equal(param->unit, u);
                assert_null(strchr(param->name, '%'));
                /* Behind 101 rows of the classifier, zeros up to 128. */
                end = param->offset + (param->id == p.classifier ? 128 * param->shape[1] : param->elems);
                elems += param->elems;
            }
            assert_true(p.unit[u].elems >= end);
            assert_int_equal(p.unit[u].elems % (3 * INT64_C(32)), 0);
            assert_int_equal(params_shard(&p, u) * 3, p.unit[u].elems);
        }
        assert_int_equal(p.elems, elems);
        const int64_t C = 24, F = 50, V = 101, QD = 24, KD = 8;
        const int64_t llama = 2 * V * C + 3 * (2 * C + (2 * QD + 2 * KD) * C + 3 * F * C) + C;
        const int64_t gpt2 = V * C + 16 * C + 3 * (4 * C + C * 3 * C + 3 * C + C * C + C + 2 * C * F + F + C) + 2 * C;
        assert_int_equal(elems, arch == ARCH_LLAMA ? llama : gpt2);
        params_close(&p);
        free(cfg);
    }
}

static void joined_parameters_lie_together(void **state)
{
    (void)state;
    struct config *cfg = small_config(ARCH_LLAMA);
    struct params p;
    assert_int_equal(params_open(&p, cfg, 101, 4), 0);
    const struct param *q = params_find(&p, 2, PARAM_Q_W), *k = params_find(&p, 2, PARAM_K_W);
    const struct param *v = params_find(&p, 2, PARAM_V_W), *gate = params_find(&p, 2, PARAM_GATE_W);
    assert_string_equal(q->name, "model.layers.1.self_attn.q_proj.weight");
    assert_int_equal(k->offset, q->offset + q->elems);
    assert_int_equal(v->offset, k->offset + k->elems);
    assert_int_equal(params_find(&p, 2, PARAM_UP_W)->offset, gate->offset + gate->elems);
    assert_null(params_find(&p, 2, PARAM_Q_NORM_W));
    assert_null(params_find(&p, p.n_units - 1, PARAM_LM_HEAD));
    params_close(&p);
    free(cfg);
}

static void model_id_follows_names_and_shapes_only(void **state)
{
    (void)state;
    struct config *cfg = small_config(ARCH_LLAMA);
    struct params a, b;
    assert_int_equal(params_open(&a, cfg, 101, 1), 0);
    cfg->run.seed = 8;
    assert_int_equal(params_open(&b, cfg, 101, 4), 0);
    assert_true(a.id == b.id);
    params_close(&b);
    cfg->model.ffn_hidden++;
    assert_int_equal(params_open(&b, cfg, 101, 1), 0);
    assert_true(a.id != b.id);
    params_close(&a);
    params_close(&b);
    free(cfg);
}

static void initial_values_do_not_depend_on_the_division(void **state)
{
    (void)state;
    struct config *cfg = small_config(ARCH_LLAMA);
    struct params p;
    cfg->model.init_std = 0.5;
    assert_int_equal(params_open(&p, cfg, 2001, 2), 0);
    for (int u = 0; u < p.n_units; u++) {
        const int64_t n = p.unit[u].elems;
        float *whole = malloc((size_t)n * sizeof *whole), *parts = malloc((size_t)n * sizeof *parts);
        assert_non_null(whole);
        assert_non_null(parts);
        params_init(&p, u, 0, n, whole);
        for (int64_t at = 0; at < n; at += 37)
            params_init(&p, u, at, at + 37 < n ? at + 37 : n, parts + at);
        assert_memory_equal(whole, parts, (size_t)n * sizeof *whole);
        if (u == 0) {
            double sum = 0, squares = 0;
            const int64_t elems = p.param[0].elems;
            for (int64_t i = 0; i < elems; i++) {
                sum += whole[i];
                squares += (double)whole[i] * whole[i];
            }
            /* Five standard errors of a normal sample of this size. */
            assert_true(fabs(sum / (double)elems) < 5 * 0.5 / sqrt((double)elems));
            assert_true(fabs(sqrt(squares / (double)elems) - 0.5) < 5 * 0.5 / sqrt(2.0 * (double)elems));
        }
        free(whole);
        free(parts);
    }
    params_close(&p);
    free(cfg);
}

/* Element i of the stream of a key, by the C library. */
static float normal_at(uint64_t key, double std, int64_t i)
{
    const uint64_t a = mix64(key ^ mix64((uint64_t)(i / 2))), b = mix64(a ^ key);
    const double u = ((double)(a >> 11) + 0.5) * 0x1p-53, v = (double)(b >> 11) * 0x1p-53;
    const double radius = sqrt(-2.0 * log(u)), angle = 6.283185307179586476925 * v;
    return (float)(std * radius * (i % 2 == 0 ? cos(angle) : sin(angle)));
}

/* What params_init must give for element i of a unit. */
static float initial_value(const struct params *p, int unit, int64_t i)
{
    for (int k = p->unit[unit].first; k < p->unit[unit].first + p->unit[unit].count; k++) {
        const struct param *param = &p->param[k];
        if (i < param->offset || i >= param->offset + param->elems) continue;
        if (param->init == INIT_ZERO || param->init == INIT_ONE) return param->init == INIT_ONE ? 1.0F : 0.0F;
        return normal_at(mix64(p->seed ^ mix64((uint64_t)k + 1)),
                         param->init == INIT_OUTPUT ? p->init_output_std : p->init_std, i - param->offset);
    }
    return 0;
}

/* Every parameter of every kind, in ranges that cut pairs of deviates at either end, at both, and at none. */
static void initial_values_are_those_of_each_element(void **state)
{
    (void)state;
    const int64_t sizes[] = {1, 2, 3, 64, 101, INT64_MAX};
    for (int arch = ARCH_LLAMA; arch <= ARCH_GPT2; arch++) {
        struct config *cfg = small_config((enum arch)arch);
        struct params p;
        cfg->model.layers = 1;
        cfg->model.hidden = 5;
        cfg->model.ffn_hidden = 7;
        assert_int_equal(params_open(&p, cfg, 11, 1), 0);
        for (int u = 0; u < p.n_units; u++) {
            const int64_t n = p.unit[u].elems;
            float *values = malloc((size_t)n * sizeof *values);
            assert_non_null(values);
            for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
                for (int64_t at = 0, end = 0; at < n; at = end) {
                    end = n - at < sizes[s] ? n : at + sizes[s];
                    memset(values, -1, (size_t)n * sizeof *values);
                    params_init(&p, u, at, end, values);
                    for (int64_t i = at; i < end; i++) {
                        const float expected = initial_value(&p, u, i);
                        assert_true(fabsf(values[i - at] - expected) <= 0x1p-22F * fabsf(expected));
                    }
                }
            }
            free(values);
        }
        params_close(&p);
        free(cfg);
    }
}

/* Bit for bit, as a compiler without vectors and fused products has them. */
static void normal_deviates_are_the_same_everywhere(void **state)
{
    (void)state;
    uint64_t hash = 0;
    for (int64_t first = 0; first < 2000000; first += NORMAL_PAIRS) {
        float deviate[2 * NORMAL_PAIRS];
        normal_pairs(12345, first, deviate);
        for (int i = 0; i < 2 * NORMAL_PAIRS; i++) {
            uint32_t bits;
            memcpy(&bits, &deviate[i], sizeof bits);
            hash = mix64(hash ^ bits);
        }
    }
    assert_true(hash == 0x565347ab6cb7e713u);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(layout_counts_every_element_once),
        cmocka_unit_test(joined_parameters_lie_together),
        cmocka_unit_test(model_id_follows_names_and_shapes_only),
        cmocka_unit_test(initial_values_do_not_depend_on_the_division),
        cmocka_unit_test(initial_values_are_those_of_each_element),
        cmocka_unit_test(normal_deviates_are_the_same_everywhere),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
