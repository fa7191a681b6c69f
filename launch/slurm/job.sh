# Sourced by the job scripts here: one launcher a node through srun, and the job's way back into the queue.
# shellcheck shell=bash disable=SC2153 # the job scripts set PYTHON and the other variables

REQUEUE=75 # what a command exits with that a cluster's signal ended, everything saved
SECURA_NODES="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd' ')"
export SECURA_NODES RANKS_PER_NODE

# srun takes --cpus-per-gpu from the job, and refuses it on nodes without GPUs.
[ "${SLURM_GPUS_ON_NODE:-0}" != 0 ] || unset SLURM_CPUS_PER_GPU SLURM_GPUS_PER_NODE

# The signal ahead of the time limit goes to the ranks alone. SIGTERM comes here with `scancel` and
# `scontrol requeue`: then Slurm itself decides whether the job comes back.
told_to_end=
trap 'told_to_end=1' TERM
trap : USR1

# run_on_nodes SCRIPT [ARGUMENT...]: the ranks of SCRIPT on every node of the job. A job that Slurm has started
# before goes on from its last checkpoint.
run_on_nodes() {
    local given=("$@") argument
    if ((${SLURM_RESTART_COUNT:-0} > 0)); then
        set --
        for argument in "${given[@]}"; do
            case $argument in --overwrite | --resume) ;; *) set -- "$@" "$argument" ;; esac
        done
        set -- "$@" --resume
    fi
    _step --ntasks-per-node=1 -- launch/slurm/node.py "$@"
}

# run_once SCRIPT [ARGUMENT...]: one process on the first node.
run_once() { _step --nodes=1 --ntasks=1 -- "$@"; }

_step() {
    local options=(--kill-on-bad-exit=0 --wait=120 --open-mode=append --output="$LOG_FOLDER/%x-%j-node%n.log") python
    mkdir -p "$LOG_FOLDER"
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    shift
    case $CONTAINER_IMAGE in
    "") python=("$PYTHON") ;;
    *.sif) python=(apptainer exec --nv --bind "$PWD" --pwd "$PWD" "$CONTAINER_IMAGE" python) ;;
    *)
        options+=(--container-image="$CONTAINER_IMAGE" --container-mounts="$PWD:$PWD" --container-workdir="$PWD")
        python=(python)
        ;;
    esac
    echo "$(date '+%F %T') job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SECURA_NODES: $*"
    srun "${options[@]}" "${python[@]}" "$@" &
    local step=$! status=0
    while kill -0 "$step" 2>/dev/null; do # `wait` also ends when a signal arrives
        wait "$step"
        status=$?
    done
    echo "$(date '+%F %T') ended with status $status"
    _end "$status"
}

_end() {
    if [ "$1" != "$REQUEUE" ] || [ -n "$told_to_end" ]; then
        exit "$1"
    elif ((${SLURM_RESTART_COUNT:-0} >= MAX_RESTARTS)); then
        echo "error: the job was started $((MAX_RESTARTS + 1)) times, as often as MAX_RESTARTS allows:" \
            "submit it again with --resume to go on" >&2
        exit "$1"
    fi
    echo "back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
    exit "$1"
}
