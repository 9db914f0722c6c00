/* Issuing work that is the same each time as a graph of the device, where that is faster: a micro-batch is hundreds of
 * small launches, and a graph issues them as one. The results are the same bits either way. */
#ifndef TATARA_GRAPHS_H
#define TATARA_GRAPHS_H

#include "comm.h"
#include "ops.h"

/* In the order of the words of the option. */
enum graphs_choice { GRAPHS_AUTO, GRAPHS_ON, GRAPHS_OFF };

#define GRAPHS_TRIALS 3 /* timings of either way */

/* Work of a rank that does not communicate; the tensors and scalars of its ops are always the same. */
struct graphs {
    struct device *dev;
    struct comm *comm;
    enum graphs_choice choice;
    bool decided;
    struct device_graph *graph; /* NULL: not captured so far, or not used */
    double graph_mib;           /* of the GPU's memory that making it took */
    int trials;                 /* done; launched, issued, launched, … */
    double launched_s[GRAPHS_TRIALS], issued_s[GRAPHS_TRIALS];
};

/* With `on`, a device that has no graphs is ERR_UNSUPPORTED. graphs_close may be called after a failure, and twice. */
int graphs_open(struct graphs *graphs, enum graphs_choice choice, struct device *dev, struct comm *comm);
void graphs_close(struct graphs *graphs);
/* Does the work that issue(context) would do; issue takes and gives no part in host state that matters from one call to the
 * next. Calls made before everything that is chosen when it is first done (the plans of matrix products) is chosen must go
 * to issue itself. With `auto`, the first calls also measure, for which the host waits for the device; when a capture fails
 * then, the log says why and the work is issued from there on, while with `on` that is ERR_UNSUPPORTED. Not collective. */
int graphs_run(struct graphs *graphs, int (*issue)(void *context), void *context);

#endif
