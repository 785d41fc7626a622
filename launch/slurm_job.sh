#!/usr/bin/env bash
# The batch script of launch/slurm.sh: run a command, and requeue the job if it was told to stop before it had finished.
#
# sbatch's SIGTERM before the time limit goes to the processes of the job's steps, not to this shell; stopped.sh turns
# it into status 143. Under scancel this shell gets it too and ends: nothing is requeued.
set -euo pipefail

echo "$(date -u +%FT%TZ) job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST"
status=0
"$@" || status=$?
if [[ $status == 143 ]]; then
  echo "$(date -u +%FT%TZ) stopped before the end; requeued"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
