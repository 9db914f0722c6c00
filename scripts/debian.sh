#!/usr/bin/env bash
# Tries Tatara on a bare Debian: makes a root of that release, and in it, from a copy of the sources, installs what
# scripts/install.sh names, goes through the quick start, and builds and runs the unit and mpi tests.
#
#   scripts/debian.sh RELEASE [FOLDER [ctest options]]    RELEASE: bookworm (12) or trixie (13)
#                                                         FOLDER: build/RELEASE by default; a root that is there
#                                                         already is used again
#
# Needs root (for debootstrap and chroot), 5 GB, and half an hour on two cores. Prints how long each part took. Ends with
# 77 where root or debootstrap is missing.
set -euo pipefail
[[ ${1:-} != --help ]] || { sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "$0" && exit; }
cd "$(dirname "$0")/.."

missing() {
    echo "scripts/debian.sh: $1" >&2
    exit 77
}
[[ $# -ge 1 ]] || { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0" && exit 2; }
command -v debootstrap >/dev/null || missing "there is no debootstrap: scripts/install.sh debian"
[[ $(id -u) -eq 0 ]] || missing "debootstrap and chroot need root"
release=$1 root=$(realpath -m "${2:-build/$1}")
[[ ! -e $root || -e $root/etc/debian_version ]] || { echo "$root is no Debian; name another folder" >&2 && exit 2; }

leave() {
    local folder
    for folder in dev/shm dev sys proc; do
        ! mountpoint -q "$root/$folder" || umount "$root/$folder"
    done
}
trap leave EXIT
# part NAME COMMAND…: says when it begins and how long it took; its words go into a file of their own.
part() {
    local begin=$SECONDS log=$root.$1.log
    if ! "${@:2}" >"$log" 2>&1; then
        tail -n 60 "$log"
        echo "$release: $1 failed after $((SECONDS - begin)) s; $log has all of it" >&2
        exit 1
    fi
    echo "$release: $1 took $((SECONDS - begin)) s"
}
inside() { chroot "$root" env -i HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 sh -c "cd /tatara && $1"; }
copy() {
    rm -rf "$root/tatara"
    mkdir "$root/tatara"
    git ls-files --cached --others --exclude-standard -z | tar --null --files-from=- --ignore-failed-read -cf - |
        tar -C "$root/tatara" -xf -
    cp /etc/resolv.conf "$root/etc/"
}

leave
mkdir -p "$(dirname "$root")"
[[ -e $root/etc/apt/sources.list ]] || part debootstrap debootstrap --variant=minbase "$release" "$root"
echo force-unsafe-io >"$root/etc/dpkg/dpkg.cfg.d/unsafe-io" # a root to try with need not survive a power cut
mount -t proc proc "$root/proc"
mount --bind /sys "$root/sys"
mount --bind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/dev/shm"
part copy copy
part packages inside "scripts/install.sh build quickstart test"
part quickstart inside scripts/quickstart.sh
part build inside "cmake -S . -B build/test -G Ninja -DTATARA_WERROR=ON && cmake --build build/test"
part tests inside "ctest --test-dir build/test --output-on-failure --no-tests=error -L '^(unit|mpi)$' ${*:3}"
tail -n 25 "$root.tests.log"
