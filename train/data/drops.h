/* The first document that was dropped for each reason, over all ranks, for the report. */
#ifndef TATARA_DROPS_H
#define TATARA_DROPS_H

#include "comm.h"
#include "data/document.h"

/* Made of whole 64-bit words: ranks sum them. */
struct drop_first {
    int64_t unit, line; /* line 0: the record is the whole file */
    char words[368];    /* what is wrong and the remedy */
};

/* Keeps what is known of the document, which is the first of this rank that was dropped for its reason. */
void drop_note(struct drop_first *first, const struct document *document, const struct document_rules *rules);
/* Leaves on every rank the first of all ranks, by the order of the units; dropped: documents of this rank by reason, not
 * yet summed. Collective. */
int drops_merge(struct comm *comm, struct drop_first first[DROPS], const int64_t dropped[DROPS]);
/* Writes where it is: PATH or PATH:LINE. unit_lines: of all ranks. */
void drop_place(const struct drop_first *first, const struct source_list *list, const int64_t *unit_lines,
                char *place, size_t room);

#endif
