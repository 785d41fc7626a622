#!/usr/bin/env bash
# Train on a Cloud TPU slice, or several.
#
#   launch/tpu.sh create|setup|run|logs|status|resume|watch|ssh|stop|delete OPTIONS [-- MORE OF afa_jax.train]
#
#   create   the slice; a queued request is waited for
#   setup    this checkout's HEAD (or --repo) and the requirements on every host, the bucket at /mnt/BUCKET
#   run      start the training on every host and leave it: it outlives this terminal
#   logs     the end of the output of one host (--worker, --slice), --follow goes on
#   status   of the slice and of every host: bare, idle, running, stopped, finished or failed
#   resume   whatever is missing: slice (made again after a preemption), set-up, training from its last checkpoint
#   watch    resume whenever that is needed, until the run has finished: for spot slices. A failure that a restart
#            does not mend (exit status 2, or more than --max-failures others) ends it
#   ssh      a shell on one host (--worker, --slice)
#   stop     the training saves and ends; the slice stays, and costs
#   delete   the slice and its disks, after gcloud's question
#
# Needs: gcloud, logged in (gcloud auth login), with the Cloud TPU API on, quota, and `ssh-add
# ~/.ssh/google_compute_engine` where there are several hosts; git. For --bucket: a bucket in the slice's region, with a
# hierarchical namespace if possible, which the slice's service account may write.
#
# Every subcommand takes all options; keep them in an array: slice=(--name afa --project ... ); launch/tpu.sh create "${slice[@]}"
#
#   --name NAME --project PROJECT --zone ZONE    always
#   --accelerator-type TYPE    v5litepod-16, v5p-8, v6e-16, ... (create, resume, watch)
#   --runtime-version VERSION  of the host image; known for v2 to v6e
#   --spot                     cheap, and may be taken away at any time
#   --queued                   ask by a queued resource, and wait for capacity
#   --slices N                 N such slices in one run (queued)
#   --create-flag FLAG         one more flag of gcloud's create, such as --create-flag=--network=NAME; repeat it
#   --iap                      ssh through the Identity-Aware Proxy, for hosts without an address
#   --repo URL --ref REF       clone this on the hosts instead of copying HEAD; REF is a branch or tag (main)
#   --bucket BUCKET            mount it on every host
#   --config FILE --workdir DIR --config.x=y --expert SPEC    afa_jax.train's, paths as on the hosts, in the checkout.
#                              Only process 0 touches DIR: on its own disk it is lost with the slice, so resume and watch
#                              want it in the bucket: /mnt/BUCKET/...
#   --worker N --slice N --lines N --follow      of logs and ssh
#   --interval S --max-failures N --delete-when-done --yes    of watch (60, 3) and delete: no question
#   --dry-run                  print every command, run none
#
# Costs: from create to delete, used or not.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

subcommand=${1:-}
case $subcommand in
  create | setup | run | logs | status | resume | watch | ssh | stop | delete) shift ;;
  --help | -h) help ;;
  '') die "which subcommand? see --help" ;;
  *) die "unknown subcommand '$subcommand'; see --help" ;;
esac
arguments=("$@")
parse_options \
  "name project zone accelerator-type runtime-version slices create-flag repo ref bucket worker slice lines interval max-failures" \
  "spot queued iap follow delete-when-done yes" "$@"
require name project zone
require_match name '[a-z]([-a-z0-9]{0,48}[a-z0-9])?' 'lower-case letters, digits and hyphens, at most 50'
require_match bucket '[a-z0-9][-_.a-z0-9]*' "a bucket's name, without gs://"
for number in slices worker slice lines interval max-failures; do require_match $number '[0-9]+' 'a number'; done

name=${opt[name]}
slices=${opt[slices]:-1}
place=(--project="${opt[project]}" --zone="${opt[zone]}")
((slices >= 1)) || die "--slices $slices: 1 or more"
if ((slices > 1)) || [[ -n ${opt[queued]:-} ]]; then
  resource=queued-resources one=(--node="${opt[slice]:-0}") all=(--node=all --worker=all)
else
  resource=tpu-vm one=() all=(--worker=all)
  [[ ${opt[slice]:-0} == 0 ]] || die "--slice ${opt[slice]}: there is one slice; with --slices N there are more"
fi
one+=(--worker="${opt[worker]:-0}")
track=() through=()
# gcloud's stable commands have no tunnel to single slices.
[[ -z ${opt[iap]:-} ]] || track=(alpha) through=(--tunnel-through-iap)

# on all|one COMMAND: of every host or of the one that is asked for.
on() {
  local -n hosts=$1
  run gcloud "${track[@]}" compute tpus "$resource" ssh "$name" "${place[@]}" "${hosts[@]}" "${through[@]}" --command="$2"
}

runtime_version() {
  case ${opt[runtime-version]:-${opt[accelerator-type]}} in
    "${opt[runtime-version]:-}") echo "${opt[runtime-version]}" ;;
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) die "--accelerator-type ${opt[accelerator-type]}: its image is not known here; name it by --runtime-version (TPU7x: launch/gke.sh)" ;;
  esac
}

create() {
  local version flags=()
  require accelerator-type
  version=$(runtime_version)
  flags=("${place[@]}" --accelerator-type="${opt[accelerator-type]}")
  [[ -z ${opt[spot]:-} ]] || flags+=(--spot)
  flags+=("${create_flags[@]}")
  if [[ $resource == tpu-vm ]]; then
    run gcloud compute tpus tpu-vm create "$name" "${flags[@]}" --version="$version"
    return
  fi
  if ((slices > 1)); then
    flags+=(--node-count="$slices" --node-prefix="$name")
  else
    flags+=(--node-id="$name")
  fi
  run gcloud compute tpus queued-resources create "$name" "${flags[@]}" --runtime-version="$version"
  wait_until_ready
}

# The slice: gone, ready, coming, stopped, or lost (it is there, and of no more use). Listing tells "there is none" from
# "cannot ask", which describing does not.
slice_state() {
  local list=(gcloud compute tpus) state taken=''
  if [[ $resource == tpu-vm ]]; then
    state=$(run "${list[@]}" tpu-vm list "${place[@]}" --filter="name~/$name\$" --format='value(state)') || return
  else
    state=$(run "${list[@]}" queued-resources list "${place[@]}" --filter="name~/$name\$" --format='value(state.state)') || return
    # A request may be active while one of its slices has been taken away.
    taken=$(run "${list[@]}" tpu-vm list "${place[@]}" --filter="name~\"/$name(-[0-9]+)?\$\"" --format='value(state)') || return
  fi
  if $dry_run; then
    printf '%s\n' "$state" ${taken:+"$taken"}
    return
  fi
  [[ $taken != *PREEMPTED* && $taken != *TERMINATED* ]] || state=PREEMPTED
  case $state in
    '') echo gone ;;
    READY | ACTIVE) echo ready ;;
    PREEMPTED | TERMINATED | FAILED | SUSPENDED) echo lost ;;
    STOPPED | STOPPING) echo stopped ;;
    *) echo coming ;;
  esac
}

wait_until_ready() {
  local state
  note "until $name is ready, every ${opt[interval]:-60} s:"
  if $dry_run; then
    slice_state
    return
  fi
  while :; do
    state=$(slice_state)
    case $state in
      ready) return ;;
      coming) sleep "${opt[interval]:-60}" ;;
      *) die "--name $name: the request came to nothing: it is $state; see status, and resume" ;;
    esac
  done
}

setup() {
  local archive=.cache/launch/$name.tar.gz unpack
  if [[ -n ${opt[repo]:-} ]]; then
    quoted git clone --quiet -- "${opt[repo]}" afa_jax
    unpack="{ test -d afa_jax || $REPLY; } && cd afa_jax"
    quoted git fetch --quiet origin "${opt[ref]:-main}"
    unpack+=" && $REPLY && git checkout --quiet --detach FETCH_HEAD"
  else
    note "HEAD is copied; what is not committed stays here"
    run mkdir -p .cache/launch
    run git archive --format=tar.gz --output="$archive" HEAD
    run gcloud "${track[@]}" compute tpus "$resource" scp "$archive" "$name:afa_jax.tar.gz" "${place[@]}" "${all[@]}" "${through[@]}"
    unpack="mkdir -p afa_jax && cd afa_jax && tar -xzf ../afa_jax.tar.gz"
  fi
  quoted bash launch/host.sh setup ${opt[bucket]:+"${opt[bucket]}"}
  on all "$unpack && $REPLY"
}

# start [--resume_if_any]: the same command on every host; libtpu's metadata tells them apart.
start() {
  train_command .venv/bin/python "$@"
  quoted bash afa_jax/launch/host.sh start "${train_command[@]}"
  on all "$REPLY"
}

host_states() {
  # shellcheck disable=SC2016 # HOSTNAME is the host's
  on all 'if test -f afa_jax/launch/host.sh; then bash afa_jax/launch/host.sh status; else echo "afa_jax on $HOSTNAME: bare"; fi'
}

stop() { on all 'bash afa_jax/launch/host.sh stop'; }

# delete [--quiet]
delete() {
  local force=()
  [[ $resource == tpu-vm ]] || force=(--force)
  run gcloud compute tpus "$resource" delete "$name" "${place[@]}" "${force[@]}" "$@"
}

resume() {
  local state hosts=''
  require_lasting_workdir
  require config accelerator-type
  if $dry_run; then
    slice_state
    note "as after a preemption, when that answers PREEMPTED:"
    state=lost
  else
    state=$(slice_state)
  fi
  case $state in
    lost) delete --quiet ;;&
    lost | gone) create ;;
    coming) wait_until_ready ;;
    stopped) die "--name $name: it was stopped by hand; start it (gcloud compute tpus tpu-vm start) or delete it" ;;
    ready) hosts=$(host_states | grep '^afa_jax on ') || die "--name $name: no host answers; see ssh" ;;
  esac
  case $hosts in
    *bare* | '') setup ;;
    *running*)
      if ! grep -qv ': running$' <<<"$hosts"; then
        note "every host is running: nothing to do"
        return
      fi
      stop # those that wait for a host that has gone
      ;;
  esac
  start --resume_if_any
}

watch() {
  local state hosts failures=0
  local most=${opt[max-failures]:-3}
  require_lasting_workdir
  require config accelerator-type
  if $dry_run; then
    note "every ${opt[interval]:-60} s, until every host has finished:"
    slice_state
    host_states
    note "whenever the slice is lost, or a host does not run:"
    resume
    [[ -z ${opt[delete-when-done]:-} ]] || { note "at the end:"; delete --quiet; }
    return
  fi
  while :; do
    hosts=''
    state=$(slice_state) || state=unknown
    [[ $state != ready ]] || hosts=$(host_states | sed -n 's/^afa_jax on .*: //p') || hosts=''
    note "$(date -u +%FT%TZ) slice $state; hosts: $(sort <<<"${hosts:-unknown}" | uniq -c | xargs)"
    case $state/$hosts in
      unknown/* | ready/) ;; # cannot ask now
      stopped/*) die "--name $name: it was stopped by hand; start or delete it" ;;
      ready/*"failed 2"*) on all 'bash afa_jax/launch/host.sh log 5'; die "the run ended with an error to mend; see above" ;;
      *)
        if [[ $state == ready ]] && ! grep -qvx finished <<<"$hosts"; then break; fi
        if [[ $state != ready ]] || grep -qvx running <<<"$hosts"; then
          [[ $hosts != *failed* ]] || failures=$((failures + 1))
          ((failures <= most)) || die "the run failed $failures times (--max-failures $most); see logs"
          # A process of its own, because set -e does not hold within a condition. No capacity: the next round asks again.
          "$BASH" launch/tpu.sh resume "${arguments[@]}" || note "resume: status $?; again in ${opt[interval]:-60} s"
        fi
        ;;
    esac
    sleep "${opt[interval]:-60}"
  done
  note "finished"
  [[ -z ${opt[delete-when-done]:-} ]] || delete --quiet
}

case $subcommand in
  run) start ;;
  logs) on one "bash afa_jax/launch/host.sh log ${opt[lines]:-100}${opt[follow]:+ -F}" ;;
  status)
    run gcloud compute tpus "$resource" list "${place[@]}" --filter="name~/$name\$"
    host_states
    ;;
  ssh)
    if ((slices > 1)); then node=$name-${opt[slice]:-0}; else node=$name; fi
    run gcloud "${track[@]}" compute tpus tpu-vm ssh "$node" "${place[@]}" --worker="${opt[worker]:-0}" "${through[@]}"
    ;;
  delete) delete ${opt[yes]:+--quiet} ;;
  *) "$subcommand" ;;
esac
