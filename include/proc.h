/* What Linux says of memory in /proc. */
#ifndef TATARA_PROC_H
#define TATARA_PROC_H

#include <stddef.h>

/* The line "Name:   123 kB" of a file such as /proc/meminfo, in bytes; name has the colon. 0 when it is not there. */
size_t proc_bytes(const char *path, const char *name);

#endif
