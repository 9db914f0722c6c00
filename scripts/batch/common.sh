# shellcheck shell=bash
# What the job scripts of all schedulers share: one attempt after the other, until the run is finished, cannot go on, or
# must be queued again. Sourced by scripts/{slurm,pbs,pjm,sge}/train.*, which set
#
#   batch_job        the job's id
#   batch_restart    how often the scheduler has started this job again: 0, 1, …; empty where it does not tell
#   batch_nodes      the job's nodes, an array; empty where the scheduler does not tell
#   batch_same_job   yes: batch_requeue keeps the job's id and its place before those that wait for it
# and define
#   batch_launch     starts "${rank_command[@]}" on the nodes "$@" (none: on all) in the background: sets batch_pid
#   batch_lost       prints those of its nodes that the scheduler has given up, one a line
#   batch_requeue    has the job queued again; fails when that is not possible
#   batch_current    fails when the scheduler has started this job anew elsewhere, or ended it
#   batch_left       prints the seconds until the job's time limit; nothing when it is not known
# and then call batch_main CONFIG.yaml [key=value …].
#
# What the user sets (scripts/submit.sh does so):
#   TATARA_ARGS             CONFIG.yaml key=value …, where the script is given none
#   TATARA_PROGRAM          the program; default $TATARA_ROOT/build/tatara
#   TATARA_NODES            nodes to run on; default: all of the job. The job's further nodes are spares
#   TATARA_RANKS_PER_NODE   default 1
#   TATARA_SITE             a file that is sourced first: module load, MPI settings of the site, any of what follows
#                           (configs/sites has examples)
#   TATARA_MPIRUN           the launcher and options of it; default: mpirun, with --bind-to none if it is Open MPI's
#   TATARA_LAUNCHER_KIND    openmpi (4, 5 and what is made from it), mpich (Hydra), intelmpi, pals, or none, whose launcher
#                           is told no nodes; default: what `mpirun --version` says
#   TATARA_LAUNCHER         srun or mpirun, under Slurm; default: srun where it has what TATARA_SRUN_MPI says
#   TATARA_SRUN_MPI         srun's --mpi=…; default pmix; none leaves it out
#   TATARA_TIME_S           the job's time limit, where the scheduler sends no signal before it
#   TATARA_SAVE_S           how long before the limit the run is stopped, there; default 180
#   TATARA_MAX_RETRIES      new attempts in the job, TATARA_MAX_REQUEUES: new jobs; both count those in a row that
#                           brought no new checkpoint. Defaults 2 and 5
#   TATARA_CHAIN, TATARA_CHAIN_LAST   the name of the chain that this job is a link of; 1 for its last link
#
# The program's exit status decides (tatara --help lists them). A launcher does not tell it: that of MPICH ends with 9 or 11
# when a rank was killed by signal 9 or 11, Open MPI's with 1 when it was itself asked to end, srun with 0 when it gives
# up a step whose nodes are lost. So the first rank that ends by itself leaves its status in a file beside the attempt's
# log (TATARA_STATUS_FILE; all ranks end alike, or the one that failed leaves it). Where that file is absent, no rank came
# to an end of its own, and the launcher's status says at most that nothing was started:
#   0                   the run is finished, if its last checkpoint is there
#   2 3 4 5 9 10        a new attempt would end the same way: the job ends with this status
#   12                  the run belongs to another attempt, which goes on: the job ends and leaves the rest to that one
#   11                  stopped with a checkpoint: queued again when the time limit is why, else the job ends with 11
#   6                   disk or memory: tried again only once the run has a checkpoint, since a wrong set-up fails before
#   7 8                 MPI or a device failed, a rank hangs: tried again
#   no file             a rank, a node or the launcher was lost: tried again; the same when 0 is left, but no last checkpoint
#   no file, 126 or 127 from the launcher: it, the program or a library could not be started; as 6
# A launcher that is not there at all ends the job at once, with status 2.
# A job of a chain that reaches its limit is not queued again: the next link goes on (without batch_same_job, whatever
# ended this one). What ended the run for good is written to logs/ended in the run's folder, and the links that follow end
# at once.

# shellcheck disable=SC2154 # batch_*, set by the scheduler's script
signals=0 limit=no ending=no batch_pid='' timers=()

say() {
    printf '%(%F %T)T job %s%s: %s\n' -1 "$batch_job" "${batch_restart:+.$batch_restart}" "$*"
}

refuse() {
    say "error: $*"
    exit 2
}

# ---- what the job starts from ----

# The shell that submitted may have had MPI settings for one machine: they would break several. What is meant for the
# job's nodes is set by TATARA_SITE.
clean_environment() {
    local name names=()
    for name in $(compgen -e OMPI_MCA_) $(compgen -e PMIX_MCA_) $(compgen -e PRTE_MCA_); do
        names+=("$name=${!name}")
        unset "$name"
    done
    [[ ${#names[@]} -eq 0 ]] || say "unset, as the submitting shell had them: ${names[*]}; TATARA_SITE may set them"
    if [[ -n ${TATARA_SITE:-} ]]; then
        [[ -r $TATARA_SITE ]] || refuse "TATARA_SITE=$TATARA_SITE cannot be read"
        set +u # what it sources in turn may take unset variables for empty
        # shellcheck source=/dev/null
        . "$TATARA_SITE"
        set -u
    fi
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
}

# plan_value NAME: a value of those that `tatara plan` prints for scripts, from $plan, its output.
plan_value() {
    sed -n "s/^${1//./\\.}=//p" <<<"$plan"
}

# The step of the run's newest checkpoint; 0 when there is none.
newest_step() {
    local folder step newest=0
    for folder in "$run_dir"/step-*; do
        step=${folder##*/step-}
        [[ $step =~ ^[0-9]{8,18}$ ]] || continue
        step=$((10#$step))
        ((step <= newest)) || newest=$step
    done
    echo "$newest"
}

# Whether an attempt that ended with status 0 has finished the run: srun ends with 0, too, when it gives a step up whose
# nodes it lost.
is_finished() {
    [[ $(newest_step) -ge $(plan_value run.last_step) ]]
}

# ---- signals ----

# The ranks stop after the step in hand, and save; the launcher passes the signal on to them.
pass_on() {
    signals=$((signals + 1))
    [[ -z $batch_pid ]] || kill -USR1 "$batch_pid" 2>/dev/null || true
}

on_limit() {
    local left
    [[ $limit == no ]] || return 0
    limit=yes
    say "the time limit is near: asking the ranks to save and stop"
    pass_on
    # Ranks that do not come to an end must not take the job with them: it is queued again just before the limit.
    left=$(batch_left)
    if [[ $left =~ ^[0-9]+$ ]]; then
        start_timer USR2 $((left > 30 ? left - 20 : left / 2))
    fi
}

on_overdue() {
    signals=$((signals + 1))
    [[ $limit == yes ]] || { on_limit; return; }
    say "the ranks have not stopped in time: this attempt's work since its last checkpoint is lost"
    [[ -z $batch_pid ]] || kill -TERM "$batch_pid" 2>/dev/null || true
    again "the time limit came before the ranks had stopped" 137
}

on_end() {
    ending=yes
    say "asked to end: asking the ranks to save and stop"
    pass_on
}

# start_timer SIGNAL SECONDS
start_timer() {
    (
        trap - USR1 USR2 TERM INT XCPU
        sleep "$2" &
        trap 'kill $! 2>/dev/null; exit 0' TERM
        wait $!
        kill -s "$1" $$
    ) &
    timers+=($!)
}

stop_timers() {
    [[ ${#timers[@]} -eq 0 ]] || kill "${timers[@]}" 2>/dev/null || true
    timers=()
}

# Waits for the launcher; its status goes to `status`. The wait is in short pieces, since a signal that comes just before
# bash's `wait` has its trap run only after it, and `wait` that a trap interrupts says nothing of the launcher.
wait_for_launcher() {
    local before rc polls=0 known=no
    while kill -0 "$batch_pid" 2>/dev/null; do
        polls=$((polls + 1))
        if ((polls < 20)); then sleep 0.1 & else sleep 1 & fi
        wait $! || true
    done
    while :; do
        before=$signals rc=0
        wait "$batch_pid" || rc=$?
        # 127 is the launcher's at first; later it may mean that bash has told the status before, and forgotten it.
        [[ $rc -eq 127 && $known == yes ]] || status=$rc
        known=yes
        [[ $signals -ne $before && $rc -ne 127 ]] || break
    done
    batch_pid=''
}

# judge STATUS-FILE: turns the launcher's status into the program's, and says it.
judge() {
    local own='' launchers=$status
    { read -r own <"$1"; } 2>/dev/null || true
    if [[ $own =~ ^[0-9]+$ ]]; then
        status=$own
        [[ $own == "$launchers" ]] || own+=" (the launcher's: $launchers)"
        say "attempt $attempt ended with status $own"
    else
        say "attempt $attempt ended, and no rank has left its status (the launcher's: $launchers)"
        ((launchers == 0 || launchers >= 126)) || status=1
    fi
    if [[ $status -eq 0 ]] && ! is_finished; then
        say "and yet the run is not finished: the launcher has lost it"
        status=1
    fi
}

# ---- nodes ----

# The first node that the launcher names in an attempt's log as having lost a rank: the others were ended after it. Of a
# start that failed the log does not say where. Open MPI breaks its lines; Intel's launcher names all nodes alike.
blamed_node() {
    grep -q 'launch failed' "$1" && return
    {
        sed -nE -e 's/^srun: error: Node failure on ([^ ,]+).*/\1/p' -e 's/^srun: error: ([^ :]+): tasks? .*/\1/p' \
            -e 's/^= +PID [0-9]+ RUNNING AT ([^ ]+)$/\1/p' -e 's/.*connection to proxy [0-9]+ at host ([^ ]+) failed.*/\1/p' "$1"
        tr '\n' ' ' <"$1" | sed -nE 's/.* on node ([^ ]+) exited on .*/\1/p'
    } | head -n 1
}

# choose_nodes: sets `chosen` to the nodes of the next attempt and `excluded` to those left out: lost ones always, the
# blamed ones as far as there are spares. Fails when too few are left.
choose_nodes() {
    local node lost good=()
    chosen=() excluded=()
    [[ ${#batch_nodes[@]} -gt 0 ]] || return 0
    lost=" $(batch_lost | tr '\n' ' ') "
    for node in "${batch_nodes[@]}"; do
        if [[ $lost == *" $node "* ]]; then excluded+=("$node"); else good+=("$node"); fi
    done
    [[ ${#excluded[@]} -eq 0 ]] || say "lost to the scheduler: ${excluded[*]}"
    for node in "${good[@]}"; do
        if [[ $blamed == *" $node "* ]]; then continue; fi
        chosen+=("$node")
    done
    for node in "${good[@]}"; do # a blamed node is better than none
        [[ $blamed == *" $node "* && ${#chosen[@]} -lt $TATARA_NODES ]] || continue
        chosen+=("$node")
    done
    if [[ ${#chosen[@]} -lt $TATARA_NODES ]]; then
        say "only ${#chosen[@]} of the $TATARA_NODES nodes that the run needs are left"
        return 1
    fi
    chosen=("${chosen[@]:0:$TATARA_NODES}")
    excluded=()
    for node in "${batch_nodes[@]}"; do
        [[ " ${chosen[*]} " == *" $node "* ]] || excluded+=("$node")
    done
}

# ---- launchers ----

# need_launcher COMMAND VARIABLE: ends the job when there is no such command, which VARIABLE chooses.
need_launcher() {
    command -v "$1" >/dev/null || finish 2 "error: there is no launcher $1 on $(hostname): load the module of the MPI that \
$TATARA_PROGRAM was built with in TATARA_SITE (submit.sh --site), or name another launcher in $2"
}

launcher_kind() {
    case $(timeout 20 "$1" --version 2>&1 </dev/null) in
    *'Open MPI'* | *OpenRTE* | *'Spectrum MPI'*) echo openmpi ;;
    *'Intel(R) MPI'*) echo intelmpi ;;
    *HYDRA*) echo mpich ;;
    *PALS*) echo pals ;;
    esac
}

# launch_mpirun NODES…: the MPI's own launcher, on these nodes; for the schedulers' batch_launch.
launch_mpirun() {
    local words kind hosts='' counts='' node per_node=$TATARA_RANKS_PER_NODE
    read -ra words <<<"${TATARA_MPIRUN:-mpirun}"
    need_launcher "${words[0]}" TATARA_MPIRUN
    kind=${TATARA_LAUNCHER_KIND:-$(launcher_kind "${words[0]}")}
    if [[ $kind == intelmpi && ${words[0]##*/} == mpirun ]]; then # a shell script: signals end it, and not its ranks
        words[0]=${words[0]%mpirun}mpiexec.hydra
        need_launcher "${words[0]}" TATARA_MPIRUN
    fi
    [[ $kind != openmpi || -n ${TATARA_MPIRUN:-} ]] || words+=(--bind-to none)
    words+=(-n $((TATARA_NODES * per_node)))
    for node in "$@"; do
        hosts+=${hosts:+,}$node counts+=${counts:+,}$node:$per_node
    done
    case ${hosts:+$kind} in
    openmpi) words+=(--host "$counts") ;;
    mpich) words+=(-hosts "$hosts" -ppn "$per_node") ;;
    intelmpi)
        export I_MPI_JOB_RESPECT_PROCESS_PLACEMENT=0 # else the scheduler's list counts, spares included
        words+=(-hosts "$hosts" -ppn "$per_node")
        ;;
    pals) words+=(--hosts "$hosts" --ppn "$per_node") ;;
    none)
        [[ ${#excluded[@]} -eq 0 ]] || finish 2 "error: TATARA_LAUNCHER_KIND=none, and ${words[0]} would start ranks on \
the spare nodes, too: ${excluded[*]}; leave out --spare, or name the launcher's kind"
        ;;
    '') [[ -z $hosts ]] || finish 2 "error: ${words[0]} --version does not say how it is told its nodes: set \
TATARA_LAUNCHER_KIND to openmpi, mpich, intelmpi, pals or none, in TATARA_SITE (submit.sh --site)" ;;
    *) finish 2 "error: TATARA_LAUNCHER_KIND is openmpi, mpich, intelmpi, pals or none, not '$kind'" ;;
    esac
    "${words[@]}" "${rank_command[@]}" >>"$log" 2>&1 &
    batch_pid=$!
}

# left_by_clock: for batch_left, where the scheduler cannot be asked.
left_by_clock() {
    [[ -z ${TATARA_TIME_S:-} ]] || echo $((TATARA_TIME_S - SECONDS))
}

# ---- the end of an attempt ----

# finish STATUS WHY: ends the job. Links of its chain that follow end at once, too.
finish() {
    stop_timers
    [[ -z ${TATARA_CHAIN:-} ]] || printf '%s %s %s\n' "$TATARA_CHAIN" "$1" "$2" >"$logs/ended"
    say "$2"
    exit "$1"
}

# again WHY STATUS: has the job queued again, and ends it.
again() {
    local count=0 step last=-1
    stop_timers
    if ! batch_current; then
        say "the scheduler has taken this job elsewhere or ended it: nothing more to do here"
        exit "$2"
    fi
    if [[ -n ${TATARA_CHAIN:-} && ${TATARA_CHAIN_LAST:-0} != 1 && ($limit == yes || $batch_same_job != yes) ]]; then
        say "$1; the next job of the chain goes on"
        exit "$2"
    fi
    step=$(newest_step)
    read -r count last 2>/dev/null <"$logs/requeues" || true
    [[ $last == "$step" ]] || count=0
    if ((count >= ${TATARA_MAX_REQUEUES:-5})); then
        finish "$2" "$1; $count jobs in a row brought no checkpoint after step $step (TATARA_MAX_REQUEUES): giving up"
    fi
    echo "$((count + 1)) $step" >"$logs/requeues"
    say "$1; queueing the job again (newest checkpoint: step $step)"
    batch_requeue && exit "$2"
    say "error: the scheduler refuses to queue it again; the run goes on from step $step when it is submitted again"
    exit "$2"
}

batch_main() {
    local config tries=0 attempt=0 status=0 before_step chain_name chain_status rest
    local plan run_dir logs log command rank_command reason chosen=() excluded=() blamed=' '
    if [[ $# -eq 0 ]]; then # some schedulers pass a script no arguments
        read -ra command <<<"${TATARA_ARGS:-}"
        set -- ${command[@]+"${command[@]}"}
    fi
    [[ $# -ge 1 ]] || refuse "no configuration: give CONFIG.yaml and key=value words, or TATARA_ARGS"
    config=$1
    shift
    [[ -r $config ]] || refuse "$config: cannot be read on $(hostname)"
    clean_environment
    TATARA_PROGRAM=${TATARA_PROGRAM:-$TATARA_ROOT/build/tatara}
    TATARA_NODES=${TATARA_NODES:-${#batch_nodes[@]}}
    TATARA_RANKS_PER_NODE=${TATARA_RANKS_PER_NODE:-1}
    [[ $TATARA_NODES =~ ^[1-9][0-9]*$ ]] || refuse "TATARA_NODES is the number of nodes, not '$TATARA_NODES'"
    [[ $TATARA_RANKS_PER_NODE =~ ^[1-9][0-9]*$ ]] ||
        refuse "TATARA_RANKS_PER_NODE is the number of ranks on each node, not '$TATARA_RANKS_PER_NODE'"
    [[ -x $TATARA_PROGRAM ]] || refuse "$TATARA_PROGRAM is no program on $(hostname); set TATARA_PROGRAM"
    until plan=$("$TATARA_PROGRAM" plan "$config" "$@"); do # a file may be out of reach for a while, as for an attempt
        [[ $? -eq 6 && $tries -lt ${TATARA_MAX_RETRIES:-2} ]] || refuse "tatara plan refuses $config on $(hostname)"
        tries=$((tries + 1))
        sleep "${TATARA_RETRY_S:-5}"
    done
    tries=0
    run_dir=$(plan_value run.dir)
    [[ -n $run_dir && $(plan_value run.last_step) =~ ^[0-9]+$ ]] ||
        refuse "$TATARA_PROGRAM plan does not print what scripts need: is it of the same version as $TATARA_ROOT/scripts?"
    command=("$TATARA_PROGRAM" train "$config" "$@")
    logs=$run_dir/logs
    mkdir -p "$logs" || refuse "$logs cannot be created"
    if [[ -z $batch_restart ]]; then
        batch_restart=0
        while compgen -G "$logs/$batch_job.$batch_restart.*.log" >/dev/null; do
            batch_restart=$((batch_restart + 1))
        done
    fi

    if [[ -n ${TATARA_CHAIN:-} && -e $logs/ended ]]; then
        read -r chain_name chain_status rest <"$logs/ended" || true
        if [[ $chain_name == "$TATARA_CHAIN" ]]; then
            say "nothing to do: an earlier job of this chain has ended the run: $rest"
            exit "$chain_status"
        fi
    fi

    trap on_limit USR1 XCPU
    trap on_overdue USR2
    trap on_end TERM INT
    [[ -z ${TATARA_TIME_S:-} ]] || start_timer USR1 $((TATARA_TIME_S - ${TATARA_SAVE_S:-180}))

    # What a log and a status file are called was never used before.
    while compgen -G "$logs/$batch_job.$batch_restart.$attempt.*" >/dev/null; do
        attempt=$((attempt + 1))
    done
    while :; do
        choose_nodes || again "too few nodes" "$((status > 0 ? status : 1))"
        log=$logs/$batch_job.$batch_restart.$attempt.log
        before_step=$(newest_step)
        say "attempt $attempt: $TATARA_RANKS_PER_NODE ranks on each of ${chosen[*]:-the nodes}${excluded[*]:+ (not \
${excluded[*]})}; newest checkpoint: step $before_step; log: $log"
        status=11
        if [[ $limit == no && $ending == no ]]; then
            # By `env`, since not every launcher passes variables on.
            rank_command=(env "TATARA_STATUS_FILE=${log%.log}.status" "${command[@]}")
            batch_launch ${chosen[@]+"${chosen[@]}"}
            [[ $limit == no && $ending == no ]] || pass_on # a signal that came between the question and the launch
            wait_for_launcher
            judge "${log%.log}.status"
        fi

        reason=$(grep -a -s -m 1 'tatara: error: ' "$log" || echo "see $log")
        case $status in
        0) finish 0 "the run is finished" ;;
        12)
            say "$reason"
            exit 12
            ;;
        2 | 3 | 4 | 5 | 9 | 10) finish "$status" "$reason; a new attempt would end the same" ;;
        esac
        [[ $limit == no ]] || again "stopped before the time limit" "$status"
        [[ $ending == no ]] || exit "$status"
        [[ $status -ne 11 ]] || finish 11 "the run was asked to stop, and has; submit it again to go on"
        if [[ $status =~ ^(6|126|127)$ && $(newest_step) -eq 0 ]]; then
            finish "$status" "$reason; nothing was ever saved: not tried again"
        fi

        [[ $(newest_step) -eq $before_step ]] || tries=0
        blamed+="$(blamed_node "$log") "
        if ((tries >= ${TATARA_MAX_RETRIES:-2})); then
            again "$((tries + 1)) attempts in a row brought no checkpoint" "$status"
        fi
        if ! batch_current; then
            say "the scheduler has taken this job elsewhere or ended it: nothing more to do here"
            exit "$status"
        fi
        tries=$((tries + 1)) attempt=$((attempt + 1))
        sleep "${TATARA_RETRY_S:-5}"
    done
}
