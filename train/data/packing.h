/* The formats of compressed files: how they are known, and unpacking them member by member.
 *
 * Threads: an unpacker belongs to one thread at a time. */
#ifndef TATARA_PACKING_H
#define TATARA_PACKING_H

#include <stdbool.h>
#include <stddef.h>

/* As many bytes of a file as packing_find looks at. */
enum { PACKING_HEAD_BYTES = 64 };

struct packing; /* a format */

/* The format that the file's first bytes show, else that its ending names; NULL: it is not compressed. *instead says what
 * the file holds where its ending is that of something else, else it is NULL. */
const struct packing *packing_find(const char *path, const char *head, size_t head_bytes, const char **instead);
/* The file's name without the ending of a compressed file, in bytes. */
size_t packing_stem_bytes(const char *path);

struct unpacker;

/* What an unpacker takes from and writes to; both move on. */
struct packing_io {
    unsigned char *in;
    size_t in_bytes;
    char *out;
    size_t out_bytes;
};

int unpacker_open(struct unpacker **out, const struct packing *packing);
/* Unpacks until either side is used up or a member has ended (*ended); then the next call begins another one. ERR_DATA or
 * ERR_SYSTEM, naming the file as `path`. */
int unpacker_run(struct unpacker *unpacker, struct packing_io *io, const char *path, bool *ended);
void unpacker_close(struct unpacker *unpacker);

#endif
