#!/usr/bin/env bash
# Stands in for gcloud, kubectl, sbatch ...: records how it was called, and answers as the test says.
#
# FAKE_CALLS gets the words of each call, a NUL after each and a NUL more at its end; FAKE_STDIN a manifest that is read
# from stdin. FAKE_ANSWERS is a folder of files: a part of the command line, an exit status, and lines for stdout. The
# first that fits is used up; a call that none fits prints nothing and succeeds. (bash, because it starts in 2 ms.)
line="${0##*/} $*"
printf '%s\0' "${0##*/}" "$@" '' >>"$FAKE_CALLS"
[[ $line != *--filename=-* ]] || cat >"$FAKE_STDIN"
for answer in "$FAKE_ANSWERS"/*; do
  [[ -s $answer ]] || continue
  mapfile -t lines <"$answer"
  if [[ $line == *"${lines[0]}"* ]]; then
    : >"$answer"
    ((${#lines[@]} < 3)) || printf '%s\n' "${lines[@]:2}"
    exit "${lines[1]}"
  fi
done
