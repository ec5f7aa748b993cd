#!/bin/bash
# Stand-in for python in the Slurm tests. It runs a bash script that decides how this start of the job ends.
#
#   Usage   stand_in.sh -m job COMMAND --config SCRIPT …
# shellcheck disable=SC2034 # The script reads these variables.
start=$((${SLURM_RESTART_COUNT:-0} + 1)) node=$SLURM_PROCID here=$5
if [[ $1 == -c ]]; then # slurm.sh tests with -c whether the program can be imported.
    ((start > ${KILLED_BEFORE_IT_STARTS:-0})) || kill -KILL $PPID
    exit
fi
# await SIGNAL COMMAND…: wait until both nodes have started, run the command on node 0, and wait for the signal.
# As in the entrypoint, a second USR1 is ignored, and a second TERM ends it at once.
await() {
    local signalled='' signal=$1
    trap '' USR1
    trap 'signalled=yes' "$signal"
    touch "$here.$start.$node"
    until [[ -e $here.$start.0 && -e $here.$start.1 ]]; do sleep 0.1; done
    ((node == 0)) && "${@:2}"
    until [[ $signalled ]]; do sleep 0.1; done
    sleep 1
    trap '' USR1
    trap 'exit 9' TERM
}
# shellcheck source=/dev/null
. "$here"
