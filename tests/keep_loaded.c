/* For builds with sanitizers: MPI's plugins stay in memory until the process ends. LeakSanitizer looks callers up then,
 * and lsan.supp knows theirs by the names of libraries that would else be gone. */
int dlclose(void *handle);

int dlclose(void *handle)
{
    (void)handle;
    return 0;
}
