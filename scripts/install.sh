#!/usr/bin/env bash
# Installs the packages of Debian 12 or 13 that Tatara needs; the one place that names them.
#
#   scripts/install.sh GROUP...             groups: build test mpich slurm quickstart fixtures arm debian
#   scripts/install.sh --list GROUP...      prints the packages, one a line, and installs nothing
#
# Only what is missing is installed. Without root nothing is installed: the one line to run is printed, and the exit
# status is 1. On a cluster whose nodes have these libraries from elsewhere, skip this script: CMake says what it misses.
set -euo pipefail
[[ ${1:-} != --help ]] || { sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "$0" && exit; }

# Building and running the program.
build=(
    gcc g++ cmake ninja-build pkg-config
    openmpi-bin libopenmpi-dev libhdf5-dev libdnnl-dev libsentencepiece-dev
    libyaml-dev libjansson-dev libzstd-dev zlib1g-dev liblzma-dev libbz2-dev libxxhash-dev
)
# scripts/test.sh: tests, and the tools that read the sources.
test=(libcmocka-dev libboost-context-dev sentencepiece python3 python3-h5py python3-numpy hdf5-tools jq clang-tidy
    clang-format libomp-dev cppcheck shellcheck)
# Another MPI beside Open MPI, for scripts/test-mpi.sh.
mpich=(mpich libmpich-dev)
# A Slurm cluster on this machine, for tests/slurm.
slurm=(slurm-wlm slurmctld slurmd slurm-client munge)
# scripts/quickstart.sh: from Debian's Japanese documentation to text, a tokenizer and a picture.
quickstart=(mandoc python3 python3-lxml python3-html2text jq sentencepiece gnuplot-nox)
# Only for making the test fixtures anew (tests/fixtures); large.
fixtures=(python3 python3-h5py python3-numpy python3-torch)
# scripts/arm.sh: the program for Arm, and its tests under qemu. scripts/debian.sh: a bare Debian.
arm=(debootstrap qemu-user-static gcc-aarch64-linux-gnu g++-aarch64-linux-gnu)
debian=(debootstrap)

usage() {
    echo "usage: scripts/install.sh [--list] GROUP...   groups: build test mpich slurm quickstart fixtures arm debian" >&2
    exit 2
}

is_installed() {
    [[ $(dpkg-query --show --showformat='${db:Status-Status}' "$1" 2>/dev/null) == installed ]]
}

list=no
if [[ ${1:-} == --list ]]; then
    list=yes
    shift
fi
[[ $# -gt 0 ]] || usage
wanted=()
for group in "$@"; do
    case $group in
    build) wanted+=("${build[@]}") ;;
    test) wanted+=("${test[@]}") ;;
    mpich) wanted+=("${mpich[@]}") ;;
    slurm) wanted+=("${slurm[@]}") ;;
    quickstart) wanted+=("${quickstart[@]}") ;;
    fixtures) wanted+=("${fixtures[@]}") ;;
    arm) wanted+=("${arm[@]}") ;;
    debian) wanted+=("${debian[@]}") ;;
    *) usage ;;
    esac
done

if [[ $list == yes ]]; then
    printf '%s\n' "${wanted[@]}"
    exit 0
fi
if ! command -v dpkg-query >/dev/null; then
    echo "scripts/install.sh: this is not Debian; install what corresponds to: ${wanted[*]}" >&2
    exit 1
fi
missing=()
for package in "${wanted[@]}"; do
    is_installed "$package" || missing+=("$package")
done
if [[ ${#missing[@]} -eq 0 ]]; then
    exit 0
fi

if [[ $(id -u) -ne 0 ]]; then
    echo "Some Debian packages are missing. Install them with this line, then run the script again:" >&2
    echo "sudo sh -c 'apt-get update && apt-get install --no-install-recommends --yes ${missing[*]}'" >&2
    exit 1
fi
echo "Installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
# The lists of a container image may be absent or old, and then name packages that the mirror no longer has.
apt-get update --quiet=2 </dev/null
apt-get install --quiet=2 --no-install-recommends --yes -o Dpkg::Use-Pty=0 "${missing[@]}" </dev/null >/dev/null
