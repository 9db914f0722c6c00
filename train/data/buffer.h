/* A byte buffer that grows: for tokens, offsets and text while a shard is being made. */
#ifndef TATARA_BUFFER_H
#define TATARA_BUFFER_H

#include <stddef.h>

/* Zero-initialised is empty. */
struct buffer {
    char *data;
    size_t used, capacity; /* bytes */
};

/* Makes room for `bytes` more. ERR_SYSTEM when there is no memory. */
int buffer_reserve(struct buffer *buffer, size_t bytes);
/* Appends `bytes`. */
int buffer_add(struct buffer *buffer, const void *data, size_t bytes);
void buffer_free(struct buffer *buffer);

#endif
