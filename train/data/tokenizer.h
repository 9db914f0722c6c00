/* SentencePiece behind a C interface (Kudo & Richardson 2018). Encoding and decoding are safe from several threads. */
#ifndef TATARA_TOKENIZER_H
#define TATARA_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define TOKENIZER_VERSION_MAX 32

struct tokenizer;

/* The version of the SentencePiece library that runs, for example "0.1.97": they do not all make the same tokens. */
void tokenizer_library_version(char version[TOKENIZER_VERSION_MAX]);
/* ERR_DATA when the file is missing or no SentencePiece model. */
int tokenizer_open(struct tokenizer **tokenizer, const char *path);
void tokenizer_close(struct tokenizer *tokenizer);
int64_t tokenizer_vocab_size(const struct tokenizer *tokenizer);
int32_t tokenizer_bos(const struct tokenizer *tokenizer); /* −1: the model has none */
int32_t tokenizer_eos(const struct tokenizer *tokenizer); /* likewise */
/* The token that is the piece of this name; −1: there is none. */
int32_t tokenizer_find_piece(const struct tokenizer *tokenizer, const char *piece);
/* A token's piece, as the model names it; it lives as long as the tokenizer. */
const char *tokenizer_piece(const struct tokenizer *tokenizer, int32_t token);
/* Whether the token stands for text: it is in the vocabulary, and neither <unk>, nor a control piece, nor unused. */
bool tokenizer_has_text(const struct tokenizer *tokenizer, int32_t token);
/* XXH3 of the model file's bytes. */
uint64_t tokenizer_id(const struct tokenizer *tokenizer);
/* The model file's bytes. The caller frees *model. */
int tokenizer_copy_model(const struct tokenizer *tokenizer, char **model, size_t *bytes);
/* Tokens of UTF-8 text, without BOS or EOS. The caller frees *tokens. */
int tokenizer_encode(const struct tokenizer *tokenizer, const char *text, size_t bytes, int32_t **tokens, int64_t *n);
/* The text as its pieces spell it, those that are <unk> too, without a space that the tokenizer adds; and how many are
 * <unk>. The caller frees *spelled. */
int tokenizer_spell(const struct tokenizer *tokenizer, const char *text, size_t bytes, char **spelled,
                    size_t *spelled_bytes, int64_t *unknown);
/* Whether characters without a piece are spelled in bytes, and not <unk>. */
bool tokenizer_has_bytes(const struct tokenizer *tokenizer);
/* Whether a space is added to each text, before it or behind it. */
bool tokenizer_adds_space(const struct tokenizer *tokenizer);
int32_t tokenizer_unk(const struct tokenizer *tokenizer);
/* Text of tokens, NUL-terminated; control tokens give nothing, incomplete byte pieces give U+FFFD. The caller frees. */
int tokenizer_decode(const struct tokenizer *tokenizer, const int32_t *tokens, int64_t n, char **text);

#endif
