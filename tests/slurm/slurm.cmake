# Jobs under schedulers.
#   label unit    the job scripts and scripts/submit.sh, with schedulers that only note what they are asked
#   label slurm   jobs on a real Slurm of four nodes on this machine; skipped where none can be started
#   label long    all cases of it, which take hours (scripts/test.sh --all)
if(NOT TATARA_SANITIZE)
  tatara_ctest(lint_batch LABEL lint TIMEOUT 120 COMMAND ${CMAKE_CURRENT_LIST_DIR}/lint_batch.sh ${CMAKE_SOURCE_DIR})
  set(SLURM_ARGUMENTS --tatara $<TARGET_FILE:tatara> --mpirun ${TATARA_MPIRUN_LINE} --data ${TATARA_CORPUS})
  foreach(name test_batch test_launchers)
    tatara_ctest(${name} LABEL unit TIMEOUT 400 COMMAND /usr/bin/python3 ${CMAKE_CURRENT_LIST_DIR}/${name}.py
      ${SLURM_ARGUMENTS})
  endforeach()
  tatara_ctest(test_slurm LABEL slurm TIMEOUT 600 RANKS 4 COMMAND /usr/bin/python3
    ${CMAKE_CURRENT_LIST_DIR}/test_slurm.py ${SLURM_ARGUMENTS})
  tatara_ctest(long_slurm LABEL slurm TIMEOUT 10800 RANKS 4 COMMAND /usr/bin/python3
    ${CMAKE_CURRENT_LIST_DIR}/test_slurm.py ${SLURM_ARGUMENTS} --all)
  set_property(TEST long_slurm APPEND PROPERTY LABELS long)
  set_tests_properties(test_slurm long_slurm PROPERTIES SKIP_RETURN_CODE 77)
  set_tests_properties(test_batch test_launchers test_slurm long_slurm PROPERTIES FIXTURES_REQUIRED ${TATARA_TEST_PREFIX}corpus)
endif()
