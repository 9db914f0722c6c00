#!/usr/bin/env bash
# Time from the start of the process to the end of the first step, and of a step when warm, for the quick start's model.
#
#   scripts/bench/startup.sh [ROUNDS]        default 5; run scripts/quickstart.sh first
set -euo pipefail
cd "$(dirname "$0")/../.."
. scripts/bench/quickstart_model.sh
rounds=${1:-5}

for ranks in 1 2; do
    : >"$out/first" && : >"$out/warm"
    for ((round = 0; round < rounds; round++)); do
        began=$EPOCHREALTIME
        # Standard output as it comes: the line of step 1 is printed when that step ends.
        train_stdout "$ranks" run.stop_at=3 checkpoint.every=0 | while read -r line; do
            if [[ $line == "step 1/"*"tokens/s"* ]]; then
                awk -v began="$began" -v now="$EPOCHREALTIME" 'BEGIN { print now - began }' >>"$out/first"
            fi
        done
        jq -r 'select(.step == 3 and .loss and (.event | not)).step_s' "$out/run/metrics.jsonl" >>"$out/warm"
    done
    awk -v ranks="$ranks" -v first="$(median "$out/first")" -v warm="$(median "$out/warm")" 'BEGIN {
        printf "%d rank%s  %.2f s from the start to the end of the first step; a warm step takes %.2f s\n", ranks,
            (ranks > 1 ? "s" : " "), first, warm }'
done
