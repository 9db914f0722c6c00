/* A file read from its beginning to its end, decompressed on the way when its name ends in .gz or .zst.
 *
 * A damaged or truncated file is ERR_DATA, never a shorter text. Threads: one at a time. */
#ifndef TATARA_STREAM_H
#define TATARA_STREAM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct stream;

/* Does stream_open decompress a file of this name? */
bool stream_is_compressed(const char *path);
int stream_open(struct stream **out, const char *path);
void stream_close(struct stream *stream);
/* Goes to a byte of a file that is not compressed. */
int stream_seek(struct stream *stream, uint64_t offset);
/* Up to `bytes` bytes of text; *got is 0 at the end only. */
int stream_read(struct stream *stream, char *data, size_t bytes, size_t *got);
/* Bytes read from the file so far, before decompression. */
uint64_t stream_file_bytes(const struct stream *stream);

#endif
