#!/usr/bin/env bash
# Makes an archive with which a machine without internet, and without MPI or HDF5, can build and run Tatara.
#
#   scripts/offline-bundle.sh [OUT.tar.zst]        on Debian 12, with internet; default build/tatara-offline.tar.zst
#
# In it: the source of HEAD, and what its libraries are on Debian 12 (packages of scripts/install.sh and all that they
# need) in a folder that may lie anywhere, CMake, ninja, mpirun and spm_train among them. The machine must have: x86-64,
# glibc 2.36 or later, as Debian 12's libraries want it (Debian 12, Ubuntu 22.10, RHEL 10 or later); gcc and g++ 12 or
# later with the C library's headers; zstd to unpack; for GPUs CUDA 12.8 or later with nvcc, cuBLAS and NCCL. There:
#
#   tar -xf tatara-offline.tar.zst && . tatara-offline/env.sh && cd "$TATARA_ROOT"
#   cmake -S . -B build -G Ninja -DTATARA_TESTS=OFF && cmake --build build      with -DTATARA_CUDA=ON for GPUs
#   scripts/gpu-check.sh                                                        or everything at once
#
# The archive has at most 60 MiB; a larger one is an error.
set -euo pipefail
[[ ${1:-} != --help ]] || { sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "$0" && exit; }
export LC_ALL=C
root=$(cd "$(dirname "$0")/.." && pwd)
out=${1:-$root/build/tatara-offline.tar.zst}
max_bytes=$((60 << 20))
# What the machine has itself: the compiler, its libraries and the C library. (A libstdc++ older than the machine's
# would break its other programs.)
assumed='^(gcc|g\+\+|cpp|binutils|make|dpkg|tar|perl|libc6|libc-|linux-libc|libcrypt[1-]|libstdc|libgcc|libgomp'
assumed+='|libitm|rpcsvc|libatomic|libquadmath|lib[a-z]*san[0-9]|libbinutils|libctf|libgprofng|libcc1|libisl|libmpc3|libmpfr)'
# Beside the packages to build: for test_ops, test_torch and the emulated GPU, and for the tests' corpus.
extra=(libcmocka-dev libboost-context-dev sentencepiece)
# Depended on, large, and used by nothing here.
unused='gfortran-12 libgfortran-12-dev libgfortran5 libperl5.36 perl perl-modules-5.36 automake autoconf m4 passwd
    adduser openssh-client libjs-jquery libjs-jquery-ui libx11-data'

fail() {
    echo "offline-bundle.sh: $*" >&2
    exit 1
}

[[ $(cut -d . -f 1 /etc/debian_version 2>/dev/null) == 12 ]] ||
    fail "this is not Debian 12: its packages are what the archive is made of"
mkdir -p "$(dirname "$out")"
out=$(cd "$(dirname "$out")" && pwd)/$(basename "$out")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
bundle=$work/tatara-offline prefix=$work/tatara-offline/prefix
mkdir -p "$bundle/tatara" "$prefix" "$work/debs" "$work/cache/partial"

# closure PACKAGE…: these and all that they depend on, as on a machine with nothing.
closure() {
    apt-get install --print-uris --yes --no-install-recommends -o Dir::State::status=/dev/null \
        -o Dir::Cache::archives="$work/cache" "$@" | sed -nE "s/^'[^']*' ([^_]+)_.*/\1/p" | sort -u
}

readarray -t wanted < <("$root/scripts/install.sh" --list build)
# shellcheck disable=SC2086 # a list of words
closure "${wanted[@]}" "${extra[@]}" | grep -vE "$assumed" | grep -vxF "$(printf '%s\n' $unused)" >"$work/packages"
[[ -s $work/packages ]] || fail "apt-get knows no packages: run apt-get update"
echo "Downloading $(wc -l <"$work/packages") packages"
readarray -t packages <"$work/packages"
(cd "$work/debs" && apt-get download --quiet=2 "${packages[@]}" >/dev/null)
for deb in "$work"/debs/*.deb; do
    dpkg-deb -x "$deb" "$work/all"
done

# One usr/, with what building and running needs.
usr=$work/all/usr lib=lib/x86_64-linux-gnu
cp -a "$work/all/lib/." "$usr/lib/"
# Boost is large: only the headers that the emulation reads.
mkdir "$work/boost"
"${CXX:-g++}" -std=c++17 -M -isystem "$usr/include" -I "$root/tests/cuda_emu/include" -I "$root/include" \
    "$root/tests/cuda_emu/block.cc" | tr ' ' '\n' | sed -n "s|^$usr/include/boost/||p" | sort -u >"$work/boost.list"
[[ -s $work/boost.list ]] || fail "tests/cuda_emu/block.cc reads no header of Boost's"
(cd "$usr/include/boost" && xargs cp --parents -t "$work/boost" version.hpp <"$work/boost.list")
rm -r "$usr/include/boost" && mv "$work/boost" "$usr/include/boost"
mkdir -p "$prefix/bin" "$prefix/share"
cp -a "$usr/include" "$usr/lib" "$prefix/"
for program in cmake ctest ninja pkgconf spm_train mpirun.openmpi orterun orted opal_wrapper; do
    cp -a "$usr/bin/$program" "$prefix/bin/"
done
cp -a "$usr/share/cmake-3.25" "$usr/share/openmpi" "$prefix/share/"
cp -a "$work/all/etc/openmpi" "$prefix/etc"
rm -rf "$prefix"/share/cmake-3.25/Help "$prefix"/lib/{python3*,systemd,udev,gcc} "$prefix/$lib/fortran"
find "$prefix" \( -type f -o -type l \) \( -name '*.a' -o -name '*.mod' -o -name '*.la' -o -name '*mpifh*' -o \
    -name '*usempi*' \) -delete
# What Debian's alternatives would link.
ln -sf opal_wrapper "$prefix/bin/mpicc"
ln -sf opal_wrapper "$prefix/bin/mpicxx"
ln -sf orterun "$prefix/bin/mpirun"
ln -sf mpirun "$prefix/bin/mpiexec"
ln -sf pkgconf "$prefix/bin/pkg-config"
# CMake looks for HDF5 in include/ and lib/ of HDF5_ROOT, and Debian has it elsewhere.
mkdir -p "$prefix/hdf5/lib"
ln -s ../include/hdf5/serial "$prefix/hdf5/include"
ln -s "../../$lib/libhdf5_serial.so" "$prefix/hdf5/lib/libhdf5.so"
# Links to /usr/lib and /lib, and pkg-config's files, become relative to where they lie.
find "$prefix" -type l -printf '%P\t%l\n' | while IFS=$'\t' read -r link target; do
    [[ $target == /* ]] || continue
    target=${target#/usr}
    ln -sfr "$prefix$target" "$prefix/$link"
done
find "$prefix" -xtype l -delete
# shellcheck disable=SC2016 # for pkg-config to expand
sed -i 's|/usr\b|${pcfiledir}/../../..|g' "$prefix/$lib"/pkgconfig/*.pc

# shellcheck disable=SC2016 # for the other machine to expand
cat >"$bundle/env.sh" <<'END'
# shellcheck shell=bash
# To be sourced by bash, in the shell that builds or runs: where the archive's programs and libraries are.
tatara_offline=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
tatara_glibc=$(getconf GNU_LIBC_VERSION 2>/dev/null | sed 's/[^0-9.]//g')
if [[ $(printf '2.36\n%s\n' "${tatara_glibc:-0}" | sort -V | head -n 1) != 2.36 ]]; then
    echo "tatara-offline: glibc here is ${tatara_glibc:-of unknown version}; the libraries want 2.36 or later" >&2
fi
tatara_gcc=$(g++ -dumpversion 2>/dev/null | cut -d . -f 1)
if [[ ${tatara_gcc:-0} -lt 12 ]]; then
    echo "tatara-offline: g++ here is ${tatara_gcc:-missing}; 12 or later is needed (module load gcc?)" >&2
fi
if ! command -v nvcc >/dev/null && [[ ! -x ${CUDA_HOME:-/usr/local/cuda}/bin/nvcc ]]; then
    echo "tatara-offline: no nvcc here (module load cuda?); only the CPU's program can be built" >&2
fi
tatara_prefix=$tatara_offline/prefix tatara_lib=$tatara_offline/prefix/lib/x86_64-linux-gnu
export TATARA_ROOT=$tatara_offline/tatara
export PATH=$tatara_prefix/bin:$PATH
export LD_LIBRARY_PATH=$tatara_lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export LIBRARY_PATH=$tatara_lib${LIBRARY_PATH:+:$LIBRARY_PATH}
export CPATH=$tatara_prefix/include:$tatara_prefix/include/x86_64-linux-gnu${CPATH:+:$CPATH}
export PKG_CONFIG_PATH=$tatara_lib/pkgconfig${PKG_CONFIG_PATH:+:$PKG_CONFIG_PATH}
export CMAKE_PREFIX_PATH=$tatara_prefix${CMAKE_PREFIX_PATH:+:$CMAKE_PREFIX_PATH}
# mpicc -showme:incdirs and libdirs leave out Open MPI's own.
export CMAKE_LIBRARY_PATH=$tatara_lib:$tatara_lib/openmpi/lib
export CMAKE_INCLUDE_PATH=$tatara_prefix/include:$tatara_lib/openmpi/include
export HDF5_ROOT=$tatara_prefix/hdf5
Boost_DIR=$(echo "$tatara_lib"/cmake/Boost-*)
export Boost_DIR
# Open MPI and PMIx find their own parts by these, wherever the archive was unpacked.
export OPAL_PREFIX=$tatara_prefix OPAL_LIBDIR=$tatara_lib/openmpi/lib OPAL_INCLUDEDIR=$tatara_lib/openmpi/include
export OPAL_PKGLIBDIR=$tatara_lib/openmpi/lib/openmpi3 OPAL_SYSCONFDIR=$tatara_prefix/etc
export OPAL_DATADIR=$tatara_prefix/share OPAL_PKGDATADIR=$tatara_prefix/share/openmpi
# mpirun wants to know a way to other nodes, even when it needs none.
command -v ssh >/dev/null || export OMPI_MCA_plm_rsh_agent=false
export PMIX_INSTALL_PREFIX=$tatara_lib/pmix2 PMIX_PREFIX=$tatara_lib/pmix2 PMIX_LIBDIR=$tatara_lib/pmix2/lib
export PMIX_DATADIR=$tatara_lib/pmix2/share PMIX_PKGLIBDIR=$tatara_lib/pmix2/lib/pmix
END
sed -n '/^#   tar /,/^# The archive/{/^# The archive/d;s/^# \{0,3\}//p}' "$0" >"$bundle/README.txt"
git -C "$root" archive HEAD | tar -x -C "$bundle/tatara"
git -C "$root" rev-parse HEAD >"$bundle/COMMIT"

tar -C "$work" --owner=0 --group=0 -cf - tatara-offline | zstd -q -19 -T0 -f -o "$out"
bytes=$(stat -c %s "$out")
du -sm "$bundle" | awk '{ printf "unpacked %d MiB; ", $1 }'
awk -v bytes="$bytes" -v out="$out" 'BEGIN { printf "%s: %.1f MiB\n", out, bytes / 1048576 }'
[[ $bytes -le $max_bytes ]] || fail "the archive has more than $((max_bytes >> 20)) MiB"
