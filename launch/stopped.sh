#!/usr/bin/env bash
# Run a command whose end something else judges: launch/stopped.sh python -m afa_jax.train ...
#
# A trainer that is told by SIGTERM to stop saves and leaves with status 0, as one that has finished does. Whatever
# restarts jobs (Kubernetes, Slurm, launch/tpu.sh watch) must tell them apart: here the first one ends with 143.
# Every other status is the command's own.
set -uo pipefail

child='' asked=''
# shellcheck disable=SC2329 # the trap's
forward() {
  asked=true
  [[ -z $child ]] || kill -TERM "$child" 2>/dev/null
}
trap forward TERM

"$@" &
child=$!
[[ -z $asked ]] || kill -TERM "$child" 2>/dev/null
# A signal ends a wait before the command has ended.
while :; do
  wait "$child"
  status=$?
  kill -0 "$child" 2>/dev/null || break
done
[[ $status != 0 || -z $asked ]] || status=143
exit "$status"
