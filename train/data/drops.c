/* The first dropped document of each reason (see drops.h). */
#include "data/drops.h"

#include "err.h"
#include "utf8.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

void drop_note(struct drop_first *first, const struct document *document, const struct document_rules *rules)
{
    const bool whole_file = !document->file->jsonl && rules->text_split == SPLIT_FILE;
    *first = (struct drop_first){.unit = document->unit, .line = whole_file ? 0 : document->record.line};
    document_explain(document, rules, first->words, sizeof first->words);
}

int drops_merge(struct comm *comm, struct drop_first first[DROPS], const int64_t dropped[DROPS])
{
    _Static_assert(sizeof *first % sizeof(int64_t) == 0, "ranks sum it as a list of numbers");
    int64_t before[DROPS]; /* −(the unit), so that the maximum is the first */
    for (int d = 0; d < DROPS; d++)
        before[d] = dropped[d] > 0 ? -first[d].unit : INT64_MIN;
    TRY(comm_max_i64(comm, before, DROPS));
    for (int d = 0; d < DROPS; d++) { /* a unit is of one rank */
        if (dropped[d] == 0 || -first[d].unit != before[d]) memset(&first[d], 0, sizeof first[d]);
    }
    void *numbers = first;
    return comm_sum_i64(comm, numbers, (int)(DROPS * sizeof *first / sizeof(int64_t)));
}

void drop_place(const struct drop_first *first, const struct source_list *list, const int64_t *unit_lines,
                char *place, size_t room)
{
    const int file = list->unit[first->unit].file;
    int64_t line = first->line;
    (void)utf8_show(list->file[file].path, "", place, room - 24);
    for (int64_t u = first->unit - 1; u >= 0 && list->unit[u].file == file; u--)
        line += unit_lines[u];
    const size_t used = strlen(place);
    if (first->line > 0) (void)snprintf(place + used, room - used, ":%" PRId64, line);
}
