/* What a checkpoint says of how it was made beside its configuration: the contents of the data, and the versions of the
 * arithmetic. A JSON object as text: {"data": {…}, "arithmetic": {…}}. */
#ifndef TATARA_RECORD_H
#define TATARA_RECORD_H

#include "comm.h"
#include "data/loader.h"

/* Makes the record of this start; the caller frees *text. valid may be NULL. Not collective, the same on all ranks that have
 * the same machine. */
int record_make(const struct config *cfg, const struct loader *train, const struct loader *valid, struct device *dev,
                struct comm *comm, char **text);

/* A difference between two records: the key ("data.train", "oneDNN") and both values as text, valid during the call. */
struct record_difference {
    const char *key, *before, *now;
    bool data; /* else arithmetic */
};
/* Calls `each` for every difference. A record that is NULL says nothing: no difference is found. */
int record_compare(const char *before, const char *now,
                   int (*each)(void *context, const struct record_difference *difference), void *context);

#endif
