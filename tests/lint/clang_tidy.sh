#!/usr/bin/env bash
# clang-tidy with the checks of .clang-tidy over what the build compiles; in tests without the static analyser, which takes
# longer than all else together.    clang_tidy.sh BUILD_FOLDER
set -euo pipefail
# Kernels for the GPU and their emulation are C++ for two compilers, of which clang is none.
run-clang-tidy -quiet -p "$1" -j "$(nproc)" '^(?!.*/(kernels/cuda|tests)/).*$'
run-clang-tidy -quiet -p "$1" -j "$(nproc)" -checks='-clang-analyzer-*' '/tests/(?!cuda_emu/)'
