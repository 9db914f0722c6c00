# What belongs to real GPUs.
#   label cuda   needs no GPU: the smoke test on the emulated one
if(NOT TATARA_SANITIZE)
  set(SMOKE LABEL cuda TIMEOUT 120 RANKS 2 COMMAND)
  tatara_ctest(smoke_emulated ${SMOKE}
    ${CMAKE_SOURCE_DIR}/scripts/smoke.sh --emulated --program $<TARGET_FILE:tatara_emu>)
  tatara_ctest(smoke_emulated_fails ${SMOKE}
    ${CMAKE_CURRENT_LIST_DIR}/smoke_fails.sh ${CMAKE_SOURCE_DIR} $<TARGET_FILE:tatara_emu>)
endif()
