/* What a file holds, by its name and where that says nothing by its content. */
#ifndef TATARA_SOURCE_LOOK_H
#define TATARA_SOURCE_LOOK_H

#include "data/source.h"

enum look {
    LOOK_TEXT, /* text or JSON lines */
    LOOK_JSON, /* JSON of another kind: configurations, lists */
    LOOK_OTHER
};

/* Looks into file->path and sets file's jsonl and packed; file->pipe is left open at its beginning. asked: the person named the file, so that it is text, or an
 * error which says what it is. */
int source_look(struct source_file *file, const struct source_rules *rules, bool asked, enum look *look);

/* Makes the words of list->fields from the first line of file->pipe; NULL when it is no JSON object. */
int source_look_fields(const struct source_file *file, char **words);

#endif
