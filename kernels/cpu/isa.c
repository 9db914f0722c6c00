/* The check that this CPU has the instructions which the kernels were compiled for. */
#define _DEFAULT_SOURCE /* for getauxval */
#include "cpu.h"
#include "err.h"
#ifdef __aarch64__
#include <sys/auxv.h>
#endif

/* The compiler's macro of an instruction set is 1 when the kernels may use it, and stays its own name when not. */
#define TEXT_OF(macro) #macro
#define COMPILED_FOR(macro) (TEXT_OF(macro)[0] == '1')

/* X(name, the compiler's macro, whether this CPU has it). */
#if defined(__x86_64__)
#define ON_X86(X, feature, macro) X(feature, macro, __builtin_cpu_supports(feature))
#define ISA_LIST(X)                         \
    ON_X86(X, "avx2", __AVX2__)             \
    ON_X86(X, "fma", __FMA__)               \
    ON_X86(X, "bmi2", __BMI2__)             \
    ON_X86(X, "avx512f", __AVX512F__)       \
    ON_X86(X, "avx512dq", __AVX512DQ__)     \
    ON_X86(X, "avx512bw", __AVX512BW__)     \
    ON_X86(X, "avx512vl", __AVX512VL__)     \
    ON_X86(X, "avx512cd", __AVX512CD__)     \
    ON_X86(X, "avx512vnni", __AVX512VNNI__) \
    ON_X86(X, "avx512bf16", __AVX512BF16__)
#elif defined(__aarch64__)
#define ISA_LIST(X)                                              \
    X("SVE", __ARM_FEATURE_SVE, getauxval(AT_HWCAP) & HWCAP_SVE) \
    X("SVE2", __ARM_FEATURE_SVE2, getauxval(AT_HWCAP2) & HWCAP2_SVE2)
#else
#define ISA_LIST(X)
#endif

/* Both functions use no vector registers on x86-64: they run where the vector instructions may be missing. */
#ifdef __x86_64__
#define NO_VECTORS __attribute__((target("general-regs-only")))
#else
#define NO_VECTORS
#endif

NO_VECTORS static const char *missing_isa(void)
{
#define X(feature, macro, has) \
    if (COMPILED_FOR(macro) && !(has)) return feature;
    ISA_LIST(X)
#undef X
    return NULL;
}

NO_VECTORS int cpu_isa_check(void)
{
    const char *missing = missing_isa();
    if (missing) {
        FAIL(ERR_DEVICE,
             "this CPU has no %s, which the program was compiled for on another machine: configure the build with "
             "-DTATARA_ARCH=<the oldest CPU of the cluster> (as x86-64-v3 or armv8-a), or build on this machine",
             missing);
    }
    return 0;
}

const char *cpu_isa_compiled(void)
{
    const char *name = "the baseline";
#define X(feature, macro, has) \
    if (COMPILED_FOR(macro)) name = feature;
    ISA_LIST(X)
#undef X
    return name;
}
