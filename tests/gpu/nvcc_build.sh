#!/usr/bin/env bash
# Compiles kernels/cuda with nvcc for all GPUs that we name, warnings being errors, and prints what each kernel takes:
# nvcc_build.sh REPOSITORY NVCC TABLE
#
# The table, also written to the file TABLE: by kernel and architecture, registers of a thread, static shared memory of a
# block, bytes that spill. A kernel that spills fails the test unless the comment above it has the word "spill" and so,
# a reason. Without nvcc the test is skipped (status 77). Needs no GPU.
set -euo pipefail
export LC_ALL=C
repository=$1 nvcc=$2 table=$3
archs=(80 90a 100)
jobs=2

rm -f "$table"
if [[ ! -x $nvcc ]]; then
    echo "skipped: there is no nvcc here, so kernels/cuda was compiled for the emulation only; CUDA_HOME says where to look"
    exit 77
fi
out=$(mktemp -d)
trap 'rm -r "$out"' EXIT

targets=()
for arch in "${archs[@]}"; do
    targets+=(-gencode "arch=compute_$arch,code=sm_$arch")
done

compile() { # compile FILE: ptxas's words in $out/NAME.log
    local log
    log=$out/$(basename "$1").log
    "$nvcc" -std=c++17 -O3 -lineinfo "${targets[@]}" -Werror all-warnings -Xcompiler -Wall,-Wextra -Xptxas -v \
        -I "$repository/include" -c "$1" -o "$log.o" >"$log" 2>&1 || {
        grep -v 'ptxas info' "$log" || cat "$log"
        echo "$1 does not compile"
        return 1
    }
}

running=0
for file in "$repository"/kernels/cuda/*.cu; do
    if [[ $running -eq $jobs ]]; then
        wait -n || exit 1
        running=$((running - 1))
    fi
    compile "$file" &
    running=$((running + 1))
done
while [[ $running -gt 0 ]]; do
    wait -n || exit 1
    running=$((running - 1))
done

# file, kernel, architecture, registers, shared bytes, spilled bytes; names as in C++, without arguments and with tabs
# between the fields.
cat >"$out/read.awk" <<'END'
/Compiling entry function/ { split($0, part, "'"); kernel = part[2]; arch = part[4]; spilled = "" }
/bytes spill stores/ {
    for (i = 1; i <= NF; i++)
        if ($i == "spill") spilled += $(i - 2)
}
/Used [0-9]+ registers/ {
    registers = shared = 0
    for (i = 2; i <= NF; i++) {
        if ($i ~ /^registers/) registers = $(i - 1)
        if ($i ~ /^smem/) shared = $(i - 2)
    }
    if (kernel == "" || spilled == "") { print "ptxas printed something else than expected: " $0 >"/dev/stderr"; exit 1 }
    print FILENAME "\t" kernel "\t" arch "\t" registers "\t" shared "\t" spilled
    kernel = ""
}
END
for log in "$out"/*.cu.log; do
    awk -f "$out/read.awk" "$log"
done | sed "s|^$out/||; s|\.log\t|\t|" | c++filt | sed -E 's/void //; s/\([^\t]*//; s/__nv_bfloat16/bf16/g' |
    sort >"$out/kernels"
[[ -s $out/kernels ]] || { echo "nvcc compiled no kernel of $repository/kernels/cuda" && exit 1; }

awk -F '\t' -v archs="${archs[*]}" '
    BEGIN { n = split(archs, arch, " ")
            printf "%-52s", "kernel: registers / shared bytes / spilled bytes"
            for (i = 1; i <= n; i++) printf "%18s", "sm_" arch[i]
            printf "\n" }
    function row() { if (last == "") return
                     printf "%-52s", last
                     for (i = 1; i <= n; i++) printf "%18s", ("sm_" arch[i]) in use ? use["sm_" arch[i]] : "-"
                     printf "\n"; delete use }
    $2 != last { row(); last = $2 }
    { use[$3] = $4 " / " $5 " / " $6 }
    END { row() }' "$out/kernels" | tee "$table"

# Whether the comment right above the kernel gives a reason.
explained() { # explained FILE KERNEL
    awk -v kernel="$2" '
        /^\/\*/ { comment = ""; inside = 1 }
        inside { comment = comment $0 }
        /\*\/$/ { inside = 0; next }
        /^}/ { comment = "" }
        $0 ~ ("[ *]" kernel "\\(") && comment ~ /spill/ { found = 1 }
        END { exit !found }' "$repository/kernels/cuda/$1"
}
bad=0
while IFS=$'\t' read -r file kernel arch _ _ spilled; do
    [[ $spilled -eq 0 ]] && continue
    explained "$file" "${kernel%%<*}" && continue
    echo "kernels/cuda/$file: $kernel spills $spilled bytes on $arch, and the comment above it does not say why"
    bad=1
done <"$out/kernels"
exit $bad
