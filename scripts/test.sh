#!/usr/bin/env bash
# Installs what is missing, builds with warnings as errors, and runs all tests: unit tests, tests over MPI ranks, both
# again under the address and undefined-behaviour sanitizers, the CUDA backend on an emulated GPU, and the tools that read
# the sources. Where nvcc is, kernels/cuda is compiled for GPUs too, and what each kernel takes is printed last.
#
#   scripts/test.sh [ctest options]        for example: scripts/test.sh -L unit
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/install.sh build test slurm

configure() { # configure FOLDER cmake-options…
    local folder=$1
    shift
    # What the configuration prints is of interest only when it fails.
    mkdir -p "$folder"
    cmake -S . -B "$folder" -G Ninja "$@" >"$folder/configure.log" 2>&1 || {
        cat "$folder/configure.log"
        exit 1
    }
}

echo "Building into build/test, and with sanitizers into build/asan"
# Warnings are errors in one of them only: gcc warns more, and wrongly, of code with sanitizers in it.
configure build/asan -DTATARA_SANITIZE=ON
configure build/test -DTATARA_WERROR=ON -DTATARA_SANITIZED_BUILD="$PWD/build/asan"
cmake --build build/test
cmake --build build/asan
test=(ctest --test-dir build/test --output-on-failure --parallel "$(nproc)")
table=build/test/nvcc_build.txt # written by the test nvcc_build, and shown before the summary of all others
rm -f $table
"${test[@]}" --no-tests=ignore --tests-regex '^nvcc_build$' "$@"
[[ ! -e $table ]] || cat $table
"${test[@]}" --no-tests=error --exclude-regex '^nvcc_build$' "$@"
