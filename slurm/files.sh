# What the job reads and writes in the run folder, but for JSON: decide.py reads that. Sourced by lib.sh.
# shellcheck shell=bash disable=SC2154,SC2034 # job.env sets run; lib.sh private, …, reads counted
#
# Whatever may lie there: only plain files are read and written. A pipe would be waited for, and a
# link leads elsewhere. What is written whole is renamed into its place.

plain() { [[ -f $1 && ! -L $1 ]]; }

put() { # FILE TEXT
  local new=${1%/*}/.${1##*/}.$token.new
  rm -f "$new" && printf %s "$2" >"$new" && mv -fT "$new" "$1"
} 2>/dev/null

writable() { # FILE: whether it is a plain file, or can become one; told
  ! [[ -e $1 || -L $1 ]] || plain "$1" || { say "$1 is no plain file: nothing is written there"; return 1; }
}

# --- progress

newest() { # the step of the newest checkpoint, 0 before the first
  local manifest step most=0
  for manifest in "$run"/checkpoint-*/manifest.json; do
    step=${manifest%/manifest.json} step=${step##*/checkpoint-}
    [[ $step =~ ^[0-9]{1,15}$ && -e $manifest ]] && ((10#$step > most)) && most=$((10#$step))
  done
  echo "$most"
}

beats() { plain "$private/heartbeat" && head -c 200 "$private/heartbeat" 2>/dev/null | tr -d '\0'; }

# --- the owner of the run: an attempt that finds another name there ends, and writes nothing

owner() { # its name; nothing when there is none, or it cannot be read now
  local name=''
  plain "$private/owner" && read -r name _ <"$private/owner"
  echo "$name"
} 2>/dev/null

claim() { # put this attempt's name there, unless this shell is a leftover of an earlier round
  local theirs
  theirs=$(owner)
  token=$SLURM_JOB_ID.$round.$try counted=0
  decide claim token="$token" theirs="$theirs"
  [[ ${answer[0]} == yes ]] || leave "the run belongs to $theirs now"
  for ((i = 0; i < 30; i++)); do
    put "$private/owner" "$token"$'\n' && return
    sleep 2
  done
  leave "nothing can be written in $private"
}

superseded() { # somebody else has the run by now
  local theirs
  theirs=$(owner)
  [[ -n $theirs && $theirs != "$token" ]]
}

# --- how an attempt ended

hear() { # set outcome, reason, status and begun to what the attempt said of itself, and count it: srun's
  # exit status is that of whichever process it has heard of first
  decide ended private="$private" logs="$logs" token="$token" exit="$status" commits="$known" fruitless="$fruitless"
  outcome=${answer[0]} reason=${answer[1]} status=${answer[2]} begun=${answer[3]} known=${answer[4]}
  count "${answer[5]}"
  ((begun)) || tell "${outcome/recipe/failed}" "$reason" "$status"
}

tell() { # OUTCOME REASON EXIT: status.json
  put "$private/status.json" "$(printf '{\n "outcome": "%s",\n "reason": "%s",\n "exit": %d,\n "owner": "%s"\n}\n' "$1" "$2" "$3" "$token")"$'\n'
}

record() { # one line for this attempt, on the screen and in events.jsonl
  local events=$private/events.jsonl step
  step=$(newest)
  say "ended after $((SECONDS - began)) s: $outcome ($reason), checkpoint $step"
  superseded && return
  writable "$events" || return
  [[ -s $events && -n $(tail -c1 "$events") ]] && echo >>"$events"
  printf '{"time": "%s", "event": "launch", "owner": "%s", "nodes": "%s", "seconds": %d, "exit": %d, "outcome": "%s", "step": %d}\n' \
    "$(date -u +%FT%T.%3N+00:00)" "$token" "$(join "${nodes[@]}")" $((SECONDS - began)) "$status" \
    "$outcome" "$step" >>"$events"
}
