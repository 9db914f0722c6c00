/* What Linux says of memory in /proc. */
#include "proc.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

size_t proc_bytes(const char *path, const char *name)
{
    char line[256];
    size_t kib = 0;
    FILE *file = fopen(path, "r");
    while (file && fgets(line, sizeof line, file)) {
        if (strncmp(line, name, strlen(name)) == 0) kib = strtoul(line + strlen(name), NULL, 10);
    }
    if (file) fclose(file);
    return kib * 1024;
}
