#!/usr/bin/env bash
# Train on TPU slices of a GKE cluster, as a JobSet that is started again after preemptions.
#
#   launch/gke.sh render|apply|status|logs|delete OPTIONS [-- MORE OF afa_jax.train]
#
#   render   print the manifest: launch/jobset.yaml with the options filled in
#   apply    hand it to the cluster. The run in --workdir goes on where there is one
#   status   of the JobSet and its pods
#   logs     of process 0, and what follows
#   delete   the JobSet; the workdir stays in the bucket
#
# Needs: kubectl with the cluster's credentials (gcloud container clusters get-credentials); on the cluster JobSet 0.6 or
# newer, the Cloud Storage FUSE CSI driver, and for each slice a TPU node pool of --topology; an image of launch/Dockerfile
# (--build-arg ACCELERATOR=tpu) in a registry that the cluster reads; a bucket that --service-account may write
# (Workload Identity).
#
#   --name NAME --image IMAGE --bucket BUCKET --service-account NAME    render and apply want these, and
#   --accelerator LABEL   tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice, ...: the nodes' gke-tpu-accelerator
#   --topology 4x4        of one slice: the nodes' gke-tpu-topology
#   --config FILE --workdir /mnt/BUCKET/... --config.x=y --expert SPEC    afa_jax.train's; the image holds configs/
#   --chips-per-host N    4, as the node pools' machine type has it; the hosts follow from the topology
#   --slices N            1; more are one run over several slices
#   --max-restarts N      10; an error to mend (exit status 2) is not tried again
#   --spot                on spot nodes
#   --namespace NAME --context NAME    kubectl's
#   --dry-run             print every command, run none
#
# Costs: with a fixed node pool the nodes, JobSet or not; with Autopilot or autoscaling from apply to the end.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

subcommand=${1:-}
case $subcommand in
  render | apply | status | logs | delete) shift ;;
  --help | -h) help ;;
  '') die "which subcommand? see --help" ;;
  *) die "unknown subcommand '$subcommand'; see --help" ;;
esac
parse_options \
  "name image bucket service-account accelerator topology chips-per-host slices max-restarts namespace context" "spot" "$@"
require name
# The pods are NAME-slice-I-J-xxxxx, which must stay a host name.
require_match name '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' 'lower-case letters, digits and hyphens, at most 40'
require_match bucket '[a-z0-9][-_.a-z0-9]*' "a bucket's name, without gs://"
require_match service-account '[a-z0-9]([-.a-z0-9]*[a-z0-9])?' 'the name of a Kubernetes service account'
require_match accelerator '[a-z0-9]([-a-z0-9]*[a-z0-9])?' "a value of the nodes' label cloud.google.com/gke-tpu-accelerator"
require_match topology '[1-9][0-9]*x[1-9][0-9]*(x[1-9][0-9]*)?' 'chips as 4x4 or 2x2x4'
require_match image '[][A-Za-z0-9._:/@-]+' "an image's name"
for number in chips-per-host slices; do require_match $number '[1-9][0-9]*' 'a number, 1 or more'; done
require_match max-restarts '[0-9]+' 'a number'

kubectl=(kubectl)
[[ -z ${opt[context]:-} ]] || kubectl+=(--context="${opt[context]}")
[[ -z ${opt[namespace]:-} ]] || kubectl+=(--namespace="${opt[namespace]}")
jobset=jobset.sigs.k8s.io

# Set REPLY to a YAML string on one line. Kubernetes reads $(NAME) in commands as a variable, and $$ as $.
yaml_string() {
  REPLY=${1//\\/\\\\}
  REPLY=${REPLY//\"/\\\"}
  REPLY=${REPLY//\$/\$\$}
  REPLY=${REPLY//$'\n'/\\n}
  REPLY=\"${REPLY//$'\t'/\\t}\"
}

render() {
  local line word mount chips hosts chips_per_host=${opt[chips-per-host]:-4} train_command
  require image bucket service-account accelerator topology
  require_lasting_workdir
  mount=$(mount_of "${opt[bucket]}")
  chips=$((${opt[topology]//x/*}))
  ((chips % chips_per_host == 0)) ||
    die "--topology ${opt[topology]}: $chips chips are not divisible by --chips-per-host $chips_per_host"
  hosts=$((chips / chips_per_host))
  ((hosts > 1 || ${opt[slices]:-1} == 1)) || die "--slices ${opt[slices]}: GKE joins slices of several hosts only"
  train_command python --resume_if_any
  while IFS= read -r line; do
    # A line of the template that ends in "# --spot" is there with that option only.
    if [[ $line == *' # --spot' ]]; then
      [[ -n ${opt[spot]:-} ]] || continue
      line=${line%' # --spot'}
    fi
    if [[ $line == *'- @COMMAND@' ]]; then
      for word in "${train_command[@]}"; do
        yaml_string "$word"
        printf '%s- %s\n' "${line%%-*}" "$REPLY"
      done
      continue
    fi
    line=${line//@NAME@/"${opt[name]}"}
    line=${line//@IMAGE@/"${opt[image]}"}
    line=${line//@SERVICE_ACCOUNT@/"${opt[service-account]}"}
    line=${line//@ACCELERATOR@/"${opt[accelerator]}"}
    line=${line//@TOPOLOGY@/"${opt[topology]}"}
    line=${line//@BUCKET@/"${opt[bucket]}"}
    line=${line//@MOUNT@/"$mount"}
    line=${line//@SLICES@/"${opt[slices]:-1}"}
    line=${line//@HOSTS@/"$hosts"}
    line=${line//@CHIPS_PER_HOST@/"$chips_per_host"}
    line=${line//@MAX_RESTARTS@/"${opt[max-restarts]:-10}"}
    printf '%s\n' "$line"
  done <launch/jobset.yaml
}

apply() {
  local manifest
  manifest=$(render)
  if $dry_run; then
    quoted "${kubectl[@]}" apply --filename=-
    printf "%s <<'END'\n%s\nEND\n" "$REPLY" "$manifest"
  else
    "${kubectl[@]}" apply --filename=- <<<"$manifest"
  fi
}

case $subcommand in
  status)
    run "${kubectl[@]}" get jobset "${opt[name]}"
    run "${kubectl[@]}" get pods --selector="$jobset/jobset-name=${opt[name]}" --output=wide
    ;;
  logs)
    selector=$jobset/jobset-name=${opt[name]},$jobset/job-index=0,batch.kubernetes.io/job-completion-index=0
    run "${kubectl[@]}" logs --selector="$selector" --container=trainer --tail=100 --follow
    ;;
  delete) run "${kubectl[@]}" delete jobset "${opt[name]}" ;;
  *) "$subcommand" ;;
esac
