#!/usr/bin/env bash
# Train on this machine: launch/train.sh RECIPE [--field value ...], or `keepstep launch RECIPE …`
#
# Chooses the number of processes and the accelerate config, prints the `accelerate-launch` line,
# runs it, and ends with the run's own exit status, which launchers hide:
#   0 finished   75 preempted: run the same command again   2 it would fail again: the recipe   70 failed
#   76 no progress: nothing is left to go on from
# A run that goes back (on_nonfinite: rewind) is launched again by itself.
#
#   --retries N    launch again what has failed or was killed, with a pause, on the GPUs that answer;
#                  after N times in a row without a new checkpoint: 76
#   --nnodes MIN:MAX  the same command on each of several machines, which find each other by the run
#                  folder that all of them see; one may leave (Ctrl-C, TERM: with a save) and come back
#
# Environment: KEEPSTEP_PROCESSES   processes in all, with --nnodes of each machine (default: this
#                                   machine's GPUs; 2 on CPU)
#              KEEPSTEP_CONFIG      accelerate config (default: zero3; zero2 on one GPU; cpu_zero3)
#              KEEPSTEP_LAUNCH_ARGS machines and port (default: --num_machines 1 --main_process_port 0)
set -euo pipefail
shopt -s lastpipe
trap '' PIPE # a terminal or a reader that is gone costs lines: whatever is told here may fail
# shellcheck source-path=SCRIPTDIR source=preflight.sh
source "$(dirname "${BASH_SOURCE[0]}")/preflight.sh"

if [[ $# -eq 0 || $1 == -* ]]; then
  sed -n '2,19s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
if [[ " $* " == *" --hub_token"* ]]; then
  fail "--hub_token would stand in the process list; export HF_TOKEN=... instead"
fi
recipe=$1
shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

[[ -f $recipe && -r $recipe ]] ||
  fail "there is no recipe $recipe" \
    "launch/recipes has some, keepstep init writes one; a path is relative to $PWD"
check_environment
check_temporary_folder

retries='' nnodes='' arguments=()
while (($#)); do
  case $1 in
    --retries=*) retries=${1#*=} ;;
    --retries) retries=${2-none} && shift "$(($# > 1))" ;;
    --nnodes=*) nnodes=${1#*=} nnodes=${nnodes:-none} ;;
    --nnodes) nnodes=${2:-none} && shift "$(($# > 1))" ;;
    *) arguments+=("$1") ;;
  esac
  shift
done
set -- "${arguments[@]}"
if [[ -n $retries ]]; then
  [[ $retries =~ ^(0|[1-9][0-9]{0,5})$ ]] || fail "--retries: $retries is no number of attempts" \
    "--retries 5: as often in a row without a new checkpoint"
  [[ -z ${KEEPSTEP_EXIT_FILE:-} ]] || fail "--retries: a job of Slurm's launches again by itself"
  export KEEPSTEP_CALLED_AS=${KEEPSTEP_CALLED_AS:-$(printf %q "$0")}
fi
if [[ -n $retries && -z $nnodes ]]; then
  # By Python: bash loses a signal that comes while it parses a command substitution.
  exec "$python" -P -m keepstep.cli.again "$retries" "${BASH_SOURCE[0]}" "$recipe" "$@"
fi

count_gpus() {
  if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -cE '^ *([0-9]|GPU|MIG)' || true # -1: none
  elif command -v nvidia-smi >/dev/null; then
    nvidia-smi --list-gpus | grep -c '^GPU' || true
  else
    echo 0
  fi
}

gpus=$(count_gpus)
case $gpus in
  0) config=cpu_zero3 processes=2 ;;
  1) config=zero2 processes=1 ;;
  *) config=zero3 processes=$gpus ;;
esac
[[ -z $nnodes ]] || config=${config/2/3} # one GPU of several machines
config=${KEEPSTEP_CONFIG:-$config}
processes=${KEEPSTEP_PROCESSES:-$processes}
check_settings

tell_command() { # for the run folder: the way on
  local name
  KEEPSTEP_COMMAND=''
  for name in KEEPSTEP_CONFIG KEEPSTEP_PROCESSES KEEPSTEP_LAUNCH_ARGS; do
    [[ -z ${!name:-} ]] || KEEPSTEP_COMMAND+="$name=$(printf %q "${!name}") "
  done
  KEEPSTEP_COMMAND+=${KEEPSTEP_CALLED_AS:-$(printf %q "$0")}$(printf ' %q' "$recipe" "$@")
  KEEPSTEP_COMMAND+=${nnodes:+ --nnodes $nnodes}${retries:+ --retries $retries}
  KEEPSTEP_COMMAND+=${KEEPSTEP_RETRIES:+ --retries $KEEPSTEP_RETRIES}
}

if [[ -n $nnodes ]]; then
  [[ -z ${KEEPSTEP_EXIT_FILE:-} ]] || fail "--nnodes: Slurm has given a job its nodes"
  [[ -z ${KEEPSTEP_EVALUATE:-} ]] || fail "--nnodes: an evaluation is one machine's"
  [[ -z ${KEEPSTEP_LAUNCH_ARGS:-} ]] ||
    fail "--nnodes: the machines agree on that: KEEPSTEP_LAUNCH_ARGS=$KEEPSTEP_LAUNCH_ARGS" \
      "unset KEEPSTEP_LAUNCH_ARGS"
  tell_command "$@"
  export KEEPSTEP_COMMAND KEEPSTEP_CONFIG=$config KEEPSTEP_PROCESSES=$processes
  exec "$python" -P -m keepstep.cli.together "$nnodes" "${retries:-3}" "${BASH_SOURCE[0]}" "$recipe" "$@"
fi
read -ra launch_args <<<"${KEEPSTEP_LAUNCH_ARGS:---num_machines 1 --main_process_port 0}"

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [[ $gpus -eq 0 ]]; then
  export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} # or DeepSpeed looks for one, and says so
  check_extensions
fi
# After a stop request the launcher ends its ranks by force when this many seconds have passed.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}

# (Of the two ways to say it, this one is spared the imports of Accelerate's other commands.)
program=(-m keepstep.train) # or, by `keepstep evaluate`, of a run or checkpoint that is there:
saves='after this step and its save'
if [[ -n ${KEEPSTEP_EVALUATE:-} ]]; then
  program=(-m keepstep.evaluate "$KEEPSTEP_EVALUATE")
  saves='now: what was measured stands'
fi
command=(accelerate-launch --config_file "$config" --num_processes "$processes"
  "${launch_args[@]}" "${program[@]}" --config "$recipe" "$@")
{ printf '+' && printf ' %q' "${command[@]}" && printf '\n'; } || true

[[ -n ${KEEPSTEP_OWNER:-} ]] || tell_command "$@" # else who has named the owner has told it
export KEEPSTEP_COMMAND # for the run folder: the way on

if [[ -n ${KEEPSTEP_SCRATCH:-} ]]; then # what has retried it reads how it ended, and removes it
  scratch=$KEEPSTEP_SCRATCH is_retried=1
  unset KEEPSTEP_SCRATCH
else
  scratch=$(mktemp -d) is_retried=''
  trap 'rm -rf "$scratch"' EXIT
fi
export KEEPSTEP_STATUS_FILE=$scratch/status.json

# The launcher meets any exit status but 0 with a traceback of its own. It is held back, and what comes
# with it; all of it is shown unless the run has ended as it was to.
without_launcher_traceback() {
  trap '' TERM HUP USR1 USR2 # Slurm signals every process; without this one, stderr would break
  local line held=''
  while IFS= read -r line || [[ -n $line ]]; do
    if [[ -n $held || $line =~ ^[WE][0-9]+\ .*torch/distributed/elastic/ ]]; then
      held+=$line$'\n'
    else
      printf '%s\n' "$line" || true # and read on: the ranks wait when nobody does
    fi
  done
  printf %s "$held" >"$scratch/held"
} >&2

# One sentence from the launcher's report: who was ended by a signal. (The launcher itself ends the
# others by TERM.)
name_culprit() {
  local rank pid number signal
  read -r rank pid number < <(awk '
    /^ *rank +: /      { rank = $3 }
    /^ *exitcode +: -/ { pid = $5; print rank, pid + 0, -$3 }' "$scratch/held" | sort -k3,3 -n |
    grep -v ' 15$') || return 0
  signal=$(kill -l "$number")
  [[ $signal != KILL ]] || signal+=": by hand, or by the kernel for lack of memory (dmesg tells)"
  culprit=$rank
  local words="rank $rank (process $pid) was ended by signal $number, SIG$signal"
  echo "keepstep: $words" >&2
  printf %s "$words" >"$scratch/culprit" # for --retries: a main process that was killed tells nothing
}

# The launcher's report is long, and comes last: what the run had said before it is said once more,
# unless it is about the rank that has just been named.
repeat_reason() { # REASON
  local about="(^|[^[:alnum:]_])rank ${culprit:-none}([^[:alnum:]_]|$)"
  [[ -s $scratch/held && -n $1 ]] || return 0
  [[ $1 =~ $about ]] || printf 'keepstep: %s\n' "$1" >&2
}

# What the run has told of its end: its exit status, and why. Nothing, where that cannot be read; and
# no success but with the word for it.
told() {
  "$python" -I - "$KEEPSTEP_STATUS_FILE" <<'EOF'
import json, sys
sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
with open(sys.argv[1], encoding="utf-8") as file:
    said = json.load(file)
code, reason = said.get("exit"), said.get("reason") or ""
is_told = type(code) is int and 0 <= code <= 255 and (code or said.get("outcome") == "finished")
line = " ".join("".join(c if c.isprintable() else " " for c in reason).split())
print(code if is_told else "")
print(said.get("outcome") == "rewound")
print(line if len(line) <= 300 else line[:299] + "…")
EOF
}

mkfifo "$scratch/stderr"
start_launcher() {
  trap '' USR1 USR2 # it would die of them; the ranks have handlers of their own
  # A session of its own: Ctrl-C reaches this script alone, and the ranks hear of it once.
  set -- setsid "${command[@]}"
  if setpriv --pdeathsig TERM true 2>/dev/null; then
    set -- setpriv --pdeathsig TERM "$@" # killed, this script takes the launcher with it
  fi
  exec "$@"
}
launcher='' interrupts=0 asked='' passed_on=''
read -r began _ </proc/uptime || began=''
stop() {
  asked=1
  { : >"$scratch/asked"; } || true # else TERM is how the launcher ends ranks whose peer is gone
  if [[ -n $launcher ]]; then
    passed_on=1
    kill -TERM "$launcher" 2>/dev/null || true
  fi
}
interrupt() { # the second means now; a kill costs no more than the steps since the last save
  interrupts=$((interrupts + 1))
  if [[ $interrupts -eq 1 ]]; then
    stop
    echo "keepstep: stopping $saves; Ctrl-C again ends at once" >&2 || true
  else
    local file ranks=() # by no command substitution: a signal that meets one is lost
    for file in "/proc/${launcher:-none}/task/"*/children; do
      { read -ra ranks <"$file"; kill -KILL "${ranks[@]}"; } 2>/dev/null || true
    done
  fi
}

attempt() { # launch the run once; set `code`, `said`, `code_told`
  rm -f "$KEEPSTEP_STATUS_FILE" "$scratch/held"
  passed_on=''
  trap stop TERM HUP USR1 USR2
  trap interrupt INT
  without_launcher_traceback <"$scratch/stderr" &
  filter=$!
  start_launcher 2>"$scratch/stderr" &
  launcher=$! launched=$!
  [[ -z $asked || -n $passed_on ]] || stop # asked before the launcher's process was known
  # A trapped signal ends `wait` early, with a status of its own: the launcher's is asked for once it
  # is gone. (Bash's own word about a job that was killed is left out: "line 158: 7226 Killed".)
  while kill -0 "$launcher" 2>/dev/null; do wait "$launcher" 2>/dev/null || true; done
  code=0
  wait "$launcher" 2>/dev/null || code=$?
  launcher=''
  while kill -0 "$filter" 2>/dev/null; do wait "$filter" 2>/dev/null || true; done
  said=()
  [[ ! -s $KEEPSTEP_STATUS_FILE ]] || told | mapfile -t said || true # by this shell: lastpipe
  code_told=${said[0]:-}
}

# Of a job the next attempt is the job's: it has another name, and maybe other nodes.
attempt
while [[ -z $asked && -z ${KEEPSTEP_EXIT_FILE:-} && $code_told == 75 && ${said[1]:-} == True ]]; do
  echo "keepstep: going back: the same command again" || true
  export KEEPSTEP_BEGAN=$began # time_limit is meant for all of it
  attempt
done

if [[ -n $asked && ! -s $KEEPSTEP_STATUS_FILE ]]; then # no attempt had begun: nothing is lost
  [[ -n $is_retried ]] || # else who has launched this says what follows
    echo "keepstep: stopped before the run began; run the same command again to go on" >&2 || true
  end 75
fi
trap '' INT TERM HUP USR1 USR2 # once more would leave it unsaid how the run has ended
if [[ ! $code_told =~ ^(0|2|75)$ && $interrupts -gt 1 ]]; then # as was asked for
  echo "keepstep: ended at once; the same command goes on from the last save" >&2 || true
elif [[ ! $code_told =~ ^(0|2|75)$ ]]; then
  cat "$scratch/held" >&2 || true
  if [[ $code -eq 137 ]]; then
    echo "keepstep: the launcher (process $launched) was ended by signal 9, SIGKILL" >&2 || true
  fi
  name_culprit || true
  repeat_reason "${said[2]:-}" || true
fi
if [[ -n $code_told ]]; then
  end "$code_told"
fi
# A run that has begun, and has not told of its end, is no success whatever the launcher says.
[[ $code -eq 0 && ! -s $KEEPSTEP_STATUS_FILE ]] || end 70
