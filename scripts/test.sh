#!/usr/bin/env bash
# Installs what is missing, builds with warnings as errors, and runs all tests: unit tests, tests over MPI ranks, both
# again under the address and undefined-behaviour sanitizers, the CUDA backend on an emulated GPU, and the tools that read
# the sources. Where nvcc is, kernels/cuda is compiled for GPUs too, and what each kernel takes is printed last.
#
#   scripts/test.sh [--all] [ctest options]        for example: scripts/test.sh -L unit
#
#   --all     also the tests labelled long, which take hours
#   --help    this text
#
# Takes about 20 minutes on two cores, and 1 GB of disk for build/test and build/asan. Installs, as root, the Debian
# packages that are missing (scripts/install.sh --list build test slurm; 1.5 GB when none is there); without root it prints
# the one line that installs them. Ends with ctest's summary and the reason of each test that was skipped.
set -euo pipefail
[[ ${1:-} != --help ]] || { sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "$0" && exit; }
cd "$(dirname "$0")/.."
long=(--label-exclude '^long$')
if [[ ${1:-} == --all ]]; then
    long=()
    shift
fi

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
test=(ctest --test-dir build/test --output-on-failure --test-output-size-passed 1000000 --parallel "$(nproc)" "${long[@]}")
table=build/test/nvcc_build.txt # written by the test nvcc_build, and shown before the summary of all others
rm -f $table
results=("$PWD/build/test/nvcc_build.xml" "$PWD/build/test/results.xml")
"${test[@]}" --output-junit "${results[0]}" --no-tests=ignore --tests-regex '^nvcc_build$' "$@"
[[ ! -e $table ]] || cat $table
status=0
"${test[@]}" --output-junit "${results[1]}" --no-tests=error --exclude-regex '^nvcc_build$' "$@" || status=$?
/usr/bin/python3 tests/skipped.py "${results[@]}"
exit $status
