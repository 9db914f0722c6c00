/* YAML into struct config: structure, keys, types and ranges; every refusal names the place and what would be allowed.
 *
 * One reader serves files (a mapping of sections) and key=value words (a value alone). It is stricter than YAML where
 * YAML surprises: a key may stand once, numbers are plain decimal, booleans are true and false only, an empty value is
 * an error. No state, no threads. */
#include "config_yaml.h"

#include "config_guess.h"
#include "err.h"
#include "path.h"
#include "utf8.h"

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <yaml.h>

/* One YAML document on its way into cfg. */
struct reader {
    const char *name; /* of the file, or the word */
    bool is_word;     /* then lines mean nothing */
    yaml_document_t document;
    struct config *cfg;
    int *line; /* by option: where it was set */
};

/* Refuses what stands at `node`. Always fails. */
static int refuse(const struct reader *in, const yaml_node_t *node, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

static int refuse(const struct reader *in, const yaml_node_t *node, const char *format, ...)
{
    char reason[ERR_MESSAGE_MAX - 200];
    va_list args;
    va_start(args, format);
    vsnprintf(reason, sizeof reason, format, args);
    va_end(args);
    if (in->is_word) FAIL(ERR_CONFIG, "%s: %s", in->name, reason);
    FAIL(ERR_CONFIG, "%s:%zu: %s", in->name, node->start_mark.line + 1, reason);
}

static const char *scalar_of(const yaml_node_t *node)
{
    return (const char *)node->data.scalar.value;
}

/* What a person calls this node. */
static void describe(const yaml_node_t *node, char text[80])
{
    if (node->type == YAML_SEQUENCE_NODE) {
        snprintf(text, 80, "a list");
    } else if (node->type == YAML_MAPPING_NODE) {
        snprintf(text, 80, "a mapping");
    } else {
        const bool plain = node->data.scalar.style == YAML_PLAIN_SCALAR_STYLE;
        snprintf(text, 80, "%s%.60s%s", plain ? "" : "the text \"", scalar_of(node), plain ? "" : "\"");
    }
}

static bool node_is_null(const yaml_node_t *node)
{
    if (node->type != YAML_SCALAR_NODE || node->data.scalar.style != YAML_PLAIN_SCALAR_STYLE) return false;
    const char *text = scalar_of(node);
    return text[0] == '\0' || strcmp(text, "~") == 0 || strcmp(text, "null") == 0 || strcmp(text, "Null") == 0 ||
           strcmp(text, "NULL") == 0;
}

static void list_add(char *list, size_t size, const char *word)
{
    const size_t used = strlen(list);
    snprintf(list + used, size - used, "%s%s", used == 0 ? "" : ", ", word);
}

/* Refuses a name, said to be unknown in `unknown`, that other programs have for something of ours. */
static int refuse_foreign(const struct reader *in, const yaml_node_t *node, const char *unknown,
                          const struct foreign *foreign)
{
    const char *note = foreign->note ? foreign->note : "";
    return refuse(in, node, "%s: it is called %s here%s%s", unknown, foreign->ours, note[0] ? ", " : "", note);
}

/* Refuses a key that `section` does not have: a key of another section, a near miss, another program's name, or else the
 * list of what there is. At the top of the document the names of the sections count as keys. */
static int refuse_key(const struct reader *in, const yaml_node_t *node, const char *section, const char *key)
{
    const bool top = section_is_top(section);
    char unknown[160], known[600] = "";
    struct guess guess = guess_start(key);
    const struct option *elsewhere = NULL;
    snprintf(unknown, sizeof unknown, "unknown key '%.80s' %s%s", key, top ? "at the top" : "in ",
             top ? "" : section);
    for (int i = 0; i < SECTION_COUNT && top; i++) {
        if (section_is_top(section_at(i)->name)) continue;
        guess_offer(&guess, section_at(i)->name);
        list_add(known, sizeof known, section_at(i)->name);
    }
    for (int i = 0; i < OPTION_COUNT; i++) {
        const struct option *option = option_at(i);
        if (strcmp(option->section, section) != 0) {
            if (strcmp(option->key, key) == 0) elsewhere = option;
            continue;
        }
        guess_offer(&guess, option->key);
        list_add(known, sizeof known, option->key);
    }
    const struct foreign *foreign = foreign_find(key);
    if (elsewhere != NULL) {
        char name[OPTION_NAME_MAX];
        option_name(elsewhere, name);
        return refuse(in, node, "%s: did you mean %s, which belongs elsewhere?", unknown, name);
    }
    if (foreign != NULL && strcmp(foreign->theirs, key) == 0) return refuse_foreign(in, node, unknown, foreign);
    if (guess.best[0] != '\0') return refuse(in, node, "%s: did you mean '%s'?", unknown, guess.best);
    if (foreign != NULL) return refuse_foreign(in, node, unknown, foreign);
    return refuse(in, node, "%s; known: %s", unknown, known);
}

static bool is_digits(const char *text)
{
    return text[0] != '\0' && text[strspn(text, "0123456789")] == '\0';
}

/* Refuses a node that is not of the option's type. */
static int refuse_type(const struct reader *in, const yaml_node_t *node, const char *name,
                       const struct option *option, const char *note)
{
    char got[80], allowed[OPTION_ALLOWED_MAX];
    describe(node, got);
    option_allowed(option, allowed);
    return refuse(in, node, "%s: got %s; allowed is %s%s%s", name, got, allowed, note[0] ? ". " : "", note);
}

/* Why a scalar that looks like a number to a person is none here; "" when it does not look like one. */
static const char *number_note(const char *text)
{
    if (strchr(text, '_') != NULL && strspn(text, "0123456789_+-.eE") == strlen(text)) {
        return "Write the digits without underscores";
    }
    if (strchr(text, ',') != NULL && strspn(text, "0123456789,+-.eE") == strlen(text)) {
        return "Write the digits without commas";
    }
    if (text[0] == '0' && is_digits(text))
        return "Write it without leading zeros: some YAML readers take those for octal";
    return "";
}

/* [+-] digits, without leading zeros. */
static bool is_whole_number(const char *text)
{
    const char *digits = text + (text[0] == '+' || text[0] == '-');
    return is_digits(digits) && (digits[0] != '0' || digits[1] == '\0');
}

/* [+-] digits [. digits] [e [+-] digits], or with nothing before the point: no hexadecimal, no .inf, no .nan. */
static bool is_real_number(const char *text)
{
    const char *at = text + (text[0] == '+' || text[0] == '-');
    const size_t whole = strspn(at, "0123456789");
    at += whole;
    size_t fraction = 0;
    if (*at == '.') {
        fraction = strspn(at + 1, "0123456789");
        at += 1 + fraction;
    }
    if (whole + fraction == 0) return false;
    if (*at == '\0') return true;
    if (*at != 'e' && *at != 'E') return false;
    at++;
    return is_digits(at + (*at == '+' || *at == '-'));
}

static bool is_plain(const yaml_node_t *node)
{
    return node->type == YAML_SCALAR_NODE && node->data.scalar.style == YAML_PLAIN_SCALAR_STYLE;
}

static int int_read(const struct reader *in, const yaml_node_t *node, const char *name, const struct option *option)
{
    if (!is_plain(node)) return refuse_type(in, node, name, option, "");
    const char *text = scalar_of(node);
    if (!is_whole_number(text)) {
        const char *note =
            is_real_number(text) && !is_digits(text) ? "Write a whole number with digits only" : number_note(text);
        return refuse_type(in, node, name, option, note);
    }
    errno = 0;
    const long long value = strtoll(text, NULL, 10);
    if (errno != 0 || value < option->int_min || value > option->int_max) {
        return refuse_type(in, node, name, option, "");
    }
    *(int64_t *)option_value(option, in->cfg) = value;
    return 0;
}

static int num_read(const struct reader *in, const yaml_node_t *node, const char *name, const struct option *option)
{
    if (!is_plain(node) || !is_real_number(scalar_of(node))) {
        return refuse_type(in, node, name, option, is_plain(node) ? number_note(scalar_of(node)) : "");
    }
    const double value = strtod(scalar_of(node), NULL);
    if (!(value >= option->num_min && value <= option->num_max)) return refuse_type(in, node, name, option, "");
    *(double *)option_value(option, in->cfg) = value;
    return 0;
}

static int bool_read(const struct reader *in, const yaml_node_t *node, const char *name, const struct option *option)
{
    const bool is_true = is_plain(node) && strcmp(scalar_of(node), "true") == 0;
    const bool is_false = is_plain(node) && strcmp(scalar_of(node), "false") == 0;
    if (!is_true && !is_false) return refuse_type(in, node, name, option, "");
    *(bool *)option_value(option, in->cfg) = is_true;
    return 0;
}

/* Puts the bytes that %XX stands for into the text of a scalar with our tag !bytes: YAML is Unicode, file names are not.
 * Returns their number, or −1 when a % is not followed by two hexadecimal digits. */
static int bytes_decode(char *text)
{
    static const char digits[] = "0123456789abcdef";
    int n = 0;
    for (const char *from = text; *from != '\0'; n++) {
        if (*from != '%') {
            text[n] = *from++;
            continue;
        }
        const char *high = from[1] ? strchr(digits, tolower((unsigned char)from[1])) : NULL;
        const char *low = high && from[2] ? strchr(digits, tolower((unsigned char)from[2])) : NULL;
        const int64_t byte = low ? 16 * (high - digits) + (low - digits) : 0;
        if (byte == 0) return -1;
        text[n] = (char)byte;
        from += 3;
    }
    text[n] = '\0';
    return n;
}

/* Copies a scalar to a text of the configuration: no zero byte, no more than fits, and in a path a home folder for ~. */
static int text_copy(const struct reader *in, const yaml_node_t *node, const char *name, bool is_path,
                     char text[CONFIG_TEXT_MAX])
{
    const size_t bytes = node->data.scalar.length;
    if (memchr(scalar_of(node), '\0', bytes) != NULL) return refuse(in, node, "%s: has a zero byte", name);
    if (bytes >= CONFIG_TEXT_MAX) {
        return refuse(in, node, "%s: has %zu bytes; allowed are %d. Use a shorter path, or a symbolic link", name,
                      bytes, CONFIG_TEXT_MAX - 1);
    }
    memset(text, 0, CONFIG_TEXT_MAX);
    memcpy(text, scalar_of(node), bytes);
    if (strcmp((const char *)node->tag, "!bytes") == 0 && bytes_decode(text) < 0)
        return refuse(in, node, "%s: after !bytes a %% stands before two hexadecimal digits, as in %%E9", name);
    if (!is_path || text[0] != '~') return 0;
    const char *why_not = path_expand(text, CONFIG_TEXT_MAX, scalar_of(node));
    return why_not ? refuse(in, node, "%s: %s: %s", name, scalar_of(node), why_not) : 0;
}

static int str_read(const struct reader *in, const yaml_node_t *node, const char *name, const struct option *option)
{
    if (node->type != YAML_SCALAR_NODE) return refuse_type(in, node, name, option, "");
    return text_copy(in, node, name, option->is_path, option_value(option, in->cfg));
}

static int choice_read(const struct reader *in, const yaml_node_t *node, const char *name,
                       const struct option *option)
{
    if (node->type != YAML_SCALAR_NODE) return refuse_type(in, node, name, option, "");
    char word[OPTION_NAME_MAX], note[OPTION_NAME_MAX + 20] = "";
    struct guess guess = guess_start(scalar_of(node));
    for (int i = 0; choice_word(option, i, word); i++) {
        if (strcmp(word, scalar_of(node)) == 0) {
            *(int *)option_value(option, in->cfg) = i;
            return 0;
        }
        guess_offer(&guess, word);
    }
    if (guess.best[0] != '\0') snprintf(note, sizeof note, "Did you mean '%s'?", guess.best);
    return refuse_type(in, node, name, option, note);
}

static yaml_node_t *node_at(struct reader *in, int index)
{
    return yaml_document_get_node(&in->document, index);
}

/* Checks a mapping's keys: text, and each only once. */
static int keys_check(struct reader *in, const yaml_node_t *mapping, const char *name)
{
    const yaml_node_pair_t *first = mapping->data.mapping.pairs.start;
    for (const yaml_node_pair_t *p = first; p < mapping->data.mapping.pairs.top; p++) {
        const yaml_node_t *key = node_at(in, p->key);
        if (key->type != YAML_SCALAR_NODE) return refuse(in, key, "%s: a key must be a word", name);
        for (const yaml_node_pair_t *q = first; q < p; q++) {
            const yaml_node_t *earlier = node_at(in, q->key);
            if (strcmp(scalar_of(earlier), scalar_of(key)) != 0) continue;
            return refuse(in, key, "%s: '%.80s' is given twice, first at line %zu; keep one", name, scalar_of(key),
                          earlier->start_mark.line + 1);
        }
    }
    return 0;
}

static int weight_read(struct reader *in, const yaml_node_t *node, const char *name, double *weight)
{
    const double value = is_plain(node) && is_real_number(scalar_of(node)) ? strtod(scalar_of(node), NULL) : 0;
    if (!(value > 0 && value <= 1e12)) {
        return refuse(in, node,
                      "%s: weight must be a number above 0, at most 1e12; leave an entry out to give it none", name);
    }
    *weight = value;
    return 0;
}

/* One {path, weight} of a list of datasets. */
static int dataset_read(struct reader *in, const yaml_node_t *node, const char *name, struct dataset_entry *entry)
{
    if (node->type != YAML_MAPPING_NODE) {
        return refuse(in, node, "%s: an entry must be {path: folder, weight: number}, where weight may be left out",
                      name);
    }
    TRY(keys_check(in, node, name));
    *entry = (struct dataset_entry){.weight = 1};
    for (const yaml_node_pair_t *p = node->data.mapping.pairs.start; p < node->data.mapping.pairs.top; p++) {
        const yaml_node_t *key = node_at(in, p->key), *value = node_at(in, p->value);
        if (strcmp(scalar_of(key), "weight") == 0) {
            TRY(weight_read(in, value, name, &entry->weight));
        } else if (strcmp(scalar_of(key), "path") != 0) {
            return refuse(in, key, "%s: unknown key '%.80s'; an entry has path and weight", name, scalar_of(key));
        } else if (value->type != YAML_SCALAR_NODE) {
            return refuse(in, value, "%s: path must be text", name);
        } else {
            TRY(text_copy(in, value, name, true, entry->path));
        }
    }
    if (entry->path[0] == '\0') return refuse(in, node, "%s: an entry has no path", name);
    return 0;
}

static int datasets_read(struct reader *in, const yaml_node_t *node, const char *name, const struct option *option)
{
    struct dataset_list *list = option_value(option, in->cfg);
    if (node->type != YAML_SEQUENCE_NODE) return refuse_type(in, node, name, option, "");
    const yaml_node_item_t *first = node->data.sequence.items.start;
    if (node->data.sequence.items.top - first > CONFIG_DATASETS_MAX) return refuse_type(in, node, name, option, "");
    memset(list, 0, sizeof *list);
    for (const yaml_node_item_t *item = first; item < node->data.sequence.items.top; item++) {
        const yaml_node_t *entry = node_at(in, *item);
        TRY(dataset_read(in, entry, name, &list->entry[list->n]));
        for (int i = 0; i < list->n; i++) {
            if (strcmp(list->entry[i].path, list->entry[list->n].path) != 0) continue;
            return refuse(in, entry, "%s: %.200s is listed twice; give it one entry with the sum of the weights",
                          name, list->entry[i].path);
        }
        list->n++;
    }
    return 0;
}

static int option_read(struct reader *in, const yaml_node_t *node, const struct option *option)
{
    char name[OPTION_NAME_MAX];
    option_name(option, name);
    in->line[option - option_at(0)] = in->is_word ? CONFIG_LINE_WORD : (int)node->start_mark.line + 1;
    if (node_is_null(node)) {
        return refuse(in, node, "%s: has no value; give one%s%s, or leave the key out for its default", name,
                      option->kind == OPTION_STR ? " (\"\" for none)" : "",
                      option->is_path ? " (\"~\" in quotes for the home folder: ~ alone is YAML for nothing)" : "");
    }
    switch (option->kind) {
    case OPTION_INT:
        return int_read(in, node, name, option);
    case OPTION_NUM:
        return num_read(in, node, name, option);
    case OPTION_BOOL:
        return bool_read(in, node, name, option);
    case OPTION_STR:
        return str_read(in, node, name, option);
    case OPTION_CHOICE:
        return choice_read(in, node, name, option);
    case OPTION_DATASETS:
        return datasets_read(in, node, name, option);
    }
    FAIL(ERR_BUG, "option %s has no reader", name);
}

static bool section_exists(const char *name)
{
    for (int i = 0; i < SECTION_COUNT; i++) {
        if (strcmp(section_at(i)->name, name) == 0) return !section_is_top(name);
    }
    return false;
}

/* A mapping of options; the document itself when section is "top", where sections may stand too. */
static int section_read(struct reader *in, const yaml_node_t *mapping, const char *section)
{
    const bool top = section_is_top(section);
    if (mapping->type != YAML_MAPPING_NODE) {
        return refuse(in, mapping, "%s must be a mapping of keys to values%s", top ? "the configuration" : section,
                      node_is_null(mapping) ? "; it is empty: remove it, or write {}" : "");
    }
    TRY(keys_check(in, mapping, top ? "the configuration" : section));
    for (const yaml_node_pair_t *p = mapping->data.mapping.pairs.start; p < mapping->data.mapping.pairs.top; p++) {
        const yaml_node_t *key = node_at(in, p->key), *value = node_at(in, p->value);
        const struct option *option = option_find(section, scalar_of(key));
        if (option != NULL) {
            TRY(option_read(in, value, option));
        } else if (top && section_exists(scalar_of(key))) {
            TRY(section_read(in, value, scalar_of(key)));
        } else {
            return refuse_key(in, key, section, scalar_of(key));
        }
    }
    return 0;
}

static int syntax_failed(const struct reader *in, const yaml_parser_t *parser)
{
    const char *problem = parser->problem ? parser->problem : "not enough memory";
    if (in->is_word) {
        const bool sound = utf8_valid_bytes(in->name, strlen(in->name)) == strlen(in->name);
        FAIL(ERR_CONFIG, "%s: the value is not YAML: %s%s", in->name, problem,
             sound ? "" : "; in a name of other bytes write each as %XX, with !bytes before: !bytes \"caf%E9\"");
    }
    const size_t line = parser->problem_mark.line + 1;
    FAIL(ERR_CONFIG, "%s:%zu: not YAML: %s%s%s", in->name, line, problem, parser->context ? ", " : "",
         parser->context ? parser->context : "");
}

/* Loads the text's one document and reads it: as the value of `option`, or as a whole configuration when that is NULL. */
static int document_read(struct reader *in, const char *text, size_t bytes, const struct option *option)
{
    int rc = 0;
    bool loaded = false;
    yaml_document_t second;
    yaml_parser_t parser;
    if (!yaml_parser_initialize(&parser)) FAIL(ERR_SYSTEM, "no memory to read %s", in->name);
    yaml_parser_set_input_string(&parser, (const unsigned char *)text, bytes);
    if (!yaml_parser_load(&parser, &in->document)) {
        rc = syntax_failed(in, &parser);
        goto done;
    }
    loaded = true;
    const yaml_node_t *root = yaml_document_get_root_node(&in->document);
    if (root == NULL) {
        FAIL_GOTO(done, ERR_CONFIG, "%s: %s", in->name,
                  in->is_word ? "has no value after the '='; write key='\"\"' for an empty text" : "is empty");
    }
    if (!yaml_parser_load(&parser, &second)) {
        rc = syntax_failed(in, &parser);
        goto done;
    }
    const bool more = yaml_document_get_root_node(&second) != NULL;
    yaml_document_delete(&second);
    if (more) FAIL_GOTO(done, ERR_CONFIG, "%s: holds a second document ('---'); keep one", in->name);
    TRY_GOTO(option ? option_read(in, root, option) : section_read(in, root, "top"), done);
done:
    if (loaded) yaml_document_delete(&in->document);
    yaml_parser_delete(&parser);
    return rc;
}

int config_yaml_read(struct config *cfg, int line[OPTION_COUNT], const char *name, const char *text, size_t bytes)
{
    struct reader in = {.name = name, .cfg = cfg};
    in.line = line;
    return document_read(&in, text, bytes, NULL);
}

/* Refuses a word whose key no option has. */
static int refuse_word(const char *word, const char *name)
{
    const char *dot = strchr(name, '.');
    const struct reader in = {.name = word, .is_word = true};
    const struct foreign *foreign = foreign_find(dot ? dot + 1 : name);
    struct guess guess = guess_start(name);
    for (int i = 0; i < OPTION_COUNT; i++) {
        char known[OPTION_NAME_MAX];
        option_name(option_at(i), known);
        guess_offer(&guess, known);
        if (strcmp(name, option_at(i)->key) == 0)
            FAIL(ERR_CONFIG, "%s: write it with its section: %s=…", word, known);
    }
    if (section_exists(name)) FAIL(ERR_CONFIG, "%s: name one option of the section, as in %s.key=value", word, name);
    if (foreign != NULL && strcmp(foreign->theirs, dot ? dot + 1 : name) == 0)
        return refuse_foreign(&in, NULL, "no such option", foreign);
    if (guess.best[0] != '\0') FAIL(ERR_CONFIG, "%s: no such option; did you mean %s?", word, guess.best);
    if (foreign != NULL) return refuse_foreign(&in, NULL, "no such option", foreign);
    FAIL(ERR_CONFIG, "%s: no such option; `tatara train --help-config` lists them all", word);
}

int config_yaml_word(struct config *cfg, int line[OPTION_COUNT], const char *word)
{
    const char *equals = strchr(word, '=');
    if (equals == NULL || equals == word) {
        FAIL(ERR_CONFIG, "%.200s: what follows the configuration's file must be key=value, such as optim.lr=1e-4",
             word);
    }
    char name[2 * OPTION_NAME_MAX], section[OPTION_NAME_MAX] = "top";
    snprintf(name, sizeof name, "%.*s", (int)(equals - word), word);
    const char *dot = strchr(name, '.');
    const char *key = dot ? dot + 1 : name;
    if (dot != NULL) snprintf(section, sizeof section, "%.*s", (int)(dot - name), name);
    const struct option *option = option_find(section, key);
    if (option == NULL || (dot != NULL && section_is_top(section))) return refuse_word(word, name);
    const size_t bytes = strlen(equals + 1);
    if (option->kind == OPTION_STR && option->is_path && bytes < CONFIG_TEXT_MAX &&
        utf8_valid_bytes(equals + 1, bytes) < bytes) {
        line[option - option_at(0)] = CONFIG_LINE_WORD;
        memcpy(option_value(option, cfg), equals + 1,
               bytes + 1); /* a file's name of other bytes than YAML can have */
        return 0;
    }
    struct reader in = {.name = word, .is_word = true, .cfg = cfg};
    in.line = line;
    return document_read(&in, equals + 1, strlen(equals + 1), option);
}
