/* The layout of a model's parameters: which there are, and where each lies in its unit.
 *
 * A unit is the flat array that is reduced, updated and gathered as one: unit 0 holds the embeddings, units 1 … layers a
 * block each, the last one the final norm and the classifier. Every unit is padded so that it divides evenly among
 * `shards` ranks, and the classifier so that its products have rows at even places; padding is zero and stays zero. */
#ifndef TATARA_PARAMS_H
#define TATARA_PARAMS_H

#include "config.h"
#include "tensor.h"

enum param_id {
    PARAM_WTE,
    PARAM_WPE,
    PARAM_NORM1_W,
    PARAM_NORM1_B,
    PARAM_Q_W,
    PARAM_K_W,
    PARAM_V_W,
    PARAM_QKV_B,
    PARAM_Q_NORM_W,
    PARAM_K_NORM_W,
    PARAM_O_W,
    PARAM_O_B,
    PARAM_NORM2_W,
    PARAM_NORM2_B,
    PARAM_GATE_W,
    PARAM_UP_W,
    PARAM_UP_B,
    PARAM_DOWN_W,
    PARAM_DOWN_B,
    PARAM_NORMF_W,
    PARAM_NORMF_B,
    PARAM_LM_HEAD,
    PARAM_IDS
};

enum param_init { INIT_NORMAL, INIT_OUTPUT, INIT_ONE, INIT_ZERO };

struct param {
    enum param_id id;
    int unit;
    char name[96];
    int ndim; /* 1 or 2 */
    int64_t shape[TENSOR_MAX_DIMS];
    int64_t offset, elems; /* within the unit, in elements */
    bool decay;
    enum param_init init;
};

struct unit {
    int first, count; /* its parameters */
    int64_t elems;    /* padded */
};

struct params {
    int n, n_units;
    struct param *param; /* by unit, then by offset */
    struct unit *unit;
    int shards;
    enum param_id classifier; /* the token embedding when they are tied */
    int64_t elems;            /* parameters in the model, without padding */
    int64_t unit_max;         /* elements of the largest layer unit */
    double init_std, init_output_std;
    uint64_t seed;
    uint64_t id; /* hash of all names and shapes: equal for models whose checkpoints fit each other */
};

/* Builds the layout for cfg->model with `vocab_size` rows, cut among `shards` ranks. Fails with ERR_SYSTEM. */
int params_open(struct params *params, const struct config *cfg, int64_t vocab_size, int shards);
void params_close(struct params *params);
/* The parameter `id` of a unit; NULL when this model has none. */
const struct param *params_find(const struct params *params, int unit, enum param_id id);
/* Rows that the classifier's matrix has room for: vocab_size of parameters, and zeros behind them. */
int64_t params_classifier_rows(int64_t vocab_size);
/* A parameter as a tensor inside its unit's flat array. */
struct tensor params_view(const struct param *param, struct tensor unit);
/* Elements of one rank's shard of a unit. */
int64_t params_shard(const struct params *params, int unit);
/* Writes the initial values of elements [begin, end) of a unit: a pure function of seed, parameter and element, so the
 * same on any number of ranks. */
void params_init(const struct params *params, int unit, int64_t begin, int64_t end, float *out);

#endif
