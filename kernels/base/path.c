/* Paths as people write and read them. No state, no threads. */
#include "path.h"

#include "err.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

const char *path_expand(char *out, size_t size, const char *path)
{
    const char *home = "", *rest = path;
    if (path[0] == '~') {
        home = getenv("HOME");
        rest = path + 1;
        if (rest[0] != '/' && rest[0] != '\0')
            return "only ~ and ~/… stand for a home folder, your own; write another's path whole, or a file of such "
                   "a "
                   "name as ./~…";
        if (!home || home[0] != '/') return "~ is your home folder, which HOME does not say; write the path whole";
    }
    const int bytes = snprintf(out, size, "%s%s", home, rest);
    return bytes >= 0 && (size_t)bytes < size ? NULL : "too long; use a shorter path, or a symbolic link";
}

int path_check_word(const char *option, const char *path)
{
    if (path[0] != '~') return 0;
    FAIL(ERR_USAGE,
         "%s%s%s%s: the shell leaves ~ as it is within quotes and after '='; write ~/… without them, or the path "
         "whole, "
         "and a file of such a name as ./~…",
         option ? "--" : "", option ? option : "", option ? ": " : "", path);
}

const char *path_whole(char whole[PATH_WHOLE_MAX], const char *path)
{
    char folder[PATH_WHOLE_MAX / 2];
    const char *rest = strncmp(path, "./", 2) == 0 ? path + 2 : path;
    const bool relative = path[0] != '/' && getcwd(folder, sizeof folder);
    snprintf(whole, PATH_WHOLE_MAX, "%s%s%s", relative ? folder : "", relative && strcmp(folder, "/") != 0 ? "/" : "",
             relative ? rest : path);
    return whole;
}
