/* Tests of the emulated cuBLASLt against sums in double: orders, transposes, batches, types and epilogues. */
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <setjmp.h>
#include <stdarg.h>

extern "C" {
#include <cmocka.h>
}

#include <vector>

enum { M = 5, N = 7, K = 37, BATCHES = 2, AUX_LD = 8, WORKSPACE_BYTES = 1 << 16 };

/* One matmul's descriptors, and its operands in device memory; values depend on the position alone. */
struct problem {
    cublasLtHandle_t handle;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t a, b, d;
    cublasLtMatmulPreference_t preference;
    float *a_data, *b_data, *d_data, *bias, *aux;
    void *workspace;
};

static void ok(cublasStatus_t status)
{
    if (status != CUBLAS_STATUS_SUCCESS) fail_msg("%s", cublasLtGetStatusName(status));
}

static float a_at(int row, int k, int batch)
{
    return (float)((row * 31 + k * 17 + batch * 5) % 23 - 11) / 8;
}

static float b_at(int k, int col, int batch)
{
    return (float)((k * 13 + col * 29 + batch * 3) % 19 - 9) / 8;
}

static double product(int row, int col, int batch)
{
    double sum = 0;
    for (int k = 0; k < K; k++)
        sum += (double)a_at(row, k, batch) * b_at(k, col, batch);
    return sum;
}

static float *device_floats(const std::vector<float> &values)
{
    void *data = nullptr;
    const size_t bytes = values.size() * sizeof(float);
    assert_int_equal(cudaMalloc(&data, bytes), cudaSuccess);
    assert_int_equal(cudaMemcpy(data, values.data(), bytes, cudaMemcpyHostToDevice), cudaSuccess);
    return static_cast<float *>(data);
}

/* rows × cols per batch, its order and a leading dimension with one element to spare. */
static cublasLtMatrixLayout_t layout(int rows, int cols, cublasLtOrder_t order, int batches)
{
    cublasLtMatrixLayout_t made = nullptr;
    const int ld = (order == CUBLASLT_ORDER_COL ? rows : cols) + 1;
    const int32_t count = batches;
    const int64_t stride = (int64_t)ld * (order == CUBLASLT_ORDER_COL ? cols : rows);
    ok(cublasLtMatrixLayoutCreate(&made, CUDA_R_32F, (uint64_t)rows, (uint64_t)cols, ld));
    ok(cublasLtMatrixLayoutSetAttribute(made, CUBLASLT_MATRIX_LAYOUT_ORDER, &order, sizeof order));
    ok(cublasLtMatrixLayoutSetAttribute(made, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof count));
    ok(cublasLtMatrixLayoutSetAttribute(made, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride, sizeof stride));
    return made;
}

/* The index that such a layout gives an element. */
static size_t index_of(int rows, int cols, cublasLtOrder_t order, int row, int col, int batch)
{
    const int ld = (order == CUBLASLT_ORDER_COL ? rows : cols) + 1;
    const int others = order == CUBLASLT_ORDER_COL ? cols : rows;
    return (size_t)(batch * ld * others + (order == CUBLASLT_ORDER_COL ? col * ld + row : row * ld + col));
}

static problem open_problem(cublasLtOrder_t order, bool ta, bool tb, int batches)
{
    problem p = {};
    const int a_rows = ta ? K : M, a_cols = ta ? M : K, b_rows = tb ? N : K, b_cols = tb ? K : N;
    std::vector<float> a((size_t)(BATCHES * (K + 1) * (K + 1))), b(a.size()), d(a.size()), bias(N, 0.5f);
    for (int batch = 0; batch < batches; batch++) {
        for (int k = 0; k < K; k++) {
            for (int m = 0; m < M; m++)
                a[index_of(a_rows, a_cols, order, ta ? k : m, ta ? m : k, batch)] = a_at(m, k, batch);
            for (int n = 0; n < N; n++)
                b[index_of(b_rows, b_cols, order, tb ? n : k, tb ? k : n, batch)] = b_at(k, n, batch);
        }
    }
    const cublasOperation_t op_a = ta ? CUBLAS_OP_T : CUBLAS_OP_N, op_b = tb ? CUBLAS_OP_T : CUBLAS_OP_N;
    const uint64_t workspace_bytes = WORKSPACE_BYTES;
    ok(cublasLtCreate(&p.handle));
    ok(cublasLtMatmulDescCreate(&p.desc, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    ok(cublasLtMatmulDescSetAttribute(p.desc, CUBLASLT_MATMUL_DESC_TRANSA, &op_a, sizeof op_a));
    ok(cublasLtMatmulDescSetAttribute(p.desc, CUBLASLT_MATMUL_DESC_TRANSB, &op_b, sizeof op_b));
    ok(cublasLtMatmulPreferenceCreate(&p.preference));
    ok(cublasLtMatmulPreferenceSetAttribute(p.preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace_bytes,
                                            sizeof workspace_bytes));
    p.a = layout(a_rows, a_cols, order, batches);
    p.b = layout(b_rows, b_cols, order, batches);
    p.d = layout(M, N, order, batches);
    p.a_data = device_floats(a);
    p.b_data = device_floats(b);
    p.d_data = device_floats(d);
    p.bias = device_floats(bias);
    p.aux = device_floats(d);
    assert_int_equal(cudaMalloc(&p.workspace, WORKSPACE_BYTES), cudaSuccess);
    return p;
}

static void close_problem(const problem &p)
{
    ok(cublasLtMatrixLayoutDestroy(p.a));
    ok(cublasLtMatrixLayoutDestroy(p.b));
    ok(cublasLtMatrixLayoutDestroy(p.d));
    ok(cublasLtMatmulPreferenceDestroy(p.preference));
    ok(cublasLtMatmulDescDestroy(p.desc));
    ok(cublasLtDestroy(p.handle));
    for (void *data :
         {(void *)p.a_data, (void *)p.b_data, (void *)p.d_data, (void *)p.bias, (void *)p.aux, p.workspace})
        assert_int_equal(cudaFree(data), cudaSuccess);
}

/* Runs one of the algorithms that the heuristic offers, and reads D. */
static std::vector<float> run(const problem &p, int algorithm, float alpha, float beta)
{
    cublasLtMatmulHeuristicResult_t results[4];
    int found = 0;
    ok(cublasLtMatmulAlgoGetHeuristic(p.handle, p.desc, p.a, p.b, p.d, p.d, p.preference, 4, results, &found));
    assert_int_equal(found, 2);
    const cublasLtMatmulHeuristicResult_t &chosen = results[algorithm];
    ok(cublasLtMatmul(p.handle, p.desc, &alpha, p.a_data, p.a, p.b_data, p.b, &beta, p.d_data, p.d, p.d_data, p.d,
                      &chosen.algo, p.workspace, chosen.workspaceSize, nullptr));
    std::vector<float> d(BATCHES * (N + 1) * (N + 1));
    assert_int_equal(cudaMemcpy(d.data(), p.d_data, d.size() * sizeof(float), cudaMemcpyDeviceToHost), cudaSuccess);
    return d;
}

static bool near(double got, double want)
{
    return fabs(got - want) <= 1e-5 * (1 + fabs(want));
}

static void test_products(void **)
{
    for (int form = 0; form < 16; form++) {
        const cublasLtOrder_t order = form & 1 ? CUBLASLT_ORDER_ROW : CUBLASLT_ORDER_COL;
        const int batches = form & 8 ? BATCHES : 1;
        const problem p = open_problem(order, form & 2, form & 4, batches);
        const std::vector<float> first = run(p, 0, 1, 0), twice = run(p, 1, 0.5f, 1);
        for (int batch = 0; batch < batches; batch++)
            for (int row = 0; row < M; row++)
                for (int col = 0; col < N; col++) {
                    const size_t at = index_of(M, N, order, row, col, batch);
                    assert_true(near(first[at], product(row, col, batch)));
                    assert_true(near(twice[at], 1.5 * product(row, col, batch)));
                }
        close_problem(p);
    }
}

/* The second algorithm needs its workspace. */
static void test_workspace(void **)
{
    const problem p = open_problem(CUBLASLT_ORDER_COL, false, false, 1);
    cublasLtMatmulAlgo_t split = {};
    split.data[0] = 1;
    const float one = 1, zero = 0;
    assert_int_equal(cublasLtMatmul(p.handle, p.desc, &one, p.a_data, p.a, p.b_data, p.b, &zero, p.d_data, p.d,
                                    p.d_data, p.d, &split, p.workspace, 16, nullptr),
                     CUBLAS_STATUS_INVALID_VALUE);
    assert_int_equal(cublasLtMatmul(p.handle, p.desc, &one, p.a_data, p.b, p.b_data, p.b, &zero, p.d_data, p.d,
                                    p.d_data, p.d, nullptr, nullptr, 0, nullptr),
                     CUBLAS_STATUS_INVALID_VALUE);
    close_problem(p);
}

static double gelu(double x)
{
    return 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

static double gelu_slope(double x)
{
    return (gelu(x + 1e-5) - gelu(x - 1e-5)) / 2e-5;
}

/* What D is, and what the bias holds afterwards, by epilogue. The bias is 0.5 and aux 0.5 before. */
static void test_epilogues(void **)
{
    for (const cublasLtEpilogue_t epilogue :
         {CUBLASLT_EPILOGUE_BIAS, CUBLASLT_EPILOGUE_GELU, CUBLASLT_EPILOGUE_GELU_BIAS, CUBLASLT_EPILOGUE_GELU_AUX,
          CUBLASLT_EPILOGUE_GELU_AUX_BIAS, CUBLASLT_EPILOGUE_DGELU, CUBLASLT_EPILOGUE_DGELU_BGRAD,
          CUBLASLT_EPILOGUE_BGRADA, CUBLASLT_EPILOGUE_BGRADB}) {
        const problem p = open_problem(CUBLASLT_ORDER_COL, false, true, 1);
        const int64_t aux_ld = AUX_LD;
        const std::vector<float> halves(AUX_LD * N, 0.5f);
        cudaMemcpy(p.aux, halves.data(), halves.size() * sizeof(float), cudaMemcpyHostToDevice);
        ok(cublasLtMatmulDescSetAttribute(p.desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue));
        ok(cublasLtMatmulDescSetAttribute(p.desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &p.bias, sizeof p.bias));
        ok(cublasLtMatmulDescSetAttribute(p.desc, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &p.aux, sizeof p.aux));
        ok(cublasLtMatmulDescSetAttribute(p.desc, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &aux_ld, sizeof aux_ld));
        const std::vector<float> d = run(p, 0, 1, 0);
        float bias[N], aux[AUX_LD * N];
        cudaMemcpy(bias, p.bias, sizeof bias, cudaMemcpyDeviceToHost);
        cudaMemcpy(aux, p.aux, sizeof aux, cudaMemcpyDeviceToHost);
        for (int row = 0; row < M; row++) {
            for (int col = 0; col < N; col++) {
                const double before = product(row, col, 0) + (epilogue & 4 ? 0.5 : 0);
                double want = epilogue & 32 ? gelu(before) : before;
                if (epilogue & 64) want = before * gelu_slope(0.5);
                assert_true(near(d[index_of(M, N, CUBLASLT_ORDER_COL, row, col, 0)], want));
                if ((epilogue & 160) == 160) assert_true(near(aux[col * AUX_LD + row], before));
            }
        }
        double first = 0.5; /* bias[0] */
        if (epilogue & (16 | CUBLASLT_EPILOGUE_BGRADA | CUBLASLT_EPILOGUE_BGRADB)) first = 0;
        for (int k = 0; k < K && epilogue == CUBLASLT_EPILOGUE_BGRADA; k++)
            first += a_at(0, k, 0);
        for (int k = 0; k < K && epilogue == CUBLASLT_EPILOGUE_BGRADB; k++)
            first += b_at(k, 0, 0);
        for (int col = 0; col < N && epilogue == CUBLASLT_EPILOGUE_DGELU_BGRAD; col++)
            first += product(0, col, 0) * gelu_slope(0.5);
        assert_true(near(bias[0], first));
        close_problem(p);
    }
}

/* GELU's input needs a leading dimension that is a multiple of 8. */
static void test_aux_ld(void **)
{
    const problem p = open_problem(CUBLASLT_ORDER_COL, false, false, 1);
    const cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_GELU_AUX;
    const int64_t aux_ld = AUX_LD + 1;
    cublasLtMatmulHeuristicResult_t result;
    int found = 1;
    ok(cublasLtMatmulDescSetAttribute(p.desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue));
    ok(cublasLtMatmulDescSetAttribute(p.desc, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &aux_ld, sizeof aux_ld));
    assert_int_equal(
        cublasLtMatmulAlgoGetHeuristic(p.handle, p.desc, p.a, p.b, p.d, p.d, p.preference, 1, &result, &found),
        CUBLAS_STATUS_NOT_SUPPORTED);
    assert_int_equal(found, 0);
    close_problem(p);
}

/* A bias is of D's type, as in CUDA. */
static void test_bias_type(void **)
{
    const problem p = open_problem(CUBLASLT_ORDER_COL, false, false, 1);
    const cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
    const int32_t type = CUDA_R_16BF;
    cublasLtMatmulHeuristicResult_t result;
    int found = 1;
    ok(cublasLtMatmulDescSetAttribute(p.desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue));
    ok(cublasLtMatmulDescSetAttribute(p.desc, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &type, sizeof type));
    assert_int_equal(
        cublasLtMatmulAlgoGetHeuristic(p.handle, p.desc, p.a, p.b, p.d, p.d, p.preference, 1, &result, &found),
        CUBLAS_STATUS_NOT_SUPPORTED);
    assert_int_equal(found, 0);
    close_problem(p);
}

int main()
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_products), cmocka_unit_test(test_workspace), cmocka_unit_test(test_epilogues),
        cmocka_unit_test(test_aux_ld),   cmocka_unit_test(test_bias_type),
    };
    return cmocka_run_group_tests(tests, nullptr, nullptr);
}
