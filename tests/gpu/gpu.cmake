# What belongs to real GPUs.
#   label cuda   needs no GPU: the smoke test on the emulated one, and the real build, skipped where there is no nvcc
#   label gpu    the tests of the CUDA backend on the GPU itself
if(NOT TATARA_SANITIZE)
  set(SMOKE LABEL cuda TIMEOUT 120 RANKS 2 COMMAND)
  tatara_ctest(smoke_emulated ${SMOKE}
    ${CMAKE_SOURCE_DIR}/scripts/smoke.sh --emulated --program $<TARGET_FILE:tatara_emu>)
  tatara_ctest(smoke_emulated_fails ${SMOKE}
    ${CMAKE_CURRENT_LIST_DIR}/smoke_fails.sh ${CMAKE_SOURCE_DIR} $<TARGET_FILE:tatara_emu>)
  tatara_ctest(nvcc_build LABEL cuda TIMEOUT 900 RANKS 2 COMMAND
    ${CMAKE_CURRENT_LIST_DIR}/nvcc_build.sh ${CMAKE_SOURCE_DIR} ${TATARA_NVCC} ${CMAKE_BINARY_DIR}/nvcc_build.txt)
  set_tests_properties(nvcc_build PROPERTIES SKIP_RETURN_CODE 77)
  tatara_ctest(nvcc_build_fails LABEL cuda TIMEOUT 60
    COMMAND ${CMAKE_CURRENT_LIST_DIR}/nvcc_build_fails.sh ${CMAKE_SOURCE_DIR})
endif()

# These need a GPU. On a machine without one they are built, so that they stay whole, and are not in ctest's list.
if(TATARA_DEVICE)
  execute_process(COMMAND nvidia-smi -L OUTPUT_VARIABLE gpus ERROR_QUIET RESULT_VARIABLE failed)
  if(failed OR NOT gpus MATCHES "^GPU ")
    message(STATUS "No GPU (nvidia-smi -L): the tests labelled gpu are built and left out of ctest")
    set(TATARA_GPU OFF)
  else()
    set(TATARA_GPU ON)
  endif()
endif()
# tatara_gpu_test(name SOURCES files… LINKS libraries…): a test program whose argument `cuda` opens the GPU.
function(tatara_gpu_test name)
  cmake_parse_arguments(TEST "" "" "SOURCES;LINKS" ${ARGN})
  add_executable(${name} ${TEST_SOURCES})
  target_include_directories(${name} PRIVATE ${CMAKE_CURRENT_SOURCE_DIR})
  target_compile_definitions(${name} PRIVATE TESTS_DIR="${CMAKE_CURRENT_SOURCE_DIR}")
  target_link_libraries(${name} PRIVATE ${TEST_LINKS} ${TATARA_DEVICE} PkgConfig::CMOCKA)
  if(TATARA_GPU)
    tatara_ctest(${name} LABEL gpu TIMEOUT 120 COMMAND ${name} cuda)
  endif()
endfunction()
if(TATARA_DEVICE)
  tatara_gpu_test(test_ops_gpu SOURCES ${TATARA_OPS_TESTS} LINKS tatara_comm) # which comm/nccl.c wants
  tatara_gpu_test(test_torch_gpu SOURCES unit/test_torch.c LINKS tatara_step tatara_hdf5)
endif()
# Whole runs: losses beside the CPU's, and ranks that share the one GPU. They need a Python with h5py.
if(TATARA_DEVICE AND TATARA_GPU)
  execute_process(COMMAND python3 -c "import h5py, numpy" RESULT_VARIABLE failed OUTPUT_QUIET ERROR_QUIET)
  if(failed)
    message(STATUS "python3 has no h5py: test_cuda_gpu is left out of ctest")
  else()
    tatara_ctest(test_cuda_gpu LABEL gpu TIMEOUT 120 RANKS 3 COMMAND python3
      ${CMAKE_CURRENT_SOURCE_DIR}/e2e/test_cuda.py --tatara $<TARGET_FILE:tatara> --mpirun ${TATARA_MPIRUN_LINE}
      --data ${TATARA_CORPUS} Losses Bits.test_shared_gpu)
    set_tests_properties(test_cuda_gpu PROPERTIES FIXTURES_REQUIRED corpus)
  endif()
endif()
