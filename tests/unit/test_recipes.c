/* Warnings of hyper-parameters: none for what is known to have worked, one for each value that leaves its range. */
#include "config.h"
#include "config_table.h"
#include "err.h"
#include "log.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

/* A configuration needs a vocabulary to be complete. */
#define COMPLETE "data: {tokenizer: t.model}\n"
#define BRANCH "checkpoint: {init_from: a/step-1, init_optimizer: true}\n"
#define LLM_JP_4_8B                                                                                               \
    "model: {layers: 32, hidden: 4096, heads: 32, kv_heads: 8, head_dim: 128, ffn_hidden: 14336, seq_len: 4096, " \
    "vocab_size: 196608, norm_eps: 1e-6, tie_embeddings: false}\n"
#define LLM_JP_4_OPTIM "lr: 3e-4, min_lr: 3e-5, warmup_steps: 2000, decay_shape: linear, decay_steps: 1}\n"
#define MOE_OPTIM "lr: 4e-4, min_lr: 4e-5, warmup_steps: 2000, decay_shape: linear, decay_steps: 1}\n"

static void test_warnings(void **state)
{
    static const struct {
        const char *text;
        int warnings;
    } cases[] = {
        {COMPLETE, 0},
        {COMPLETE "optim: {eps: 1e-5}", 1},
        {COMPLETE "optim: {eps: 1e-12, beta1: 0.5, beta2: 0.999, weight_decay: 0, clip: 0}", 5},
        {COMPLETE "optim: {lr: 1e-2, min_lr: 1e-3}", 1},
        {COMPLETE "optim: {min_lr: 3e-4}", 1},
        {COMPLETE "optim: {min_lr: 3e-4, schedule: constant}", 0},
        {COMPLETE "optim: {warmup_steps: 0}", 1},
        {COMPLETE "optim: {decay_steps: 10}", 1},
        /* Of a warm-up its steps count, not its share. */
        {COMPLETE "run: {steps: 20000000}\noptim: {warmup_steps: 2000, decay_steps: 2000000}", 0},
        {COMPLETE "run: {steps: 20000000}\noptim: {warmup_steps: 99, decay_steps: 2000000}", 1},
        {COMPLETE "run: {steps: 20000000}\noptim: {warmup_steps: 200000, decay_steps: 2000000}", 1},
        {COMPLETE "run: {steps: 3000}\noptim: {warmup_steps: 2000, decay_steps: 300}", 0},
        {COMPLETE "run: {steps: 2001}\noptim: {warmup_steps: 2000, schedule: cosine}", 0},
        {COMPLETE "run: {steps: 9000}\noptim: {warmup_steps: 3000, decay_steps: 900}", 1},
        {COMPLETE "run: {steps: 400}\noptim: {warmup_steps: 3, decay_steps: 40}", 1},
        {COMPLETE "run: {steps: 400}\noptim: {warmup_steps: 4, decay_steps: 40}", 0},
        /* A smoke run. */
        {COMPLETE "run: {steps: 1}\noptim: {warmup_steps: 0, decay_steps: 0}", 0},
        {COMPLETE "run: {steps: 20}\noptim: {warmup_steps: 0, decay_steps: 20}", 0},
        {COMPLETE "run: {steps: 20}\noptim: {warmup_steps: 2, decay_steps: 8}", 0},
        /* The trunk of decay branches; as Megatron-LM has it; with a last learning rate that is never reached. */
        {COMPLETE "optim: {decay_steps: 0}", 0},
        {COMPLETE "optim: {decay_steps: 1, min_lr: 1e-4}", 0},
        {COMPLETE "optim: {decay_steps: 0, min_lr: 1e-3}", 0},
        {COMPLETE "optim: {warmup_steps: 0, decay_steps: 0}", 1},
        /* All decay, which is another word for linear. */
        {COMPLETE "optim: {decay_steps: 900, decay_shape: linear, min_lr: 0}", 0},
        {COMPLETE "optim: {schedule: constant, min_lr: 1e-3}", 0},
        {COMPLETE "optim: {schedule: constant, warmup_steps: 0}", 1},
        /* A branch has AdamW's moments, and needs no warm-up; with the weights alone it does. */
        {COMPLETE BRANCH "optim: {warmup_steps: 0, decay_steps: 1000}", 0},
        {COMPLETE "checkpoint: {resume: a/step-1}\noptim: {warmup_steps: 0, decay_steps: 1000}", 0},
        {COMPLETE "checkpoint: {resume: never}\noptim: {warmup_steps: 0, decay_steps: 1000}", 1},
        {COMPLETE "checkpoint: {init_from: a/step-1}\noptim: {warmup_steps: 0, decay_steps: 1000}", 1},
        {COMPLETE BRANCH "optim: {warmup_steps: 0, decay_steps: 10}", 1},
        {COMPLETE BRANCH "optim: {warmup_steps: 300, eps: 1e-5}", 1},
        /* Continued pre-training: warmed up again, at a lower learning rate. */
        {COMPLETE "checkpoint: {init_from: a/step-1}\noptim: {lr: 2.5e-5, min_lr: 2.5e-6}", 0},
        {COMPLETE "checkpoint: {init_from: a/step-1}\noptim: {lr: 1e-7, min_lr: 0}", 1},
        {COMPLETE "checkpoint: {init_from: a/step-1}\noptim: {lr: 1e-2, min_lr: 1e-3}", 1},
        {COMPLETE "optim: {lr: 2.5e-5, min_lr: 2.5e-6}", 1},
        {COMPLETE "model: {init_std: 0.1, norm_eps: 1e-3, z_loss: 0.1}", 3},
        /* Runs that are known to have worked: LLM-jp-4 8B in both phases and one of its decays, its siblings of 32B, 291B and
         * 332B (as far as a model without experts has their shape), and Apertus 70B's schedule. */
        {LLM_JP_4_8B "run: {steps: 12000000}\nbatch: {global: 512, micro: 1}\noptim: {" LLM_JP_4_OPTIM, 0},
        {LLM_JP_4_8B "run: {steps: 1000000}\nbatch: {global: 2048, micro: 1}\noptim: {" LLM_JP_4_OPTIM, 0},
        {LLM_JP_4_8B "run: {steps: 3000000}\nbatch: {global: 512, micro: 1}\ncheckpoint: {resume: a/step-2900000}\n"
                     "optim: {lr: 3e-4, min_lr: 0, warmup_steps: 2000, decay_steps: 100000}",
         0},
        {LLM_JP_4_8B "run: {steps: 100000}\nbatch: {global: 512, micro: 1}\n" BRANCH
                     "optim: {lr: 3e-4, min_lr: 0, warmup_steps: 0, decay_steps: 100000}",
         0},
        {"model: {layers: 64, hidden: 5120, heads: 40, kv_heads: 8, head_dim: 128, ffn_hidden: 27648, seq_len: 4096, "
         "vocab_size: 196608, norm_eps: 1e-6, tie_embeddings: false}\nrun: {steps: 12000000}\nbatch: {global: 512, "
         "micro: 1}\noptim: {lr: 2e-4, min_lr: 2e-5, warmup_steps: 2000, decay_steps: 1}",
         0},
        {"model: {layers: 70, hidden: 5120, heads: 80, kv_heads: 8, head_dim: 128, ffn_hidden: 262144, seq_len: "
         "4096, "
         "vocab_size: 196608, norm_eps: 1e-6, init_std: 0.006}\nrun: {steps: 12000000}\nbatch: {global: 2880, "
         "micro: 1}\noptim: {" MOE_OPTIM,
         0},
        {"model: {layers: 80, hidden: 5120, heads: 64, kv_heads: 8, head_dim: 128, ffn_hidden: 262144, seq_len: "
         "4096, "
         "vocab_size: 196608, norm_eps: 1e-6, init_std: 0.006, qk_norm: true}\nrun: {steps: 12000000}\n"
         "batch: {global: 2048, micro: 1}\noptim: {" MOE_OPTIM,
         0},
        {"model: {layers: 80, hidden: 8192, heads: 64, kv_heads: 8, head_dim: 128, ffn_hidden: 43008, seq_len: 4096, "
         "vocab_size: 131072, qk_norm: true}\nrun: {steps: 1180000}\nbatch: {global: 4096, micro: 1}\n"
         "optim: {lr: 1e-4, min_lr: 0, warmup_steps: 2000, decay_steps: 236000, clip: 0.1}",
         0},
        /* 172B parameters: this learning rate and batch are those of a small model. */
        {COMPLETE "model: {layers: 96, hidden: 12288, ffn_hidden: 38464}\noptim: {lr: 6e-4, min_lr: 6e-5}", 2},
    };
    struct config *cfg = calloc(1, sizeof *cfg);
    (void)state;
    assert_non_null(cfg);
    assert_int_equal(setenv("TATARA_LOG", "error", 1), 0);
    log_set_rank(0, 1);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        if (config_parse(cfg, "test.yaml", cases[i].text, strlen(cases[i].text)) != 0) fail_msg("%s", err_message());
        const int warnings = config_warn_recipes(cfg);
        if (warnings != cases[i].warnings) fail_msg("%d warnings for: %s", warnings, cases[i].text);
    }
    free(cfg);
}

/* What was published of the models whose recipes we ship, or of the yardstick that they name. */
static void test_published(void **state)
{
    static const struct {
        const char *config, *section, *key;
        double value;
    } published[] = {
        {"llm-jp-4-8b", "model", "layers", 32},
        {"llm-jp-4-8b", "model", "hidden", 4096},
        {"llm-jp-4-8b", "model", "heads", 32},
        {"llm-jp-4-8b", "model", "kv_heads", 8},
        {"llm-jp-4-8b", "model", "ffn_hidden", 14336},
        {"llm-jp-4-8b", "model", "seq_len", 4096},
        {"llm-jp-4-8b", "model", "vocab_size", 196608},
        {"llm-jp-4-8b", "model", "rope_theta", 5e5},
        {"llm-jp-4-8b", "model", "norm_eps", 1e-6},
        {"llm-jp-4-8b", "model", "init_std", 0.02},
        {"llm-jp-4-8b", "batch", "global", 2048},
        {"llm-jp-4-8b", "optim", "lr", 3e-4},
        {"llm-jp-4-8b", "optim", "min_lr", 0},
        {"llm-jp-4-8b", "optim", "warmup_steps", 2000},
        {"llm-jp-3-172b", "run", "steps", 292812},
        {"llm-jp-3-172b", "model", "layers", 96},
        {"llm-jp-3-172b", "model", "hidden", 12288},
        {"llm-jp-3-172b", "model", "kv_heads", 16},
        {"llm-jp-3-172b", "model", "ffn_hidden", 38464},
        {"llm-jp-3-172b", "model", "vocab_size", 99584},
        {"llm-jp-3-172b", "model", "norm_eps", 1e-5},
        {"llm-jp-3-172b", "batch", "global", 1728},
        {"llm-jp-3-172b", "optim", "lr", 8e-5},
        {"llm-jp-3-172b", "optim", "min_lr", 8e-6},
        {"llm-jp-3-172b", "optim", "warmup_steps", 2000},
        {"llm-jp-3-172b", "optim", "eps", 1e-8},
        {"fugaku-13b", "model", "layers", 40},
        {"fugaku-13b", "model", "hidden", 5184},
        {"fugaku-13b", "model", "seq_len", 2048},
        {"fugaku-13b", "optim", "lr", 1e-4},
    };
    struct config *cfg = calloc(1, sizeof *cfg);
    (void)state;
    assert_non_null(cfg);
    for (size_t i = 0; i < sizeof published / sizeof *published; i++) {
        char path[CONFIG_TEXT_MAX];
        snprintf(path, sizeof path, "%s/%s.yaml", TATARA_CONFIGS, published[i].config);
        if (config_load(cfg, path, 0, NULL) != 0) fail_msg("%s", err_message());
        const double value = option_number(option_find(published[i].section, published[i].key), cfg);
        if (value != published[i].value) fail_msg("%s: %s is %g", path, published[i].key, value);
    }
    free(cfg);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_warnings), cmocka_unit_test(test_published)};
    return cmocka_run_group_tests_name("recipes", tests, NULL, NULL);
}
