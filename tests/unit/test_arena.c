/* The arena: what the measuring pass counts is what the taking pass takes, aligned, zeroed and not overlapping. */
#include <omp.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "arena.h"
#include "err.h"
#include "ops.h"

enum { PIECES = 5, ALIGN = 128 };

/* A layout as a model has it: the same calls for both passes. */
static void lay_out(struct arena *arena, struct tensor pieces[PIECES])
{
    pieces[0] = arena_tensor(arena, ARENA_PARAMS, DT_F32, 7, 3, 0);
    pieces[1] = arena_tensor(arena, ARENA_GRADS, DT_I64, 1, 0, 0);
    pieces[2] = arena_tensor(arena, ARENA_ACTS, DT_BF16, 3, 5, 11);
    pieces[3] = arena_tensor(arena, ARENA_ACTS, DT_F32, 0, 4, 0);
    pieces[4] = arena_tensor(arena, ARENA_WORK, DT_I32, 32, 0, 0);
}

static void test_measuring_equals_taking(void **state)
{
    struct device *dev = *state;
    struct arena measured = arena_measure(dev), taken;
    struct tensor views[PIECES], pieces[PIECES];
    lay_out(&measured, views);
    assert_int_equal(measured.used, 128 + 128 + 384 + 0 + 128);
    assert_int_equal(arena_open(&taken, dev, measured.used), 0);
    lay_out(&taken, pieces);
    assert_int_equal(taken.used, measured.used);
    assert_memory_equal(taken.by_kind, measured.by_kind, sizeof taken.by_kind);

    size_t by_kind = 0;
    for (int k = 0; k < ARENA_KINDS; k++)
        by_kind += taken.by_kind[k];
    assert_int_equal(by_kind, taken.used);
    for (int i = 0; i < PIECES; i++) {
        assert_null(views[i].data);
        assert_int_equal(pieces[i].ndim, views[i].ndim);
        assert_memory_equal(pieces[i].shape, views[i].shape, sizeof views[i].shape);
        assert_int_equal((uintptr_t)pieces[i].data % ALIGN, 0);
        for (size_t b = 0; b < tensor_bytes(pieces[i]); b++)
            assert_int_equal(((const unsigned char *)pieces[i].data)[b],
                             0); /* a piece written below would show here */
        if (tensor_bytes(pieces[i]) > 0) memset(pieces[i].data, 0xff, tensor_bytes(pieces[i]));
    }
    arena_close(&taken);
    assert_null(taken.base);
    arena_close(&taken); /* closing twice does nothing */
}

static void test_shapes(void **state)
{
    struct arena arena = arena_measure(*state);
    const struct tensor one = arena_tensor(&arena, ARENA_WORK, DT_F32, 6, 0, 0);
    const struct tensor three = arena_tensor(&arena, ARENA_WORK, DT_BF16, 2, 3, 4);
    assert_int_equal(one.ndim, 1);
    assert_int_equal(tensor_elems(one), 6);
    assert_int_equal(three.ndim, 3);
    assert_int_equal(tensor_bytes(three), 48);
    assert_string_equal(arena_kind_name(ARENA_ACTS), "activations");
}

/* What is zeroed by several threads in pieces, of sizes around one of 2 MiB. From the third round on it is memory
 * that was written before. */
static void test_large_memory_is_zero(void **state)
{
    struct device *dev = *state;
    const size_t piece = (size_t)2 << 20, n = 5,
                 sizes[] = {piece - 256, piece, piece + 128, 5 * piece - 128, 5 * piece};
    for (size_t i = 0; i < 4 * n; i++) {
        void *data = NULL;
        const size_t bytes = sizes[i % n];
        assert_int_equal(dev->table->alloc(dev, bytes, &data), 0);
        assert_int_equal((uintptr_t)data % (bytes < piece ? ALIGN : piece), 0);
        for (size_t b = 0; b < bytes; b++)
            if (((const unsigned char *)data)[b] != 0) fail_msg("byte %zu of %zu is not zero", b, bytes);
        memset(data, 0xff, bytes);
        dev->table->free(dev, data, bytes);
    }
}

static void test_too_large(void **state)
{
    struct arena arena;
    assert_int_equal(arena_open(&arena, *state, SIZE_MAX - 5), ERR_SYSTEM);
    assert_non_null(strstr(err_message(), "bytes of memory"));
    arena_close(&arena);
    err_clear();
}

/* What computes beside the ops keeps to the device's threads too. */
static void test_threads(void **state)
{
    (void)state;
    assert_int_equal(omp_get_max_threads(), 3);
}

int main(void)
{
    struct device dev;
    if (device_open(&dev, DEVICE_CPU, 0, 3) != 0) return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_prestate(test_measuring_equals_taking, &dev),
        cmocka_unit_test_prestate(test_shapes, &dev),
        cmocka_unit_test_prestate(test_large_memory_is_zero, &dev),
        cmocka_unit_test_prestate(test_too_large, &dev),
        cmocka_unit_test(test_threads),
    };
    const int failed = cmocka_run_group_tests(tests, NULL, NULL);
    device_close(&dev);
    return failed;
}
