/* A file, or what comes through a pipe, read from its beginning to its end, decompressed on the way: gzip, Zstandard, xz and
 * bzip2, by the first bytes or else by the name's ending. They may hold several members, one after the other, with zeros
 * behind each, as tapes leave them; anything else behind a whole member is an error.
 *
 * A damaged or truncated file is ERR_DATA, never a shorter text. Threads: one at a time. */
#ifndef TATARA_STREAM_H
#define TATARA_STREAM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct stream;

int stream_open(struct stream **out, const char *path);
void stream_close(struct stream *stream);
bool stream_is_packed(const struct stream *stream);
/* What the file holds, where its name's ending says that it is compressed in another way; else NULL. */
const char *stream_holds_instead(const struct stream *stream);
/* The next `wanted` bytes of text, fewer only at the end, which stream_read gives again; *text lives until then. */
int stream_peek(struct stream *stream, size_t wanted, char **text, size_t *bytes);
/* Goes to a byte of a file that is not compressed. ERR_DATA when it cannot be read from the middle. */
int stream_seek(struct stream *stream, uint64_t offset);
/* Up to `bytes` bytes of text; *got is 0 at the end only. */
int stream_read(struct stream *stream, char *data, size_t bytes, size_t *got);
/* Bytes read from the file so far, before decompression. */
uint64_t stream_file_bytes(const struct stream *stream);

#endif
