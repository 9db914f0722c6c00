# The CUDA backend for machines without CUDA: the very files of kernels/cuda, compiled by the host's compiler against the
# headers in include/, and run by the sources here. No test needs nvcc or a GPU.
#   tatara_device_emu  the backend; a program is linked with it as with tatara_device_cuda
#   tatara_nccl_emu    comm/nccl.c over an emulated NCCL, and an MPI that lets the emulated GPU work while its rank waits
find_package(Boost 1.74 REQUIRED COMPONENTS context)
set(EMU ${CMAKE_CURRENT_LIST_DIR})

set(EMU_SOURCES ${EMU}/block.cc ${EMU}/cublaslt.cc ${EMU}/runtime.cc ${EMU}/stream.cc)
set_source_files_properties(${EMU_SOURCES} PROPERTIES COMPILE_OPTIONS -O3) # options of sources come after all others
add_library(tatara_cuda_emu STATIC ${EMU_SOURCES})
target_include_directories(tatara_cuda_emu BEFORE PUBLIC ${EMU}/include)
target_compile_options(tatara_cuda_emu PRIVATE -march=${TATARA_ARCH})
target_link_libraries(tatara_cuda_emu PUBLIC tatara_flags Boost::context)

file(GLOB TATARA_CUDA_SOURCES CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/kernels/cuda/*.cu)
# 16 bytes are moved as one float4 or uint4, whatever they hold; the house's headers use C's compound literals; #pragma
# unroll is nvcc's. -O2 because a sanitized build has less, and emulated kernels are slow enough.
set_source_files_properties(${TATARA_CUDA_SOURCES} ${EMU}/test_emu.cc ${EMU}/test_graph.cc PROPERTIES LANGUAGE CXX
  COMPILE_OPTIONS "-O2;-fno-strict-aliasing;-Wno-pedantic;-Wno-c++20-extensions;-Wno-unknown-pragmas")
add_library(tatara_device_emu OBJECT ${TATARA_CUDA_SOURCES})
target_compile_options(tatara_device_emu PRIVATE -march=${TATARA_ARCH})
target_link_libraries(tatara_device_emu PUBLIC tatara_kernels tatara_cuda_emu)

add_library(tatara_nccl_emu OBJECT ${EMU}/nccl.cc ${EMU}/mpi_wait.cc ${CMAKE_SOURCE_DIR}/comm/nccl.c)
target_compile_definitions(tatara_nccl_emu PRIVATE OMPI_SKIP_MPICXX MPICH_SKIP_MPICXX) # no use for MPI's C++ classes
target_link_libraries(tatara_nccl_emu PUBLIC tatara_comm tatara_cuda_emu)

tatara_test(test_emu LABEL cuda SOURCES ${EMU}/test_emu.cc LINKS tatara_device_emu)
tatara_test(test_graph LABEL cuda SOURCES ${EMU}/test_graph.cc LINKS tatara_device_emu)
tatara_test(test_nccl LABEL cuda RANKS 1 2 3 SOURCES ${EMU}/test_nccl.c LINKS tatara_nccl_emu TIMEOUT 200)
tatara_test(test_comm_cuda LABEL cuda RANKS 1 2 3 SOURCES mpi/test_comm_cuda.c LINKS tatara_nccl_emu tatara_device_emu
  TIMEOUT 200)
tatara_test(test_blas LABEL cuda SOURCES ${EMU}/test_blas.cc LINKS tatara_cuda_emu)
if(NOT TATARA_SANITIZE) # its kernels are those of test_ops_cuda, run many times to be timed
  tatara_test(test_attention_choice LABEL cuda SOURCES ${EMU}/test_attention_choice.c LINKS tatara_device_emu TIMEOUT 200)
endif()
tatara_test(test_matmul_plan LABEL cuda SOURCES ${EMU}/test_matmul_plan.c LINKS tatara_device_emu)
target_link_options(test_matmul_plan PRIVATE -Wl,--wrap=clock_gettime)

# The whole program, with the emulated GPU for device=cuda.
add_executable(tatara_emu ${CMAKE_SOURCE_DIR}/train/main.c $<$<BOOL:${TATARA_SANITIZE}>:keep_loaded.c>)
target_link_libraries(tatara_emu PRIVATE tatara_run tatara_device_emu tatara_nccl_emu)
