#!/usr/bin/env bash
# Builds with another MPI than the system's default, in a folder of its own, and runs what several ranks do under it: the
# tests of label mpi, and the job scripts with its launcher.
#
#   scripts/test-mpi.sh mpich                   Debian's MPICH, which lies beside Open MPI
#   scripts/test-mpi.sh NAME MPICC MPIEXEC      another one, such as Intel MPI or Open MPI 5, into build/NAME
set -euo pipefail
[[ ${1:-} != --help ]] || { sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "$0" && exit; }
cd "$(dirname "$0")/.."

name=${1:-} mpicc=${2:-mpicc.mpich} mpiexec=${3:-mpiexec.mpich}
if [[ $# -ne 3 && "$*" != mpich ]]; then
    sed -n 's/^# \{0,1\}//; 2,6p' "$0" >&2
    exit 2
fi
scripts/install.sh build test
[[ $# -eq 3 ]] || scripts/install.sh mpich
mkdir -p "build/$name"
cmake -S . -B "build/$name" -G Ninja -DTATARA_WERROR=ON -DMPI_C_COMPILER="$mpicc" \
    -DMPIEXEC_EXECUTABLE="$(command -v "$mpiexec")" >"build/$name/configure.log" 2>&1 || {
    cat "build/$name/configure.log"
    exit 1
}
cmake --build "build/$name"
# test_stop and test_readme tell of Open MPI's mpirun.
ctest --test-dir "build/$name" --output-on-failure --parallel "$(nproc)" --label-regex '^mpi$' \
    --exclude-regex '^test_(stop|readme)$'
ctest --test-dir "build/$name" --output-on-failure --tests-regex '^test_launchers$'
