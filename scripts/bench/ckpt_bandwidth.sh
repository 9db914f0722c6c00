#!/usr/bin/env bash
# How fast checkpoints are written beside what the same disk does at best, and how long training stands still for them.
#
#   scripts/bench/ckpt_bandwidth.sh [FOLDER [GIB_PER_RANK [ROUNDS]]]       default build/bench-ckpt, 2 GiB, 3 rounds
#
# 2 ranks with ZeRO 1, in turn: raw write() and fsync of as many bytes by as many processes (dd conv=fsync), a save that
# training waits for (checkpoint.async=false), and one in the background. Its rate is that of the ranks' files to disk,
# while training computes on the same cores; a save is whole only when a later step has ended, which is the time in
# brackets. Needs GIB_PER_RANK times 4.5 of memory for each rank, and scripts/quickstart.sh to have run (for a tokenizer
# and shards). The model is a wide and shallow one, so that its steps are short.
set -euo pipefail
[[ ${1:-} != --help ]] || { sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "$0" && exit; }
cd "$(dirname "$0")/../.."
folder=${1:-build/bench-ckpt} gib=${2:-2} rounds=${3:-3}
mkdir -p "$folder"
trap 'rm -rf "$folder"/{raw,run}*' EXIT
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMP_WAIT_POLICY=passive

# 12 bytes of state a parameter, divided by 2 ranks; 12 C² + 2·8192·C of them with one layer of width C, ffn 8/3 C.
hidden=$(awk -v gib="$gib" 'BEGIN {
    wanted = gib * 2^30 * 2 / 12
    for (c = 256; 12 * c * c + 8192 * c < wanted; c += 256);
    print c }')
words=(model.layers=1 "model.hidden=$hidden" "model.heads=$((hidden / 64))" "model.kv_heads=$((hidden / 64))"
    model.head_dim=64 "model.ffn_hidden=$((hidden * 8 / 3))" model.seq_len=64 batch.global=2 batch.micro=1
    parallel.zero=1 parallel.reduce=fast log.every=1 log.eval_every=0 run.steps=1000000 run.stop_at=6 checkpoint.every=3
    checkpoint.keep=1 "data.valid=[]")

save() { # save NAME async: appends "seconds stalled whole bytes" of the save at step 3, in which no other was under way
    rm -rf "$folder/run"
    mpirun --oversubscribe --bind-to none -n 2 build/tatara train configs/quickstart.yaml "run.dir=$folder/run" \
        "${words[@]}" "checkpoint.async=$2" >/dev/null 2>"$folder/run.log" || { tail -n 3 "$folder/run.log" >&2; exit 1; }
    jq -r 'select(.event == "checkpoint" and .step == 3) | "\(.write_s) \(.stall_s) \(.s) \(.bytes)"' \
        "$folder/run/metrics.jsonl" >>"$folder/run.$1"
}

raw() { # raw BYTES: seconds that two processes take to write half of them each
    local began=$EPOCHREALTIME
    for rank in 0 1; do
        dd if=/dev/zero of="$folder/raw.$rank" bs=4M count=$(($1 / 2 / 4194304)) conv=fsync status=none &
    done
    wait
    awk -v began="$began" -v now="$EPOCHREALTIME" -v bytes="$1" 'BEGIN { print now - began, 0, 0, bytes }' >>"$folder/run.raw"
    rm -f "$folder"/raw.?
}

for ((round = 0; round < rounds; round++)); do
    save blocking false
    save background true
    raw "$(awk 'END { print $4 }' "$folder/run.blocking")"
done
median() { sort -g | awk '{ v[NR] = $1 } END { print v[int((NR + 1) / 2)] }'; }
for name in raw blocking background; do
    awk '{ print $4 / $1 / 2^20 }' "$folder/run.$name" | median >"$folder/run.rate"
    awk '{ print $2 }' "$folder/run.$name" | median >"$folder/run.stall"
    awk '{ print $3 }' "$folder/run.$name" | median >"$folder/run.whole"
    printf '%-12s %6.0f MiB/s' "$name" "$(<"$folder/run.rate")"
    [[ $name == raw ]] || printf '  %.2f of raw  training stood still %.4f s (the save was whole after %.1f s)' \
        "$(awk -v a="$(<"$folder/run.rate")" -v b="$raw_rate" 'BEGIN { print a / b }')" "$(<"$folder/run.stall")" \
        "$(<"$folder/run.whole")"
    [[ $name != raw ]] || raw_rate=$(<"$folder/run.rate")
    echo
done
