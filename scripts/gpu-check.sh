#!/usr/bin/env bash
# All that Tatara has to show on a GPU, in 9 minutes: builds for the GPU that is there, runs the tests labelled gpu,
# compute-sanitizer on a small training run, the smoke test, and the comparison with PyTorch.
#
#   scripts/gpu-check.sh [--out DIR] [--seconds N] [--dry-run]
#
#   --out DIR     where the reports and the logs go, and the build; default build/gpu-check
#   --seconds N   time for everything; default 540
#   --dry-run     prints the parts, their time and their commands
#
# Leaves DIR/report.txt and DIR/report.json. Each part has a time of its own and never more than is left; one that
# fails, or is cut, is recorded, and the rest goes on. The exit status is 1 when any part failed. A goal of speed that is
# missed is not a failure. Needs a compiler, CMake, CUDA with nvcc, and what scripts/install.sh names, or the archive of
# offline-bundle.sh; the comparison needs a Python with PyTorch (PYTHON says which; default python3). Changes no setting
# of the GPU.
set -euo pipefail
[[ ${1:-} != --help ]] || { sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "$0" && exit; }
export LC_ALL=C OMP_WAIT_POLICY=passive OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
root=$(cd "$(dirname "$0")/.." && pwd)
out=$root/build/gpu-check seconds=540 dry=no python=${PYTHON:-python3}

usage() {
    sed -n 's/^# \{0,1\}//; 2,9p' "$0" >&2
    exit 2
}

while [[ $# -gt 0 ]]; do
    case $1 in
    --out | --seconds)
        [[ $# -ge 2 ]] || usage
        if [[ $1 == --out ]]; then out=$2; else seconds=$2; fi
        shift 2
        ;;
    --dry-run)
        dry=yes
        shift
        ;;
    *) usage ;;
    esac
done
[[ $seconds =~ ^[0-9]+$ ]] || usage
if [[ $dry == no ]]; then
    mkdir -p "$out"
    out=$(cd "$out" && pwd)
fi
build=$out/build

ask() { # ask FIELD: what nvidia-smi says of the first GPU; "unknown" when it says nothing
    local answer
    answer=$(nvidia-smi "--query-gpu=$1" --format=csv,noheader 2>/dev/null | head -n 1) || answer=
    echo "${answer:-unknown}"
}

gpu=$(ask name) driver=$(ask driver_version) capability=$(ask compute_cap)
case $capability in
9.0) arch=90a ;;
*.*) arch=${capability/./} ;;
*) arch=native ;;
esac
cuda=$( (nvcc --version || "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" --version) 2>/dev/null |
    sed -nE 's/.*release ([0-9.]+).*/\1/p' || true)
commit=$(git -C "$root" rev-parse HEAD 2>/dev/null || cat "$root/../COMMIT" 2>/dev/null || echo unknown)

# A training run of two steps with every kernel of the step in it, small enough for compute-sanitizer.
small=("$build/tatara" train "$root/configs/smoke.yaml" device=cuda run.steps=2 optim.warmup_steps=0
    optim.decay_steps=1 model.hidden=128 model.heads=2 model.kv_heads=1 model.ffn_hidden=96 model.seq_len=96
    batch.global=2 batch.micro=1 "data.tokenizer=$out/corpus/tok.model" "data.train=[{path: $out/corpus/train}]")

# name, seconds, command (a shell line; runs in the repository's root)
parts=() limits=() commands=()
part() {
    parts+=("$1") limits+=("$2")
    shift 2
    commands+=("$*")
}
bench() { # bench MODEL SECONDS
    part "bench-$1" "$2" "'$python' scripts/bench/gpu_vs_pytorch.py $1 --rounds 1 --steps 12 --tatara '$build/tatara'" \
        "--json '$out/$1.json'"
}
part machine 10 "nvidia-smi && uname -a && ldd --version | head -n 1 && nproc"
part build 110 "cmake -S . -B '$build' -DTATARA_CUDA=ON -DTATARA_CUDA_ARCHS=$arch &&" \
    "cmake --build '$build' --parallel --target tatara test_ops_gpu test_torch_gpu &&" \
    "tests/make_corpus.sh '$out/corpus' '$build/tatara'"
part tests 80 "ctest --test-dir '$build' -L gpu --output-on-failure --no-tests=error"
for tool in memcheck racecheck; do
    part $tool 35 "rm -rf '$out/$tool' && compute-sanitizer --tool $tool --error-exitcode 9" \
        "$(printf "'%s' " "${small[@]}" "run.dir=$out/$tool")"
done
part smoke 60 "scripts/smoke.sh --build '$build'"
bench gpt2-124m 65
bench llama-1b 90
bench llm-jp-4-8b-slice 55

if [[ $dry == yes ]]; then
    echo "GPU $gpu, driver $driver, CUDA ${cuda:-unknown}, sm_$arch, commit $commit; $seconds s for"
    for i in "${!parts[@]}"; do
        printf '%-24s %4d s  %s\n' "${parts[i]}" "${limits[i]}" "${commands[i]}"
    done
    exit 0
fi

quote() { # quote TEXT: a JSON string
    local text=$1
    text=$(tr -d '\000-\010\013-\037' <<<"$text")
    text=${text//\\/\\\\} text=${text//\"/\\\"} text=${text//$'\t'/ } text=${text//$'\n'/\\n}
    printf '"%s"' "$text"
}

# numbers PART: a JSON object of what the part measured, from its log or its own JSON.
numbers() {
    local log=$out/$1.log json=$out/${1#bench-}.json
    case $1 in
    bench-*) if [[ -s $json ]]; then cat "$json"; else echo '{}'; fi ;;
    smoke) sed -nE 's/^PASS +([0-9]+) tokens\/s, MFU ([0-9]+)%.*/{"tokens_per_s": \1, "mfu_percent": \2}/p' "$log" |
        grep . || echo '{}' ;;
    tests) sed -nE 's/.*tests passed, ([0-9]+) tests failed out of ([0-9]+)/{"failed": \1, "tests": \2}/p' "$log" |
        grep . || echo '{}' ;;
    *) echo '{}' ;;
    esac
}

date=$(date -u +%Y-%m-%dT%H:%M:%SZ)
report=$out/report.txt json=$out/report.json
{
    echo "Tatara on a GPU, $date"
    echo "GPU $gpu, driver $driver, CUDA ${cuda:-unknown}, compute capability $capability, commit $commit"
} | tee "$report"
{
    printf '{"date": "%s", "gpu": %s, "driver": %s, "cuda": %s, ' "$date" "$(quote "$gpu")" "$(quote "$driver")" \
        "$(quote "${cuda:-unknown}")"
    printf '"compute_capability": %s, "commit": %s, "parts": [' "$(quote "$capability")" "$(quote "$commit")"
} >"$json"

cd "$root"
failures=0 separator=''
for i in "${!parts[@]}"; do
    name=${parts[i]} log=$out/${parts[i]}.log limit=${limits[i]} status=0
    rm -f "$log" "$out/${name#bench-}.json"
    left=$((seconds - SECONDS))
    [[ $limit -le $left ]] || limit=$left
    began=$SECONDS
    if [[ $limit -lt 1 ]]; then
        result="not run: the time is used up"
        : >"$log"
    else
        timeout -k 5 "$limit" bash -c "${commands[i]}" >"$log" 2>&1 </dev/null || status=$?
        case $status in
        0) result=passed ;;
        124 | 137) result="cut after $limit s" ;;
        *) result="failed, status $status" ;;
        esac
    fi
    took=$((SECONDS - began))
    [[ $result == passed ]] || failures=$((failures + 1))
    {
        printf '\n== %s: %s, %d s\n' "$name" "$result" "$took"
        tail -n 25 "$log" | cut -c 1-300
    } >>"$report"
    printf '%-24s %s, %d s\n' "$name" "$result" "$took"
    printf '%s\n{"part": "%s", "result": %s, "seconds": %d, "numbers": %s, "log_end": %s}' "$separator" "$name" \
        "$(quote "$result")" "$took" "$(numbers "$name")" "$(quote "$(tail -n 5 "$log" | cut -c 1-300)")" >>"$json"
    separator=,
done
printf '\n], "failures": %d, "seconds": %d}\n' "$failures" "$SECONDS" >>"$json"
printf '\n%d of %d parts passed, in %d s\n' "$((${#parts[@]} - failures))" "${#parts[@]}" "$SECONDS" | tee -a "$report"
echo "$report"
[[ $failures -eq 0 ]]
