#!/usr/bin/env bash
# Every C, C++ and CUDA source has the layout of .clang-format.    format.sh REPOSITORY
set -euo pipefail
cd "$1"
find train kernels comm include tests \( -name '*.[ch]' -o -name '*.cc' -o -name '*.cu' -o -name '*.cuh' \) -print0 |
    xargs -0 clang-format --dry-run --Werror
