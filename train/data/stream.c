/* Reading plain, gzip (RFC 1952) and Zstandard (RFC 8878) files; both formats may hold several members, one after the
 * other. Anything after the last whole member is an error. */
#include "data/stream.h"

#include "err.h"
#include "fs.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>
#include <zlib.h>
#include <zstd.h>

#define CHUNK_BYTES ((size_t)256 * 1024)
#define REMEDY "restore the file, or leave it out"

enum packing { PACKING_NONE, PACKING_GZIP, PACKING_ZSTD };

struct stream {
    char *path;
    enum packing packing;
    int fd;
    uint64_t file_bytes;
    unsigned char *chunk; /* packed bytes [at, end) are still to be unpacked */
    size_t at, end;
    bool in_member; /* a member has begun and not ended */
    bool full;      /* the last call filled the caller's memory: the library may hold more */
    z_stream gzip;
    ZSTD_DStream *zstd;
};

static enum packing packing_of(const char *path)
{
    const char *ending = strrchr(path, '.');
    if (ending && strcmp(ending, ".gz") == 0) return PACKING_GZIP;
    if (ending && strcmp(ending, ".zst") == 0) return PACKING_ZSTD;
    return PACKING_NONE;
}

bool stream_is_compressed(const char *path)
{
    return packing_of(path) != PACKING_NONE;
}

static int start(struct stream *stream)
{
    stream->fd = open(stream->path, O_RDONLY | O_CLOEXEC);
    if (stream->fd < 0) FAIL_FS("cannot open", stream->path, ERR_DATA, REMEDY);
    if (stream->packing == PACKING_NONE) return 0;
    stream->chunk = malloc(CHUNK_BYTES);
    if (!stream->chunk) FAIL(ERR_SYSTEM, "out of memory");
    if (stream->packing == PACKING_ZSTD) {
        stream->zstd = ZSTD_createDStream();
        if (!stream->zstd) FAIL(ERR_SYSTEM, "out of memory for Zstandard");
    } else if (inflateInit2(&stream->gzip, 15 + 16) != Z_OK) { /* 15: any window; 16: gzip only */
        FAIL(ERR_SYSTEM, "out of memory for gzip");
    }
    return 0;
}

int stream_open(struct stream **out, const char *path)
{
    *out = NULL;
    struct stream *stream = calloc(1, sizeof *stream);
    if (!stream) FAIL(ERR_SYSTEM, "out of memory");
    stream->fd = -1;
    stream->packing = packing_of(path);
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
    if (stream->packing == PACKING_GZIP) (void)inflateEnd(&stream->gzip);
    if (stream->zstd) (void)ZSTD_freeDStream(stream->zstd);
    free(stream->chunk);
    free(stream->path);
    free(stream);
}

int stream_seek(struct stream *stream, uint64_t offset)
{
    ASSERT(stream->packing == PACKING_NONE);
    if (lseek(stream->fd, (off_t)offset, SEEK_SET) < 0) FAIL(ERR_DATA, "%s: %s", stream->path, strerror(errno));
    return 0;
}

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

/* Unpacks some of the chunk; *ended when a member ended. */
static int unpack_gzip(struct stream *stream, void *data, size_t bytes, size_t *got, bool *ended)
{
    z_stream *z = &stream->gzip;
    z->next_in = stream->chunk + stream->at;
    z->avail_in = (uInt)(stream->end - stream->at);
    z->next_out = data;
    z->avail_out = bytes < UINT32_MAX ? (uInt)bytes : UINT32_MAX;
    const uInt room = z->avail_out;
    const int status = inflate(z, Z_NO_FLUSH);
    stream->at = stream->end - z->avail_in;
    *got = room - z->avail_out;
    *ended = status == Z_STREAM_END;
    if (*ended && inflateReset(z) != Z_OK) FAIL(ERR_SYSTEM, "gzip cannot go on in %s", stream->path);
    if (status != Z_OK && status != Z_STREAM_END && status != Z_BUF_ERROR) {
        FAIL(ERR_DATA, "%s is damaged or no gzip file: %s; " REMEDY, stream->path,
             z->msg ? z->msg : "unknown reason");
    }
    return 0;
}

static int unpack_zstd(struct stream *stream, void *data, size_t bytes, size_t *got, bool *ended)
{
    ZSTD_inBuffer in = {.src = stream->chunk, .size = stream->end, .pos = stream->at};
    ZSTD_outBuffer out = {.dst = data, .size = bytes, .pos = 0};
    const size_t status = ZSTD_decompressStream(stream->zstd, &out, &in);
    stream->at = in.pos;
    *got = out.pos;
    *ended = status == 0;
    if (ZSTD_isError(status)) {
        FAIL(ERR_DATA, "%s is damaged or no Zstandard file: %s; " REMEDY, stream->path, ZSTD_getErrorName(status));
    }
    return 0;
}

int stream_read(struct stream *stream, char *data, size_t bytes, size_t *got)
{
    if (stream->packing == PACKING_NONE) return read_file(stream, data, bytes, got);
    *got = 0;
    while (*got == 0) {
        if (stream->at == stream->end && !(stream->in_member && stream->full)) {
            stream->at = 0;
            TRY(read_file(stream, stream->chunk, CHUNK_BYTES, &stream->end));
            if (stream->end == 0 && (stream->in_member || stream->file_bytes == 0)) {
                FAIL(ERR_DATA, "%s is truncated; " REMEDY, stream->path);
            }
            if (stream->end == 0) return 0;
        }
        bool ended = false;
        TRY(stream->packing == PACKING_GZIP ? unpack_gzip(stream, data, bytes, got, &ended)
                                            : unpack_zstd(stream, data, bytes, got, &ended));
        stream->in_member = !ended;
        stream->full = *got == bytes;
    }
    return 0;
}

uint64_t stream_file_bytes(const struct stream *stream)
{
    return stream->file_bytes;
}
