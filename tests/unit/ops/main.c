/* The op test: every op of ops.def, on one kind of device. `test_ops` runs on the CPU, `test_ops portable` there with the
 * portable product, `test_ops cuda` on a GPU. */
#include <stdio.h>
#include <string.h>

#include "op_test.h"

#define THREADS_MAX 3

#define OP(name, params, args)           \
    static void row_##name(void **state) \
    {                                    \
        test_op_##name(*state);          \
    }
#include "ops.def"
#undef OP

int main(int argc, char **argv)
{
    const bool cuda = argc == 2 && strcmp(argv[1], "cuda") == 0;
    const bool portable = argc == 2 && strcmp(argv[1], "portable") == 0;
    struct device dev;
    int failed = 1;
    if (device_open(&dev, cuda ? DEVICE_CUDA : DEVICE_CPU, 0, THREADS_MAX) != 0 ||
        device_choose_product(&dev, portable ? PRODUCT_PORTABLE : PRODUCT_AUTO) != 0) {
        fprintf(stderr, "test_ops: %s\n", err_message());
        return 1;
    }
    const size_t bytes = dev.table->workspace_bytes(&dev, NULL, ATTENTION_FLASH);
    if (dev.table->alloc(&dev, bytes, &dev.workspace) == 0) {
        dev.workspace_bytes = bytes;
        const struct CMUnitTest rows[] = {
#define OP(name, params, args) cmocka_unit_test_prestate(row_##name, &dev),
#include "ops.def"
#undef OP
        };
        failed = cmocka_run_group_tests(rows, NULL, NULL);
        dev.table->free(&dev, dev.workspace, bytes);
    } else {
        fprintf(stderr, "test_ops: %s\n", err_message());
    }
    device_close(&dev);
    return failed;
}
