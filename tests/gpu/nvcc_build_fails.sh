#!/usr/bin/env bash
# nvcc_build.sh must find what it is for: nvcc_build_fails.sh REPOSITORY
#
# Gives it one kernel and a stand-in for nvcc that prints what ptxas would: it spills without a reason, it spills with one,
# it does not compile, its report has another form. Needs no nvcc.
set -euo pipefail
script=$1/tests/gpu/nvcc_build.sh
out=$(mktemp -d)
trap 'rm -r "$out"' EXIT
mkdir -p "$out/kernels/cuda"

kernel() { # kernel COMMENT…
    printf '/* Spills of another kernel. */\nvoid other()\n{\n}\n\n/* %s */\n__global__ void scale(float *y)\n{\n}\n' "$*" \
        >"$out/kernels/cuda/scale.cu"
}

nvcc() { # nvcc STATUS SPILLED_BYTES LAST_LINE: makes the stand-in
    cat >"$out/nvcc" <<END
#!/bin/sh
cat <<REPORT
ptxas info    : Compiling entry function '_Z5scalePf' for 'sm_80'
ptxas info    : Function properties for _Z5scalePf
    $2 bytes stack frame, $2 bytes spill stores, $2 bytes spill loads
$3
REPORT
exit $1
END
    chmod +x "$out/nvcc"
}

expect() { # expect STATUS TEXT
    local rc=0
    "$script" "$out" "$out/nvcc" "$out/table" >"$out/log" 2>&1 || rc=$?
    if [[ $rc -ne $1 ]] || ! grep -qF "$2" "$out/log"; then
        echo "status $rc; expected $1, and the line \"$2\":"
        cat "$out/log"
        exit 1
    fi
}

used='ptxas info    : Used 40 registers, used 1 barriers, 512 bytes smem, 368 bytes cmem[0]'
kernel 'y = 2 y.'
nvcc 0 0 "$used"
expect 0 '40 / 512 / 0'
nvcc 0 8 "$used"
expect 1 'scale spills 16 bytes on sm_80, and the comment above it does not say why'
kernel 'y = 2 y. It spills 16 bytes: two pointers, read once a row.'
expect 0 '40 / 512 / 16'
nvcc 2 0 "error: identifier \"x\" is undefined"
expect 1 'scale.cu does not compile'
nvcc 0 0 'ptxas info    : 40 registers in use'
expect 1 'nvcc compiled no kernel'
