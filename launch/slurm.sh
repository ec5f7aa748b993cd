#!/bin/bash
# WikiLLM on a Slurm cluster: one node or many, started again until the run is done. Submit it from the repository:
#
#   sbatch launch/slurm.sh                        trains by JOB_CONFIG, job.yaml here, or configs/wiki-123m.yaml
#   sbatch --nodes=4 launch/slurm.sh configs/x.yaml --train.learning_rate 1e-3     on four nodes, with a setting
#   sbatch --array=0-15 --gpus-per-node=0 launch/slurm.sh prepare configs/x.yaml   corpus → shards, in 16 parts
#   sbatch launch/slurm.sh check configs/x.yaml                          any other command of `python -m job`
#
#   tail -f wikillm-JOBID.log          what it prints; a requeued job goes on in the same file
#   scancel --signal=USR1 JOBID        checkpoint, then start again: with all the time that takes
#   scontrol requeue JOBID             the same within KillWait (30 s at most sites), and so is preemption
#   scancel JOBID                      checkpoint within KillWait, and stay stopped; the next sbatch continues the run
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
PYTHON=${PYTHON:-$PWD/.venv/bin/python} # EDIT: of RUNTIME=none
SCRATCH=${SCRATCH:-${SLURM_TMPDIR:-${TMPDIR:-/tmp}}} # EDIT: on a disk of the node; wikillm-$UID in it is used
CREDENTIALS=${CREDENTIALS:-$HOME/.config/wikillm/credentials} # EDIT: lines NAME=value, for your eyes only
MAX_RESTARTS=${MAX_RESTARTS:-200} # of one job, whatever their cause
MAX_CRASHES=${MAX_CRASHES:-3}     # in a row that are started again

say() { echo "slurm.sh: job $id: $*" >&2; }
refuse() { say "$*" && exit 78; }
shown() { sed -E 's#://[^/[:space:]]*@#://***@#g; s#\?[^[:space:]]*=[^[:space:]]*#?***#g' <<<"$*"; } # without secrets
# Not SLURM_JOB_ID in an array: its last task has the array's own id, and would requeue all the others.
id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
id=${id:-${SLURM_JOB_ID:?"start it with sbatch"}}

warned='' ended='' srun=''
# A signal that finds the step still starting is lost, so it is repeated. Always as USR1: a second TERM means "at once".
forward() { [[ $srun ]] && { while kill -USR1 "$srun"; do sleep 10; done 2>/dev/null & }; }
trap 'heard=1 warned=1; say "warned: the limit is near"; forward' USR1
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
export PYTHONUNBUFFERED=1 WIKILLM_SCRATCH=$SCRATCH
# Slurm before 23.02 does not tell a job when it ends; since 22.05 srun does not take over sbatch's CPUs per task.
limit=$(date +%s --date "$(squeue --noheader --jobs "$id" --format %e)" 2>/dev/null)
[[ $limit ]] && export SLURM_JOB_END_TIME="$limit"
[[ ${SLURM_CPUS_PER_TASK:-} ]] && export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"

# The nodes of a run end together: when one has ended, the others get a minute to follow with the same code. Not by
# --kill-on-bad-exit=1, which kills them at once: 143 for a run saved on all nodes, as one was a tenth of a second ahead.
[[ $command =~ ^(train|evaluate)$ ]] && wait=60 || wait=0 # parts of prepare take as long as they take
step=(srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --export=ALL --kill-on-bad-exit=0 --wait="$wait")
((SLURM_JOB_NUM_NODES > 1)) && step+=(--label)

# ---- In what to run it: the same paths in every container; secrets stay in the environment, which no `ps` shows ----
inside=(env PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin PYTHONPATH=/app HOME=/scratch WIKILLM_SCRATCH=/scratch)
inside+=(python -m job "$command" --config "/app/configs/${config##*/}" "$@")
private=$SCRATCH && [[ ${SCRATCH##*/} == "wikillm-$UID" ]] || private=${SCRATCH%/}/wikillm-$UID
mounts=$(realpath "$(dirname "$config")"):/app/configs,$private:/scratch${MOUNTS:+,$MOUNTS}
case $RUNTIME in
    none)
        [[ -x $PYTHON ]] || refuse "RUNTIME=none needs $PYTHON: make setup, or set PYTHON"
        step+=("$PYTHON" -m job "$command" --config "$config" "$@") ;;
    pyxis)
        srun --help 2>&1 | grep -q -e --container-image || refuse "RUNTIME=pyxis: this srun has no --container-image"
        [[ $IMAGE == [./]* ]] || IMAGE=${IMAGE/\//#} # as enroot wants it, which may know no digests
        step+=(--container-image="$IMAGE" --container-mounts="$mounts" --no-container-mount-home)
        step+=(--container-workdir=/app --no-container-entrypoint "${inside[@]}") ;;
    apptainer)
        command -v apptainer >/dev/null || refuse "RUNTIME=apptainer: no apptainer here (module load it before sbatch?)"
        [[ $IMAGE == [./]* ]] || IMAGE=docker://$IMAGE
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
before=$(stat --format %s "$log")
# What is in the scratch folder is executed, and others can guess its name. RUNTIME=none leaves this to job/scratch.py.
# shellcheck disable=SC2016
make_private='umask 077; mkdir --parents -- "$0"; found=$(stat --format "%F, uid %u, mode %a" -- "$0")
    [[ $found == "directory, uid $UID, mode "*[0145] ]] && chmod 700 -- "$0" && exit
    echo "slurm.sh: SCRATCH: $0: found ${found:-nothing}, expected a folder of yours alone: remove it or set SCRATCH"
    exit 78'
if [[ $RUNTIME != none ]]; then
    srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 bash -c "$make_private" "$private"
    (($? != 78)) || exit 78
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
# srun ends with the highest code of all nodes, 137 for one that was killed: what a node has said itself comes first.
for own in 70 78; do
    tail --bytes "+$((before + 1))" "$log" | grep --count "^srun: error: .*: Exited with exit code $own\$" >/dev/null &&
        code=$own
done
case $code in
    0) exit 0 ;;
    70 | 78) say "not started again, since that could not help (exit code $code)" && exit "$code" ;;
esac
# What was requeued or preempted, Slurm starts again; what was cancelled stays so. Of its limit a job has to take care.
if [[ $ended && $(squeue --noheader --jobs "$id" --format %r) != TimeLimit ]]; then
    say "ended from outside (exit code $code)"
    exit "$code"
fi
# A command that has nothing to save simply dies of the warning.
[[ $warned$ended ]] && ((code == 128 + 10 || code == 128 + 15)) && code=75
if ((code == 75)); then
    say "stopped, to be continued"
else
    say "crashed (exit code $code)"
    crashes=$(awk -v id="slurm.sh: job $id:" '
        index($0, id " stopped") == 1 { n = 0 } index($0, id " crashed") == 1 { n++ } END { print n + 0 }' "$log")
    ((crashes <= MAX_CRASHES)) || { say "not started again: $crashes crashes in a row" && exit "$code"; }
fi
((${SLURM_RESTART_COUNT:-0} < MAX_RESTARTS)) || { say "not started again: $MAX_RESTARTS restarts" && exit "$code"; }
scontrol requeue "$id" || say "cannot be requeued here: sbatch it again, the run continues"
exit "$code"
