/* Warnings where hyper-parameters leave the range of training runs that are known to have worked.
 *
 * Nothing here is refused: a range says what others did, not what is right. But a wrong epsilon cost LLM-jp two runs of
 * 0.7T and 1.4T tokens, and a line at the start of the first would have saved both. Figures are from the published
 * recipes of the runs that are named. No state, no threads. */
#include "config.h"

#include "config_table.h"
#include "log.h"

#include <math.h>
#include <string.h>

/* A value to watch: an option, or what several options make together. */
struct recipe {
    const char *name; /* "section.key" of a number, unless `value` is given */
    double (*value)(const struct config *cfg);
    double low, high;                 /* inclusive */
    double from_params, below_params; /* the sizes of model that the range holds for */
    const char *who, *why;
    double continued_low; /* in place of low, where the run begins with a model's weights; 0: the same */
};

/* Parameters of the matrices: enough to tell a small model from a large one. */
static double params_estimate(const struct config *cfg)
{
    const struct config_model *m = &cfg->model;
    const double attention = 2.0 * (double)m->hidden * (double)m->head_dim * (double)(m->heads + m->kv_heads);
    const double ffn = (m->arch == ARCH_GPT2 ? 2.0 : 3.0) * (double)m->hidden * (double)m->ffn_hidden;
    const double embedding = (m->tie_embeddings ? 1.0 : 2.0) * (double)m->vocab_size * (double)m->hidden;
    return (double)m->layers * (attention + ffn) + embedding;
}

static double batch_tokens(const struct config *cfg)
{
    return (double)cfg->batch.global * (double)cfg->model.seq_len;
}

/* Whether the run goes on from AdamW's moments of another one, as a branch does. */
static bool has_moments(const struct config *cfg)
{
    const char *resume = cfg->checkpoint.resume;
    return cfg->checkpoint.init_optimizer || (strcmp(resume, "auto") != 0 && strcmp(resume, "never") != 0);
}

/* Whether it goes on from the weights of another one, at least. */
static bool is_continued(const struct config *cfg)
{
    return has_moments(cfg) || cfg->checkpoint.init_from[0] != '\0';
}

/* Whether the learning rate decays. The trunk of a WSD run, from whose checkpoints decays branch off, does nowhere, or
 * in its last step alone, as Megatron-LM has it. */
static bool decays(const struct config *cfg)
{
    if (cfg->optim.schedule == SCHEDULE_CONSTANT || cfg->optim.lr == 0) return false;
    return cfg->optim.schedule != SCHEDULE_WSD || cfg->optim.decay_steps > 1;
}

static double decay_share(const struct config *cfg)
{
    return (double)cfg->optim.decay_steps / (double)cfg->run.steps;
}

/* 0, which no range excludes, where the learning rate does not decay. */
static double final_lr_share(const struct config *cfg)
{
    return decays(cfg) ? cfg->optim.min_lr / cfg->optim.lr : 0;
}

#define ANY_SIZE .from_params = 0, .below_params = INFINITY
/* What is learnt already is not to be overwritten: continued pre-training takes down to a hundredth of the learning rate. */
#define CONTINUED_LOW .continued_low = 1e-6

static const struct recipe recipes[] = {
    {"optim.eps", NULL, 1e-9, 1e-7, ANY_SIZE, "LLM-jp-3 172B and most others use 1e-8",
     "a larger one damps the update where gradients are small: it spoiled two LLM-jp 172B runs of 0.7T and 1.4T "
     "tokens"},
    {"optim.beta1", NULL, 0.85, 0.95, ANY_SIZE, "LLM-jp-3 172B, GPT-3 and Llama use 0.9",
     "it sets how fast the direction of the update follows the gradient"},
    {"optim.beta2", NULL, 0.9, 0.99, ANY_SIZE, "LLM-jp-3 172B, GPT-3 and Llama use 0.95",
     "closer to 1, the update's scale reacts too slowly to a spike in the gradients"},
    {"optim.weight_decay", NULL, 0.01, 0.2, ANY_SIZE, "LLM-jp-3 172B, GPT-3 and Llama use 0.1",
     "without it weights grow until bf16 training becomes unstable"},
    {"optim.clip", NULL, 0.1, 1.0, ANY_SIZE, "LLM-jp-3 172B uses 1, Apertus 70B 0.1",
     "unclipped (0, or a large bound), one bad batch can throw the weights far off"},
    {"optim.lr", NULL, 1e-4, 3e-3, .from_params = 0, .below_params = 1e9, "GPT-3 used 6e-4 at 125M parameters",
     "small models learn slowly with less and diverge with more", CONTINUED_LOW},
    {"optim.lr", NULL, 5e-5, 1e-3, .from_params = 1e9, .below_params = 2e10,
     "Fugaku-LLM 13B used 1e-4, LLM-jp-4 8B 3e-4", "less wastes tokens, more ends in spikes", CONTINUED_LOW},
    {"optim.lr", NULL, 5e-5, 4e-4, .from_params = 2e10, .below_params = INFINITY,
     "LLM-jp-3 172B used 8e-5, LLM-jp-4 332B-A31B 4e-4", "less wastes tokens, more ends in spikes", CONTINUED_LOW},
    {"optim.min_lr / optim.lr", final_lr_share, 0, 0.2, ANY_SIZE, "LLM-jp-3 172B decays from 8e-5 to 8e-6, a tenth",
     "ending high leaves loss on the table"},
    {"model.init_std", NULL, 0.002, 0.04, ANY_SIZE, "GPT-2 and most others use 0.02",
     "too wide saturates the first layers, too narrow stalls deep models"},
    {"model.norm_eps", NULL, 1e-6, 1e-5, ANY_SIZE, "Llama 3 uses 1e-5, Qwen3 1e-6",
     "it must stay small beside the mean square of activations and above what bf16 loses"},
    {"model.z_loss", NULL, 0, 1e-3, ANY_SIZE, "PaLM used 1e-4", "a larger one competes with the loss itself"},
    {"tokens in a step (batch.global × model.seq_len)", batch_tokens, 2.5e5, 3e7, .from_params = 1e9,
     .below_params = INFINITY, "LLM-jp-3 172B used 7.1M, Apertus 70B 8.4M to 16.8M",
     "too few make noisy steps and idle machines, too many waste tokens"},
};

static const struct recipe wsd_recipe = {"optim.decay_steps / run.steps",
                                         decay_share,
                                         0.02,
                                         1,
                                         ANY_SIZE,
                                         "MiniCPM found a tenth to be enough",
                                         "most of a WSD run's final gain comes in its decay"};

/* Of a warm-up count the steps that it gives the second moment, whatever the length of the run: 2,000 are never wrong. Short
 * runs do with a hundredth of their steps, or a quarter, and restored moments need none. */
static struct recipe warmup_recipe(const struct config *cfg)
{
    const int64_t hundredth = cfg->run.steps / 100, quarter = cfg->run.steps / 4;
    const int64_t least = hundredth < 100 ? hundredth : 100;
    const int64_t most = quarter < 2000 ? 2000 : quarter < 10000 ? quarter : 10000;
    return (struct recipe){
        "optim.warmup_steps",
        NULL,
        has_moments(cfg) ? 0 : (double)least,
        (double)most,
        ANY_SIZE,
        "LLM-jp-3 172B and LLM-jp-4 8B warm up for 2,000 steps",
        "Adam's second moment is a poor estimate at first, and full steps with it can spoil the run "
        "early; a long warm-up wastes tokens"};
}

static double recipe_value(const struct recipe *recipe, const struct config *cfg)
{
    if (recipe->value != NULL) return recipe->value(cfg);
    for (int i = 0; i < OPTION_COUNT; i++) {
        char name[OPTION_NAME_MAX];
        option_name(option_at(i), name);
        if (strcmp(name, recipe->name) == 0) return option_number(option_at(i), cfg);
    }
    return NAN; /* no such option: warns always, which a test sees */
}

static int recipe_check(const struct recipe *recipe, const struct config *cfg, double params)
{
    if (params < recipe->from_params || params >= recipe->below_params) return 0;
    const double value = recipe_value(recipe, cfg);
    const double low = recipe->continued_low > 0 && is_continued(cfg) ? recipe->continued_low : recipe->low;
    if (value >= low && value <= recipe->high) return 0;
    log_warn("%s is %g; known recipes for this size keep to %g…%g (%s): %s", recipe->name, value, low, recipe->high,
             recipe->who, recipe->why);
    return 1;
}

int config_warn_recipes(const struct config *cfg)
{
    const double params = params_estimate(cfg);
    const struct recipe warmup = warmup_recipe(cfg);
    int warnings = recipe_check(&warmup, cfg, params);
    for (size_t i = 0; i < sizeof recipes / sizeof *recipes; i++)
        warnings += recipe_check(&recipes[i], cfg, params);
    if (cfg->optim.schedule == SCHEDULE_WSD && decays(cfg)) warnings += recipe_check(&wsd_recipe, cfg, params);
    return warnings;
}
