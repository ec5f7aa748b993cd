#!/bin/bash
# WikiLLM on a Slurm cluster: one node or many, started again until the run is done. Submit it from the repository:
#
#   sbatch launch/slurm.sh                        trains by JOB_CONFIG, job.yaml here, or configs/wiki-123m.yaml
#   sbatch --nodes=4 launch/slurm.sh configs/x.yaml --train.learning_rate 1e-3     on four nodes, with a setting
#   sbatch --array=0-15 --gpus-per-node=0 --output=%x-%A_%a.log launch/slurm.sh prepare configs/x.yaml
#                                                                        corpus → shards, in 16 parts
#   sbatch launch/slurm.sh check configs/x.yaml                          any other command of `python -m job`
#
#   tail -f wikillm-JOBID.log          what it prints; a requeued job goes on in the same file
#   tail -f wikillm-JOBID_0.log        what task 0 of the array above prints
#   scancel --signal=USR1 JOBID        checkpoint, then start again: with all the time that takes
#   scontrol requeue JOBID             the same within KillWait (30 s at most sites), and so is preemption
#   scancel JOBID                      checkpoint within KillWait, and stay stopped; the next sbatch continues the run
#
# GPUs of a node: --gpus-per-node=N, or TYPE:N, or --gres=gpu:N. Other options (--gpus, --gpus-per-task) have to agree
# with the --gpus-per-node below, or sbatch refuses them: add --gpus-per-node=0 to them.
#
# Where a site does not let jobs be requeued, submit several at once. Each starts when all before it have ended and the
# run is not done. When it is done (0), or cannot go on (70, 78), those that still wait are cancelled:
#
#   jobs=$(sbatch --parsable launch/slurm.sh configs/x.yaml)
#   for more in 2 3 4; do
#       after="--dependency=afternotok:$jobs --kill-on-invalid-dep=yes"
#       jobs+=:$(sbatch --parsable $after launch/slurm.sh configs/x.yaml)
#   done
#   scancel ${jobs//:/ }               stops all of them
#
# Credentials (AWS_ACCESS_KEY_ID, …, SWANLAB_API_KEY) come from the environment of sbatch or the file CREDENTIALS below.
# EDIT marks what differs between sites; options of sbatch, and variables before it (RUNTIME=pyxis sbatch …), win.

#SBATCH --job-name=wikillm
##SBATCH --partition=gpu         # EDIT where the site asks for one: remove a "#"
##SBATCH --account=project       # EDIT likewise
#SBATCH --nodes=1                # EDIT
#SBATCH --gpus-per-node=1        # EDIT: all GPUs of a node
#SBATCH --cpus-per-task=8        # EDIT: CPUs of a node that go with them
#SBATCH --time=24:00:00          # EDIT: then it is requeued and continues
#SBATCH --ntasks-per-node=1      # one supervisor a node: it starts a process for each GPU
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append       # or each requeue would empty the log
#SBATCH --requeue                # after a node failure or preemption, whatever the site's default
#SBATCH --signal=B:USR1@300      # EDIT: seconds before the limit; more than a step and a checkpoint take together

RUNTIME=${RUNTIME:-none} # EDIT: pyxis, apptainer, charliecloud, or none for the virtual environment of `make setup`
# A name in a registry, or a file or folder: .sqsh for pyxis, .sif for Apptainer, the root filesystem for Charliecloud.
IMAGE=${IMAGE:-registry.example.com/wikillm:latest} # EDIT, or make set-image
MOUNTS=${MOUNTS:-} # EDIT: what a config names beside it: /data,/lustre/me:/me (has to exist in Charliecloud's image)
REPOSITORY=${REPOSITORY:-} # EDIT: of RUNTIME=none; empty for the folder of sbatch, else the one launch/slurm.sh lies in
PYTHON=${PYTHON:-} # EDIT: of RUNTIME=none; empty for .venv/bin/python in REPOSITORY
SCRATCH=${SCRATCH:-${SLURM_TMPDIR:-${TMPDIR:-/tmp}}} # EDIT: on a disk of the node; wikillm-$UID in it is used
CREDENTIALS=${CREDENTIALS:-$HOME/.config/wikillm/credentials} # EDIT: lines NAME=value, for your eyes only
MAX_RESTARTS=${MAX_RESTARTS:-200} # of one job, whatever their cause
MAX_CRASHES=${MAX_CRASHES:-3}     # in a row that are started again

say() { echo "slurm.sh: job $id: $*" >&2; }
refuse() { say "$*" && give_up 78; }
shown() { sed -E 's#://[^/[:space:]]*@#://***@#g; s#\?[^[:space:]]*=[^[:space:]]*#?***#g' <<<"$*"; } # without secrets
# Not SLURM_JOB_ID in an array: its last task has the array's own id, and would requeue all the others.
id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
id=${id:-${SLURM_JOB_ID:?"start it with sbatch"}}

# What squeue says. SQUEUE_* and SLURM_TIME_FORMAT are a user's, and would change its answer.
ask() { (unset "${!SQUEUE_@}" && SLURM_TIME_FORMAT=%s timeout --kill-after=5 30 squeue --noheader "$@") 2>/dev/null; }
# A time to come; Slurm writes "no limit" as 0, NONE, or the last numbers of 32 bits, which are in 2106.
is_limit() { [[ $1 =~ ^[1-9][0-9]{8,9}$ ]] && (($1 > $(now) && $1 < 4294967294)); }
now() { printf '%(%s)T' -1; }
# The jobs of a chain that wait for this one to end without being done.
waiting() {
    ask --user "$UID" --states PENDING --format '%i|%j|%E' |
        awk -F '|' -v name="$SLURM_JOB_NAME" -v this="afternotok:$id" '$2 == name {
            n = split($3, all, ",")
            for (i = 1; i <= n; i++) { sub(/\(.*/, "", all[i]); if (all[i] == this) print $1 }
        }'
}
# Ends a run that another start does not help, and the chain with it.
give_up() {
    local others
    others=$(waiting | tr '\n' ' ')
    if [[ $others ]]; then
        say "cancels the jobs that wait for this one: scancel $others"
        # shellcheck disable=SC2086 # several ids
        timeout 60 scancel $others
    fi
    exit "$1"
}

warned='' ended='' srun='' limit=unasked postponed='' ignored=''
# A signal that finds the step still starting is lost, so it is repeated. Always as USR1: a second TERM means "at once".
forward() { [[ $srun ]] && { while kill -USR1 "$srun"; do sleep 10; done 2>/dev/null & }; }
# Slurm warns once. Where the limit is nearer than --signal has it, that is at once, in the first minute: to stop then
# would be to stop at every start. 65535 s is the most that --signal takes: more than that ahead, a person has sent it.
warning() {
    [[ $limit == unasked ]] && postponed=1 && return
    local left=$((${limit:-0} - $(now)))
    if [[ ! $ignored ]] && ((SECONDS <= 60 && left > 3 * SECONDS && left < 65600)); then
        ignored=1
        say "the limit is $left s from now, nearer than --signal warns of it: goes on without a warning"
        return
    fi
    warned=1
    say "warned: the limit is near"
    forward
}
trap 'heard=1; warning' USR1
trap 'heard=1 ended=1; forward' TERM # the limit, scancel, requeue, preemption: the step has heard of it as well

# ---- What to run ----
command=train
[[ ${1:-} =~ ^[a-z]+$ ]] && { command=$1 && shift; }
config=${JOB_CONFIG:-} # as `python -m job` has it: JOB_CONFIG, then job.yaml here, then the example
[[ $config ]] || { [[ -r job.yaml ]] && config=job.yaml || config=configs/wiki-123m.yaml; }
[[ ${1:---} != --* ]] && { config=$1 && shift; }
[[ -r $config ]] || refuse "no config file $config in $PWD"
# shellcheck source=/dev/null
[[ -r $CREDENTIALS ]] && { set -a && . "$CREDENTIALS" && set +a; }
for name in MAX_RESTARTS MAX_CRASHES; do
    [[ ${!name} =~ ^[0-9]{1,9}$ ]] || refuse "$name=${!name}: expected a whole number"
done
export PYTHONUNBUFFERED=1 WIKILLM_SCRATCH=$SCRATCH
# Slurm before 23.02 does not tell a job when it ends: squeue does, if it answers.
read -r ends_at gpus submitted _ < <(ask --states all --jobs "$id" --format '%e %b %o')
[[ ${submitted:-} == /* ]] || submitted='' # of a job that was given to sbatch on its standard input
[[ ${ends_at:-} == ????-??-??T* ]] && seconds=$(date +%s --date "$ends_at" 2>/dev/null) && ends_at=$seconds
is_limit "${SLURM_JOB_END_TIME:-}" && ends_at=$SLURM_JOB_END_TIME
unset SLURM_JOB_END_TIME
if is_limit "${ends_at:-}"; then
    export SLURM_JOB_END_TIME="$ends_at"
elif [[ ${ends_at:-} != @(NONE|N/A|Unknown|UNLIMITED|0|429496729[45]) ]]; then
    say "nobody says when the job ends (squeue: ${ends_at:-no answer}): only Slurm's warning stops the run in time"
fi
limit=${SLURM_JOB_END_TIME:-}
[[ $postponed ]] && warning
# Since 22.05 srun does not take over sbatch's CPUs per task.
[[ ${SLURM_CPUS_PER_TASK:-} ]] && export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
# With --gres=gpu:2 beside the --gpus-per-node=1 above, a job gets two GPUs, but srun would take the 1 from its
# environment. Without these variables, a step gets all GPUs of its job.
unset "${!SLURM_GPUS_PER_@}" SLURM_GPUS SLURM_NTASKS_PER_GPU SLURM_TRES_PER_TASK
if [[ ${gpus:-} =~ gpu[^,]*[:=]([0-9]+),.*gpu[^,]*[:=]([0-9]+)$ && ${BASH_REMATCH[1]} != "${BASH_REMATCH[2]}" ]]; then
    say "GPUs of a node: --gpus-per-node and --gres contradict each other ($gpus): Slurm gives ${SLURM_GPUS_ON_NODE:-0}"
fi

# The nodes of a run end together: when one has ended, the others get a minute to follow with the same code. Not by
# --kill-on-bad-exit=1, which kills them at once: 143 for a run saved on all nodes, as one was a tenth of a second ahead.
[[ $command =~ ^(train|evaluate)$ ]] && wait=60 || wait=0 # parts of prepare take as long as they take
step=(srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --export=ALL --kill-on-bad-exit=0 --wait="$wait")
((SLURM_JOB_NUM_NODES > 1)) && step+=(--label)

# ---- In what to run it: the same paths in every container; secrets stay in the environment, which no `ps` shows ----
# What keeps the program itself from starting is no crash of it. The second line is how this script knows that it has.
# shellcheck disable=SC2016
begin='said=$("$1" -c "import job" 2>&1 >/dev/null) || {
        said=$(echo "$said" | tail -n 1)
        echo "slurm.sh: job $0: $1 on ${SLURMD_NODENAME:-a node} cannot import job: ${said:-it prints nothing}" >&2
        exit 78
    }
    [ "${SLURM_PROCID:-0}" != 0 ] || echo "slurm.sh: job $0: the entrypoint starts" >&2
    exec "$@"'
inside=(env PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin PYTHONPATH=/app HOME=/scratch WIKILLM_SCRATCH=/scratch)
inside+=(sh -c "$begin" "$id" python -m job "$command" --config "/app/configs/${config##*/}" "$@")
private=$SCRATCH && [[ ${SCRATCH##*/} == "wikillm-$UID" ]] || private=${SCRATCH%/}/wikillm-$UID
folder=$(realpath "$(dirname "$config")") && [[ $folder == /* ]] || refuse "the folder of $config has no path"
mounts=$folder:/app/configs,$private:/scratch${MOUNTS:+,$MOUNTS}
[[ $IMAGE == [./]* ]] || IMAGE=${IMAGE#docker://}
case $RUNTIME in
    none)
        if [[ ! $REPOSITORY ]]; then # sbatch has copied this file: Slurm knows where from
            REPOSITORY=${submitted%/launch/slurm.sh}
            [[ -r $REPOSITORY/job/__main__.py && ! -r job/__main__.py ]] || REPOSITORY=$PWD
        fi
        [[ -r $REPOSITORY/job/__main__.py ]] ||
            refuse "REPOSITORY=$REPOSITORY has no job/__main__.py: sbatch it from the repository, or set REPOSITORY"
        PYTHON=${PYTHON:-$REPOSITORY/.venv/bin/python}
        [[ -x $PYTHON ]] || refuse "RUNTIME=none needs $PYTHON: make setup, or set PYTHON"
        [[ $REPOSITORY -ef . ]] || export PYTHONPATH="$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}"
        step+=(sh -c "$begin" "$id" "$PYTHON" -m job "$command" --config "$config" "$@") ;;
    pyxis)
        options=$(timeout 60 srun --help 2>&1)
        [[ $options == *--container-image* || $options != *--ntasks* ]] ||
            refuse "RUNTIME=pyxis: this srun has no --container-image"
        if [[ $IMAGE != [./]* ]]; then # as enroot has it: [REGISTRY#]NAME[:TAG], and since 3.0.1 a digest can be TAG
            [[ $IMAGE =~ ^([^/#]*[.:][^/#]*|localhost)/ ]] && IMAGE=${IMAGE/\//#}
            if [[ $IMAGE =~ ^(.+)@(sha256:[0-9a-f]+)$ ]]; then
                IMAGE=${BASH_REMATCH[1]} digest=${BASH_REMATCH[2]}
                [[ ${IMAGE##*[/#]} != *:* ]] || IMAGE=${IMAGE%:*}
                IMAGE=$IMAGE:$digest
                say "IMAGE has a digest, which enroot takes as a tag: $IMAGE"
            fi
        fi
        step+=(--container-image="$IMAGE" --container-mounts="$mounts" --no-container-mount-home)
        step+=(--container-workdir=/app --no-container-entrypoint "${inside[@]}") ;;
    apptainer)
        command -v apptainer >/dev/null || refuse "RUNTIME=apptainer: no apptainer here (module load it before sbatch?)"
        if [[ $IMAGE != [./]* && $IMAGE != *://* ]]; then # with a digest, it takes no tag
            [[ $IMAGE =~ ^(.*/[^/]+|[^/]+):[^:/]+(@sha256:.+)$ ]] && IMAGE=${BASH_REMATCH[1]}${BASH_REMATCH[2]}
            IMAGE=docker://$IMAGE
        fi
        step+=(apptainer exec ${SLURM_GPUS_ON_NODE:+--nv} --no-mount "home,cwd" --pwd /app --bind "$mounts")
        step+=("$IMAGE" "${inside[@]}") ;;
    charliecloud)
        command -v ch-run >/dev/null || refuse "RUNTIME=charliecloud: no ch-run here"
        [[ -d $IMAGE ]] || refuse "RUNTIME=charliecloud: IMAGE=$IMAGE is not the folder of an image"
        export USER=${USER:-$(id -un)} # ch-run wants it
        IFS=, read -ra binds <<<"$mounts"
        step+=(ch-run --cd=/app "${binds[@]/#/--bind=}" "$IMAGE" -- "${inside[@]}") ;;
    *) refuse "RUNTIME=$RUNTIME: expected pyxis, apptainer, charliecloud or none" ;;
esac

# ---- Run it ----
log=$(readlink --canonicalize /dev/stderr) && [[ -f $log ]] || log=/dev/null # it is what one start knows of another
before=$(stat --format %s "$log") && [[ $before =~ ^[0-9]+$ ]] || log=/dev/null before=0
# What is in the scratch folder is executed, and others can guess its name. RUNTIME=none leaves this to job/local_dirs.py.
# shellcheck disable=SC2016
make_private='umask 077; mkdir --parents -- "$0"; found=$(stat --format "%F, uid %u, mode %a" -- "$0")
    [[ $found == "directory, uid $UID, mode "*[0145] ]] && chmod 700 -- "$0" && exit
    echo "slurm.sh: SCRATCH: $0: found ${found:-nothing}, expected a folder of yours alone: remove it or set SCRATCH"
    exit 78'
if [[ $RUNTIME != none ]]; then
    srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 bash -c "$make_private" "$private"
    (($? != 78)) || give_up 78
fi
say "start $((${SLURM_RESTART_COUNT:-0} + 1)) on ${SLURM_JOB_NODELIST}: $(shown "$command" "$config" "$@")"
"${step[@]}" & # behind a command in the foreground, a trap waits until that has ended
srun=$!
[[ $warned$ended ]] && forward
heard=1
while [[ $heard ]]; do # a signal ends a wait, too
    heard=''
    wait "$srun"
    code=$?
done

# ---- Again? ----
# Whether the entrypoint has begun in any start of this job: only a log that can be read (0 or 1) can tell that not.
has_begun() {
    grep --quiet --extended-regexp "^( *[0-9]+: )?slurm\.sh: job $id: the entrypoint starts\$" "$log"
    (($? != 1)) || [[ $log == /dev/null ]]
}
# srun ends with the highest code of all nodes, 137 for one that was killed: what a node has said itself comes first.
for own in 70 78; do
    tail --bytes "+$((before + 1))" "$log" | grep --count "^srun: error: .*: Exited with exit code $own\$" >/dev/null &&
        code=$own
done
case $code in
    0) exit 0 ;;
    70 | 78) say "not started again, since that could not help (exit code $code)" && give_up "$code" ;;
esac
# What was requeued or preempted, Slurm starts again; what was cancelled stays so. Of its limit a job has to take care.
if [[ $ended ]]; then
    reason=$(ask --states all --jobs "$id" --format %r)
    [[ $reason =~ ^[[:alpha:]]+$ ]] || { [[ $limit ]] && (($(now) >= limit)) && reason=TimeLimit; } # by the clock
    [[ $reason == TimeLimit ]] || { say "ended from outside (exit code $code)" && exit "$code"; }
fi
# A command that has nothing to save simply dies of the warning.
[[ $warned$ended ]] && ((code == 128 + 10 || code == 128 + 15)) && code=75
if ((code == 75)); then
    say "stopped, to be continued"
elif ! has_begun; then
    say "not started again: the entrypoint did not start (exit code $code), for the reason above"
    give_up 78
else
    say "crashed (exit code $code)"
    crashes=$(awk -v id="slurm.sh: job $id:" '
        index($0, id " stopped") == 1 { n = 0 } index($0, id " crashed") == 1 { n++ } END { print n + 0 }' "$log")
    [[ $crashes =~ ^[0-9]+$ ]] || crashes=1 # MAX_RESTARTS, and the entrypoint's own 70, end it as well
    ((crashes <= MAX_CRASHES)) || { say "not started again: $crashes crashes in a row" && exit "$code"; }
fi
((${SLURM_RESTART_COUNT:-0} < MAX_RESTARTS)) || { say "not started again: $MAX_RESTARTS restarts" && exit "$code"; }
timeout 60 scontrol requeue "$id" && exit "$code"
others=$(waiting | head -n 1)
[[ $others ]] && say "cannot be requeued here: job $others, which waits for this one, continues the run" && exit "$code"
again="sbatch --dependency=afterany:${SLURM_ARRAY_JOB_ID:-$id} --nodes=$SLURM_JOB_NUM_NODES"
again+=${SLURM_ARRAY_JOB_ID:+" --array=$SLURM_ARRAY_TASK_MIN-$SLURM_ARRAY_TASK_MAX:$SLURM_ARRAY_TASK_STEP"}
script=${submitted:-launch/slurm.sh}
words=$(printf ' %q' "${script#"$PWD"/}" "$command" "$config" "$@")
say "cannot be requeued here. To continue the run, with the other options of this job: $again$(shown "$words")"
say "to submit several in advance: see the first lines of launch/slurm.sh"
exit "$code"
