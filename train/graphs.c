/* Issuing work as a graph: capture, measurement, choice. */
#include "graphs.h"

#include "clock.h"
#include "err.h"
#include "log.h"
#include "step.h"

#include <stdlib.h>

int graphs_open(struct graphs *g, enum graphs_choice choice, struct device *dev, struct comm *comm)
{
    const bool there = dev->table->capture_begin != NULL;
    *g = (struct graphs){.dev = dev, .comm = comm, .choice = choice, .decided = choice == GRAPHS_OFF || !there};
    if (choice == GRAPHS_ON && !there)
        FAIL(ERR_UNSUPPORTED, "graphs=on needs a GPU; use graphs=auto, or device=cuda");
    return 0;
}

void graphs_close(struct graphs *g)
{
    if (g->graph) g->dev->table->graph_free(g->dev, g->graph);
    g->graph = NULL;
}

static int capture(struct graphs *g, int (*issue)(void *context), void *context)
{
    const struct device_table *table = g->dev->table;
    size_t before = 0, after = 0, total = 0;
    TRY(table->memory(g->dev, &before, &total));
    TRY(table->capture_begin(g->dev));
    const int rc = issue(context);
    if (rc != 0) (void)table->capture_end(g->dev, NULL);
    TRY(rc);
    TRY(table->capture_end(g->dev, &g->graph));
    TRY(table->memory(g->dev, &after, &total));
    g->graph_mib = before > after ? (double)(before - after) / (1 << 20) : 0;
    return 0;
}

/* Makes the graph, and does the work for the first time with it. */
static int begin(struct graphs *g, int (*issue)(void *context), void *context)
{
    struct err_record why;
    const int rc = capture(g, issue, context);
    if (rc == 0) {
        g->decided = g->choice == GRAPHS_ON;
        if (g->decided)
            log_info("graphs: on: a micro-batch is launched as a graph; it takes %.0f MiB beside the arena",
                     g->graph_mib);
        return g->dev->table->graph_launch(g->dev, g->graph);
    }
    err_take(&why, rc);
    graphs_close(g);
    g->decided = true;
    if (g->choice == GRAPHS_ON)
        FAIL(ERR_UNSUPPORTED, "graphs=on, and a micro-batch cannot be captured as a graph: %s; use graphs=auto",
             why.message);
    log_warn("graphs: off: a micro-batch cannot be captured as a graph: %s", why.message);
    return issue(context);
}

static int compare(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double times[GRAPHS_TRIALS])
{
    qsort(times, GRAPHS_TRIALS, sizeof *times, compare);
    return times[GRAPHS_TRIALS / 2];
}

static void decide(struct graphs *g)
{
    const double launched_s = median(g->launched_s), issued_s = median(g->issued_s);
    const bool faster = launched_s < issued_s;
    g->decided = true;
    log_info(
        "graphs: %s: a micro-batch takes %.3f ms as a graph, %.3f ms launch by launch (medians of %d); the graph %s "
        "%.0f MiB beside the arena",
        faster ? "on" : "off", 1e3 * launched_s, 1e3 * issued_s, GRAPHS_TRIALS, faster ? "takes" : "took",
        g->graph_mib);
    if (!faster) graphs_close(g);
}

/* Does the work either way and times it. The device is idle at the beginning, so that what the host takes to issue is part
 * of the time, as far as the device has to wait for it. */
static int trial(struct graphs *g, int (*issue)(void *context), void *context)
{
    const struct device_table *table = g->dev->table;
    const bool launched = g->trials % 2 == 0;
    TRY(comm_finish(g->comm));
    TRY(table->sync(g->dev));
    const double begin_s = now_s();
    TRY(launched ? table->graph_launch(g->dev, g->graph) : issue(context));
    TRY(table->sync(g->dev));
    (launched ? g->launched_s : g->issued_s)[g->trials++ / 2] = now_s() - begin_s;
    if (g->trials == 2 * GRAPHS_TRIALS) decide(g);
    return 0;
}

int graphs_run(struct graphs *g, int (*issue)(void *context), void *context)
{
    if (g->decided) return g->graph ? g->dev->table->graph_launch(g->dev, g->graph) : issue(context);
    return g->graph ? trial(g, issue, context) : begin(g, issue, context);
}
