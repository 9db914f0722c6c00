# How tests start several ranks on few cores, over loopback only and as root in CI: TATARA_MPIRUN, the launcher with its
# options, and TATARA_TEST_ENVIRONMENT.
set(TATARA_TEST_LAUNCHER "" CACHE STRING
  "Kind of the MPI launcher of tests: openmpi4, openmpi5, mpich or intelmpi; empty: what mpiexec --version says")
set(TATARA_LAUNCHER_KIND "${TATARA_TEST_LAUNCHER}")
if(NOT TATARA_LAUNCHER_KIND)
  execute_process(COMMAND ${MPIEXEC_EXECUTABLE} --version OUTPUT_VARIABLE version ERROR_VARIABLE version)
  if(version MATCHES "Open(RTE| MPI)\\) 4")
    set(TATARA_LAUNCHER_KIND openmpi4)
  elseif(version MATCHES "Open MPI\\)")
    set(TATARA_LAUNCHER_KIND openmpi5)
  elseif(version MATCHES "Intel\\(R\\) MPI")
    set(TATARA_LAUNCHER_KIND intelmpi)
  elseif(version MATCHES "HYDRA")
    set(TATARA_LAUNCHER_KIND mpich)
  endif()
endif()

# Tests run more threads and ranks than there are cores: those that wait must not spin.
set(TATARA_TEST_ENVIRONMENT OMP_WAIT_POLICY=passive)
set(TATARA_MPIRUN ${MPIEXEC_EXECUTABLE})
if(TATARA_LAUNCHER_KIND MATCHES openmpi)
  list(APPEND TATARA_TEST_ENVIRONMENT OMPI_MCA_mpi_yield_when_idle=1)
  list(APPEND TATARA_MPIRUN --allow-run-as-root --bind-to none --mca btl_tcp_if_include lo)
endif()
if(TATARA_LAUNCHER_KIND STREQUAL openmpi4)
  list(APPEND TATARA_MPIRUN --oversubscribe --mca btl self,vader,tcp --mca oob_tcp_if_include lo)
elseif(TATARA_LAUNCHER_KIND STREQUAL openmpi5)
  list(APPEND TATARA_MPIRUN --map-by :OVERSUBSCRIBE --mca pml ob1 --mca btl self,sm,tcp)
elseif(TATARA_LAUNCHER_KIND STREQUAL intelmpi)
  list(APPEND TATARA_TEST_ENVIRONMENT I_MPI_FABRICS=shm I_MPI_PIN=0 I_MPI_THREAD_YIELD=3)
elseif(TATARA_LAUNCHER_KIND STREQUAL mpich)
  list(APPEND TATARA_TEST_ENVIRONMENT UCX_MEM_EVENTS=no) # else it takes mmap from what tests put in its place
else()
  message(FATAL_ERROR "${MPIEXEC_EXECUTABLE} --version does not say which MPI it is of; set TATARA_TEST_LAUNCHER to "
    "openmpi4, openmpi5, mpich or intelmpi, or build with TATARA_TESTS=OFF")
endif()
