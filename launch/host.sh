#!/usr/bin/env bash
# What launch/tpu.sh runs on every host of a Cloud TPU slice, in the home directory's checkout afa_jax.
#
#   host.sh setup [BUCKET]     Python, jax[tpu] and the requirements into .venv; the bucket at /mnt/BUCKET
#   host.sh start COMMAND...   start a command and leave it: it outlives the ssh connection
#   host.sh status             one line: HOST: bare, idle, running, stopped, finished or failed STATUS
#   host.sh log LINES [-F]     the end of the command's output, and what follows
#   host.sh stop               SIGTERM, and wait until the command has saved and gone
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
run=.cache/run # pid, exit and log of the one command of this host

running() {
  [[ -f $run/pid ]] && tr '\0' ' ' <"/proc/$(<$run/pid)/cmdline" 2>/dev/null | grep -q stopped.sh
}

setup() {
  # The images carry an older Python than jax wants; uv brings its own. (Newer systems keep pip out without the word.)
  PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user --upgrade uv
  [[ -x .venv/bin/python ]] || python3 -m uv venv --quiet --python 3.12 .venv
  python3 -m uv pip install --quiet --python .venv/bin/python -r requirements.txt 'jax[tpu]'
  [[ -z ${1:-} ]] || mount_bucket "$1"
  touch .venv/ready
}

mount_bucket() {
  local mount=/mnt/$1
  if ! command -v gcsfuse >/dev/null; then
    sudo apt-get -qq update
    if ! sudo apt-get -qq install -y gcsfuse; then
      echo "error: $HOSTNAME has no gcsfuse, and no package source with it: see cloud.google.com/storage/docs/cloud-storage-fuse/install," \
        "install it on every host (launch/tpu.sh ssh), then set up again" >&2
      exit 1
    fi
  fi
  mountpoint -q "$mount" && return
  sudo mkdir -p "$mount"
  sudo chown "$(id -u):$(id -g)" "$mount"
  # Checkpoints are finished by renaming a folder, which gcsfuse refuses without a limit.
  gcsfuse --implicit-dirs --rename-dir-limit=100000 "$1" "$mount"
}

start() {
  [[ -f .venv/ready ]] || { echo "error: $HOSTNAME is not set up: launch/tpu.sh setup" >&2; exit 1; }
  ! running || { echo "error: $HOSTNAME runs already: launch/tpu.sh logs, or stop" >&2; exit 1; }
  mkdir -p $run
  rm -f $run/pid $run/exit
  # A session of its own: no terminal that could take it along.
  setsid bash launch/host.sh supervise "$@" >>$run/log 2>&1 </dev/null &
  for _ in {1..100}; do
    [[ ! -f $run/pid ]] || return 0
    sleep 0.1
  done
  echo "error: $HOSTNAME did not start: launch/tpu.sh logs" >&2
  exit 1
}

supervise() {
  local status=0
  printf '\n%s %s\n' "$(date -u +%FT%TZ)" "$*"
  bash launch/stopped.sh "$@" &
  echo $! >$run/pid.new
  mv $run/pid.new $run/pid
  wait $! || status=$?
  echo "$status" >$run/exit
}

status() {
  local state=idle
  if [[ ! -f .venv/ready ]]; then
    state=bare
  elif running; then
    state=running
  elif [[ -f $run/exit ]]; then
    case $(<$run/exit) in
      0) state=finished ;;
      143) state=stopped ;;
      *) state="failed $(<$run/exit)" ;;
    esac
  elif [[ -f $run/pid ]]; then
    state=stopped # and could not say so: the host went down
  fi
  echo "afa_jax on $HOSTNAME: $state"
}

stop() {
  running || return 0
  kill -TERM "$(<$run/pid)" || return 0
  for _ in {1..300}; do
    running || return 0
    sleep 1
  done
  echo "error: $HOSTNAME has not stopped after 300 s; it may hang: launch/tpu.sh logs" >&2
  exit 1
}

case ${1:-} in
  setup | start | supervise | status | stop) "$@" ;;
  log) tail -n "$2" "${@:3}" $run/log ;;
  *) echo "error: host.sh ${1:-}: setup, start, status, log or stop" >&2; exit 2 ;;
esac
