#!/usr/bin/env bash
# Builds Tatara for 64-bit Arm on this machine, and runs the unit tests of kernels and configuration under qemu: the
# portable product has the bits that it has here.
#
#   scripts/arm.sh [FOLDER]        FOLDER: build/arm by default; keeps Debian's Arm libraries and the build
#
# Needs root (for debootstrap) and the packages of scripts/install.sh's group arm. Ends with 77 where they are missing.
set -euo pipefail
[[ ${1:-} != --help ]] || { sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "$0" && exit; }
cd "$(dirname "$0")/.."

out=$(realpath -m "${1:-build/arm}") triple=aarch64-linux-gnu
root=$out/root
tests=(test_err test_arena test_product test_cpu_exp test_config test_config_changes test_ops)

missing() {
    echo "scripts/arm.sh: $1" >&2
    exit 77
}
for tool in debootstrap qemu-aarch64-static $triple-gcc $triple-g++; do
    command -v "$tool" >/dev/null || missing "there is no $tool: scripts/install.sh arm"
done
[[ $(id -u) -eq 0 ]] || missing "debootstrap needs root"

# Debian's libraries for Arm, unpacked and not set up: nothing of them runs before the tests.
packages=$(scripts/install.sh --list build test | grep -E '^(lib|zlib).*-dev$' | grep -v libomp-dev | paste -sd,)
if [[ $(cat "$root/unpacked" 2>/dev/null) != "$packages" ]]; then
    # shellcheck source=/dev/null
    suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
    rm -rf "$root"
    mkdir -p "$out"
    debootstrap --arch=arm64 --foreign --variant=minbase --include="$packages" "$suite" "$root" >"$out/debootstrap.log" || {
        tail "$out/debootstrap.log"
        exit 1
    }
    for package in "$root"/var/cache/apt/archives/*.deb; do
        dpkg -x "$package" "$root"
    done
    echo "$packages" >"$root/unpacked"
fi

lib=$root/usr/lib/$triple
cat >"$out/toolchain.cmake" <<END
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_LIBRARY_ARCHITECTURE $triple)
set(CMAKE_C_COMPILER $triple-gcc)
set(CMAKE_CXX_COMPILER $triple-g++)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64-static;-L;$root)
set(CMAKE_FIND_ROOT_PATH $root)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE ONLY)
# Libraries of libraries.
set(CMAKE_EXE_LINKER_FLAGS_INIT "-Wl,-rpath-link,$lib -Wl,-rpath-link,$lib/openmpi/lib -Wl,--allow-shlib-undefined")
# The compiler wrappers of HDF5 and MPI cannot run here.
set(HDF5_C_COMPILER_EXECUTABLE false)
set(CMAKE_INCLUDE_PATH $root/usr/include/hdf5/serial)
set(CMAKE_LIBRARY_PATH $lib/hdf5/serial)
set(MPI_SKIP_COMPILER_WRAPPER TRUE)
set(MPI_C_LIB_NAMES mpi)
set(MPI_mpi_LIBRARY $lib/openmpi/lib/libmpi.so)
set(MPI_C_HEADER_DIR $lib/openmpi/include)
END
export OMP_WAIT_POLICY=passive # threads that wait must not spin
export PKG_CONFIG_LIBDIR=$lib/pkgconfig:$root/usr/share/pkgconfig PKG_CONFIG_SYSROOT_DIR=$root
cmake -S . -B "$out/build" -G Ninja --toolchain "$out/toolchain.cmake" -DTATARA_ARCH=armv8-a -DTATARA_WERROR=ON \
    >"$out/configure.log" 2>&1 || {
    cat "$out/configure.log"
    exit 1
}
cmake --build "$out/build" --target tatara "${tests[@]}"
for test in "${tests[@]}"; do
    # The tests of all ops, under qemu, take minutes; with oneDNN's kernels too many.
    words=()
    [[ $test != test_ops ]] || words=(portable)
    begin=$SECONDS
    if ! (cd "$out/build" && qemu-aarch64-static -L "$root" "./$test" "${words[@]}") >"$out/$test.log" 2>&1; then
        cat "$out/$test.log"
        echo "scripts/arm.sh: $test failed" >&2
        exit 1
    fi
    echo "$test ${words[*]}: passed after $((SECONDS - begin)) s"
done
