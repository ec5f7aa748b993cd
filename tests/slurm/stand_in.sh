#!/bin/bash
# Stands for python: `stand_in.sh -m job COMMAND --config SCRIPT …` runs a script, which says how this start ends.
[[ $1 == -c ]] && exit # it is asked whether it can import the program
# shellcheck disable=SC2034 # the script reads these
start=$((${SLURM_RESTART_COUNT:-0} + 1)) node=$SLURM_PROCID here=$5
# await SIGNAL COMMAND…: when both nodes are there, the first runs the command; until the signal comes.
# As in the entrypoint, USR1 may come again, and another TERM later on ends it at once.
await() {
    local told='' signal=$1
    trap '' USR1
    trap 'told=yes' "$signal"
    touch "$here.$start.$node"
    until [[ -e $here.$start.0 && -e $here.$start.1 ]]; do sleep 0.1; done
    ((node == 0)) && "${@:2}"
    until [[ $told ]]; do sleep 0.1; done
    sleep 1
    trap '' USR1
    trap 'exit 9' TERM
}
# shellcheck source=/dev/null
. "$here"
