// The SentencePiece wrapper: the program's only C++, so that nothing of it (exceptions, strings) reaches the C side.
//
// Threads: after opening, the processor is only read, so encoding and decoding may run in several threads.
extern "C" {
#include "data/tokenizer.h"
#include "data/files.h"
#include "err.h"
#include "fs.h"
}

#include <link.h>

#include <cctype>
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

// dl_iterate_phdr: the path of the shared library, if that is what it is.
int find_library(struct dl_phdr_info *info, size_t, void *path)
{
    if (!std::strstr(info->dlpi_name, "libsentencepiece")) return 0;
    *static_cast<std::string *>(path) = info->dlpi_name;
    return 1;
}

// Whether the bytes are digits.digits.digits.
bool is_version(const std::string &text)
{
    int dots = 0;
    for (size_t i = 0; i < text.size(); i++) {
        const bool dot = text[i] == '.';
        if (dot ? i == 0 || text[i - 1] == '.' : !std::isdigit(static_cast<unsigned char>(text[i]))) return false;
        dots += dot;
    }
    return dots == 2 && text.back() != '.';
}

// SentencePiece says its version in no function, but it is one of the texts in its file. A version other than that of the
// build is there when the library was replaced since.
std::string find_version(const std::string &library, const std::string &built)
{
    if (built != "unknown" && library.find('\0' + built + '\0') != std::string::npos) return built;
    for (size_t at = 0, end = 0; (end = library.find('\0', at)) != std::string::npos; at = end + 1) {
        std::string text = end - at < TOKENIZER_VERSION_MAX ? library.substr(at, end - at) : "";
        if (is_version(text)) return text;
    }
    return "unknown";
}

constexpr char SPACE_SIGN[] = "\xE2\x96\x81"; // how pieces spell a space
constexpr size_t SIGN_BYTES = sizeof SPACE_SIGN - 1;

bool begins_with_space(const std::string &piece)
{
    return piece.compare(0, SIGN_BYTES, SPACE_SIGN) == 0;
}

bool ends_with_space(const std::string &piece)
{
    return piece.size() >= SIGN_BYTES && piece.compare(piece.size() - SIGN_BYTES, SIGN_BYTES, SPACE_SIGN) == 0;
}

// The text that a piece spells; a byte's piece is named "<0xE3>".
std::string spell(const sentencepiece::SentencePieceProcessor &processor, const std::string &piece, int id)
{
    if (processor.IsByte(id)) return std::string(1, static_cast<char>(std::strtol(piece.c_str() + 1, nullptr, 16)));
    std::string text = piece;
    for (size_t at = 0; (at = text.find(SPACE_SIGN, at)) != std::string::npos; at++)
        text.replace(at, SIGN_BYTES, " ");
    return text;
}

int copy_string(const std::string &from, char **to, size_t *bytes)
{
    *bytes = from.size();
    *to = static_cast<char *>(std::malloc(from.size() + 1));
    if (!*to) FAIL(ERR_SYSTEM, "out of memory for %zu bytes of text", from.size());
    std::memcpy(*to, from.c_str(), from.size() + 1);
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

void tokenizer_library_version(char version[TOKENIZER_VERSION_MAX])
{
    std::string found = TATARA_SENTENCEPIECE_VERSION; // of a library that is linked into the program
    (void)guarded("reading SentencePiece's version", [&]() -> int {
        std::string path, library;
        if (dl_iterate_phdr(find_library, &path) == 0) return 0;
        found = read_file(path.c_str(), &library) == 0 ? find_version(library, found) : "unknown";
        return 0;
    });
    err_clear();
    (void)std::snprintf(version, TOKENIZER_VERSION_MAX, "%s", found.c_str());
}

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

int tokenizer_encode(const struct tokenizer *tokenizer, const char *text, size_t bytes, int32_t **tokens, int64_t *n)
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

int32_t tokenizer_unk(const struct tokenizer *tokenizer)
{
    return tokenizer->processor.unk_id();
}

bool tokenizer_has_bytes(const struct tokenizer *tokenizer)
{
    for (int id = 0; id < tokenizer->processor.GetPieceSize(); id++)
        if (tokenizer->processor.IsByte(id)) return true;
    return false;
}

bool tokenizer_adds_space(const struct tokenizer *tokenizer)
{
    const auto pieces = tokenizer->processor.EncodeAsPieces("a");
    return !pieces.empty() && (begins_with_space(pieces.front()) || ends_with_space(pieces.back()));
}

int tokenizer_spell(const struct tokenizer *tokenizer, const char *text, size_t bytes, char **spelled,
                    size_t *spelled_bytes, int64_t *unknown)
{
    *spelled = nullptr;
    *unknown = 0;
    return guarded("spelling text", [&]() -> int {
        const auto &processor = tokenizer->processor;
        std::string out;
        const auto encoded = processor.EncodeAsImmutableProto(std::string_view(text, bytes)); // owns the pieces
        for (const auto &piece : encoded.pieces()) {
            const int id = static_cast<int>(piece.id());
            *unknown += processor.IsUnknown(id);
            out += spell(processor, piece.piece(), id);
        }
        if (tokenizer_adds_space(tokenizer) && !out.empty()) {
            const bool before = begins_with_space(processor.EncodeAsPieces("a").front());
            out.erase(before ? 0 : out.size() - 1, 1);
        }
        return copy_string(out, spelled, spelled_bytes);
    });
}

int tokenizer_decode(const struct tokenizer *tokenizer, const int32_t *tokens, int64_t n, char **text)
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
        size_t decoded_bytes = 0;
        return copy_string(decoded, text, &decoded_bytes);
    });
}
