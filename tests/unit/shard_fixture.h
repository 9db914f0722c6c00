/* Small shards for tests: their tokens and documents follow from a formula, in a temporary folder of the test's own. */
#ifndef TATARA_TEST_SHARD_FIXTURE_H
#define TATARA_TEST_SHARD_FIXTURE_H

#include "data/shard.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { FIXTURE_VOCAB = 500, FIXTURE_EOS = 2, FIXTURE_TOKENIZER = 77, FIXTURE_PATH_BYTES = 256 };

/* Token i of the shard made with `salt`, when it ends no document. */
static inline int32_t fixture_token(uint64_t salt, uint64_t i)
{
    return (int32_t)(3 + (i * 131 + salt * 17 + i / 7) % (FIXTURE_VOCAB - 3));
}

/* Tokens of document d: 1 to 40, EOS included. */
static inline uint64_t fixture_document_tokens(uint64_t d)
{
    return 1 + (d * 23) % 40;
}

/* Writes a shard of so many documents; vocab_size above 65536 makes wide tokens. Returns the error code. */
static inline int fixture_write(const char *path, uint64_t documents, uint64_t salt, uint64_t vocab_size)
{
    struct shard_builder *builder = NULL;
    int rc = shard_builder_open(&builder, vocab_size, -1, FIXTURE_EOS, FIXTURE_TOKENIZER);
    for (uint64_t d = 0; d < documents && rc == 0; d++) {
        const uint64_t n = fixture_document_tokens(d), begin = shard_builder_tokens(builder);
        int32_t tokens[64];
        for (uint64_t i = 0; i < n; i++)
            tokens[i] = i + 1 < n ? fixture_token(salt, begin + i) : FIXTURE_EOS;
        char id[32];
        (void)snprintf(id, sizeof id, "doc-%d", (int)d);
        const struct shard_label label = {.id = id,
                                          .source = d % 3 == 0 ? "新聞" : "web",
                                          .licence = d % 2 == 0 ? "CC-BY-4.0" : "unknown",
                                          .language = "ja"};
        rc = shard_builder_add(builder, tokens, n, 3 * n, &label);
    }
    if (rc == 0) rc = shard_builder_write(builder, path);
    shard_builder_close(builder);
    return rc;
}

/* A new temporary folder; its path in `folder`. */
static inline int fixture_folder(char folder[FIXTURE_PATH_BYTES])
{
    const char *base = getenv("TMPDIR");
    (void)snprintf(folder, FIXTURE_PATH_BYTES, "%s/tatara-test-XXXXXX", base ? base : "/tmp");
    return mkdtemp(folder) ? 0 : -1;
}

/* Removes a folder with all that is in it. */
static inline void fixture_remove(const char *path)
{
    DIR *dir = opendir(path);
    for (struct dirent *entry; dir && (entry = readdir(dir)) != NULL;) {
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
        const size_t bytes = strlen(path) + strlen(entry->d_name) + 2;
        char *inner = malloc(bytes);
        if (!inner) break;
        (void)snprintf(inner, bytes, "%s/%s", path, entry->d_name);
        if (unlink(inner) != 0) fixture_remove(inner);
        free(inner);
    }
    if (dir) (void)closedir(dir);
    (void)rmdir(path);
}

/* Flips one bit of the byte at `offset`. */
static inline int fixture_flip(const char *path, long offset)
{
    FILE *file = fopen(path, "r+b");
    if (!file) return -1;
    int rc = fseek(file, offset, SEEK_SET);
    const int byte = getc(file);
    if (rc == 0) rc = fseek(file, offset, SEEK_SET);
    if (rc == 0) rc = putc(byte ^ 4, file) == EOF ? -1 : 0;
    return fclose(file) == 0 ? rc : -1;
}

#endif
