/* What a checkpoint says of its data and its arithmetic. No state, no threads. */
#include "record.h"

#include "err.h"
#include "ops.h"
#include "run.h"

#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define TEXT_MAX 256

/* A mixture: each dataset's share and what is in it, wherever it lies. */
static json_t *describe_sets(const struct dataset_list *sets, const struct loader *loader)
{
    json_t *list = json_array();
    double total = 0;
    for (int d = 0; loader && d < sets->n; d++)
        total += sets->entry[d].weight;
    for (int d = 0; loader && d < sets->n; d++) {
        char fingerprint[20];
        snprintf(fingerprint, sizeof fingerprint, "%016" PRIx64, loader_fingerprint(loader, d));
        (void)json_array_append_new(list, json_pack("{s:s, s:s, s:f}", "path", sets->entry[d].path, "fingerprint",
                                                    fingerprint, "share", sets->entry[d].weight / total));
    }
    return list;
}

static json_t *describe_arithmetic(const struct config *cfg, struct device *dev, struct comm *comm)
{
    char libc[TEXT_MAX] = "", device[TEXT_MAX], transport[TEXT_MAX];
    if (confstr(_CS_GNU_LIBC_VERSION, libc, sizeof libc) == 0) snprintf(libc, sizeof libc, "unknown");
    dev->table->arithmetic(dev, device, sizeof device);
    comm_describe(comm, transport, sizeof transport);
    json_t *all = json_pack("{s:s, s:s, s:s}", "program", run_version, "C library", libc, "device", device);
    if (all && cfg->parallel.reduce == REDUCE_FAST) /* then the sums depend on who adds them */
        (void)json_object_set_new(all, "ranks",
                                  json_sprintf("%d, %s", comm->ranks, comm->ranks > 1 ? transport : "alone"));
    return all;
}

int record_make(const struct config *cfg, const struct loader *train, const struct loader *valid, struct device *dev,
                struct comm *comm, char **text)
{
    json_t *all =
        json_pack("{s:{s:o, s:o}, s:o}", "data", "train", describe_sets(&cfg->data.train, train), "valid",
                  describe_sets(&cfg->data.valid, valid), "arithmetic", describe_arithmetic(cfg, dev, comm));
    *text = all ? json_dumps(all, JSON_COMPACT | JSON_SORT_KEYS | JSON_REAL_PRECISION(17)) : NULL;
    json_decref(all);
    if (!*text) FAIL(ERR_SYSTEM, "out of memory for the record of data and arithmetic");
    return 0;
}

/* A version, or a mixture as "shards/ja 60% (1a2b3c4d5e6f7081), …"; with_paths false: only what counts. NULL: no memory. The
 * caller frees it. */
static char *value_text(const json_t *value, bool with_paths)
{
    char *text = NULL;
    size_t bytes = 0;
    if (json_is_string(value)) return strdup(json_string_value(value));
    FILE *out = open_memstream(&text, &bytes);
    if (!out) return NULL;
    if (json_array_size(value) == 0) fputs("none", out);
    for (size_t i = 0; i < json_array_size(value); i++) {
        const json_t *set = json_array_get(value, i);
        const char *path = json_string_value(json_object_get(set, "path"));
        const char *fingerprint = json_string_value(json_object_get(set, "fingerprint"));
        fprintf(out, "%s%s%s%.6g%% (%s)", i > 0 ? ", " : "", with_paths && path ? path : "", with_paths ? " " : "",
                100 * json_number_value(json_object_get(set, "share")), fingerprint ? fingerprint : "?");
    }
    if (fclose(out) == 0) return text;
    free(text);
    return NULL;
}

/* Whether both are the same but for where the data lie; false, too, without memory. */
static bool same_value(const json_t *a, const json_t *b)
{
    char *x = value_text(a, false), *y = value_text(b, false);
    const bool same = x && y && strcmp(x, y) == 0;
    free(x);
    free(y);
    return same;
}

static int compare_objects(json_t *before, json_t *now, bool data,
                           int (*each)(void *context, const struct record_difference *difference), void *context)
{
    int rc = 0;
    const char *key = NULL;
    json_t *value = NULL;
    json_object_foreach(now, key, value)
    {
        json_t *old = json_object_get(before, key);
        if (!old || same_value(old, value)) continue;
        char name[TEXT_MAX], *a = value_text(old, true), *b = value_text(value, true);
        snprintf(name, sizeof name, "%s%s", data ? "data." : "", key);
        if (!a || !b) {
            rc = err_raise(ERR_SYSTEM, __FILE__, __LINE__, "out of memory to compare the records");
        } else {
            rc = each(context, &(struct record_difference){.key = name, .before = a, .now = b, .data = data});
        }
        free(a);
        free(b);
        if (rc != 0) break;
    }
    return rc;
}

int record_compare(const char *before, const char *now,
                   int (*each)(void *context, const struct record_difference *difference), void *context)
{
    json_t *old = before ? json_loads(before, 0, NULL) : NULL, *new = now ? json_loads(now, 0, NULL) : NULL;
    int rc = 0;
    if (old && new) {
        rc = compare_objects(json_object_get(old, "data"), json_object_get(new, "data"), true, each, context);
        if (rc == 0)
            rc = compare_objects(json_object_get(old, "arithmetic"), json_object_get(new, "arithmetic"), false, each,
                                 context);
    }
    json_decref(old);
    json_decref(new);
    return rc;
}
