/* YAML text into struct config; for train/config*.c only. */
#ifndef TATARA_CONFIG_YAML_H
#define TATARA_CONFIG_YAML_H

#include "config_table.h"

/* Where an option was set: a line of the file, or one of these. */
enum { CONFIG_LINE_DEFAULT = 0, CONFIG_LINE_WORD = -1 };

/* Reads a whole configuration over what cfg holds, and notes in `line` where each option was set. `name` stands for the
 * text in messages. ERR_CONFIG. */
int config_yaml_read(struct config *cfg, int line[OPTION_COUNT], const char *name, const char *text, size_t bytes);
/* The same for one key=value word. */
int config_yaml_word(struct config *cfg, int line[OPTION_COUNT], const char *word);

#endif
