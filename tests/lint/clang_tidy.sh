#!/usr/bin/env bash
# clang-tidy with the checks of .clang-tidy over what the build compiles.    clang_tidy.sh BUILD_FOLDER
set -euo pipefail
run-clang-tidy -quiet -p "$1" -j "$(nproc)"
