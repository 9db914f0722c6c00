/* A dataset on disk: a single shard, or a folder of shards with the list of them that `tatara prepare` writes last.
 *
 * The list (dataset.json) makes a missing or foreign shard an error, and not a smaller dataset. A folder without one,
 * put together by hand, is taken as it is. Threads: none of this is shared. */
#ifndef TATARA_DATASET_H
#define TATARA_DATASET_H

#include "data/files.h"

#include <jansson.h>

#define DATASET_LIST "dataset.json"
#define DATASET_SUFFIX ".h5"

/* The shards of the dataset at `path`, in their order. ERR_DATA when there are none or the list does not agree. */
int dataset_shards(struct path_list *shards, const char *path);
/* What dataset.json says of the dataset at `path`, to be freed with json_decref; NULL for what has none. ERR_DATA when it
 * cannot be read. */
int dataset_report(json_t **report, const char *path);
/* Writes the list of the folder: `report` with an array "shards" of {file, bytes, tokens, documents} added, made by
 * opening each shard there. Takes no ownership of report. */
int dataset_write_list(const char *folder, json_t *report);

#endif
