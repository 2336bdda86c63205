# The functions of train.sbatch. Sourced there; `$job` is the job's folder in the run folder.
# shellcheck shell=bash disable=SC1091,SC2154,SC2034 # job.env sets run, …; train.sbatch reads outcome, …
set +u # the site's own; ahead of ours, whatever it calls its variables
source "$job/site.env"
set -u +e -o pipefail
job=${BASH_SOURCE[0]%/*}
source "$job/job.env"

: "${POLL_SECONDS:=5}"         # between looks at an attempt
: "${STARTUP_SECONDS:=3600}"   # until its first step
: "${STALL_SECONDS:=$((hang_timeout + 600))}" # without a sign of life: the run's own limit comes first
: "${GRACE_SECONDS:=240}"      # from the time limit's signal to the end by force
: "${PROBE_SECONDS:=60}"       # for a node to answer
: "${NODE_WAIT_SECONDS:=900}"  # for enough nodes to answer, before the job is queued again
: "${RETRY_SECONDS:=10}"       # between looks at missing nodes, or at a controller that is away
: "${REQUEUE_SECONDS:=1800}"   # for Slurm to queue this job again
: "${MAX_ATTEMPTS:=10}"        # in a row without a new checkpoint

private=$run/.keepstep
mkdir -p "$private" # where the run folder is each node's own, it is this one's
round=${SLURM_RESTART_COUNT:-0} try=0 token=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}.0
stop='' stop_at=0 srun='' beat='' outcome='' reason='' status=0 begun=0 began=0 counted=0 guard=''
# A step has all that the job has on each node (--whole), whose number of CPUs may differ; and the
# environment of this shell, also where the site has jobs begin without the user's.
unset SLURM_CPUS_PER_TASK SRUN_CPUS_PER_TASK SLURM_TRES_PER_TASK SLURM_EXPORT_ENV SRUN_EXPORT_ENV
everywhere=(--overlap --whole --ntasks-per-node=1)

# shellcheck source-path=SCRIPTDIR source=files.sh
source "$job/files.sh"

say() { printf '%(%F %T)T [%s] %s\n' -1 "$token" "$*"; }
join() { local IFS=,; echo "$*"; }

leave() { # MESSAGE [STATUS]
  say "$1"
  # For `keepstep stop`: unless Slurm, or another shell, goes on with this job.
  [[ ${2:-1} =~ ^(1|143)$ ]] || echo "$2" >"$job/ended"
  [[ -z $guard ]] || kill "$guard" 2>/dev/null
  [[ ${2:-1} != 75 ]] || say "to go on: $submitted_as"
  exit "${2:-1}"
}

# --- decisions: next_step.py takes them, and decide.py tells them

decide() { # WHAT NAME=VALUE…: set `answer` to what decide.py says
  local candidate tries
  for ((tries = 0; tries < 3; tries++)); do
    for candidate in "$environment/python" python3 /usr/bin/python3 /usr/libexec/platform-python; do
      command -v "$candidate" >/dev/null || continue
      mapfile -t answer < <(timeout -k 5 60 "$candidate" -BEsS "$job/decide.py" "$@")
      ((${#answer[@]} > 1)) && [[ ${answer[-1]} == . ]] && return
    done
    sleep 1
  done
  leave "what is next cannot be decided: no Python answers here, or it fails, as told above" 70
}

LATE_SECONDS=120 # Slurm repeats a signal that a node has not heard after a minute; then it is saved
seen() { # NAME=VALUE…: set `facts` to what a decision goes by, and to those
  facts=(stop="$stop" stop_requested="$(requested && echo 1)" fruitless="$fruitless"
    max_attempts="$MAX_ATTEMPTS" processes=$((${#nodes[@]} * processes_per_node))
    requeued=$((round > 0 && SECONDS < LATE_SECONDS + GRACE_SECONDS)) retry_seconds="$RETRY_SECONDS" "$@")
}

# keepstep stop, between two attempts
requested() { plain "$private/stop" && [[ ! -s $private/stop ]]; }

obey() { # do as the decision in `answer` says; returns only if it is to launch, or to wait
  local action=${answer[0]} words=${answer[1]} code=${answer[2]}
  case $action in
    launch | wait)
      [[ -z $words ]] || say "$words"
      nap "${answer[3]}"
      ;;
    requeue) give_back "$words" ;;
    give-up)
      tell no_progress "$words" "$code"
      leave "no progress: $words" "$code"
      ;;
    stop)
      ((code != 75)) || ! requested || rm -f "$private/stop"
      leave "$words" "$code"
      ;;
  esac
}

what_next() { # after an attempt
  local preempted='' nodes_answer=''
  while :; do
    seen outcome="$outcome" reason="$reason" exit="$status" begun="$begun" preempted="$preempted" \
      nodes_answer="$nodes_answer"
    decide after "${facts[@]}"
    case ${answer[0]} in
      ask-slurm) preempted=$(preempted && echo yes || echo no) ;;
      ask-nodes) nodes_answer=$(prepare "${nodes[@]}" && echo yes || echo no) ;;
      *) break ;;
    esac
  done
  obey
}

nap() { # SECONDS, or until somebody asks for a stop
  local end=$((SECONDS + $1))
  while ((SECONDS < end)) && [[ -z $stop ]]; do sleep 1; done
}

# --- progress: a budget of attempts in a row without a new checkpoint, over all restarts of the job

decide commits private="$private"
known=${answer[0]}
fruitless=$(cat "$job/fruitless" 2>/dev/null)
[[ $fruitless =~ ^(0|[1-9][0-9]{0,8})$ ]] || fruitless=0

count() { # NUMBER: of attempts in a row without a new checkpoint, this one included
  fruitless=$1 counted=1
  echo "$fruitless" >"$job/fruitless"
}

left_behind() { # Slurm has queued this job again, and could not tell this shell
  local facts
  facts=$(slurm show job -o "$SLURM_JOB_ID")
  [[ $facts =~ \ Restarts=([0-9]+) && ${BASH_REMATCH[1]} != "$round" ]]
}

leave_if_left() {
  superseded && leave "the run belongs to $(owner) now"
  left_behind && leave "this job has been queued again: this shell was left behind"
}

# --- Slurm

slurm() { # scontrol, where there is one and it answers
  command -v scontrol >/dev/null && timeout 20 scontrol "$@" 2>/dev/null
}

on_time_limit() {
  [[ $stop == term ]] && return
  say "the time limit is near: save, then queue again"
  stop=time stop_at=$SECONDS
  ask_to_stop
}

on_term() { # scancel, requeue, preemption, node failure: from here on the job is Slurm's
  [[ $stop == term ]] && return
  say "TERM: this job is to end"
  stop=term stop_at=$SECONDS
  ask_to_stop # Slurm has told the ranks; `scancel --batch` has not
}

ask_to_stop() {
  [[ -n $srun ]] || return 0
  # For this attempt, also when it has not begun to listen.
  writable "$private/stop" && put "$private/stop" "$token"
  kill -USR1 "$srun" 2>/dev/null
}

preempted() {
  local facts
  facts=$(slurm show job -o "$SLURM_JOB_ID")
  [[ $facts =~ \ PreemptTime=[0-9] ]]
}

give_back() { # queue this job again: it goes on when its turn comes
  local told end=$((SECONDS + REQUEUE_SECONDS))
  ((counted)) || count $((fruitless + 1))
  say "queue again: $1, at checkpoint $(newest)"
  while [[ $stop != term ]] && command -v scontrol >/dev/null && ((SECONDS < end)); do
    leave_if_left
    if told=$(timeout 60 scontrol requeue "$SLURM_JOB_ID" 2>&1); then
      for ((i = 0; i < 120; i++)); do [[ $stop == term ]] || sleep 1; done # TERM comes with it
      break
    fi
    say "scontrol requeue: $told"
    decide refused answer="$told"
    [[ ${answer[0]} == wait ]] || break # else the controller is away
    for ((i = 0; i < RETRY_SECONDS; i++)); do [[ $stop == term ]] || sleep 1; done
  done
  [[ $stop == term ]] && leave "Slurm has ended the job" 143
  leave "this job cannot be queued again" 75
}

# --- nodes

all_nodes() {
  slurm show hostnames "$SLURM_JOB_NODELIST" ||
    srun "${everywhere[@]}" --mem=0 -N"$SLURM_JOB_NUM_NODES" -n"$SLURM_JOB_NUM_NODES" \
      printenv SLURMD_NODENAME </dev/null
}
mapfile -t all < <(all_nodes)
((gpus)) || [[ -z ${SLURM_JOB_GPUS:-${SLURM_GPUS_ON_NODE:-}} ]] ||
  say "warning: this job holds GPUs, and trains on CPU: submit it with --gpus-per-node"

find_nodes() { # set `nodes` to those that answer, once there are enough; without them, queue again
  local since=$SECONDS
  while :; do
    leave_if_left
    mapfile -t nodes < <(answering)
    seen fruitless=$((counted ? fruitless : fruitless + 1)) answering="${nodes[*]-}" there=${#all[@]} \
      needed="$min_nodes" waited=$((SECONDS - since)) patience="$NODE_WAIT_SECONDS"
    decide nodes "${facts[@]}"
    [[ ${answer[0]} != launch ]] || return 0
    if [[ ${answer[0]} == wait ]]; then
      cat "$logs/prepare.log" 2>/dev/null
      answer[3]=$RETRY_SECONDS
    fi
    obey
  done
}

answering() { # the nodes that answer and are prepared for an attempt, one per line, in their order
  : >"$logs/prepare.log"
  if prepare "${all[@]}"; then printf '%s\n' "${all[@]}" && return; fi
  local node answers
  answers=$(for node in "${all[@]}"; do prepare "$node" && echo "$node" & done; wait)
  for node in "${all[@]}"; do grep -qxF "$node" <<<"$answers" && echo "$node"; done
} 2>/dev/null

prepare() { # NODE...: end what earlier attempts left there, see that the run folder is there
  timeout -k 5 "$PROBE_SECONDS" srun --job-name=prepare "${everywhere[@]}" --mem=0 -N$# -n$# \
    -w "$(join "$@")" --kill-on-bad-exit=1 \
    bash "$job/node.sh" prepare "$token" </dev/null >>"$logs/prepare.log" 2>&1
}

address_of() { # NODE: where the others reach it
  local facts
  facts=$(slurm show node -o "$1")
  [[ $facts =~ \ NodeAddr=([^ ]+) ]] && echo "${BASH_REMATCH[1]}" || echo "$1"
}

# A range of nodes comes with --no-kill: the allocation outlives a node. But when the node of this
# shell dies, Slurm then neither ends nor requeues the job; so a step on the other nodes does.
start_guard() {
  ((ranged)) && [[ -z $guard ]] || return 0
  srun --job-name=guard --no-kill "${everywhere[@]}" --mem=0 -N${#all[@]} -n${#all[@]} \
    bash "$job/node.sh" guard </dev/null >/dev/null 2>&1 &
  guard=$!
}

# --- one attempt

launch() { # begin an attempt on `nodes`
  local count=${#nodes[@]} port head log=$logs/$token.log
  # Below the ephemeral range, and new each time: no straggler joins the rendezvous.
  port=$((10000 + (SLURM_JOB_ID * 31 + round * 1009 + try) % 20000))
  head=$(address_of "${nodes[0]}")
  say "attempt on $(join "${nodes[@]}"), $((count * processes_per_node)) processes, $head:$port," \
    "from checkpoint $(newest); log: $log"
  began=$SECONDS beat=$(beats) beat_at=''
  exec {out}> >(trap '' TERM USR1; exec tee -a "$log")
  tee=$!
  # --wait=0: at the end one process may push to the Hub for long, and the other nodes are done.
  srun --job-name="attempt-$try" "${everywhere[@]}" -N"$count" -n"$count" \
    -w "$(join "${nodes[@]}")" --kill-on-bad-exit=1 --wait=0 \
    ${SITE_SRUN[@]+"${SITE_SRUN[@]}"} \
    bash "$job/node.sh" launch "$token" "$count" "$head" "$port" </dev/null >&"$out" 2>&1 &
  srun=$!
  exec {out}>&-
  [[ -z $stop ]] || ask_to_stop
}

watch() { # until the attempt ends, or has to be ended
  local ending=''
  while kill -0 "$srun" 2>/dev/null; do
    sleep "$POLL_SECONDS" &
    wait -n "$srun" $! 2>/dev/null
    kill -0 "$srun" 2>/dev/null || break
    superseded && ending="the run belongs to $(owner) now"
    [[ $stop != term ]] && stalls && ending="no step for $((SECONDS - ${beat_at:-$began})) s"
    [[ -n $stop ]] && ((SECONDS - stop_at > GRACE_SECONDS)) && ending="not saved in time"
    [[ -z $ending ]] || { end_attempt "$ending" && break; }
  done
  wait "$srun" 2>/dev/null
  status=$? srun=''
  for ((i = 0; i < 20; i++)); do kill -0 "$tee" 2>/dev/null && sleep 0.1; done
  superseded && leave "the run belongs to $(owner) now"
  hear
}

stalls() { # whether nothing has come of the attempt for too long; by this shell's own clock
  local now
  now=$(beats)
  if [[ $now != "$beat" ]]; then beat=$now beat_at=$SECONDS; fi
  if [[ -n $beat_at ]]; then ((SECONDS - beat_at > STALL_SECONDS)); else ((SECONDS - began > STARTUP_SECONDS)); fi
}

end_attempt() { # WHY: end the attempt's step; srun too, which waits for ever for a node cut off
  say "$1: this attempt is ended"
  local step
  step=$(squeue -h -s -j "$SLURM_JOB_ID" -o '%i %j' 2>/dev/null | sed -n "s/ attempt-$try\$//p")
  [[ -n $step ]] && timeout 20 scancel --signal=KILL "$step" 2>/dev/null
  for ((i = 0; i < 10; i++)); do kill -0 "$srun" 2>/dev/null && sleep 1; done
  kill -KILL "$srun" 2>/dev/null && say "srun did not end: a node does not answer"
  return 0
}
