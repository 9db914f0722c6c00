/* Attention by a library from outside, for calls of one shape: what attention_choice.cu takes it through. C, for the
 * library's own file and for the stand-in of builds without it.
 *
 * Causal, grouped queries, scale 1/sqrt(D); no start: every token sees its whole sequence so far. Tensors as in ops.h.
 * What runs is queued on the device's stream and repeats bit for bit, whatever the workspace held before. */
#ifndef TATARA_ATTENTION_LIBRARY_H
#define TATARA_ATTENTION_LIBRARY_H

#ifdef __cplusplus
extern "C" {
#endif

#include "ops.h"

struct attention_library {
    const char *name;
    size_t (*version)(void);
    /* Plans both passes. Takes no device memory of its own. ERR_UNSUPPORTED, saying why, where the library has no such
     * attention; *plans is then NULL. */
    int (*open)(struct device *dev, const struct attention_case *c, void **plans);
    void (*close)(void *plans); /* NULL is let pass */
    /* That the plans may ask for; 0 where open refuses the case. Needs no device. */
    size_t (*workspace_bound)(const struct attention_case *c);
    /* That they do ask for. */
    size_t (*workspace_bytes)(const void *plans);
    int (*fwd)(void *plans, void *workspace, struct tensor o, struct tensor lse, struct tensor qkv);
    int (*bwd)(void *plans, void *workspace, struct tensor dqkv, struct tensor dout, struct tensor o,
               struct tensor lse, struct tensor delta, struct tensor qkv);
};

/* cuDNN's, NULL in a build without it: which, is decided when the program is linked. */
const struct attention_library *attention_cudnn(void);

#ifdef __cplusplus
}
#endif

#endif
