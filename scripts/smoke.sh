#!/usr/bin/env bash
# The single-GPU smoke test, under a minute: is the GPU there, does it compute what the CPU computes, does a run resume.
#
#   scripts/smoke.sh [--build DIR | --program PATH] [--emulated]
#
#   --build DIR      the build folder; default build
#   --program PATH   the program; default DIR/tatara
#   --emulated       the program is tests/cuda_emu's (build target tatara_emu), whose GPU is the CPU: no driver is
#                    looked for, the model is tiny and the steps are few
#
# Trains configs/smoke.yaml on the GPU and on the CPU, from the same weights and on the same batches. Losses and norms
# of the gradient must agree at every step:
#   fp32   within 1e-4, the bound of tests/unit/test_torch.c for training steps; sums differ in order only
#   bf16   within 3 times the distance of the CPU's bf16 from its own fp32, measured here: two independent rounding
#          errors of that size differ by 1.4 times as much, and the largest of the steps varies by chance
# Then half the steps, a checkpoint, and the other half must give the checkpoint of the whole run bit for bit. Last, the
# speed of GPT-2 124M. Ends with PASS or FAIL and, for FAIL, status 1.
set -euo pipefail
[[ ${1:-} != --help ]] || { sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "$0" && exit; }
export LC_ALL=C
root=$(cd "$(dirname "$0")/.." && pwd)
build=$root/build program='' emulated=no steps=50
words=()

usage() {
    sed -n 's/^# \{0,1\}//; 2,10p' "$0" >&2
    exit 2
}

while [[ $# -gt 0 ]]; do
    case $1 in
    --build | --program)
        [[ $# -ge 2 ]] || usage
        if [[ $1 == --build ]]; then build=$2; else program=$2; fi
        shift 2
        ;;
    --emulated)
        emulated=yes
        shift
        ;;
    *) usage ;;
    esac
done
[[ -n $program ]] || program=$build/tatara
if [[ $emulated == yes ]]; then
    steps=12
    words=(model.layers=1 model.hidden=64 model.heads=2 model.kv_heads=1 model.head_dim=32 model.ffn_hidden=96
        model.seq_len=32 batch.global=2 batch.micro=1 optim.decay_steps=2)
fi
export OMP_WAIT_POLICY=passive OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

out=$(mktemp -d "${TMPDIR:-/tmp}/tatara-smoke-XXXXXX")

fail() {
    echo "FAIL  $*"
    echo "      what the runs left is in $out"
    exit 1
}

say() { printf '%-10s %s\n' "$1" "$2"; }

# What the machine and the program lack, one line each; fails after the last.
check_machine() {
    local missing=() line
    if ! line=$(nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total --format=csv,noheader 2>&1); then
        missing+=("no GPU: nvidia-smi says: ${line:-nothing}")
    else
        say gpu "$(head -n 1 <<<"$line")"
    fi
    if [[ ! -x $program ]]; then
        missing+=("no program $program: build with cmake -DTATARA_CUDA=ON, or name it with --program")
    else
        while read -r line; do
            missing+=("the program's library ${line%% *} is not found: set LD_LIBRARY_PATH")
        done < <(ldd "$program" | grep 'not found')
        for line in libcublasLt libnccl; do
            ldd "$program" | grep -q "$line" || missing+=("$program does not use $line: build with -DTATARA_CUDA=ON")
        done
        say libraries "$(ldd "$program" | sed -nE 's/.*lib(cublasLt|nccl|cudnn)[.].* => ([^ ]+).*/\2/p' | paste -sd ' ')"
    fi
    command -v spm_train >/dev/null || missing+=("no spm_train: it comes with SentencePiece (Debian: sentencepiece)")
    [[ ${#missing[@]} -eq 0 ]] && return
    printf 'missing    %s\n' "${missing[@]}"
    fail "this machine lacks ${#missing[@]} of the things above"
}

# train NAME CONFIG key=value…: a run in $out/NAME; what it prints goes to $out/NAME.log.
train() {
    local name=$1 config=$2 rc=0
    shift 2
    timeout 120 "$program" train "$root/configs/$config" "run.dir=$out/$name" "data.tokenizer=$out/corpus/tok.model" \
        "data.train=[{path: $out/corpus/train}]" "data.valid=[]" "$@" >>"$out/$name.log" 2>&1 || rc=$?
    [[ $rc -eq 0 ]] && return
    fail "$name ended with status $rc: $(tail -n 1 "$out/$name.log")"
}

smoke() { # smoke NAME key=value…
    local name=$1
    shift
    train "$name" smoke.yaml "run.steps=$steps" ${words[@]+"${words[@]}"} "$@"
}

# "step loss grad_norm" of each step of a run.
values() {
    sed -nE '/"event"/!s/.*"step":([0-9]+),"loss":([^,]+),.*"grad_norm":([^,]+),.*/\1 \2 \3/p' "$out/$1/metrics.jsonl"
}

# distance A B: the largest relative difference of a loss and of a gradient norm over the steps of two runs, which must
# have all steps.
distance() {
    paste -d ' ' <(values "$1") <(values "$2") | awk -v steps="$steps" '
        function off(a, b) { return a > b ? (a - b) / b : (b - a) / b }
        NF != 6 || $1 != NR || $4 != NR || !($5 > 0) || !($6 > 0) { print "steps or values are missing"; exit bad = 1 }
        { if (off($2, $5) > loss) loss = off($2, $5); if (off($3, $6) > norm) norm = off($3, $6) }
        END { if (bad) exit 1; if (NR != steps) { print NR " steps of " steps; exit 1 }
              printf "%.2e %.2e\n", loss, norm }'
}

# compare PRECISION "LOSS_BOUND NORM_BOUND": the GPU's run of this precision with the CPU's.
compare() {
    local found
    found=$(distance "cuda-$1" "cpu-$1") || fail "$1: GPU and CPU cannot be compared: $found"
    say "$1" "GPU and CPU differ by (loss, gradient norm) $found; allowed $2"
    awk -v found="$found" -v bound="$2" 'BEGIN {
        split(found, f, " "); split(bound, b, " "); exit !(f[1] <= b[1] && f[2] <= b[2]) }' ||
        fail "$1: GPU and CPU differ by more than rounding"
}

learns() {
    values "$1" | awk 'NR == 1 { first = $2 } { last = $2 } END { exit !(last < first) }' ||
        fail "$1: the loss does not fall"
}

[[ $emulated == yes ]] || check_machine
"$root/tests/make_corpus.sh" "$out/corpus" "$program" >"$out/corpus.log" 2>&1 ||
    fail "no corpus: $(tail -n 1 "$out/corpus.log")"

for precision in fp32 bf16; do
    smoke "cuda-$precision" device=cuda precision.compute=$precision
    smoke "cpu-$precision" device=cpu precision.compute=$precision
    learns "cuda-$precision"
done
compare fp32 "1e-4 1e-4"
noise=$(distance cpu-bf16 cpu-fp32) || fail "bf16 and fp32 on the CPU cannot be compared: $noise"
compare bf16 "$(awk '{ printf "%.2e %.2e", 3 * $1, 3 * $2 }' <<<"$noise")"

smoke resumed device=cuda precision.compute=bf16 "run.stop_at=$((steps / 2))"
smoke resumed device=cuda precision.compute=bf16
whole=$out/cuda-bf16 last=$(printf 'step-%08d' "$steps")
grep -q '"event":"resume"' "$out/resumed/metrics.jsonl" || fail "the second half did not resume from a checkpoint"
diff <(values cuda-bf16) <(values resumed) >"$out/resume.diff" || fail "losses differ after resuming"
cmp "$whole/$last/rank-00000.h5" "$out/resumed/$last/rank-00000.h5" ||
    fail "weights or optimizer state differ after resuming"
say resume "$((steps / 2)) + $((steps - steps / 2)) steps give the bits of $steps"

speed=cuda-bf16
if [[ $emulated == no ]]; then
    speed=gpt2-124m
    train $speed gpt2-124m.yaml device=cuda run.steps=30 optim.warmup_steps=0 batch.global=32 batch.micro=16 \
        log.every=10 log.eval_every=0 checkpoint.every=0
fi
# The last interval: "… 123456 tokens/s  45% of matmul peak …".
rate=$(sed -nE 's/.* ([0-9]+ tokens\/s)  ([0-9]+% of matmul peak).*/\1, MFU \2/p' "$out/$speed.log" | tail -n 1)
[[ -n $rate ]] || fail "$speed printed no rate"
for choice in attention graphs; do
    say $choice "$(sed -nE "s/^$choice: //p" "$out/$speed.log")"
done
rm -r "$out"
echo "PASS  $rate ($speed)"
