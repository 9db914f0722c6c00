/* Limits of control groups, read from trees of files as machines and containers have them. */
#include "cgroup.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#define V2 "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
#define V1                                                                                 \
    "33 31 0:30 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n" \
    "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
#define CG "/sys/fs/cgroup"
#define MIB "1048576"

struct file {
    const char *path, *text;
};

/* The smallest quota and the smallest remainder of memory, over all levels; 0: none. */
static const struct {
    const char *name;
    struct file files[12];
    double cpus;
    uint64_t left_bytes;
} rows[] = {
    {"nothing at all", {{NULL, NULL}}, 0, 0},
    {"version 2, no limit",
     {{"/proc/self/cgroup", "0::/user.slice\n"},
      {"/proc/self/mountinfo", "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n" V2},
      {CG "/user.slice/cpu.max", "max 100000\n"},
      {CG "/user.slice/memory.max", "max\n"},
      {CG "/user.slice/memory.current", "100\n"}},
     0,
     0},
    {"version 2, a quota and limits at several levels",
     {{"/proc/self/cgroup", "0::/a/b/c\n"},
      {"/proc/self/mountinfo", V2},
      {CG "/a/cpu.max", "150000 100000\n"},
      {CG "/a/b/cpu.max", "max 100000\n"},
      {CG "/a/b/c/cpu.max", "400000 100000\n"},
      {CG "/a/memory.max", "9000\n"},
      {CG "/a/memory.current", "8000\n"},
      {CG "/a/memory.stat", "anon 1\nfile 3000\ninactive_file 2000\nactive_file 500\nslab_reclaimable 100\n"},
      {CG "/a/b/memory.max", "4000\n"},
      {CG "/a/b/memory.high", "3500\n"},
      {CG "/a/b/memory.current", "100\n"}},
     1.5,
     3400},
    {"version 1, controllers mounted together, the parent smaller",
     {{"/proc/self/cgroup", "4:memory:/job/step\n2:cpu,cpuacct:/job/step\n1:name=systemd:/x\n0::/\n"},
      {"/proc/self/mountinfo", V1},
      {CG "/cpu,cpuacct/job/cpu.cfs_quota_us", "50000\n"},
      {CG "/cpu,cpuacct/job/cpu.cfs_period_us", "100000\n"},
      {CG "/cpu,cpuacct/job/step/cpu.cfs_quota_us", "-1\n"},
      {CG "/cpu,cpuacct/job/step/cpu.cfs_period_us", "100000\n"},
      {CG "/memory/job/memory.limit_in_bytes", "9223372036854771712\n"},
      {CG "/memory/job/step/memory.limit_in_bytes", "5000\n"},
      {CG "/memory/job/step/memory.usage_in_bytes", "3000\n"},
      {CG "/memory/job/step/memory.stat", "inactive_file 10\ntotal_inactive_file 1000\n"}},
     0.5,
     3000},
    {"a container's own namespace",
     {{"/proc/self/cgroup", "0::/\n"},
      {"/proc/self/mountinfo", V2},
      {CG "/cpu.max", "100000 100000\n"},
      {CG "/memory.max", MIB "\n"},
      {CG "/memory.current", MIB "\n"},
      {CG "/memory.stat", "inactive_file 2097152\n"}},
     1,
     1048576},
    {"a container that sees its group's path from the machine's root",
     {{"/proc/self/cgroup", "2:cpu,cpuacct:/docker/1f2e\n"},
      {"/proc/self/mountinfo",
       "33 31 0:30 /docker/1f2e /sys/fs/cgroup/cpu,cpuacct ro - cgroup cgroup rw,cpu,cpuacct\n"},
      {CG "/cpu,cpuacct/cpu.cfs_quota_us", "250000\n"},
      {CG "/cpu,cpuacct/cpu.cfs_period_us", "100000\n"}},
     2.5,
     0},
    {"a group outside the namespace, and a mount of another group",
     {{"/proc/self/cgroup", "0::/../other\n"},
      {"/proc/self/mountinfo", "30 23 0:26 /kubepods/pod1 /sys/fs/cgroup rw - cgroup2 cgroup rw\n"},
      {CG "/cpu.max", "300000 100000\n"}},
     3,
     0},
    {"a folder with a space, mounted twice",
     {{"/proc/self/cgroup", "0::/a b\n"},
      {"/proc/self/mountinfo", "30 23 0:26 / /mnt/c\\040g rw - cgroup2 cgroup2 rw\n30 23 0:26 / /mnt/c\\040g rw - "
                               "cgroup2 cgroup2 rw\n"},
      {"/mnt/c g/a b/cpu.max", "20000 100000\n"}},
     0.2,
     0},
    {"what makes no sense",
     {{"/proc/self/cgroup", "nonsense\n0:\n\n0::/a\n"},
      {"/proc/self/mountinfo", "short line\n1 2 3 4 5 - cgroup2\n" V2},
      {CG "/a/cpu.max", "\n"},
      {CG "/a/memory.max", "many\n"},
      {CG "/cpu.max", "100000 0\n"}},
     0,
     0},
};

static void write_file(const char *root, const struct file *file)
{
    char path[512];
    snprintf(path, sizeof path, "%s%s", root, file->path);
    for (char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = '\0';
        (void)mkdir(path, 0777);
        *slash = '/';
    }
    FILE *out = fopen(path, "w");
    assert_non_null(out);
    assert_true(fputs(file->text, out) >= 0);
    assert_int_equal(fclose(out), 0);
}

static void remove_tree(const char *root)
{
    char command[256];
    snprintf(command, sizeof command, "rm -rf '%s'", root);
    assert_int_equal(system(command), 0); // NOLINT(cert-env33-c): a path of our own
}

static void test_levels(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        char root[] = "/tmp/tatara-cgroup-XXXXXX";
        struct cgroup_level level[CGROUP_LEVELS];
        double cpus = 0;
        uint64_t left = 0;
        assert_non_null(mkdtemp(root));
        for (const struct file *file = rows[i].files; file->path; file++)
            write_file(root, file);
        const int n = cgroup_levels(root, level);
        for (int l = 0; l < n; l++) {
            const uint64_t rest = level[l].limit_bytes - level[l].taken_bytes;
            assert_true(level[l].cpus > 0 || level[l].limit_bytes > 0);
            assert_true((level[l].limit_bytes > 0) == (level[l].limit_name != NULL));
            if (level[l].cpus > 0 && (cpus == 0 || level[l].cpus < cpus)) cpus = level[l].cpus;
            if (level[l].limit_bytes > 0 && (left == 0 || rest < left)) left = rest;
            for (int k = 0; k < l; k++)
                assert_true(level[k].id != level[l].id);
        }
        remove_tree(root);
        if (cpus != rows[i].cpus || left != rows[i].left_bytes) {
            fail_msg("%s: %g processors, %llu bytes left; wanted %g and %llu", rows[i].name, cpus,
                     (unsigned long long)left, rows[i].cpus, (unsigned long long)rows[i].left_bytes);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_levels)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
