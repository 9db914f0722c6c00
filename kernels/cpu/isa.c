/* The check that this CPU has the instructions which the kernels were compiled for. */
#include "cpu.h"
#include "err.h"

/* The compiler's macro of an instruction set is 1 when the kernels may use it, and stays its own name when not. */
#define TEXT_OF(macro) #macro
#define COMPILED_FOR(macro) (TEXT_OF(macro)[0] == '1')

#define ISA_LIST(X)                 \
    X("avx2", __AVX2__)             \
    X("fma", __FMA__)               \
    X("bmi2", __BMI2__)             \
    X("avx512f", __AVX512F__)       \
    X("avx512dq", __AVX512DQ__)     \
    X("avx512bw", __AVX512BW__)     \
    X("avx512vl", __AVX512VL__)     \
    X("avx512cd", __AVX512CD__)     \
    X("avx512vnni", __AVX512VNNI__) \
    X("avx512bf16", __AVX512BF16__)

/* Both functions use no vector registers: they run where the vector instructions may be missing. */
__attribute__((target("general-regs-only"))) static const char *missing_isa(void)
{
#define X(feature, macro) \
    if (COMPILED_FOR(macro) && !__builtin_cpu_supports(feature)) return feature;
    ISA_LIST(X)
#undef X
    return NULL;
}

__attribute__((target("general-regs-only"))) int cpu_isa_check(void)
{
    const char *missing = missing_isa();
    if (missing) {
        FAIL(ERR_DEVICE,
             "this CPU has no %s, which the program was compiled for on another machine: configure the build with "
             "-DTATARA_ARCH=<the oldest CPU of the cluster> (for example x86-64-v3), or build on this machine",
             missing);
    }
    return 0;
}
