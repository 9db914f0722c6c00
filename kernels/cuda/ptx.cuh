/* Inline PTX, all there is of it in the house: tensor-core products, loads of their fragments from shared memory,
 * asynchronous copies into it, and powers of 2, of sm_80 and up.
 *
 * Each function has two versions: the instruction for nvcc, and for the emulation what NVIDIA's "Parallel Thread
 * Execution ISA" says that it does. A fragment spreads a small matrix over the 32 lanes of a warp; with lane = 4·g + t
 * (g in 0..7, t in 0..3), two bf16 to a register, the lower column in the lower half:
 *
 *   A, 16×16 (rows × k):  register 0 holds row g, columns 2t, 2t+1; 1: row g+8; 2: row g, columns 2t+8, 2t+9; 3: row g+8,
 *                         the same columns.
 *   B, 16×8 (k × columns): register 0 holds rows 2t, 2t+1 of column g; 1: rows 2t+8, 2t+9.
 *   C and D, 16×8, float: elements 0 and 1 are row g, columns 2t, 2t+1; 2 and 3 those of row g+8.
 *
 * All 32 lanes call the functions of a warp, which are all but ptx_exp2 and ptx_copy…, together. */
#ifndef TATARA_PTX_CUH
#define TATARA_PTX_CUH

#include "cuda.cuh"

#ifdef __CUDACC__

/* 2^x to 2 units in the last place; results below 2^-126 are 0. exp2f spends more instructions on those. */
__device__ inline float ptx_exp2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* d += A·B on the tensor cores. */
__device__ inline void ptx_mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2])
{
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline unsigned ptx_shared_address(const void *shared)
{
    return (unsigned)__cvta_generic_to_shared(shared);
}

/* Four 8×8 matrices of bf16 from shared memory. Lanes 8i … 8i+7 name the rows of matrix i, 16 bytes each at a multiple
 * of 16. Register i of lane 4·g + t gets row g, columns 2t, 2t+1 of matrix i. */
__device__ inline void ptx_load_matrices(unsigned (&to)[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(ptx_shared_address(row))
                 : "memory");
}

/* The same, each matrix transposed: register i of lane 4·g + t gets rows 2t, 2t+1 of column g of matrix i. */
__device__ inline void ptx_load_matrices_transposed(unsigned (&to)[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(ptx_shared_address(row))
                 : "memory");
}

/* Copies 16 bytes from global to shared memory, without waiting; zeros when not `valid` (then `from` is not read). */
__device__ inline void ptx_copy(void *shared, const void *from, bool valid)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(ptx_shared_address(shared)), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
}

/* The same of 4 bytes. */
__device__ inline void ptx_copy_word(void *shared, const void *from, bool valid)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(ptx_shared_address(shared)), "l"(from),
                 "r"(valid ? 4 : 0)
                 : "memory");
}

/* Closes the group of this thread's copies so far. */
__device__ inline void ptx_copy_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* Waits until at most `pending` groups of this thread are under way. Other threads see what was copied only after a
 * barrier that follows. */
template <int pending> __device__ inline void ptx_copy_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

#else

inline float ptx_exp2(float x)
{
    return exp2f(x);
}

/* One lane's fragments. */
struct ptx_product {
    float *d;
    const unsigned *a, *b;
};

/* Gathers A and B from the lanes, multiplies, and spreads the sums. */
static inline void ptx_multiply(void *const *lanes, unsigned)
{
    float a[16][16], b[16][8];
    for (int lane = 0; lane < CUDA_WARP; lane++) {
        const ptx_product *part = static_cast<const ptx_product *>(lanes[lane]);
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; i++) {
            float *const at = &a[g + i % 2 * 8][2 * t + i / 2 * 8];
            cuda_unpack_bf16(at[0], at[1], part->a[i]);
        }
        for (int i = 0; i < 2; i++)
            cuda_unpack_bf16(b[2 * t + 8 * i][g], b[2 * t + 8 * i + 1][g], part->b[i]);
    }
    float d[16][8] = {};
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < 16; k++)
            for (int column = 0; column < 8; column++)
                d[row][column] += a[row][k] * b[k][column];
    for (int lane = 0; lane < CUDA_WARP; lane++) {
        float *const to = static_cast<const ptx_product *>(lanes[lane])->d;
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; i++)
            to[i] += d[g + i / 2 * 8][2 * t + i % 2];
    }
}

inline void ptx_mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                    cuda_emu_place place = CUDA_EMU_HERE)
{
    ptx_product part = {d, a, b};
    cuda_emu_meet("ptx_mma", CUDA_ALL_LANES, &part, ptx_multiply, place);
}

/* One lane's row, and its registers. */
struct ptx_rows {
    unsigned *to;
    const unsigned short *row;
};

template <bool transposed> static inline void ptx_load(void *const *lanes, unsigned)
{
    for (int lane = 0; lane < CUDA_WARP; lane++) {
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; i++) {
            unsigned halves[2];
            for (int half = 0; half < 2; half++) {
                const int row = transposed ? 2 * t + half : g, column = transposed ? g : 2 * t + half;
                halves[half] = static_cast<const ptx_rows *>(lanes[8 * i + row])->row[column];
            }
            static_cast<const ptx_rows *>(lanes[lane])->to[i] = halves[0] | halves[1] << 16;
        }
    }
}

static inline void ptx_meet_rows(unsigned *to, const void *row, void (*load)(void *const *, unsigned),
                                 cuda_emu_place place)
{
    ptx_rows part = {to, static_cast<const unsigned short *>(row)};
    if (!cuda_aligned(row))
        cuda_emu_fault("%s:%d: a matrix row that is not at a multiple of 16 bytes", place.file, place.line);
    cuda_emu_meet("ptx_load_matrices", CUDA_ALL_LANES, &part, load, place);
}

inline void ptx_load_matrices(unsigned (&to)[4], const void *row, cuda_emu_place place = CUDA_EMU_HERE)
{
    ptx_meet_rows(to, row, ptx_load<false>, place);
}

inline void ptx_load_matrices_transposed(unsigned (&to)[4], const void *row, cuda_emu_place place = CUDA_EMU_HERE)
{
    ptx_meet_rows(to, row, ptx_load<true>, place);
}

inline void ptx_copy(void *shared, const void *from, bool valid)
{
    cuda_emu_copy_later(shared, from, valid ? 16 : 0, 16);
}

inline void ptx_copy_word(void *shared, const void *from, bool valid)
{
    cuda_emu_copy_later(shared, from, valid ? 4 : 0, 4);
}

inline void ptx_copy_commit()
{
    cuda_emu_copy_commit();
}

template <int pending> inline void ptx_copy_wait()
{
    cuda_emu_copy_wait(pending);
}

#endif

#endif
