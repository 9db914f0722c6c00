/* The rate of matrix products that progress is compared with, measured once in a run.
 *
 * A window is a barrier, then the same number of products on every rank; its rate is what all ranks computed over the time
 * of the slowest, which is how a step's rate comes about too. The best window counts. On a CPU the time is what its cores
 * spent on the products: others' use of the machine makes that no longer, and a step, whose clock counts that use too,
 * cannot be faster. The rates are kept in RUN/matmul.json, one for each kind of machine that the run has seen. They
 * describe, and change nothing that is computed: where the file cannot be read or written, the rate is measured again. */
#include "peak.h"

#include "clock.h"
#include "err.h"
#include "log.h"

#include <errno.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#define FILE_NAME "matmul.json"
#define WINDOW_S 0.05
#define LEAST_S 0.2

/* The CPU's name, as Linux says it; "" where it does not. */
static void cpu_name(char name[128])
{
    char line[256];
    name[0] = '\0';
    FILE *file = fopen("/proc/cpuinfo", "r");
    while (file && name[0] == '\0' && fgets(line, sizeof line, file)) {
        const char *colon = strncmp(line, "model name", 10) == 0 ? strchr(line, ':') : NULL;
        if (colon) snprintf(name, 128, "%.*s", (int)strcspn(colon + 2, "\n"), colon + 2);
    }
    if (file) fclose(file);
}

static void file_path(char path[CONFIG_TEXT_MAX + 32], const char *run_dir, const char *ending)
{
    snprintf(path, CONFIG_TEXT_MAX + 32, "%s/" FILE_NAME "%s", run_dir, ending);
}

static json_t *load_all(const char *run_dir)
{
    char path[CONFIG_TEXT_MAX + 32];
    file_path(path, run_dir, "");
    json_t *all = json_load_file(path, 0, NULL);
    if (json_is_object(all)) return all;
    json_decref(all);
    return json_object();
}

static void keep(const struct peak *peak, const char *run_dir)
{
    char path[CONFIG_TEXT_MAX + 32], fresh[CONFIG_TEXT_MAX + 32];
    json_t *all = load_all(run_dir);
    file_path(path, run_dir, "");
    file_path(fresh, run_dir, ".new");
    json_object_set_new(all, peak->key, json_real(peak->flops));
    if (json_dump_file(all, fresh, JSON_INDENT(1) | JSON_REAL_PRECISION(6)) != 0 || rename(fresh, path) != 0)
        log_debug("%s cannot be written: %s; the next start measures again", path, strerror(errno));
    json_decref(all);
}

/* Rows of the model's own weights are multiplied: zeros would take a GPU less power than numbers do. */
static int64_t product_rows(const struct model *m)
{
    return m->chunk < m->wte.shape[0] ? m->chunk : m->wte.shape[0];
}

/* n products into the logits, which nothing reads before it has written them. */
static int multiply(struct step *step, int64_t n)
{
    struct model *m = &step->model;
    const struct tensor x = tensor_rows(m->wte, 0, product_rows(m)), y = tensor_rows(m->logits, 0, x.shape[0]);
    for (int64_t i = 0; i < n; i++)
        TRY(op_matmul(m->dev, y, x, m->head.w, m->head.pack_fwd, TENSOR_NONE, MATMUL_TB));
    return m->dev->table->sync(m->dev);
}

/* The time of a window on the slowest rank: by the clock of its cores, of which it has its share and uses no more than
 * threads, on a GPU by that on the wall; and by that on the wall. */
struct window {
    double busy_s, wall_s;
};

/* n products on all ranks at once. Collective. */
static int run_window(struct step *step, int64_t n, struct window *window)
{
    const struct device *dev = step->model.dev;
    const double cores = fmin(dev->threads, step->comm->core_share);
    TRY(comm_barrier(step->comm));
    const double wall = now_s(), busy = cpu_s();
    const int rc = multiply(step, n);
    window->busy_s = (cpu_s() - busy) / cores;
    window->wall_s = now_s() - wall;
    if (dev->kind != DEVICE_CPU) window->busy_s = window->wall_s;
    TRY(comm_agree(step->comm, rc));
    TRY(comm_max_f64(step->comm, &window->busy_s, 1));
    return comm_max_f64(step->comm, &window->wall_s, 1);
}

static int measure(struct peak *peak, struct step *step)
{
    const struct model *m = &step->model;
    const double product = 2.0 * (double)product_rows(m) * (double)m->vocab_size * (double)m->cfg.hidden;
    struct window window;
    double spent_s = 0;
    /* The first loads code, wakes threads, and on a GPU chooses the algorithm; the second says how many make a window. */
    TRY(run_window(step, 1, &window));
    TRY(run_window(step, 1, &window));
    const int64_t n = 1 + (int64_t)(WINDOW_S / fmax(window.wall_s, 1e-6));
    do {
        TRY(run_window(step, n, &window));
        spent_s += window.wall_s;
        peak->flops = fmax(peak->flops, (double)(step->comm->ranks * n) * product / fmax(window.busy_s, 1e-9));
    } while (spent_s + window.wall_s < LEAST_S);
    return op_fill(m->dev, m->logits, 0);
}

/* What the rate depends on. */
static void describe(struct peak *peak, const struct step *step)
{
    char cpu[128], device[256];
    const struct model *m = &step->model;
    cpu_name(cpu);
    device_describe(m->dev, device, sizeof device);
    snprintf(peak->key, sizeof peak->key, "%d ranks, %d on a node; %s; %s; %s, %lld x %lld x %lld", step->comm->ranks,
             step->comm->local_ranks, cpu, device, m->act == DT_F32 ? "fp32" : "bf16", (long long)product_rows(m),
             (long long)m->vocab_size, (long long)m->cfg.hidden);
}

int peak_open(struct peak *peak, struct step *step, const char *run_dir)
{
    *peak = (struct peak){.flops = 0};
    describe(peak, step);
    if (step->comm->rank == 0) {
        json_t *all = load_all(run_dir);
        peak->flops = json_number_value(json_object_get(all, peak->key));
        json_decref(all);
    }
    TRY(comm_bcast(step->comm, &peak->flops, sizeof peak->flops, 0));
    peak->kept = peak->flops > 0;
    if (!peak->kept) TRY(measure(peak, step));
    if (!peak->kept && step->comm->rank == 0) keep(peak, run_dir);
    return 0;
}

double peak_share(struct peak *peak, double flops, const char *run_dir)
{
    if (flops <= peak->flops) return flops / peak->flops;
    if (!peak->raised) {
        log_info(
            "matmul: steps run at %.0f GFLOP/s, their largest product at %.0f when it was measured: the machine was "
            "busy then, or slower; from here on 100%% is what the fastest steps reach",
            flops / 1e9, peak->flops / 1e9);
    }
    peak->raised = true;
    peak->flops = flops;
    keep(peak, run_dir);
    return 1;
}
