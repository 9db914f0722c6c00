/* Paths as people write and read them. */
#ifndef TATARA_PATH_H
#define TATARA_PATH_H

#include <stddef.h>

#define PATH_WHOLE_MAX 4096

/* Copies a path; in one that is ~ or begins with ~/, the home folder (HOME) stands for ~, as in a shell. NULL, or why it
 * cannot be done, for a person. */
const char *path_expand(char *out, size_t size, const char *path);
/* Refuses a path of the command line that begins with ~, which no shell has replaced: as it stands it would be a file or
 * folder of that name. option: whose value it is, without the dashes; NULL: none's. ERR_USAGE. */
int path_check_word(const char *option, const char *path);
/* The path from the root on, for messages: a relative one begins with the working directory. Returns `whole`. */
const char *path_whole(char whole[PATH_WHOLE_MAX], const char *path);

#endif
