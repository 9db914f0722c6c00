/* `tatara ckpt`: looking at checkpoints. One rank, and bounded memory whatever the size of a tensor. */
#include "ckpt_internal.h"
#include "path.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define CHUNK_ELEMS ((int64_t)4 << 20)
#define VERIFY_THREADS 8

static const char usage[] =
    "usage: tatara ckpt ls RUN_DIR        the checkpoints of a run\n"
    "       tatara ckpt show FOLDER       metadata, configuration, and every tensor's statistics\n"
    "       tatara ckpt verify FOLDER     compares every byte with the manifest's checksums\n"
    "       tatara ckpt diff A B          which tensors differ, in how many elements, and by how much\n"
    "FOLDER, A and B are checkpoints, RUN_DIR/step-NNNNNNNN, or a run's folder, whose newest complete checkpoint is "
    "taken.\n"
    "\n"
    "Exit status: 0 success; 1 diff: tensors differ; 2 and up trouble, as `tatara --help` lists it.\n";

/* What `ckpt diff` ends with, like diff(1), where it did what was asked of it. */
enum { SAME = 0, DIFFERENT = 1 };

static void format_bytes(char text[32], double bytes)
{
    static const char *const unit[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
    int u = 0;
    for (; bytes >= 1024.0 && u < 5; u++) {
        bytes /= 1024.0;
    }
    snprintf(text, 32, u == 0 ? "%.0f %s" : "%.1f %s", bytes, unit[u]);
}

static int64_t file_bytes(const struct ckpt_manifest *manifest)
{
    int64_t bytes = 0;
    for (int i = 0; i < manifest->n_files; i++) {
        bytes += manifest->files[i].bytes;
    }
    return bytes;
}

/* ---- ls ---- */

static int list_one(const char *run_dir, int64_t step)
{
    char folder[CKPT_PATH_MAX], size[32];
    struct ckpt_manifest manifest;
    int missing = 0;
    TRY(ckpt_step_path(folder, run_dir, step));
    if (ckpt_manifest_read(folder, &manifest) != 0) {
        printf("%-10" PRId64 " %-21s %10s %6s  not usable: %s\n", step, "-", "-", "-", err_message());
        err_clear();
        return 0;
    }
    for (int i = 0; i < manifest.n_files; i++) {
        missing += !ckpt_file_present(folder, &manifest.files[i]);
    }
    format_bytes(size, (double)file_bytes(&manifest));
    printf("%-10" PRId64 " %-21s %10s %6d  ", step, manifest.saved_at, size, manifest.n_files);
    if (missing == 0) printf("complete\n");
    if (missing > 0)
        printf("%d of its files missing or of another size; see tatara ckpt verify %s\n", missing, folder);
    ckpt_manifest_free(&manifest);
    return 0;
}

static int list_run(const char *run_dir)
{
    int rc = 0, n = 0;
    int64_t *steps = NULL;
    char whole[PATH_WHOLE_MAX];
    TRY(ckpt_list_steps(run_dir, &steps, &n));
    if (n == 0) {
        FAIL_GOTO(done, ERR_DATA, "%s is not there, or holds no checkpoints (folders named step-NNNNNNNN)",
                  path_whole(whole, run_dir));
    }
    printf("%-10s %-21s %10s %6s  %s\n", "step", "saved (UTC)", "size", "files", "state");
    for (int i = 0; i < n; i++) {
        TRY_GOTO(list_one(run_dir, steps[i]), done);
    }
done:
    free(steps);
    return rc;
}

/* ---- show ---- */

/* Over the finite elements; the others are counted. */
struct stats {
    double sum_squares, min, max;
    int64_t not_finite;
};

static void add_stats(struct stats *stats, const float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        const double value = (double)x[i];
        if (!isfinite(value)) {
            stats->not_finite++;
            continue;
        }
        stats->sum_squares += value * value;
        stats->min = fmin(stats->min, value);
        stats->max = fmax(stats->max, value);
    }
}

static int show_tensor(const char *folder, const struct ckpt_manifest *manifest, const struct ckpt_tensor *tensor,
                       float *buffer)
{
    struct stats stats = {.min = INFINITY, .max = -INFINITY};
    struct ckpt_slab slab = {.ndim = tensor->ndim, .data = buffer};
    const int64_t elems = ckpt_tensor_elems(tensor->ndim, tensor->shape);
    char shape[64];
    memcpy(slab.name, tensor->name, sizeof slab.name);
    memcpy(slab.shape, tensor->shape, sizeof tensor->shape);
    for (int64_t at = 0; at < elems; at = slab.end) {
        slab.begin = at;
        slab.end = elems - at < CHUNK_ELEMS ? elems : at + CHUNK_ELEMS;
        TRY(ckpt_read_slabs(folder, manifest, &slab, 1));
        add_stats(&stats, buffer, slab.end - slab.begin);
    }
    if (tensor->ndim == 1) snprintf(shape, sizeof shape, "[%" PRId64 "]", tensor->shape[0]);
    if (tensor->ndim == 2)
        snprintf(shape, sizeof shape, "[%" PRId64 ", %" PRId64 "]", tensor->shape[0], tensor->shape[1]);
    printf("  %-64s %-18s %12.6g %12.5g %12.5g  %016" PRIx64, tensor->name, shape, sqrt(stats.sum_squares), stats.min,
           stats.max, tensor->digest);
    if (stats.not_finite > 0) printf("  %" PRId64 " elements are NaN or infinite", stats.not_finite);
    printf("\n");
    return 0;
}

static void show_meta(const char *folder, const struct ckpt_manifest *manifest)
{
    const struct ckpt_meta *meta = &manifest->meta;
    char size[32];
    format_bytes(size, (double)file_bytes(manifest));
    printf("checkpoint    %s\nstep          %" PRId64 "\nsaved         %s by %s\n", folder, meta->step,
           manifest->saved_at, meta->version);
    printf("size          %s in %d files, of %d rank(s)\n", size, manifest->n_files, manifest->n_ranks);
    printf("optim steps   %" PRId64 " in the moments\n", meta->optim_steps);
    if (meta->sequences >= 0) printf("sequences     %" PRId64 " read\n", meta->sequences);
    printf("tokens        %.17g\ngrad norm     %.17g\ngrad scale    %.17g\n", meta->tokens, meta->grad_norm,
           meta->grad_scale);
    printf("model id      %016" PRIx64 "\ntokenizer id  %016" PRIx64 ", %s\n", meta->model_id, meta->tokenizer_id,
           manifest->n_files > manifest->n_ranks + 1 ? "in " CKPT_TOKENIZER : "its model not in the checkpoint");
    printf("documents     begin with %" PRId64 ", end with %" PRId64 " (-1: none, or not known)\n", meta->bos,
           meta->eos);
    if (meta->record) printf("record        %s\n", meta->record);
    printf("configuration\n");
    for (const char *line = meta->config_yaml; *line;) {
        const int length = (int)strcspn(line, "\n");
        printf("  %.*s\n", length, line);
        line += length + (line[length] == '\n');
    }
}

/* Several files at a time: a parallel file system gives each its own speed. */
static int verify_all(const char *folder, const struct ckpt_manifest *manifest)
{
    return ckpt_verify_files(folder, manifest, 0, 1, VERIFY_THREADS);
}

static int show(const char *path)
{
    int rc = 0;
    struct ckpt_manifest manifest;
    float *buffer = NULL;
    char folder[CKPT_PATH_MAX];
    TRY(ckpt_choose(path, folder));
    TRY(ckpt_manifest_read(folder, &manifest));
    TRY_GOTO(verify_all(folder, &manifest), done);
    show_meta(folder, &manifest);
    buffer = malloc((size_t)CHUNK_ELEMS * sizeof *buffer);
    if (!buffer) FAIL_GOTO(done, ERR_SYSTEM, "no memory left to read %s", folder);
    printf("tensors\n  %-64s %-18s %12s %12s %12s  %s\n", "name", "shape", "norm", "min", "max", "digest");
    for (int i = 0; i < manifest.n_tensors; i++) {
        TRY_GOTO(show_tensor(folder, &manifest, &manifest.tensors[i], buffer), done);
    }
done:
    free(buffer);
    ckpt_manifest_free(&manifest);
    return rc;
}

/* ---- verify ---- */

static int verify(const char *path)
{
    int rc = 0;
    char folder[CKPT_PATH_MAX], size[32];
    struct ckpt_manifest manifest;
    TRY(ckpt_choose(path, folder));
    TRY(ckpt_manifest_read(folder, &manifest));
    TRY_GOTO(verify_all(folder, &manifest), done);
    format_bytes(size, (double)file_bytes(&manifest));
    printf("OK: %s, %d files, %s\n", folder, manifest.n_files, size);
done:
    ckpt_manifest_free(&manifest);
    return rc;
}

/* ---- diff ---- */

/* A tensor of a checkpoint, read a chunk at a time. */
struct reader {
    char folder[CKPT_PATH_MAX];
    struct ckpt_manifest manifest;
    float *chunk;
};

static int reader_open(struct reader *r, const char *path)
{
    TRY(ckpt_choose(path, r->folder));
    TRY(ckpt_manifest_read(r->folder, &r->manifest));
    TRY(verify_all(r->folder, &r->manifest));
    r->chunk = malloc((size_t)CHUNK_ELEMS * sizeof *r->chunk);
    if (!r->chunk) FAIL(ERR_SYSTEM, "no memory left to read %s", r->folder);
    return 0;
}

static void reader_close(struct reader *r)
{
    free(r->chunk);
    ckpt_manifest_free(&r->manifest);
}

static const struct ckpt_tensor *reader_find(const struct reader *r, const char *name)
{
    for (int i = 0; i < r->manifest.n_tensors; i++)
        if (strcmp(r->manifest.tensors[i].name, name) == 0) return &r->manifest.tensors[i];
    return NULL;
}

static int reader_read(struct reader *r, const struct ckpt_tensor *tensor, int64_t begin, int64_t end)
{
    struct ckpt_slab slab = {.ndim = tensor->ndim, .begin = begin, .end = end, .data = r->chunk};
    memcpy(slab.name, tensor->name, sizeof slab.name);
    memcpy(slab.shape, tensor->shape, sizeof tensor->shape);
    return ckpt_read_slabs(r->folder, &r->manifest, &slab, 1);
}

/* How two tensors of one shape differ; bits count, so that two NaN may be alike. */
struct difference {
    int64_t elems;
    double largest, squares, squares_a;
};

static uint32_t bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static void add_difference(struct difference *d, const float *a, const float *b, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        const double gap = (double)a[i] - (double)b[i];
        d->squares_a += (double)a[i] * (double)a[i];
        if (bits_of(a[i]) == bits_of(b[i])) continue;
        d->elems++;
        d->squares += gap * gap;
        if (!(fabs(gap) <= d->largest)) d->largest = fabs(gap); /* lets a NaN through */
    }
}

static int diff_tensor(struct reader *a, struct reader *b, const struct ckpt_tensor *in_a, int64_t *differing)
{
    struct difference d = {.elems = 0};
    const struct ckpt_tensor *in_b = reader_find(b, in_a->name);
    const int64_t elems = ckpt_tensor_elems(in_a->ndim, in_a->shape);
    if (!in_b || in_b->ndim != in_a->ndim || memcmp(in_a->shape, in_b->shape, sizeof in_a->shape) != 0) {
        printf("  %-64s %s\n", in_a->name, in_b ? "has another shape in B" : "is only in A");
        ++*differing;
        return 0;
    }
    for (int64_t at = 0; at < elems; at += CHUNK_ELEMS) {
        const int64_t end = elems - at < CHUNK_ELEMS ? elems : at + CHUNK_ELEMS;
        TRY(reader_read(a, in_a, at, end));
        TRY(reader_read(b, in_b, at, end));
        add_difference(&d, a->chunk, b->chunk, end - at);
    }
    if (d.elems == 0) return 0;
    ++*differing;
    printf("  %-64s %" PRId64 " of %" PRId64 " elements, largest %.3g, relative %.3g\n", in_a->name, d.elems, elems,
           d.largest, sqrt(d.squares / d.squares_a));
    return 0;
}

static int diff(const char *path_a, const char *path_b)
{
    int rc = 0;
    int64_t differing = 0;
    struct reader a = {.chunk = NULL}, b = {.chunk = NULL};
    TRY_GOTO(reader_open(&a, path_a), done);
    TRY_GOTO(reader_open(&b, path_b), done);
    printf("A  %s, step %" PRId64 "\nB  %s, step %" PRId64 "\n", a.folder, a.manifest.meta.step, b.folder,
           b.manifest.meta.step);
    for (int i = 0; i < a.manifest.n_tensors; i++)
        TRY_GOTO(diff_tensor(&a, &b, &a.manifest.tensors[i], &differing), done);
    for (int i = 0; i < b.manifest.n_tensors; i++) {
        if (reader_find(&a, b.manifest.tensors[i].name)) continue;
        printf("  %-64s is only in B\n", b.manifest.tensors[i].name);
        differing++;
    }
    if (differing == 0) printf("all %d tensors are the same, bit for bit\n", a.manifest.n_tensors);
    if (differing > 0) printf("%" PRId64 " tensors differ\n", differing);
    rc = differing == 0 ? SAME : DIFFERENT;
done:
    reader_close(&a);
    reader_close(&b);
    return rc;
}

int ckpt_command(struct comm *comm, int argc, char **argv)
{
    const char *verb = argc > 0 ? argv[0] : "";
    (void)comm;
    for (int i = 0; i < argc; i++) {
        if (strcmp(argv[i], "--help") != 0 && strcmp(argv[i], "-h") != 0) continue;
        fputs(usage, stdout);
        return 0;
    }
    for (int i = 1; i < argc; i++)
        TRY(path_check_word(NULL, argv[i]));
    if (argc == 2 && strcmp(verb, "ls") == 0) return list_run(argv[1]);
    if (argc == 2 && strcmp(verb, "show") == 0) return show(argv[1]);
    if (argc == 2 && strcmp(verb, "verify") == 0) return verify(argv[1]);
    if (argc == 3 && strcmp(verb, "diff") == 0) return diff(argv[1], argv[2]);
    FAIL(ERR_USAGE, "tatara ckpt takes ls, show or verify and one folder, or diff and two; see `tatara ckpt --help`");
}
