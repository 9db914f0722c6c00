/* What a person probably meant: names nearby, and names that other programs use. No state, no threads. */
#include "config_guess.h"

#include <ctype.h>
#include <string.h>

/* Of Megatron-LM, Hugging Face's transformers, nanoGPT and llm.c, DeepSpeed, NeMo, GPT-NeoX, OLMo and torchtitan. */
static const struct foreign foreigners[] = {
    {"hidden_size", "model.hidden", NULL},
    {"d_model", "model.hidden", NULL},
    {"n_embd", "model.hidden", NULL},
    {"n_embed", "model.hidden", NULL},
    {"embedding_size", "model.hidden", NULL},
    {"embed_dim", "model.hidden", NULL},
    {"dim", "model.hidden", NULL},
    {"hidden_dim", "model.hidden", NULL},
    {"num_layers", "model.layers", NULL},
    {"n_layers", "model.layers", NULL},
    {"n_layer", "model.layers", NULL},
    {"num_hidden_layers", "model.layers", NULL},
    {"depth", "model.layers", NULL},
    {"num_attention_heads", "model.heads", NULL},
    {"num_heads", "model.heads", NULL},
    {"n_heads", "model.heads", NULL},
    {"n_head", "model.heads", NULL},
    {"attention_heads", "model.heads", NULL},
    {"num_key_value_heads", "model.kv_heads", NULL},
    {"num_query_groups", "model.kv_heads", NULL},
    {"n_kv_heads", "model.kv_heads", NULL},
    {"num_kv_heads", "model.kv_heads", NULL},
    {"n_kv_head", "model.kv_heads", NULL},
    {"kv_channels", "model.head_dim", NULL},
    {"head_size", "model.head_dim", NULL},
    {"intermediate_size", "model.ffn_hidden", NULL},
    {"ffn_hidden_size", "model.ffn_hidden", NULL},
    {"mlp_hidden_size", "model.ffn_hidden", NULL},
    {"n_inner", "model.ffn_hidden", NULL},
    {"ffn_dim", "model.ffn_hidden", NULL},
    {"d_ff", "model.ffn_hidden", NULL},
    {"seq_length", "model.seq_len", NULL},
    {"sequence_length", "model.seq_len", NULL},
    {"max_position_embeddings", "model.seq_len", NULL},
    {"max_seq_len", "model.seq_len", NULL},
    {"max_seq_length", "model.seq_len", NULL},
    {"max_sequence_length", "model.seq_len", NULL},
    {"context_length", "model.seq_len", NULL},
    {"block_size", "model.seq_len", NULL},
    {"n_positions", "model.seq_len", NULL},
    {"n_ctx", "model.seq_len", NULL},
    {"ctx_len", "model.seq_len", NULL},
    {"context_size", "model.seq_len", NULL},
    {"padded_vocab_size", "model.vocab_size", NULL},
    {"vocabulary_size", "model.vocab_size", NULL},
    {"rotary_base", "model.rope_theta", NULL},
    {"rope_base", "model.rope_theta", NULL},
    {"rms_norm_eps", "model.norm_eps", NULL},
    {"layernorm_epsilon", "model.norm_eps", NULL},
    {"layer_norm_epsilon", "model.norm_eps", NULL},
    {"layer_norm_eps", "model.norm_eps", NULL},
    {"norm_epsilon", "model.norm_eps", NULL},
    {"qk_layernorm", "model.qk_norm", NULL},
    {"use_qk_norm", "model.qk_norm", NULL},
    {"tie_word_embeddings", "model.tie_embeddings", NULL},
    {"weight_tying", "model.tie_embeddings", NULL},
    {"share_embeddings_and_output_weights", "model.tie_embeddings", NULL},
    {"untie_embeddings_and_output_weights", "model.tie_embeddings", "and means the opposite"},
    {"z_loss_weight", "model.z_loss", NULL},
    {"z_loss_coeff", "model.z_loss", NULL},
    {"initializer_range", "model.init_std", NULL},
    {"init_method_std", "model.init_std", NULL},
    {"model_type", "model.arch", NULL},
    {"architecture", "model.arch", NULL},
    {"gradient_checkpointing", "model.recompute", NULL},
    {"activation_checkpointing", "model.recompute", NULL},
    {"activation_checkpoint", "model.recompute", NULL},
    {"recompute_granularity", "model.recompute", NULL},
    {"recompute_activations", "model.recompute", NULL},
    {"learning_rate", "optim.lr", NULL},
    {"max_lr", "optim.lr", NULL},
    {"peak_lr", "optim.lr", NULL},
    {"max_learning_rate", "optim.lr", NULL},
    {"min_learning_rate", "optim.min_lr", NULL},
    {"lr_min", "optim.min_lr", NULL},
    {"lr_decay_style", "optim.schedule", NULL},
    {"lr_scheduler_type", "optim.schedule", NULL},
    {"lr_scheduler", "optim.schedule", NULL},
    {"scheduler", "optim.schedule", NULL},
    {"warmup_iters", "optim.warmup_steps", NULL},
    {"lr_warmup_iters", "optim.warmup_steps", NULL},
    {"lr_warmup_steps", "optim.warmup_steps", NULL},
    {"num_warmup_steps", "optim.warmup_steps", NULL},
    {"warmup", "optim.warmup_steps", NULL},
    {"warmup_ratio", "optim.warmup_steps", "in steps"},
    {"lr_wsd_decay_iters", "optim.decay_steps", NULL},
    {"lr_decay_iters", "optim.decay_steps", "with schedule wsd; cosine and linear decay until run.steps"},
    {"lr_wsd_decay_style", "optim.decay_shape", NULL},
    {"adam_beta1", "optim.beta1", NULL},
    {"adam_beta2", "optim.beta2", NULL},
    {"adam_b1", "optim.beta1", NULL},
    {"adam_b2", "optim.beta2", NULL},
    {"betas", "optim.beta1", "and optim.beta2"},
    {"adam_eps", "optim.eps", NULL},
    {"adam_epsilon", "optim.eps", NULL},
    {"epsilon", "optim.eps", NULL},
    {"wd", "optim.weight_decay", NULL},
    {"clip_grad", "optim.clip", NULL},
    {"grad_clip", "optim.clip", NULL},
    {"max_grad_norm", "optim.clip", NULL},
    {"gradient_clipping", "optim.clip", NULL},
    {"gradient_clip_val", "optim.clip", NULL},
    {"max_steps", "run.steps", NULL},
    {"train_iters", "run.steps", NULL},
    {"max_iters", "run.steps", NULL},
    {"num_steps", "run.steps", NULL},
    {"training_steps", "run.steps", NULL},
    {"total_steps", "run.steps", NULL},
    {"train_steps", "run.steps", NULL},
    {"num_iterations", "run.steps", NULL},
    {"iterations", "run.steps", NULL},
    {"iters", "run.steps", NULL},
    {"num_train_steps", "run.steps", NULL},
    {"num_training_steps", "run.steps", NULL},
    {"max_train_steps", "run.steps", NULL},
    {"train_samples", "run.steps", "samples divided by batch.global"},
    {"max_tokens", "run.steps", "tokens divided by batch.global and model.seq_len"},
    {"num_train_epochs", "run.steps", "`tatara train` says at its start how often the steps read the data"},
    {"epochs", "run.steps", "`tatara train` says at its start how often the steps read the data"},
    {"exit_interval", "run.stop_at", NULL},
    {"output_dir", "run.dir", NULL},
    {"out_dir", "run.dir", NULL},
    {"run_dir", "run.dir", NULL},
    {"save_dir", "run.dir", NULL},
    {"save_path", "run.dir", "checkpoints lie in it"},
    {"save_folder", "run.dir", "checkpoints lie in it"},
    {"checkpoint_dir", "run.dir", "checkpoints lie in it"},
    {"ckpt_dir", "run.dir", "checkpoints lie in it"},
    {"save", "run.dir", "checkpoints lie in it"},
    {"random_seed", "run.seed", NULL},
    {"num_threads", "run.threads", NULL},
    {"omp_num_threads", "run.threads", NULL},
    {"global_batch_size", "batch.global", "in sequences"},
    {"global_batch", "batch.global", "in sequences"},
    {"gbs", "batch.global", "in sequences"},
    {"train_batch_size", "batch.global", "in sequences"},
    {"batch_size", "batch.global", "in sequences, over all ranks; batch.micro are those of one pass"},
    {"micro_batch_size", "batch.micro", NULL},
    {"micro_batch", "batch.micro", NULL},
    {"mbs", "batch.micro", NULL},
    {"device_batch_size", "batch.micro", NULL},
    {"per_device_train_batch_size", "batch.micro", NULL},
    {"train_micro_batch_size_per_gpu", "batch.micro", NULL},
    {"gradient_accumulation_steps", "batch.global", "from which, batch.micro and the ranks it follows"},
    {"grad_accum_steps", "batch.global", "from which, batch.micro and the ranks it follows"},
    {"accumulate_grad_batches", "batch.global", "from which, batch.micro and the ranks it follows"},
    {"tokenizer_model", "data.tokenizer", NULL},
    {"tokenizer_path", "data.tokenizer", NULL},
    {"tokenizer_name_or_path", "data.tokenizer", NULL},
    {"tokenizer_file", "data.tokenizer", NULL},
    {"vocab_file", "data.tokenizer", NULL},
    {"data_path", "data.train", NULL},
    {"train_data", "data.train", NULL},
    {"train_data_path", "data.train", NULL},
    {"train_files", "data.train", NULL},
    {"dataset_path", "data.train", NULL},
    {"blend", "data.train", NULL},
    {"valid_data_path", "data.valid", NULL},
    {"validation_files", "data.valid", NULL},
    {"valid_data", "data.valid", NULL},
    {"eval_data", "data.valid", NULL},
    {"num_workers", "data.prefetch", NULL},
    {"reset_attention_mask", "data.document_mask", NULL},
    {"dtype", "precision.compute", NULL},
    {"torch_dtype", "precision.compute", NULL},
    {"mixed_precision", "precision.compute", NULL},
    {"bf16", "precision.compute", "as in precision.compute=bf16"},
    {"fp32", "precision.compute", "as in precision.compute=fp32"},
    {"fp16", "precision.compute", "bf16 or fp32"},
    {"zero_stage", "parallel.zero", NULL},
    {"zero_optimization", "parallel.zero", NULL},
    {"use_distributed_optimizer", "parallel.zero", "1 divides the optimizer state among the ranks"},
    {"save_interval", "checkpoint.every", NULL},
    {"save_steps", "checkpoint.every", NULL},
    {"checkpoint_interval", "checkpoint.every", NULL},
    {"ckpt_interval", "checkpoint.every", NULL},
    {"checkpoint_every", "checkpoint.every", NULL},
    {"save_freq", "checkpoint.every", NULL},
    {"save_every", "checkpoint.every", NULL},
    {"save_total_limit", "checkpoint.keep", NULL},
    {"keep_last", "checkpoint.keep", NULL},
    {"async_save", "checkpoint.async", NULL},
    {"resume_from_checkpoint", "checkpoint.resume", NULL},
    {"resume_from", "checkpoint.resume", NULL},
    {"load", "checkpoint.resume", NULL},
    {"init_checkpoint", "checkpoint.init_from", NULL},
    {"pretrained_checkpoint", "checkpoint.init_from", NULL},
    {"log_interval", "log.every", NULL},
    {"logging_steps", "log.every", NULL},
    {"log_every", "log.every", NULL},
    {"eval_interval", "log.eval_every", NULL},
    {"eval_steps", "log.eval_every", NULL},
    {"eval_freq", "log.eval_every", NULL},
    {"validation_interval", "log.eval_every", NULL},
    {"val_interval", "log.eval_every", NULL},
    {"val_check_interval", "log.eval_every", NULL},
    {"eval_iters", "log.eval_batches", NULL},
    {"limit_val_batches", "log.eval_batches", NULL},
    {"attn_implementation", "attention", NULL},
    {"use_flash_attn", "attention", NULL},
    {"backend", "comm", NULL},
    {"distributed_backend", "comm", NULL},
    {"optimizer", "optim", NULL},
    {"training", "run", NULL},
    {"trainer", "run", NULL},
    {"dataset", "data", NULL},
    {"datasets", "data", NULL},
    {"checkpointing", "checkpoint", NULL},
    {"logging", "log", NULL},
    {"parallelism", "parallel", NULL},
};

enum { FOREIGNERS = sizeof foreigners / sizeof *foreigners };

static int min_of_3(int a, int b, int c)
{
    const int least = a < b ? a : b;
    return least < c ? least : c;
}

/* Levenshtein's distance: insertions, deletions and replacements that turn a into b; large when either is long. */
static int edit_distance(const char *a, const char *b)
{
    const size_t na = strlen(a), nb = strlen(b);
    int row[OPTION_NAME_MAX];
    if (na >= OPTION_NAME_MAX || nb >= OPTION_NAME_MAX) return OPTION_NAME_MAX;
    for (size_t j = 0; j <= nb; j++)
        row[j] = (int)j;
    for (size_t i = 1; i <= na; i++) {
        int diagonal = row[0];
        row[0] = (int)i;
        for (size_t j = 1; j <= nb; j++) {
            const int replaced = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            row[j] = min_of_3(replaced, row[j] + 1, row[j - 1] + 1);
        }
    }
    return row[nb];
}

/* The same name is nearest, then one of which the first words were written, as decay of decay_steps. */
static int name_distance(const char *wrote, const char *name)
{
    const size_t length = strlen(wrote);
    if (length > 0 && strncmp(wrote, name, length) == 0 && (name[length] == '\0' || name[length] == '_'))
        return name[length] == '_';
    return 1 + edit_distance(wrote, name);
}

struct guess guess_start(const char *wrote)
{
    const size_t length = strlen(wrote);
    return (struct guess){.wrote = wrote, .distance = length <= 3 ? 3 : 4 + (length > 9)};
}

void guess_offer(struct guess *guess, const char *candidate)
{
    const int distance = name_distance(guess->wrote, candidate);
    if (distance >= guess->distance) return;
    guess->distance = distance;
    snprintf(guess->best, sizeof guess->best, "%s", candidate);
}

const struct foreign *foreign_at(int i)
{
    return i < FOREIGNERS ? &foreigners[i] : NULL;
}

const struct foreign *foreign_find(const char *name)
{
    char plain[OPTION_NAME_MAX] = "";
    if (strlen(name) >= sizeof plain) return NULL;
    size_t n = 0;
    for (const char *at = name + strspn(name, "-"); *at != '\0'; at++)
        plain[n++] = *at == '-' ? '_' : (char)tolower((unsigned char)*at);
    plain[n] = '\0';
    struct guess guess = guess_start(plain);
    guess.distance--; /* further from a name that we do not have ourselves */
    for (int i = 0; i < FOREIGNERS; i++)
        guess_offer(&guess, foreigners[i].theirs);
    for (int i = 0; i < FOREIGNERS; i++)
        if (strcmp(guess.best, foreigners[i].theirs) == 0) return &foreigners[i];
    return NULL;
}
