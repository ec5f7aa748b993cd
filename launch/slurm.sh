#!/bin/bash
# Train on a Slurm cluster, on one or more nodes. The job requeues itself until the run is done.
#
# Usage: sbatch [OPTION...] launch/slurm.sh [COMMAND] [CONFIG] [--section.key VALUE...]
#
# Apply (from the repository)
#   sbatch launch/slurm.sh                        uses JOB_CONFIG, job.yaml in this folder, or configs/wiki-123m.yaml
#   sbatch --nodes=4 launch/slurm.sh configs/x.yaml --train.learning_rate 1e-3     four nodes, and one changed setting
#   sbatch --array=0-15 --gpus-per-node=0 --output=%x-%A_%a.log launch/slurm.sh prepare configs/x.yaml
#                                                                        corpus → shards, in 16 parts
#   sbatch launch/slurm.sh check configs/x.yaml                          any other command of `python -m job`
#
# Logs
#   tail -f wikillm-JOBID.log          output of the job; a requeued job appends to the same file
#   tail -f wikillm-JOBID_0.log        output of task 0 of the array above
#
# Stop
#   scancel --signal=USR1 JOBID        saves a checkpoint without a time limit, then restarts
#   scontrol requeue JOBID             saves a checkpoint within KillWait (30 s at most sites), then restarts; the same
#                                      happens on preemption
#   scancel JOBID                      saves a checkpoint within KillWait and stays stopped; the next sbatch continues
#
# GPUs: set them with --gpus-per-node=N, --gpus-per-node=TYPE:N or --gres=gpu:N. sbatch refuses other options (--gpus,
# --gpus-per-task) unless they agree with --gpus-per-node below: add --gpus-per-node=0 to use them.
#
# If your site does not allow requeueing, submit several jobs at once. Each starts when all jobs before it have ended
# without finishing the run. When the run is done (0) or cannot continue (70, 78), the waiting jobs are cancelled:
#
#   jobs=$(sbatch --parsable launch/slurm.sh configs/x.yaml)
#   for more in 2 3 4; do
#       after="--dependency=afternotok:$jobs --kill-on-invalid-dep=yes"
#       jobs+=:$(sbatch --parsable $after launch/slurm.sh configs/x.yaml)
#   done
#   scancel ${jobs//:/ }               stops all these jobs
#
# Credentials (AWS_ACCESS_KEY_ID, …, SWANLAB_API_KEY) come from the environment of sbatch or from the file CREDENTIALS.
# EDIT marks what differs between sites. Options of sbatch and variables before it (RUNTIME=pyxis sbatch …) override it.

#SBATCH --job-name=wikillm
##SBATCH --partition=gpu         # EDIT: if your site requires a partition, remove one "#"
##SBATCH --account=project       # EDIT: if your site requires an account, remove one "#"
#SBATCH --nodes=1                # EDIT: number of nodes
#SBATCH --gpus-per-node=1        # EDIT: all GPUs of a node
#SBATCH --cpus-per-task=8        # EDIT: CPUs of a node for these GPUs
#SBATCH --time=24:00:00          # EDIT: time limit; after it the job is requeued and continues
#SBATCH --ntasks-per-node=1      # one supervisor on each node, which starts one process for each GPU
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append       # otherwise each requeue would empty the log
#SBATCH --requeue                # requeue after a node failure or preemption, whatever the site's default is
#SBATCH --signal=B:USR1@300      # EDIT: seconds before the time limit; more than one step and one checkpoint take

RUNTIME=${RUNTIME:-none} # EDIT: pyxis, apptainer, charliecloud, or none for the virtual environment of `make setup`
# A name in a registry, or a path: .sqsh file for pyxis, .sif file for Apptainer, root filesystem folder for Charliecloud.
IMAGE=${IMAGE:-registry.example.com/wikillm:latest} # EDIT, or make set-image
MOUNTS=${MOUNTS:-} # EDIT: other folders that the config uses: /data,/lustre/me:/me (Charliecloud's image must contain them)
REPOSITORY=${REPOSITORY:-} # EDIT: for RUNTIME=none; empty: the folder of sbatch, else the folder that contains launch/
PYTHON=${PYTHON:-} # EDIT: for RUNTIME=none; empty: .venv/bin/python in REPOSITORY
SCRATCH=${SCRATCH:-${SLURM_TMPDIR:-${TMPDIR:-/tmp}}} # EDIT: folder on a local disk of the node; wikillm-$UID in it is used
CREDENTIALS=${CREDENTIALS:-$HOME/.config/wikillm/credentials} # EDIT: file with lines NAME=value; only you should read it
MAX_RESTARTS=${MAX_RESTARTS:-200} # EDIT: restarts of one job, for any reason
MAX_CRASHES=${MAX_CRASHES:-3}     # EDIT: crashes in a row after which the job is still restarted

say() { echo "slurm.sh: job $id: $*" >&2; }
refuse() { say "$*" && give_up 78; }
# Print the words without passwords and query strings of URLs.
without_secrets() { sed -E 's#://[^/[:space:]]*@#://***@#g; s#\?[^[:space:]]*=[^[:space:]]*#?***#g' <<<"$*"; }
# In an array SLURM_JOB_ID is not usable: the last task has the id of the whole array, and would requeue all tasks.
id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
id=${id:-${SLURM_JOB_ID:?"start it with sbatch"}}

# Query squeue. A user may have set SQUEUE_* and SLURM_TIME_FORMAT, which would change the answer.
query_squeue() {
    (unset "${!SQUEUE_@}" && SLURM_TIME_FORMAT=%s timeout --kill-after=5 30 squeue --noheader "$@") 2>/dev/null
}
# Return true for a time in the future. Slurm writes "no limit" as 0, NONE or the largest 32-bit numbers (year 2106).
is_limit() { [[ $1 =~ ^[1-9][0-9]{8,9}$ ]] && (($1 > $(now) && $1 < 4294967294)); }
now() { printf '%(%s)T' -1; }
# Print the ids of the jobs that start if this one ends without finishing the run.
waiting() {
    query_squeue --user "$UID" --states PENDING --format '%i|%j|%E' |
        awk -F '|' -v name="$SLURM_JOB_NAME" -v this="afternotok:$id" '$2 == name {
            n = split($3, all, ",")
            for (i = 1; i <= n; i++) { sub(/\(.*/, "", all[i]); if (all[i] == this) print $1 }
        }'
}
# Exit when a restart cannot help, and cancel the jobs that wait for this one.
give_up() {
    local others
    others=$(waiting | tr '\n' ' ')
    if [[ $others ]]; then
        say "cancelling the jobs that wait for this one: scancel $others"
        # shellcheck disable=SC2086 # $others holds several ids.
        timeout 60 scancel $others
    fi
    exit "$1"
}

warned='' ended='' srun='' limit=unasked postponed='' ignored=''
# Forward the signal to the step. It is repeated, because a step that is still starting loses it. It is always USR1,
# because a second TERM means "exit at once".
forward() { [[ $srun ]] && { while kill -USR1 "$srun"; do sleep 10; done 2>/dev/null & }; }
# Handle Slurm's warning signal, which comes once. If the time limit is shorter than the time of --signal, it comes in the
# first minute, and stopping then would stop every start at once, so it is ignored. --signal takes at most 65535 s: if the
# limit is farther away, a person sent the signal.
warning() {
    [[ $limit == unasked ]] && postponed=1 && return
    local left=$((${limit:-0} - $(now)))
    if [[ ! $ignored ]] && ((SECONDS <= 60 && left > 3 * SECONDS && left < 65600)); then
        ignored=1
        say "the time limit is only $left s away, less than the time of --signal: ignoring the warning"
        return
    fi
    warned=1
    say "warned: the limit is near"
    forward
}
trap 'signalled=1; warning' USR1
trap 'signalled=1 ended=1; forward' TERM # The time limit, scancel, a requeue or preemption. The step gets the signal too.

# ---- What to run ----
command=train
[[ ${1:-} =~ ^[a-z]+$ ]] && { command=$1 && shift; }
config=${JOB_CONFIG:-} # The same order as in `python -m job`: JOB_CONFIG, then job.yaml here, then the example.
[[ $config ]] || { [[ -r job.yaml ]] && config=job.yaml || config=configs/wiki-123m.yaml; }
[[ ${1:---} != --* ]] && { config=$1 && shift; }
[[ -r $config ]] || refuse "no config file $config in $PWD: give an existing file as the first argument"
# shellcheck source=/dev/null
[[ -r $CREDENTIALS ]] && { set -a && . "$CREDENTIALS" && set +a; }
for name in MAX_RESTARTS MAX_CRASHES; do
    [[ ${!name} =~ ^[0-9]{1,9}$ ]] || refuse "$name=${!name}: expected a whole number"
done
export PYTHONUNBUFFERED=1 WIKILLM_SCRATCH=$SCRATCH
# Slurm before 23.02 does not set the end time in the job's environment, so squeue is asked.
read -r ends_at gpus submitted _ < <(query_squeue --states all --jobs "$id" --format '%e %b %o')
[[ ${submitted:-} == /* ]] || submitted='' # There is no path if sbatch read the script from its standard input.
[[ ${ends_at:-} == ????-??-??T* ]] && seconds=$(date +%s --date "$ends_at" 2>/dev/null) && ends_at=$seconds
is_limit "${SLURM_JOB_END_TIME:-}" && ends_at=$SLURM_JOB_END_TIME
unset SLURM_JOB_END_TIME
if is_limit "${ends_at:-}"; then
    export SLURM_JOB_END_TIME="$ends_at"
elif [[ ${ends_at:-} != @(NONE|N/A|Unknown|UNLIMITED|0|429496729[45]) ]]; then
    say "unknown end time of the job (squeue: ${ends_at:-no answer}): only Slurm's warning stops the run in time"
fi
limit=${SLURM_JOB_END_TIME:-}
[[ $postponed ]] && warning
# Since Slurm 22.05 srun does not inherit sbatch's CPUs per task.
[[ ${SLURM_CPUS_PER_TASK:-} ]] && export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
# With --gres=gpu:2 and the --gpus-per-node=1 above, a job gets two GPUs, but srun would read the 1 from its environment.
# Without these variables, a step gets all GPUs of its job.
unset "${!SLURM_GPUS_PER_@}" SLURM_GPUS SLURM_NTASKS_PER_GPU SLURM_TRES_PER_TASK
if [[ ${gpus:-} =~ gpu[^,]*[:=]([0-9]+),.*gpu[^,]*[:=]([0-9]+)$ && ${BASH_REMATCH[1]} != "${BASH_REMATCH[2]}" ]]; then
    say "GPUs: --gpus-per-node and --gres contradict each other ($gpus): each node has ${SLURM_GPUS_ON_NODE:-0}"
fi

# The nodes of a run end together: when one has ended, the others get a minute to exit with the same code.
# --kill-on-bad-exit=1 would kill them at once, so that a run that was saved on all nodes could exit with 143.
[[ $command =~ ^(train|evaluate)$ ]] && wait=60 || wait=0 # The nodes of `prepare` end at different times.
step=(srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --export=ALL --kill-on-bad-exit=0 --wait="$wait")
((SLURM_JOB_NUM_NODES > 1)) && step+=(--label)

# ---- Where to run it ----
# All containers use the same paths. Secrets stay in the environment, where `ps` does not show them.
# If the program cannot be imported, this is not a crash. The line "the entrypoint starts" tells this script that the
# program has started.
# shellcheck disable=SC2016
begin='said=$("$1" -c "import job" 2>&1 >/dev/null) || {
        said=$(echo "$said" | tail -n 1)
        echo "slurm.sh: job $0: $1 on ${SLURMD_NODENAME:-a node} cannot import job: ${said:-no error message}" >&2
        exit 78
    }
    [ "${SLURM_PROCID:-0}" != 0 ] || echo "slurm.sh: job $0: the entrypoint starts" >&2
    exec "$@"'
inside=(env PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin PYTHONPATH=/app HOME=/scratch WIKILLM_SCRATCH=/scratch)
inside+=(sh -c "$begin" "$id" python -m job "$command" --config "/app/configs/${config##*/}" "$@")
private=$SCRATCH && [[ ${SCRATCH##*/} == "wikillm-$UID" ]] || private=${SCRATCH%/}/wikillm-$UID
folder=$(realpath "$(dirname "$config")") && [[ $folder == /* ]] || refuse "cannot resolve the folder of the config $config"
mounts=$folder:/app/configs,$private:/scratch${MOUNTS:+,$MOUNTS}
[[ $IMAGE == [./]* ]] || IMAGE=${IMAGE#docker://}
case $RUNTIME in
    none)
        if [[ ! $REPOSITORY ]]; then # sbatch runs a copy of this file, but Slurm knows the original path.
            REPOSITORY=${submitted%/launch/slurm.sh}
            [[ -r $REPOSITORY/job/__main__.py && ! -r job/__main__.py ]] || REPOSITORY=$PWD
        fi
        [[ -r $REPOSITORY/job/__main__.py ]] ||
            refuse "REPOSITORY=$REPOSITORY has no job/__main__.py: submit from the repository, or set REPOSITORY"
        PYTHON=${PYTHON:-$REPOSITORY/.venv/bin/python}
        [[ -x $PYTHON ]] || refuse "RUNTIME=none needs $PYTHON: run make setup, or set PYTHON"
        [[ $REPOSITORY -ef . ]] || export PYTHONPATH="$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}"
        step+=(sh -c "$begin" "$id" "$PYTHON" -m job "$command" --config "$config" "$@") ;;
    pyxis)
        options=$(timeout 60 srun --help 2>&1)
        [[ $options == *--container-image* || $options != *--ntasks* ]] ||
            refuse "RUNTIME=pyxis: this srun has no --container-image, so pyxis is not installed: choose another RUNTIME"
        if [[ $IMAGE != [./]* ]]; then # enroot expects [REGISTRY#]NAME[:TAG]; since 3.0.1 TAG can be a digest.
            [[ $IMAGE =~ ^([^/#]*[.:][^/#]*|localhost)/ ]] && IMAGE=${IMAGE/\//#}
            if [[ $IMAGE =~ ^(.+)@(sha256:[0-9a-f]+)$ ]]; then
                IMAGE=${BASH_REMATCH[1]} digest=${BASH_REMATCH[2]}
                [[ ${IMAGE##*[/#]} != *:* ]] || IMAGE=${IMAGE%:*}
                IMAGE=$IMAGE:$digest
                say "IMAGE has a digest, which enroot expects in place of the tag: $IMAGE"
            fi
        fi
        step+=(--container-image="$IMAGE" --container-mounts="$mounts" --no-container-mount-home)
        step+=(--container-workdir=/app --no-container-entrypoint "${inside[@]}") ;;
    apptainer)
        command -v apptainer >/dev/null ||
            refuse "RUNTIME=apptainer: apptainer is not in PATH: load its module before sbatch, or choose another RUNTIME"
        if [[ $IMAGE != [./]* && $IMAGE != *://* ]]; then # Apptainer does not accept a tag together with a digest.
            [[ $IMAGE =~ ^(.*/[^/]+|[^/]+):[^:/]+(@sha256:.+)$ ]] && IMAGE=${BASH_REMATCH[1]}${BASH_REMATCH[2]}
            IMAGE=docker://$IMAGE
        fi
        step+=(apptainer exec ${SLURM_GPUS_ON_NODE:+--nv} --no-mount "home,cwd" --pwd /app --bind "$mounts")
        step+=("$IMAGE" "${inside[@]}") ;;
    charliecloud)
        command -v ch-run >/dev/null ||
            refuse "RUNTIME=charliecloud: ch-run is not in PATH: load its module before sbatch, or choose another RUNTIME"
        [[ -d $IMAGE ]] || refuse "RUNTIME=charliecloud: IMAGE=$IMAGE is not a folder: set IMAGE to an unpacked image"
        export USER=${USER:-$(id -un)} # ch-run needs it.
        IFS=, read -ra binds <<<"$mounts"
        step+=(ch-run --cd=/app "${binds[@]/#/--bind=}" "$IMAGE" -- "${inside[@]}") ;;
    *) refuse "RUNTIME=$RUNTIME: expected pyxis, apptainer, charliecloud or none" ;;
esac

# ---- Run it ----
# The log is the only record that one start of the job has of the starts before it.
log=$(readlink --canonicalize /dev/stderr) && [[ -f $log ]] || log=/dev/null
before=$(stat --format %s "$log") && [[ $before =~ ^[0-9]+$ ]] || log=/dev/null before=0
# The scratch folder must be private: files in it are executed, and other users can guess its name. With RUNTIME=none
# job/local_dirs.py checks this.
# shellcheck disable=SC2016
make_private='umask 077; mkdir --parents -- "$0"; found=$(stat --format "%F, uid %u, mode %a" -- "$0")
    [[ $found == "directory, uid $UID, mode "*[0145] ]] && chmod 700 -- "$0" && exit
    echo "slurm.sh: SCRATCH: $0: found ${found:-nothing}, expected a private folder of yours: remove it, or set SCRATCH"
    exit 78'
if [[ $RUNTIME != none ]]; then
    srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 bash -c "$make_private" "$private"
    (($? != 78)) || give_up 78
fi
say "start $((${SLURM_RESTART_COUNT:-0} + 1)) on ${SLURM_JOB_NODELIST}: $(without_secrets "$command" "$config" "$@")"
"${step[@]}" & # In the background, because bash runs a trap only after a foreground command has ended.
srun=$!
[[ $warned$ended ]] && forward
signalled=1
while [[ $signalled ]]; do # A signal ends `wait` too, so wait again.
    signalled=''
    wait "$srun"
    code=$?
done

# ---- Restart or not ----
# Return true if the entrypoint started in any start of this job, or if the log cannot be read (grep exits with 2).
has_started() {
    grep --quiet --extended-regexp "^( *[0-9]+: )?slurm\.sh: job $id: the entrypoint starts\$" "$log"
    (($? != 1)) || [[ $log == /dev/null ]]
}
# srun exits with the highest exit code of all nodes, such as 137 for a killed one. 70 or 78 of any node takes precedence.
for own in 70 78; do
    tail --bytes "+$((before + 1))" "$log" | grep --count "^srun: error: .*: Exited with exit code $own\$" >/dev/null &&
        code=$own
done
case $code in
    0) exit 0 ;;
    70 | 78) say "not restarted, because a restart cannot help (exit code $code)" && give_up "$code" ;;
esac
# Slurm itself restarts a requeued or preempted job, and a cancelled job stays stopped. Only after the time limit the
# script must requeue the job.
if [[ $ended ]]; then
    reason=$(query_squeue --states all --jobs "$id" --format %r)
    # Without an answer, compare the clock with the time limit.
    [[ $reason =~ ^[[:alpha:]]+$ ]] || { [[ $limit ]] && (($(now) >= limit)) && reason=TimeLimit; }
    [[ $reason == TimeLimit ]] || { say "cancelled, requeued or preempted (exit code $code)" && exit "$code"; }
fi
# A command that saves nothing is killed by the warning signal. This counts as stopped.
[[ $warned$ended ]] && ((code == 128 + 10 || code == 128 + 15)) && code=75
if ((code == 75)); then
    say "stopped, to be continued"
elif ((code < 128)) && ! has_started; then # A killed task (128 + signal) crashed, even if it had not started yet.
    say "not restarted: the entrypoint did not start (exit code $code), see the reason above"
    give_up 78
else
    say "crashed (exit code $code)"
    crashes=$(awk -v id="slurm.sh: job $id:" '
        index($0, id " stopped") == 1 { n = 0 } index($0, id " crashed") == 1 { n++ } END { print n + 0 }' "$log")
    [[ $crashes =~ ^[0-9]+$ ]] || crashes=1 # MAX_RESTARTS and exit code 70 still end the restarts.
    ((crashes <= MAX_CRASHES)) || { say "not restarted: $crashes crashes in a row (MAX_CRASHES=$MAX_CRASHES)" && exit "$code"; }
fi
((${SLURM_RESTART_COUNT:-0} < MAX_RESTARTS)) || { say "not restarted: MAX_RESTARTS=$MAX_RESTARTS is reached" && exit "$code"; }
timeout 60 scontrol requeue "$id" && exit "$code"
others=$(waiting | head -n 1)
[[ $others ]] && say "cannot be requeued here: job $others, which waits for this one, continues the run" && exit "$code"
resubmit="sbatch --dependency=afterany:${SLURM_ARRAY_JOB_ID:-$id} --nodes=$SLURM_JOB_NUM_NODES"
resubmit+=${SLURM_ARRAY_JOB_ID:+" --array=$SLURM_ARRAY_TASK_MIN-$SLURM_ARRAY_TASK_MAX:$SLURM_ARRAY_TASK_STEP"}
script=${submitted:-launch/slurm.sh}
words=$(printf ' %q' "${script#"$PWD"/}" "$command" "$config" "$@")
say "cannot be requeued here. To continue the run, add the other options of this job to:" \
    "$resubmit$(without_secrets "$words")"
say "to submit several jobs in advance, see the first lines of launch/slurm.sh"
exit "$code"
