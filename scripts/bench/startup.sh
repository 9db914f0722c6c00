#!/usr/bin/env bash
# How long a run takes to be under way: from the start of the process to the end of its first step, and from the SIGKILL of
# a rank to the end of the first step that the restarted run does. Beside them the time of a step when warm.
#
#   scripts/bench/startup.sh [--1b] [ROUNDS]        default 5 rounds; run scripts/quickstart.sh first
#
# For the quick start's model on 1 and 2 ranks; with --1b for a Llama of 1.0B parameters on one rank in bf16, which needs
# 21 GiB of memory and 26 GiB of disk, and takes minutes a round.
set -euo pipefail
[[ ${1:-} != --help ]] || { sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "$0" && exit; }
cd "$(dirname "$0")/../.."
. scripts/bench/quickstart_model.sh
big=no
if [[ ${1:-} == --1b ]]; then big=yes && shift; fi
rounds=${1:-5} words=(checkpoint.every=0)
if [[ $big == yes ]]; then
    config=configs/llama-1b.yaml
    words+=(model.seq_len=64 model.vocab_size=8192 batch.global=1 batch.micro=1 model.recompute=block
        parallel.reduce=fast checkpoint.async=false data.tokenizer=quickstart/tok.model
        "data.train=[{path: quickstart/shards/ja}]" optim.warmup_steps=1 optim.decay_steps=1)
fi

# start RANKS key=value…: starts a run in the background; its output goes to $out/log, its process is $pid.
start() {
    local ranks=$1 launcher=()
    shift
    if [[ $ranks -gt 1 ]]; then
        launcher=(mpirun -n "$ranks" --oversubscribe --bind-to none --mca btl "self,vader")
        export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_oob_tcp_if_include=lo
    fi
    : >"$out/log"
    "${launcher[@]}" build/tatara train "$config" "run.dir=$out/run" log.every=1 log.eval_every=0 "data.valid=[]" \
        run.steps=1000 "${words[@]}" "$@" >"$out/log" 2>&1 &
    pid=$!
}

# until_line PATTERN: waits for it in the output; fails when the run ends before.
until_line() {
    until grep -q "$1" "$out/log"; do
        kill -0 "$pid" 2>/dev/null || fail "the run ended before it said '$1'"
        sleep 0.01
    done
}

# Waits for the run's end; $status is how it ended.
ended() {
    status=0
    wait "$pid" 2>/dev/null || status=$?
}

fail() {
    echo "startup.sh: $1; its output:" >&2
    tail -n 5 "$out/log" >&2
    exit 1
}

since() { awk -v began="$1" -v now="$EPOCHREALTIME" 'BEGIN { print now - began }'; }

measure() { # measure RANKS
    local ranks=$1 round began victim
    : >"$out/first" && : >"$out/warm" && : >"$out/again"
    for ((round = 0; round < rounds; round++)); do
        rm -rf "$out/run"
        began=$EPOCHREALTIME
        start "$ranks"
        until_line '^step 1/.*tokens/s'
        since "$began" >>"$out/first"
        until_line '^step 3/.*tokens/s'
        touch "$out/run/SAVE"
        until_line '^checkpoint: '
        victim=$pid
        [[ $ranks -eq 1 ]] || victim=$(pgrep -P "$pid" | head -n 1)
        began=$EPOCHREALTIME
        kill -KILL "$victim"
        ended
        [[ $status -ne 0 ]] || fail "a run of which a rank was killed says that it is done"
        start "$ranks"
        until_line '^step [0-9]*/.*tokens/s'
        since "$began" >>"$out/again"
        kill -USR1 "$pid" # mpirun passes it on and keeps the status
        ended
        [[ $status -eq 11 ]] || fail "a run that was asked to stop ended with status $status instead of 11"
        jq -r 'select(.step == 3 and .loss and (.event | not)).step_s' "$out/run/metrics.jsonl" >>"$out/warm"
    done
    awk -v ranks="$ranks" -v first="$(median "$out/first")" -v warm="$(median "$out/warm")" -v again="$(median "$out/again")" '
        BEGIN { printf "%d rank%s  first step done %.2f s after the start, %.2f s after a kill; a warm step takes %.2f s\n",
            ranks, (ranks > 1 ? "s" : " "), first, again, warm }'
}

measure 1
[[ $big == yes ]] || measure 2
