/* Graphs of ops: CUDA's, made by capturing the device's one stream.
 *
 * A captured launch keeps a copy of its arguments: addresses and scalars are as they were at the capture, for good. What
 * an instantiated graph takes of the GPU's memory lies beside the arena and is the driver's own.
 *
 * The capture concerns this thread only (cudaStreamCaptureModeThreadLocal): NCCL's threads may call CUDA meanwhile. */
#include "cuda.cuh"

/* A struct device_graph is CUDA's executable graph itself. */
static cudaGraphExec_t exec_of(struct device_graph *graph)
{
    return reinterpret_cast<cudaGraphExec_t>(graph);
}

int cuda_capture_begin(struct device *dev)
{
    CHECK_CUDA(cudaStreamBeginCapture(cuda_state_of(dev)->stream, cudaStreamCaptureModeThreadLocal));
    return 0;
}

static int instantiate(cudaGraph_t captured, struct device_graph **graph)
{
    cudaGraphExec_t exec = NULL;
    CHECK_CUDA(cudaGraphInstantiate(&exec, captured, 0));
    *graph = reinterpret_cast<struct device_graph *>(exec);
    return 0;
}

int cuda_capture_end(struct device *dev, struct device_graph **graph)
{
    cudaGraph_t captured = NULL;
    const cudaError_t error = cudaStreamEndCapture(cuda_state_of(dev)->stream, &captured);
    int rc = 0;
    if (graph) {
        *graph = NULL;
        rc = error == cudaSuccess ? instantiate(captured, graph)
                                  : cuda_failed(__FILE__, __LINE__, "cudaStreamEndCapture", error);
    }
    if (captured) (void)cudaGraphDestroy(captured);
    if (!graph || rc) (void)cudaGetLastError(); /* else the next launch would report it */
    return rc;
}

int cuda_graph_launch(struct device *dev, struct device_graph *graph)
{
    CHECK_CUDA(cudaGraphLaunch(exec_of(graph), cuda_state_of(dev)->stream));
    return 0;
}

void cuda_graph_free(struct device *dev, struct device_graph *graph)
{
    (void)dev;
    if (graph) (void)cudaGraphExecDestroy(exec_of(graph));
}
