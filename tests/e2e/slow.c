/* Preloaded into tatara by test_stop.py: every parallel region waits for SLOW_US microseconds first, so that a small model's
 * steps take as long as a large one's, without the work. */
#define _GNU_SOURCE /* for RTLD_NEXT */
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

void GOMP_parallel(void (*region)(void *), void *data, unsigned threads, unsigned flags);

void GOMP_parallel(void (*region)(void *), void *data, unsigned threads, unsigned flags)
{
    void (*real)(void (*)(void *), void *, unsigned, unsigned);
    void *const found = dlsym(RTLD_NEXT, "GOMP_parallel");
    const char *us = getenv("SLOW_US");
    const long wait_us = us ? strtol(us, NULL, 10) : 0;
    struct timespec left = {wait_us / 1000000, wait_us % 1000000 * 1000};
    int rc = 0;
    do
        rc = nanosleep(&left, &left);
    while (rc != 0);
    memcpy(&real, &found, sizeof real);
    real(region, data, threads, flags);
}
