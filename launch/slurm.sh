#!/usr/bin/env bash
# Train on several GPU nodes of a Slurm cluster: submit a job that starts itself again until the run has finished.
#
#   launch/slurm.sh OPTIONS [-- MORE OF afa_jax.train]
#
# Needs: this checkout on a file system that all nodes share, with .venv made there and `pip install "jax[cuda13]"` in it
# (or a container: launch/Dockerfile with --build-arg ACCELERATOR=cuda13, and pyxis or apptainer on the nodes).
#
#   --nodes N --gpus-per-node G --time HH:MM:SS    what is asked for
#   --per-gpu             one process per GPU instead of one per node
#   --name NAME           afa_jax; the log is NAME-JOBID.log, or --output FILE
#   --partition, --account, --qos, --cpus-per-task    sbatch's
#   --create-flag FLAG    one more flag of sbatch, such as --create-flag=--constraint=h100; repeat it
#   --python FILE         .venv/bin/python; within a container python
#   --pyxis IMAGE         run in this image by enroot and pyxis
#   --apptainer IMAGE     run in this image by apptainer
#   --mounts A:B,C:D      folders of the host within the container: the workdir's, the data's, the models'
#   --config FILE --workdir DIR --config.x=y --expert SPEC    afa_jax.train's. DIR is process 0's; share it, since the
#                         next start may be on another node
#   --dry-run             print the command, do not run it
#
# 120 s before the time limit the run gets SIGTERM, saves and ends; launch/slurm_job.sh then requeues the job, which goes
# on from there. Slurm itself requeues it after a node failure or a preemption. squeue and scancel are as always.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse_options \
  "nodes gpus-per-node time name output partition account qos cpus-per-task create-flag python pyxis apptainer mounts" \
  "per-gpu" "$@"
require nodes gpus-per-node time
for number in nodes gpus-per-node cpus-per-task; do require_match $number '[1-9][0-9]*' 'a number, 1 or more'; done
require_match time '([0-9]+-)?[0-9]+(:[0-9]+){0,2}' 'as sbatch has it: MINUTES, HH:MM:SS or DAYS-HH:MM:SS'
[[ -z ${opt[pyxis]:-} || -z ${opt[apptainer]:-} ]] || die "--pyxis and --apptainer exclude each other"
container=${opt[pyxis]:-${opt[apptainer]:-}}
[[ -z ${opt[mounts]:-} || -n $container ]] || die "--mounts: of a container; name one by --pyxis or --apptainer"

gpus=${opt[gpus-per-node]}
if [[ -n ${opt[per-gpu]:-} ]]; then
  tasks=$gpus devices=()
else
  # jax gives a Slurm task one GPU, its own number's, unless it is told otherwise.
  tasks=1 devices=(env JAX_LOCAL_DEVICE_IDS="$(seq -s, 0 $((gpus - 1)))")
fi

# A process that has saved may end while process 0 still writes: it is waited for. One that hangs is not.
srun=(srun --kill-on-bad-exit=0 --wait=300)
if [[ -n ${opt[pyxis]:-} ]]; then
  srun+=(--container-image="$container" --container-workdir=/opt/afa_jax)
  [[ -z ${opt[mounts]:-} ]] || srun+=(--container-mounts="${opt[mounts]}")
elif [[ -n ${opt[apptainer]:-} ]]; then
  srun+=(apptainer exec --nv --pwd /opt/afa_jax)
  [[ -z ${opt[mounts]:-} ]] || srun+=(--bind "${opt[mounts]}")
  srun+=("$container")
fi
python=.venv/bin/python
[[ -z $container ]] || python=python
train_command "${opt[python]:-$python}" --resume_if_any

sbatch=(
  sbatch --job-name="${opt[name]:-afa_jax}" --output="${opt[output]:-%x-%j.log}" --open-mode=append
  --nodes="${opt[nodes]}" --ntasks-per-node="$tasks" --gpus-per-node="$gpus" --time="${opt[time]}"
  --signal=TERM@120 --requeue
)
for name in partition account qos cpus-per-task; do
  [[ -z ${opt[$name]:-} ]] || sbatch+=("--$name=${opt[$name]}")
done
run "${sbatch[@]}" "${create_flags[@]}" launch/slurm_job.sh \
  "${srun[@]}" bash launch/stopped.sh "${devices[@]}" "${train_command[@]}"
