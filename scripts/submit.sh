#!/usr/bin/env bash
# Submits a training run to the machine's scheduler, after a look at what would stop it.
#
#   scripts/submit.sh [options] CONFIG.yaml [key=value …]
#
#   --scheduler NAME      slurm, pbs, pjm or sge; default: the one whose commands are there
#   --nodes N             nodes to run on; default 1
#   --ranks-per-node N    default 1
#   --time [D-]HH:MM:SS   the job's time limit; default 24:00:00
#   --save-time SECONDS   how long before the limit the run is stopped and saved; default 180
#   --spare N             further nodes, which take the place of nodes that fail (Slurm, PBS, Grid Engine); default 0
#   --chain N             N jobs, one after the other: for runs longer than the site's limit; default 1
#   --option 'WORD …'     more options of the scheduler, e.g. --option '--partition=gpu'; may be repeated
#   --program FILE        default build/tatara
#   --site FILE           sourced by the job first: module load, MPI settings of the site
#   --dry-run             check, and print what would be submitted
#
# Checks that `tatara plan` takes the configuration, the tokenizer and the shards, else ends with its status, and that the
# run's folder has space for its checkpoints. Then writes the job script into RUN/logs, submits it and prints the job's id
# and where its output goes. A job that reaches its time limit is queued again until the run is finished; the jobs of a
# chain leave that to the next of them, and once the run is finished those that are left end at once. What a job does is
# described in scripts/batch/common.sh.
set -euo pipefail
[[ ${1:-} != --help ]] || { sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "$0" && exit; }
export LC_ALL=C
root=$(cd "$(dirname "$0")/.." && pwd)
scheduler='' nodes=1 ranks_per_node=1 time=24:00:00 save_time=180 spare=0 chain=1 program=$root/build/tatara site=''
dry_run=no options=()

usage() {
    sed -n 's/^# \{0,1\}//; 2,17p' "$0" >&2
    exit 2
}

fail() {
    echo "scripts/submit.sh: error: $*" >&2
    exit 1
}

while [[ $# -gt 0 && $1 == -* ]]; do
    if [[ $1 == --dry-run ]]; then
        dry_run=yes
        shift
        continue
    fi
    [[ $# -ge 2 ]] || usage
    case $1 in
    --scheduler) scheduler=$2 ;;
    --nodes) nodes=$2 ;;
    --ranks-per-node) ranks_per_node=$2 ;;
    --time) time=$2 ;;
    --save-time) save_time=$2 ;;
    --spare) spare=$2 ;;
    --chain) chain=$2 ;;
    --option) options+=("$2") ;;
    --program) program=$(realpath "$2") ;;
    --site) site=$(realpath "$2") ;;
    *) usage ;;
    esac
    shift 2
done
[[ $# -ge 1 ]] || usage
config=$1
shift
words=("$@")

# ---- checks ----

for number in "$nodes" "$ranks_per_node" "$chain"; do
    [[ $number =~ ^[1-9][0-9]*$ ]] || fail "--nodes, --ranks-per-node and --chain are whole numbers from 1, not '$number'"
done
for number in "$spare" "$save_time"; do
    [[ $number =~ ^[0-9]+$ ]] || fail "--spare and --save-time are whole numbers, not '$number'"
done
[[ $time =~ ^(([0-9]+)-)?([0-9]+):([0-5][0-9]):([0-5][0-9])$ ]] || fail "--time is [D-]HH:MM:SS, not '$time'"
seconds=$((86400 * 10#${BASH_REMATCH[2]:-0} + 3600 * 10#${BASH_REMATCH[3]} + 60 * 10#${BASH_REMATCH[4]} + 10#${BASH_REMATCH[5]}))
hours=$(printf '%02d:%02d:%02d' $((seconds / 3600)) $((seconds / 60 % 60)) $((seconds % 60)))
((seconds > save_time)) || fail "--save-time $save_time leaves nothing of --time $time"
if [[ -z $scheduler ]]; then
    if command -v sbatch >/dev/null; then
        scheduler=slurm
    elif command -v pjsub >/dev/null; then
        scheduler=pjm
    elif command -v qsub >/dev/null; then
        if [[ -n ${SGE_ROOT:-} ]]; then scheduler=sge; else scheduler=pbs; fi
    else
        fail "neither sbatch, pjsub nor qsub is in PATH; submit from the cluster's login node"
    fi
fi
[[ $scheduler =~ ^(slurm|pbs|pjm|sge)$ ]] || fail "--scheduler is slurm, pbs, pjm or sge, not '$scheduler'"
[[ $scheduler != pjm || $spare -eq 0 ]] || fail "--spare: PJM ends a job that loses a node; leave it out"
[[ $scheduler != sge || ${#options[@]} -gt 0 ]] ||
    fail "Grid Engine's request for nodes differs by site; give it, e.g. --option '-l node_f=$((nodes + spare))'"
[[ -r $config ]] || fail "$(realpath -m "$config") cannot be read"
[[ -x $program ]] || fail "$program is not there; build it, or name it with --program"
[[ -z $site || -r $site ]] || fail "$site cannot be read"
config=$(realpath "$config")

# shellcheck source=scripts/batch/common.sh
. "$root/scripts/batch/common.sh"

plan=$("$program" plan "$config" "ranks=$((nodes * ranks_per_node))" ${words[@]+"${words[@]}"}) || {
    status=$?
    echo "scripts/submit.sh: error: tatara plan refuses the configuration, as training would; nothing was submitted" >&2
    exit "$status"
}
echo "$plan"
echo
run_dir=$(plan_value run.dir) need=$(plan_value checkpoints.bytes) checkpoints=$(plan_value checkpoints)
[[ -n $run_dir && $need =~ ^[0-9]+$ ]] || fail "$program plan does not print what this script needs; build it again"
need=$((need / 1048576))
run_dir=$(realpath -m "$run_dir")
[[ ! $run_dir =~ [[:space:]%] ]] || fail "run.dir $run_dir: schedulers do not take blanks and % in the path of an output"

# An absent folder is made by a job, not by a dry run: look at the part of the path that is there.
existing=$run_dir
while [[ ! -e $existing ]]; do existing=$(dirname "$existing"); done
[[ -d $existing && -w $existing ]] || fail "run.dir $run_dir: $existing cannot be written to"
free=$(df --output=avail -B 1M "$existing" | tail -n 1 | tr -d ' ')
taken=0
if compgen -G "$run_dir/step-*" >/dev/null; then
    taken=$(du -cm "$run_dir"/step-* | tail -n 1 | cut -f 1)
fi
((free + taken > need)) ||
    fail "$run_dir: $checkpoints checkpoints take $need MiB, and there are $free MiB free (and $taken MiB in" \
        "checkpoints of this run); free some, choose another run.dir, or lower checkpoint.keep"
echo "space           $need MiB for $checkpoints checkpoints; $free MiB are free in $existing"

# ---- the job script ----

logs=$run_dir/logs
chain_name=$(date +%Y%m%d-%H%M%S)-$$
# One name for one run: Slurm starts no two jobs of a name at once, so that no run is ever in two jobs.
name=tatara-$(basename "$run_dir")
name=${name//[!A-Za-z0-9._-]/_}
if [[ $scheduler == slurm ]]; then name+=-$(cksum <<<"$run_dir" | cut -d ' ' -f 1); else name=${name:0:15}; fi
all=$((nodes + spare))

directives() {
    local option
    case $scheduler in
    slurm)
        printf '#SBATCH %s\n' "--job-name=$name" "--nodes=$all" "--ntasks-per-node=$ranks_per_node" "--time=$time" \
            "--output=$logs/job-%j.out" --open-mode=append --requeue "--signal=B:USR1@$save_time" --dependency=singleton
        [[ $spare -eq 0 ]] || echo "#SBATCH --no-kill"
        ;;
    pbs)
        printf '#PBS %s\n' "-N $name" "-l select=$all:mpiprocs=$ranks_per_node" "-l walltime=$hours" "-j oe" \
            "-o $logs/" "-r y"
        ;;
    pjm)
        printf '#PJM %s\n' "-N $name" "-L node=$nodes" "-L elapse=$hours" "--mpi proc=$((nodes * ranks_per_node))" \
            -j "-o $logs/job-%j.out"
        ;;
    sge)
        printf '#$ %s\n' "-N $name" "-S /bin/bash" "-l h_rt=$hours" -cwd "-j y" "-o $logs/" "-r y"
        ;;
    esac
    declare -A mark=([slurm]=SBATCH [pbs]=PBS [pjm]=PJM [sge]=$)
    for option in ${options[@]+"${options[@]}"}; do
        printf '#%s %s\n' "${mark[$scheduler]}" "$option"
    done
}

job_script() {
    declare -A suffix=([slurm]=sbatch [pbs]=pbs [pjm]=pjm [sge]=sge)
    echo "#!/usr/bin/env bash"
    echo "# Written by scripts/submit.sh on $(date '+%F %T')."
    directives
    printf 'cd %q || exit 2\n' "$PWD"
    printf 'export %s=%q\n' TATARA_ROOT "$root" TATARA_PROGRAM "$program" TATARA_NODES "$nodes" \
        TATARA_RANKS_PER_NODE "$ranks_per_node" TATARA_JOB_SCRIPT "$script"
    [[ -z $site ]] || printf 'export TATARA_SITE=%q\n' "$site"
    [[ $chain -eq 1 ]] || printf 'export TATARA_CHAIN=%q\n' "$chain_name"
    [[ $scheduler == slurm ]] || printf 'export TATARA_TIME_S=%q TATARA_SAVE_S=%q\n' "$seconds" "$save_time"
    # Retries, requeues and the launcher as the submitting shell has them set.
    for variable in TATARA_MAX_RETRIES TATARA_MAX_REQUEUES TATARA_RETRY_S TATARA_LAUNCHER TATARA_LAUNCHER_KIND \
        TATARA_MPIRUN TATARA_SRUN_MPI; do
        [[ -z ${!variable:-} ]] || printf 'export %s=%q\n' "$variable" "${!variable}"
    done
    printf 'exec bash'
    printf ' %q' "$root/scripts/$scheduler/train.${suffix[$scheduler]}" "$config" ${words[@]+"${words[@]}"}
    echo
}

script=$logs/submit-$chain_name.sh
echo "job script      $script"
if [[ $dry_run == yes ]]; then
    job_script | sed 's/^/    /'
else
    mkdir -p "$logs"
    job_script >"$script"
fi

# ---- submission ----

submit() { # prints the command, and sets `answer` to what the scheduler prints
    echo "submit          $*"
    answer='' id=DRY-RUN
    [[ $dry_run == no ]] || return 0
    answer=$("$@") || fail "the scheduler refuses: $*"
    echo "                $answer"
}

# A job that is submitted from within a job is no restart of that one.
unset SLURM_RESTART_COUNT
id='' first=''
for ((link = 1; link <= chain; link++)); do
    last=$((link == chain))
    case $scheduler in
    slurm)
        submit env "TATARA_CHAIN_LAST=$last" sbatch --parsable "$script"
        [[ -z $answer ]] || id=${answer%%;*}
        ;;
    pbs)
        submit qsub -v "TATARA_CHAIN_LAST=$last" ${id:+-W "depend=afterany:$id"} "$script"
        [[ -z $answer ]] || id=$answer
        ;;
    pjm)
        step=()
        [[ $chain -eq 1 ]] || step=(--step --sparam "${first:+jid=$first,}sn=$link")
        submit pjsub -x "TATARA_CHAIN_LAST=$last" ${step[@]+"${step[@]}"} "$script"
        if [[ -n $answer ]]; then id=$(sed -nE 's/.*Job ([0-9]+(_[0-9]+)?) submitted.*/\1/p' <<<"$answer"); fi
        [[ -n $first ]] || first=${id%%_*}
        ;;
    sge)
        submit qsub -terse -v "TATARA_CHAIN_LAST=$last" ${id:+-hold_jid "$id"} "$script"
        [[ -z $answer ]] || id=${answer%%.*}
        ;;
    esac
    [[ -n $id ]] || fail "the scheduler's answer names no job: $answer"
done
echo "output          $logs: job-*.out and a log for each attempt; metrics in $run_dir/metrics.jsonl"
