/* What a person probably meant by a key or a word that there is not; for train/config*.c only. */
#ifndef TATARA_CONFIG_GUESS_H
#define TATARA_CONFIG_GUESS_H

#include "config_table.h"

/* The candidate nearest to what was written, if it is near enough to have been meant. */
struct guess {
    const char *wrote;
    char best[OPTION_NAME_MAX]; /* "" so far: none */
    int distance;
};

struct guess guess_start(const char *wrote);
void guess_offer(struct guess *guess, const char *candidate);

/* What another program calls one of our options or sections. */
struct foreign {
    const char *theirs; /* in small letters */
    const char *ours;   /* "optim.lr", or a section: "optim" */
    const char *note;   /* what else is to be known, or NULL */
};

/* The rows of the table; NULL after the last. */
const struct foreign *foreign_at(int i);
/* What other programs mean by this name, also where it is misspelt a little; NULL: nothing known. Capitals and - instead
 * of _ make no difference. */
const struct foreign *foreign_find(const char *name);

#endif
