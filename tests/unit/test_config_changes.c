/* What differs between two configurations: each option once, with both values and what the change does; and which changes
 * run.allow_changes may name. */
#include "config.h"
#include "config_table.h"
#include "err.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static struct config *defaults(void)
{
    struct config *cfg = calloc(1, sizeof *cfg);
    assert_non_null(cfg);
    config_defaults(cfg);
    snprintf(cfg->data.tokenizer, sizeof cfg->data.tokenizer, "t.model");
    return cfg;
}

/* Another value than the one that the option has. */
static void flip(const struct option *option, struct config *cfg)
{
    void *value = option_value(option, cfg);
    switch (option->kind) {
    case OPTION_INT:
        *(int64_t *)value += 1;
        break;
    case OPTION_NUM:
        *(double *)value += 1e-7;
        break;
    case OPTION_BOOL:
        *(bool *)value = !*(bool *)value;
        break;
    case OPTION_CHOICE:
        *(int *)value = *(int *)value == 0;
        break;
    case OPTION_STR:
        snprintf(value, CONFIG_TEXT_MAX, "another");
        break;
    case OPTION_DATASETS:
        *(struct dataset_list *)value = (struct dataset_list){.n = 1, .entry = {{"another", 1}}};
        break;
    }
}

struct seen {
    int n;
    char name[OPTION_NAME_MAX];
    enum config_change change;
    bool explained;
};

static int note(void *context, const struct config_difference *difference)
{
    struct seen *seen = context;
    seen->n++;
    snprintf(seen->name, sizeof seen->name, "%s", difference->name);
    seen->change = difference->change;
    seen->explained = difference->effect[0] != '\0';
    assert_string_not_equal(difference->before, difference->now);
    return 0;
}

static void test_each_option(void **state)
{
    (void)state;
    struct config *before = defaults(), *now = defaults();
    for (int i = 0; i < OPTION_COUNT; i++) {
        struct seen seen = {.n = 0};
        char name[OPTION_NAME_MAX];
        option_name(option_at(i), name);
        *now = *before;
        assert_int_equal(config_compare(before, now, note, &seen), 0);
        assert_int_equal(seen.n, 0);
        flip(option_at(i), now);
        assert_int_equal(config_compare(before, now, note, &seen), 0);
        assert_int_equal(seen.n, 1);
        assert_string_equal(seen.name, name);
        assert_int_equal(seen.change, option_at(i)->change.kind);
        assert_int_equal(seen.explained, seen.change != CHANGE_HARMLESS);
    }
    free(before);
    free(now);
}

static void test_allowed(void **state)
{
    (void)state;
    static const struct {
        const char *list, *key;
        bool allows, sound;
    } row[] = {
        {"", "model.rope_theta", false, true},
        {"model.rope_theta", "model.rope_theta", true, true},
        {"model.rope_theta", "model.rope", false, true},
        {"model.norm_eps, model.rope_theta", "model.rope_theta", true, true},
        {" ,model.norm_eps,,data.tokenizer ", "data.tokenizer", true, true},
        {"model.rope_thet", "model.rope_theta", false, false},
        {"optim.lr", "optim.lr", true, false}, /* needs no leave */
        {"rope_theta", "model.rope_theta", false, false},
    };
    for (size_t i = 0; i < sizeof row / sizeof *row; i++) {
        struct config *cfg = defaults();
        snprintf(cfg->run.allow_changes, sizeof cfg->run.allow_changes, "%s", row[i].list);
        assert_int_equal(config_allows(cfg, row[i].key), row[i].allows);
        err_clear();
        assert_int_equal(config_check(cfg), row[i].sound ? 0 : ERR_CONFIG);
        if (!row[i].sound) assert_non_null(strstr(err_message(), "run.allow_changes names"));
        free(cfg);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_each_option), cmocka_unit_test(test_allowed)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
