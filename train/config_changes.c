/* What differs between two configurations, and what that means for a run that resumes. No state, no threads. */
#include "config.h"

#include "config_table.h"
#include "err.h"

#include <stdlib.h>
#include <string.h>

int config_compare(const struct config *before, const struct config *now,
                   int (*each)(void *context, const struct config_difference *difference), void *context)
{
    int rc = 0;
    for (int i = 0; i < OPTION_COUNT && rc == 0; i++) {
        const struct option *option = option_at(i);
        char name[OPTION_NAME_MAX];
        char *old = option_text(option, before), *new = option_text(option, now);
        option_name(option, name);
        if (old == NULL || new == NULL) {
            rc = err_raise(ERR_SYSTEM, __FILE__, __LINE__, "no memory to compare the configurations");
        } else if (strcmp(old, new) != 0) {
            rc = each(context, &(struct config_difference){.name = name,
                                                           .change = option->change.kind,
                                                           .effect = option->change.effect,
                                                           .before = old,
                                                           .now = new});
        }
        free(old);
        free(new);
    }
    return rc;
}

/* The next word of a list divided by commas and blanks, and its length; NULL when there is none. */
static const char *next_word(const char *at, size_t *length)
{
    at += strspn(at, ", ");
    *length = strcspn(at, ", ");
    return *length > 0 ? at : NULL;
}

int config_check_allowed(const struct config *cfg)
{
    size_t length = 0;
    for (const char *at = cfg->run.allow_changes; (at = next_word(at, &length)) != NULL; at += length) {
        bool known = false;
        for (int i = 0; i < OPTION_COUNT && !known; i++) {
            char name[OPTION_NAME_MAX];
            option_name(option_at(i), name);
            known = option_at(i)->change.kind == CHANGE_FUNCTION && strlen(name) == length &&
                    strncmp(at, name, length) == 0;
        }
        if (known) continue;
        FAIL(ERR_CONFIG,
             "run.allow_changes names %.*s, which is no option that it is needed for; those are the ones with "
             "\"run.allow_changes\" in `tatara train --help-config`",
             (int)length, at);
    }
    return 0;
}

bool config_allows(const struct config *cfg, const char *name)
{
    size_t length = 0;
    for (const char *at = cfg->run.allow_changes; (at = next_word(at, &length)) != NULL; at += length) {
        if (strlen(name) == length && strncmp(at, name, length) == 0) return true;
    }
    return false;
}
