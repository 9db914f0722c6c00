// The SentencePiece wrapper: the program's only C++, so that nothing of it (exceptions, strings) reaches the C side.
//
// Threads: after opening, the processor is only read, so encoding and decoding may run in several threads.
extern "C" {
#include "data/tokenizer.h"
#include "data/files.h"
#include "err.h"
#include "fs.h"
}

#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include <sentencepiece_processor.h>
#include <xxhash.h>

struct tokenizer {
    sentencepiece::SentencePieceProcessor processor;
    std::string model; // the file's bytes
    uint64_t id = 0;
};

namespace
{

constexpr size_t MODEL_MAX_BYTES = size_t{1} << 30;

// The whole file; ERR_DATA when it is not there.
int read_file(const char *path, std::string *bytes)
{
    const std::unique_ptr<FILE, int (*)(FILE *)> file(std::fopen(path, "rb"), std::fclose);
    if (!file) FAIL_FS("cannot open the tokenizer", path, ERR_DATA, "check data.tokenizer, or --tokenizer");
    char chunk[65536];
    for (size_t got = 0; (got = std::fread(chunk, 1, sizeof chunk, file.get())) > 0;) {
        bytes->append(chunk, got);
        if (bytes->size() > MODEL_MAX_BYTES) FAIL(ERR_DATA, "%s is too large to be a SentencePiece model", path);
    }
    if (std::ferror(file.get())) FAIL_FS("cannot read the tokenizer", path, ERR_DATA, nullptr);
    return 0;
}

// Names what people take for the model: what Git LFS left in its place, and other programs' vocabularies.
int check_kind(const char *path, const std::string &bytes)
{
    if (bytes.empty()) FAIL(ERR_DATA, "the tokenizer %s is empty", path);
    TRY(file_check_fetched(path));
    const size_t first = bytes.find_first_not_of(" \t\r\n");
    if (first == std::string::npos || (bytes[first] != '{' && bytes[first] != '[')) return 0;
    FAIL(
        ERR_DATA,
        "%s is JSON, like the tokenizer.json and vocab.json of Hugging Face, and not a SentencePiece model; give the "
        "binary file, often called tokenizer.model, that lies beside it, or make one with spm_train",
        path);
}

int load(struct tokenizer *tokenizer, const char *path)
{
    std::string &bytes = tokenizer->model;
    TRY(read_file(path, &bytes));
    TRY(check_kind(path, bytes));
    const auto status = tokenizer->processor.LoadFromSerializedProto(bytes);
    if (!status.ok() || tokenizer->processor.GetPieceSize() <= 0) {
        FAIL(ERR_DATA, "%s is not a SentencePiece model; make one with spm_train and pass its .model file", path);
    }
    tokenizer->id = XXH3_64bits(bytes.data(), bytes.size());
    return 0;
}

// Runs `body` so that no exception leaves it.
template <typename Body> int guarded(const char *what, Body body)
{
    try {
        return body();
    } catch (const std::bad_alloc &) {
        FAIL(ERR_SYSTEM, "out of memory while %s", what);
    } catch (const std::exception &e) {
        FAIL(ERR_BUG, "SentencePiece failed while %s: %s", what, e.what());
    }
}

} // namespace

int tokenizer_open(struct tokenizer **tokenizer, const char *path)
{
    *tokenizer = nullptr;
    return guarded("loading the tokenizer", [&]() -> int {
        auto opened = std::make_unique<struct tokenizer>();
        TRY(load(opened.get(), path));
        *tokenizer = opened.release();
        return 0;
    });
}

void tokenizer_close(struct tokenizer *tokenizer)
{
    delete tokenizer;
}

int64_t tokenizer_vocab_size(const struct tokenizer *tokenizer)
{
    return tokenizer->processor.GetPieceSize();
}

int32_t tokenizer_bos(const struct tokenizer *tokenizer)
{
    return tokenizer->processor.bos_id();
}

int32_t tokenizer_find_piece(const struct tokenizer *tokenizer, const char *piece)
{
    const int id = tokenizer->processor.PieceToId(piece); // <unk> for what is not there
    return tokenizer->processor.IdToPiece(id) == piece ? id : -1;
}

const char *tokenizer_piece(const struct tokenizer *tokenizer, int32_t token)
{
    return tokenizer->processor.IdToPiece(token).c_str();
}

int32_t tokenizer_eos(const struct tokenizer *tokenizer)
{
    return tokenizer->processor.eos_id();
}

bool tokenizer_has_text(const struct tokenizer *tokenizer, int32_t token)
{
    const auto &processor = tokenizer->processor;
    return token >= 0 && token < processor.GetPieceSize() && !processor.IsUnknown(token) &&
           !processor.IsControl(token) && !processor.IsUnused(token);
}

uint64_t tokenizer_id(const struct tokenizer *tokenizer)
{
    return tokenizer->id;
}

int tokenizer_copy_model(const struct tokenizer *tokenizer, char **model, size_t *bytes)
{
    *bytes = tokenizer->model.size();
    *model = static_cast<char *>(std::malloc(*bytes));
    if (!*model) FAIL(ERR_SYSTEM, "out of memory for a tokenizer of %zu bytes", *bytes);
    std::memcpy(*model, tokenizer->model.data(), *bytes);
    return 0;
}

int tokenizer_encode(struct tokenizer *tokenizer, const char *text, size_t bytes, int32_t **tokens, int64_t *n)
{
    *tokens = nullptr;
    *n = 0;
    return guarded("encoding text", [&]() -> int {
        std::vector<int> ids;
        const auto status = tokenizer->processor.Encode(absl::string_view(text, bytes), &ids);
        if (!status.ok()) FAIL(ERR_DATA, "SentencePiece cannot encode the text: %s", status.message());
        const size_t size_bytes = (ids.empty() ? 1 : ids.size()) * sizeof(int32_t);
        auto *out = static_cast<int32_t *>(std::malloc(size_bytes));
        if (!out) FAIL(ERR_SYSTEM, "out of memory for %zu tokens", ids.size());
        for (size_t i = 0; i < ids.size(); i++)
            out[i] = ids[i];
        *tokens = out;
        *n = static_cast<int64_t>(ids.size());
        return 0;
    });
}

int tokenizer_decode(struct tokenizer *tokenizer, const int32_t *tokens, int64_t n, char **text)
{
    *text = nullptr;
    return guarded("decoding tokens", [&]() -> int {
        const int vocab_size = tokenizer->processor.GetPieceSize();
        std::vector<int> ids(tokens, tokens + n);
        for (const int id : ids) {
            if (id < 0 || id >= vocab_size) {
                FAIL(ERR_DATA, "token %d is not in the tokenizer's vocabulary of %d", id, vocab_size);
            }
        }
        std::string decoded;
        const auto status = tokenizer->processor.Decode(ids, &decoded);
        if (!status.ok()) FAIL(ERR_DATA, "SentencePiece cannot decode the tokens: %s", status.message());
        auto *out = static_cast<char *>(std::malloc(decoded.size() + 1));
        if (!out) FAIL(ERR_SYSTEM, "out of memory for %zu bytes of text", decoded.size());
        std::memcpy(out, decoded.c_str(), decoded.size() + 1);
        *text = out;
        return 0;
    });
}
