/* gzip (RFC 1952), Zstandard (RFC 8878), xz and bzip2 (see packing.h): one row and one short function each. */
#include "data/packing.h"

#include "err.h"
#include "utf8.h"

#include <bzlib.h>
#include <limits.h>
#include <lzma.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <zlib.h>
#include <zstd.h>
#include <zstd_errors.h>

#define REMEDY "restore the file, or leave it out"

/* Windows of up to 2 GiB, which `zstd --long=31` makes; memory is taken as the text fills it. */
#define ZSTD_WINDOW_LOG_MAX 31

struct unpacker {
    const struct packing *packing;
    bool in_member; /* of gzip, xz and bzip2: the library holds state that `end` frees */
    z_stream gzip;
    ZSTD_DStream *zstd;
    lzma_stream xz;
    bz_stream bzip2;
};

/* What a format's function found. */
enum outcome { WENT_ON, ENDED, DAMAGED, NO_MEMORY, WINDOW_TOO_LARGE, UNSUPPORTED };

struct packing {
    const char *name, *endings[2];
    size_t magic_at, magic_bytes;
    const char *magic;
    enum outcome (*run)(struct unpacker *u, struct packing_io *io);
    void (*end)(struct unpacker *u); /* frees what a member needed; NULL: nothing */
};

static unsigned at_most(size_t bytes)
{
    return bytes < UINT_MAX ? (unsigned)bytes : UINT_MAX;
}

/* Moves io on, to where the library left it. */
static void move_on(struct packing_io *io, size_t in_used, size_t out_used)
{
    io->in += in_used;
    io->in_bytes -= in_used;
    io->out += out_used;
    io->out_bytes -= out_used;
}

static void end_gzip(struct unpacker *u)
{
    (void)inflateEnd(&u->gzip);
}

static enum outcome run_gzip(struct unpacker *u, struct packing_io *io)
{
    z_stream *z = &u->gzip;
    if (!u->in_member) {
        *z = (z_stream){.next_in = NULL};
        if (inflateInit2(z, 15 + 16) != Z_OK) return NO_MEMORY; /* 15: any window; 16: gzip only */
    }
    const unsigned in = at_most(io->in_bytes), out = at_most(io->out_bytes);
    z->next_in = io->in;
    z->avail_in = in;
    z->next_out = (unsigned char *)io->out;
    z->avail_out = out;
    const int status = inflate(z, Z_NO_FLUSH);
    move_on(io, in - z->avail_in, out - z->avail_out);
    return status == Z_STREAM_END                    ? ENDED
           : status == Z_OK || status == Z_BUF_ERROR ? WENT_ON
           : status == Z_MEM_ERROR                   ? NO_MEMORY
                                                     : DAMAGED;
}

static enum outcome run_zstd(struct unpacker *u, struct packing_io *io)
{
    if (!u->zstd) { /* for all members: there may be as many as documents */
        u->zstd = ZSTD_createDStream();
        if (!u->zstd || ZSTD_isError(ZSTD_DCtx_setParameter(u->zstd, ZSTD_d_windowLogMax, ZSTD_WINDOW_LOG_MAX))) {
            return NO_MEMORY;
        }
    }
    ZSTD_inBuffer in = {.src = io->in, .size = io->in_bytes, .pos = 0};
    ZSTD_outBuffer out = {.dst = io->out, .size = io->out_bytes, .pos = 0};
    const size_t status = ZSTD_decompressStream(u->zstd, &out, &in);
    move_on(io, in.pos, out.pos);
    if (!ZSTD_isError(status)) return status == 0 ? ENDED : WENT_ON;
    const ZSTD_ErrorCode code = ZSTD_getErrorCode(status);
    switch (code) {
    case ZSTD_error_memory_allocation:
        return NO_MEMORY;
    case ZSTD_error_frameParameter_windowTooLarge:
        return WINDOW_TOO_LARGE;
    case ZSTD_error_dictionary_wrong:
    case ZSTD_error_frameParameter_unsupported:
    case ZSTD_error_version_unsupported:
        return UNSUPPORTED;
    default:
        return DAMAGED;
    }
}

static void end_xz(struct unpacker *u)
{
    lzma_end(&u->xz);
}

static enum outcome run_xz(struct unpacker *u, struct packing_io *io)
{
    lzma_stream *x = &u->xz;
    if (!u->in_member) {
        *x = (lzma_stream)LZMA_STREAM_INIT;
        if (lzma_stream_decoder(x, UINT64_MAX, 0) != LZMA_OK) return NO_MEMORY;
    }
    x->next_in = io->in;
    x->avail_in = io->in_bytes;
    x->next_out = (uint8_t *)io->out;
    x->avail_out = io->out_bytes;
    const lzma_ret status = lzma_code(x, LZMA_RUN);
    move_on(io, io->in_bytes - x->avail_in, io->out_bytes - x->avail_out);
    switch (status) {
    case LZMA_STREAM_END:
        return ENDED;
    case LZMA_OK:
    case LZMA_BUF_ERROR:
        return WENT_ON;
    case LZMA_MEM_ERROR:
        return NO_MEMORY;
    case LZMA_OPTIONS_ERROR:
        return UNSUPPORTED;
    default:
        return DAMAGED;
    }
}

static void end_bzip2(struct unpacker *u)
{
    (void)BZ2_bzDecompressEnd(&u->bzip2);
}

static enum outcome run_bzip2(struct unpacker *u, struct packing_io *io)
{
    bz_stream *b = &u->bzip2;
    if (!u->in_member) {
        *b = (bz_stream){.next_in = NULL};
        if (BZ2_bzDecompressInit(b, 0, 0) != BZ_OK) return NO_MEMORY;
    }
    const unsigned in = at_most(io->in_bytes), out = at_most(io->out_bytes);
    b->next_in = (char *)io->in;
    b->avail_in = in;
    b->next_out = io->out;
    b->avail_out = out;
    const int status = BZ2_bzDecompress(b);
    move_on(io, in - b->avail_in, out - b->avail_out);
    return status == BZ_STREAM_END ? ENDED : status == BZ_OK ? WENT_ON : status == BZ_MEM_ERROR ? NO_MEMORY : DAMAGED;
}

#define MAGIC(bytes) sizeof(bytes) - 1, bytes
static const struct packing packings[] = {
    {"gzip", {".gz"}, 0, MAGIC("\x1F\x8B\x08"), run_gzip, end_gzip},
    {"Zstandard", {".zst", ".zstd"}, 0, MAGIC("\x28\xB5\x2F\xFD"), run_zstd, NULL},
    {"Zstandard", {NULL}, 0, MAGIC("\x50\x2A\x4D\x18"), run_zstd, NULL}, /* pzstd begins with a skippable frame */
    {"xz", {".xz"}, 0, MAGIC("\xFD\x37zXZ\0"), run_xz, end_xz},
    {"bzip2", {".bz2"}, 4, MAGIC("1AY&SY"), run_bzip2, end_bzip2},
};
enum { PACKINGS = sizeof packings / sizeof *packings };

static const struct packing *find_by_ending(const char *path)
{
    const char *const ending = strrchr(path, '.');
    for (int p = 0; ending && p < PACKINGS; p++) {
        for (int e = 0; e < 2 && packings[p].endings[e]; e++) {
            if (strcasecmp(ending, packings[p].endings[e]) == 0) return &packings[p];
        }
    }
    return NULL;
}

static const struct packing *find_by_content(const char *head, size_t head_bytes)
{
    for (int p = 0; p < PACKINGS; p++) {
        const struct packing *packing = &packings[p];
        if (head_bytes >= packing->magic_at + packing->magic_bytes &&
            memcmp(head + packing->magic_at, packing->magic, packing->magic_bytes) == 0) {
            return packing;
        }
    }
    return NULL;
}

/* Is it the beginning of a text, which no compressed file has? */
static bool is_plain(const char *head, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++) {
        if ((unsigned char)head[i] < 0x20 && (head[i] == '\0' || !strchr("\t\n\r", head[i]))) return false;
    }
    const bool is_bzip2 = bytes >= 3 && memcmp(head, "BZh", 3) == 0; /* a damaged one */
    return bytes > 0 && !is_bzip2 && bytes - utf8_valid_bytes(head, bytes) < 4;
}

const struct packing *packing_find(const char *path, const char *head, size_t head_bytes, const char **instead)
{
    const struct packing *const named = find_by_ending(path), *const found = find_by_content(head, head_bytes);
    *instead = NULL;
    if (named && !found && is_plain(head, head_bytes)) {
        *instead = "plain text";
        return NULL;
    }
    if (named && found && named->run != found->run) *instead = found->name;
    return found ? found : named;
}

size_t packing_stem_bytes(const char *path)
{
    return find_by_ending(path) ? (size_t)(strrchr(path, '.') - path) : strlen(path);
}

int unpacker_open(struct unpacker **out, const struct packing *packing)
{
    *out = calloc(1, sizeof **out);
    if (!*out) FAIL(ERR_SYSTEM, "out of memory");
    (*out)->packing = packing;
    return 0;
}

int unpacker_run(struct unpacker *u, struct packing_io *io, const char *path, bool *ended)
{
    const char *const name = u->packing->name;
    const enum outcome outcome = u->packing->run(u, io);
    u->in_member = outcome != NO_MEMORY;
    *ended = outcome == ENDED;
    switch (outcome) {
    case ENDED:
        if (u->packing->end) u->packing->end(u);
        u->in_member = false;
        return 0;
    case WENT_ON:
        return 0;
    case NO_MEMORY:
        FAIL(ERR_SYSTEM,
             "there is not enough memory to unpack %s; give the ranks more, or pack it again with a smaller window "
             "(zstd --long=27)",
             path);
    case WINDOW_TOO_LARGE:
        FAIL(ERR_DATA, "%s: its window is larger than 2 GiB; pack it again with a smaller one (zstd --long=27)",
             path);
    case UNSUPPORTED:
        FAIL(ERR_DATA, "%s is packed with a dictionary or in another way that is not read; pack it again without",
             path);
    case DAMAGED:
        break;
    }
    FAIL(ERR_DATA, "%s is damaged or no %s file; " REMEDY, path, name);
}

void unpacker_close(struct unpacker *u)
{
    if (!u) return;
    if (u->in_member && u->packing->end) u->packing->end(u);
    (void)ZSTD_freeDStream(u->zstd);
    free(u);
}
