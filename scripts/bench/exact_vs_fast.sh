#!/usr/bin/env bash
# What bit-reproducible gradients cost: the time of a step of the quick start's model with parallel.reduce=exact over that
# with fast, on 1 and on 2 ranks. The two are measured in turn, so that a machine that slows down slows both.
#
#   scripts/bench/exact_vs_fast.sh [ROUNDS [STEPS]]        default 3 rounds of 12 steps; run scripts/quickstart.sh first
set -euo pipefail
[[ ${1:-} != --help ]] || { sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "$0" && exit; }
cd "$(dirname "$0")/../.."
. scripts/bench/quickstart_model.sh
rounds=${1:-3} steps=${2:-12}

for ranks in 1 2; do
    : >"$out/exact" && : >"$out/fast"
    for ((round = 0; round < rounds; round++)); do
        for reduce in exact fast; do
            train "$ranks" "parallel.reduce=$reduce" "run.stop_at=$steps"
            # The first steps make oneDNN's kernels.
            jq -r 'select(.loss and (.event | not) and .step > 2).step_s' "$out/run/metrics.jsonl" >>"$out/$reduce"
        done
    done
    exact=$(median "$out/exact") fast=$(median "$out/fast")
    awk -v ranks="$ranks" -v exact="$exact" -v fast="$fast" 'BEGIN {
        printf "%d rank%s  exact %.0f ms a step, fast %.0f ms: exact / fast = %.3f\n", ranks, (ranks > 1 ? "s" : " "),
            1000 * exact, 1000 * fast, exact / fast }'
done
