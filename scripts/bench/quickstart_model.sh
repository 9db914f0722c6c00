# shellcheck shell=bash
# For the scripts beside this one, which source it from the repository's root: trains the quick start's model for a few
# steps, in a temporary folder that is removed at exit.
config=configs/quickstart.yaml
[[ -x build/tatara && -d quickstart/shards ]] || {
    echo "run scripts/quickstart.sh first: it builds the program and makes the data" >&2
    exit 1
}
out=$(mktemp -d)
trap 'rm -r "$out"' EXIT

# train_stdout RANKS [key=value ...]: what it prints comes on stdout; a failure shows what went wrong.
train_stdout() {
    local ranks=$1 launcher=()
    shift
    rm -rf "$out/run"
    if [[ $ranks -gt 1 ]]; then
        launcher=(mpirun -n "$ranks" --oversubscribe --bind-to none --mca btl "self,vader")
        export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_oob_tcp_if_include=lo
    fi
    "${launcher[@]}" build/tatara train $config "run.dir=$out/run" log.every=1 log.eval_every=0 checkpoint.every=0 \
        data.valid=[] "$@" 2>"$out/stderr" || {
        cat "$out/stderr" >&2
        exit 1
    }
}

train() { train_stdout "$@" >/dev/null; }

median() { sort -g "$1" | awk '{ value[NR] = $1 } END { print (value[int((NR + 1) / 2)] + value[int(NR / 2) + 1]) / 2 }'; }
