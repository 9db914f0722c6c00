/* A byte buffer that grows by half its size, so that appending costs O(1) a byte. */
#include "data/buffer.h"

#include "err.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int buffer_reserve(struct buffer *buffer, size_t bytes)
{
    if (bytes <= buffer->capacity - buffer->used) return 0;
    if (bytes > SIZE_MAX / 2 - buffer->used)
        FAIL(ERR_SYSTEM, "a buffer of more than half the address space is needed");
    size_t capacity = buffer->capacity + buffer->capacity / 2 + 256;
    if (capacity < buffer->used + bytes) capacity = buffer->used + bytes;
    char *data = realloc(buffer->data, capacity);
    if (!data) FAIL(ERR_SYSTEM, "out of memory: %zu bytes for a buffer", capacity);
    buffer->data = data;
    buffer->capacity = capacity;
    return 0;
}

int buffer_add(struct buffer *buffer, const void *data, size_t bytes)
{
    TRY(buffer_reserve(buffer, bytes));
    if (bytes > 0) memcpy(buffer->data + buffer->used, data, bytes);
    buffer->used += bytes;
    return 0;
}

void buffer_free(struct buffer *buffer)
{
    free(buffer->data);
    *buffer = (struct buffer){.data = NULL, .used = 0, .capacity = 0};
}
