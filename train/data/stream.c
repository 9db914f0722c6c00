/* Reading files as text (see stream.h). */
#include "data/stream.h"

#include "data/buffer.h"
#include "data/packing.h"
#include "err.h"
#include "fs.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

#define CHUNK_BYTES ((size_t)256 * 1024)
#define REMEDY "restore the file, or leave it out"

struct stream {
    char *path;
    int fd;
    uint64_t file_bytes;
    unsigned char *chunk; /* bytes [at, end) of the file are still to be unpacked, or to be given as they are */
    size_t at, end;
    struct unpacker *unpacker; /* NULL: the file is not compressed */
    const char *instead;       /* as in packing_find */
    int64_t members;           /* that have begun */
    bool in_member;            /* the last of them has not ended */
    bool full;                 /* the last call filled the caller's memory: the unpacker may hold more */
    struct buffer peeked;      /* text [given, used) that comes before all else */
    size_t given;
};

/* Bytes as they are in the file. */
static int read_file(struct stream *stream, void *data, size_t bytes, size_t *got)
{
    ssize_t n;
    do {
        n = read(stream->fd, data, bytes);
    } while (n < 0 && errno == EINTR);
    if (n < 0) FAIL_FS("cannot read", stream->path, ERR_DATA, REMEDY);
    stream->file_bytes += (uint64_t)n;
    *got = (size_t)n;
    return 0;
}

static int start(struct stream *stream)
{
    size_t got = 1;
    stream->fd = open(stream->path, O_RDONLY | O_CLOEXEC);
    if (stream->fd < 0) FAIL_FS("cannot open", stream->path, ERR_DATA, REMEDY);
    stream->chunk = malloc(CHUNK_BYTES);
    if (!stream->chunk) FAIL(ERR_SYSTEM, "out of memory");
    while (got > 0 && stream->end < PACKING_HEAD_BYTES) { /* a pipe may give them one by one */
        TRY(read_file(stream, stream->chunk + stream->end, PACKING_HEAD_BYTES - stream->end, &got));
        stream->end += got;
    }
    const struct packing *packing =
        packing_find(stream->path, (const char *)stream->chunk, stream->end, &stream->instead);
    return packing ? unpacker_open(&stream->unpacker, packing) : 0;
}

int stream_open(struct stream **out, const char *path)
{
    *out = NULL;
    struct stream *stream = calloc(1, sizeof *stream);
    if (!stream) FAIL(ERR_SYSTEM, "out of memory");
    stream->fd = -1;
    stream->path = strdup(path);
    const int rc = stream->path ? start(stream) : err_raise(ERR_SYSTEM, __FILE__, __LINE__, "out of memory");
    if (rc == 0) {
        *out = stream;
    } else {
        stream_close(stream);
    }
    return rc;
}

void stream_close(struct stream *stream)
{
    if (!stream) return;
    if (stream->fd >= 0) (void)close(stream->fd);
    unpacker_close(stream->unpacker);
    buffer_free(&stream->peeked);
    free(stream->chunk);
    free(stream->path);
    free(stream);
}

bool stream_is_packed(const struct stream *stream)
{
    return stream->unpacker != NULL;
}

const char *stream_holds_instead(const struct stream *stream)
{
    return stream->instead;
}

int stream_seek(struct stream *stream, uint64_t offset)
{
    if (stream->unpacker) FAIL(ERR_DATA, "%s has become a compressed file meanwhile; start again", stream->path);
    if (lseek(stream->fd, (off_t)offset, SEEK_SET) < 0) FAIL(ERR_DATA, "%s: %s", stream->path, strerror(errno));
    stream->at = stream->end = 0;
    return 0;
}

/* Fills the chunk, which is empty; it stays so at the end of the file. */
static int fill_chunk(struct stream *stream)
{
    stream->at = 0;
    return read_file(stream, stream->chunk, CHUNK_BYTES, &stream->end);
}

/* Passes over zeros between members. *end when the file ends there, as it may. */
static int skip_padding(struct stream *stream, bool *end)
{
    for (;;) {
        while (stream->members > 0 && stream->at < stream->end && stream->chunk[stream->at] == 0)
            stream->at++;
        if (stream->at < stream->end) return 0;
        TRY(fill_chunk(stream));
        *end = stream->end == 0;
        if (*end && stream->members == 0) FAIL(ERR_DATA, "%s is empty or truncated; " REMEDY, stream->path);
        if (*end) return 0;
    }
}

static int unpack(struct stream *stream, char *data, size_t bytes, size_t *got)
{
    *got = 0;
    while (*got == 0) {
        bool end = false, ended = false;
        if (!stream->in_member) {
            TRY(skip_padding(stream, &end));
            if (end) return 0;
            stream->members++;
        } else if (stream->at == stream->end && !stream->full) {
            TRY(fill_chunk(stream));
            if (stream->end == 0) FAIL(ERR_DATA, "%s is truncated; " REMEDY, stream->path);
        }
        struct packing_io io = {stream->chunk + stream->at, stream->end - stream->at, data, bytes};
        TRY(unpacker_run(stream->unpacker, &io, stream->path, &ended));
        stream->at = stream->end - io.in_bytes;
        *got = bytes - io.out_bytes;
        stream->in_member = !ended;
        stream->full = *got == bytes;
    }
    return 0;
}

/* Text that was not peeked at. */
static int read_text(struct stream *stream, char *data, size_t bytes, size_t *got)
{
    if (stream->unpacker) return unpack(stream, data, bytes, got);
    const size_t left = stream->end - stream->at;
    if (left == 0) return read_file(stream, data, bytes, got);
    *got = left < bytes ? left : bytes;
    memcpy(data, stream->chunk + stream->at, *got);
    stream->at += *got;
    return 0;
}

int stream_peek(struct stream *stream, size_t wanted, char **text, size_t *bytes)
{
    struct buffer *peeked = &stream->peeked;
    size_t got = 1;
    TRY(buffer_reserve(peeked, wanted));
    while (got > 0 && peeked->used - stream->given < wanted) {
        const size_t more = wanted - (peeked->used - stream->given);
        TRY(buffer_reserve(peeked, more));
        TRY(read_text(stream, peeked->data + peeked->used, more, &got));
        peeked->used += got;
    }
    *text = peeked->data + stream->given;
    *bytes = peeked->used - stream->given;
    return 0;
}

int stream_read(struct stream *stream, char *data, size_t bytes, size_t *got)
{
    const size_t left = stream->peeked.used - stream->given;
    if (left == 0) return read_text(stream, data, bytes, got);
    *got = left < bytes ? left : bytes;
    memcpy(data, stream->peeked.data + stream->given, *got);
    stream->given += *got;
    return 0;
}

uint64_t stream_file_bytes(const struct stream *stream)
{
    return stream->file_bytes;
}
