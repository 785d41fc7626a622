# shellcheck shell=bash
# What the launchers share; they source it. It wants bash 4.4 or newer (macOS: brew install bash).
set -euo pipefail
shopt -s inherit_errexit 2>/dev/null || true # an older bash is refused below

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "error: this is bash $BASH_VERSION; 4.4 or newer is needed (macOS: brew install bash)" >&2
  exit 2
fi

script=$(cd "$(dirname "$0")" >/dev/null && pwd)/${0##*/}
dry_run=false
declare -A opt=()      # --name VALUE -> opt[name]; a flag that is given is "true"
create_flags=()        # what --create-flag hands on to whatever makes the machines
overrides=()           # --config.x=y, --expert: the trainer's own, as they were given
trainer_args=()        # after --

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# The comment at the top of a script is its help.
help() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$script"
  exit 0
}

# quoted WORD...: set REPLY to a command line that a shell splits into exactly these words. Of --flag=value the value is
# in quotes. (REPLY, because a subshell for every word would be slow.)
quoted() {
  local word flag escaped="'\\''" line=''
  for word; do
    flag=''
    if [[ -n $word && ! $word =~ [^A-Za-z0-9_@%+=:,./-] ]]; then
      line+=" $word"
      continue
    fi
    if [[ $word =~ ^--[A-Za-z0-9_.-]+= ]]; then
      flag=${BASH_REMATCH[0]}
      word=${word#"$flag"}
    fi
    line+=" $flag'${word//\'/"$escaped"}'"
  done
  REPLY=${line# }
}

# Run a command; with --dry-run print it instead.
run() {
  if $dry_run; then
    quoted "$@"
    printf '%s\n' "$REPLY"
  else
    "$@"
  fi
}

# What a person reads beside the commands. A comment, so that a dry run can be pasted as a whole.
note() {
  if $dry_run; then printf '# %s\n' "$*"; else printf '%s\n' "$*" >&2; fi
}

# parse_options "VALUED ..." "FLAGS ..." "$@": fill opt, create_flags, overrides, trainer_args and dry_run.
parse_options() {
  local valued=" $1 config workdir " flags=" $2 " option name
  shift 2
  while (($#)); do
    option=$1
    shift
    case $option in
      --) trainer_args=("$@"); break ;;
      --help | -h) help ;;
      --dry-run) dry_run=true; continue ;;
      --config.*=*) overrides+=("$option"); continue ;;
      --config.*) die "$option: write $option=VALUE" ;;
      --*=*) set -- "${option#*=}" "$@"; option=${option%%=*} ;;
      --?*) ;;
      *) die "unexpected argument '$option'; see --help" ;;
    esac
    name=${option#--}
    if [[ $flags == *" $name "* ]]; then
      opt[$name]=true
      continue
    fi
    [[ $valued == *" $name "* || $name == expert ]] || die "unknown option $option; see --help"
    (($#)) || die "$option needs a value"
    [[ $1 != --* || $name == create-flag ]] || die "$option needs a value, not $1"
    case $name in
      create-flag) create_flags+=("$1") ;;
      expert) overrides+=(--expert "$1") ;;
      *) [[ -n $1 ]] || die "$option needs a value"; opt[$name]=$1 ;;
    esac
    shift
  done
}

require() {
  local name
  for name; do [[ -n ${opt[$name]:-} ]] || die "--$name is required; see --help"; done
}

# require_match NAME PATTERN WHAT: an option that is given matches an extended regular expression.
require_match() {
  [[ -z ${opt[$1]:-} || ${opt[$1]} =~ ^($2)$ ]] || die "--$1 ${opt[$1]}: $3"
}

# Buckets are mounted here on every host, so that paths in configs are the same everywhere.
mount_of() { printf '/mnt/%s' "$1"; }

# The machines may vanish at any time: what a run keeps lies in the bucket.
require_lasting_workdir() {
  require bucket workdir
  [[ ${opt[workdir]} == "$(mount_of "${opt[bucket]}")"/?* ]] ||
    die "--workdir ${opt[workdir]}: lost with the machines; put it in the bucket, $(mount_of "${opt[bucket]}")/..."
}

# train_command PYTHON [--resume_if_any]: fill train_command with the trainer and its arguments. The processes find
# each other by what the environment says (docs/scale.md), so that every one of them is started by the same words.
train_command() {
  local python=$1
  shift
  require config workdir
  # shellcheck disable=SC2034 # the scripts that source this read it
  train_command=(
    "$python" -m afa_jax.train --config "${opt[config]}" --workdir "${opt[workdir]}" "$@"
    "${overrides[@]}" "${trainer_args[@]}"
  )
}

# Paths in commands are those of the checkout.
cd "$(dirname "${BASH_SOURCE[0]}")/.." >/dev/null
