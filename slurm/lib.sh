# The functions of train.sbatch. Sourced there; `$job` is the job's folder in the run folder.
# shellcheck shell=bash disable=SC1091,SC2154,SC2034 # job.env sets run, …; train.sbatch reads outcome, …
source "$job/job.env"
source "$job/site.env"

: "${POLL_SECONDS:=5}"         # between looks at an attempt
: "${STARTUP_SECONDS:=3600}"   # until its first step
: "${STALL_SECONDS:=2400}"     # without a sign of life; the run's own hang_timeout_seconds comes first
: "${GRACE_SECONDS:=240}"      # from the time limit's signal to the end by force
: "${PROBE_SECONDS:=60}"       # for a node to answer
: "${NODE_WAIT_SECONDS:=900}"  # for enough nodes to answer, before the job is queued again
: "${RETRY_SECONDS:=10}"       # between looks at missing nodes, or at a controller that is away
: "${MAX_ATTEMPTS:=10}"        # in a row without a new checkpoint

private=$run/.keepstep
round=${SLURM_RESTART_COUNT:-0} try=0 fruitless=0 token=$SLURM_JOB_ID.$round.0
stop='' stop_at=0 srun='' beat='' outcome='' reason='' code=0 began=0
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}} # srun does not inherit it

say() { printf '%(%F %T)T [%s] %s\n' -1 "$token" "$*"; }
join() { local IFS=,; echo "$*"; }

leave() { # MESSAGE [STATUS]
  say "$1"
  [[ -n ${guard:-} ]] && kill "$guard" 2>/dev/null
  [[ ${2:-1} == 75 ]] && say "to go on: ${submitted_as[*]@Q}"
  exit "${2:-1}"
}

newest() { # the step of the newest checkpoint, 0 before the first
  local steps
  steps=$(compgen -G "$run/checkpoint-*/manifest.json" | sed 's|.*/checkpoint-\([0-9]*\)/.*|\1|' | sort -n)
  echo "${steps##*$'\n'}" | grep . || echo 0
}

# --- the owner of the run: an attempt that finds another name there ends, and writes nothing

owner() {
  local name=nobody
  [[ -r $private/owner ]] && read -r name _ <"$private/owner"
  echo "$name"
}

claim() { # put this attempt's name there, unless this shell is a leftover of an earlier round
  local theirs
  theirs=$(owner)
  if [[ $theirs =~ ^$SLURM_JOB_ID\.([0-9]+)\.([0-9]+)$ ]]; then
    ((BASH_REMATCH[1] < round || (BASH_REMATCH[1] == round && BASH_REMATCH[2] <= try))) || return 1
  elif [[ $theirs != nobody ]]; then
    ((round == 0 && try == 0)) || return 1 # only a job that begins takes a run from others
  fi
  token=$SLURM_JOB_ID.$round.$try
  echo "$token" >"$private/.owner.$token" && mv -f "$private/.owner.$token" "$private/owner"
}

superseded() { # somebody else has the run by now
  [[ $stop != term && $(owner) != "$token" ]] # after a TERM the ranks may still save
}

left_behind() { # Slurm has queued this job again, and could not tell this shell
  local restarts
  restarts=$(slurm show job -o "$SLURM_JOB_ID" | sed -n 's/.* Restarts=\([0-9]*\).*/\1/p')
  [[ $stop != term && -n $restarts && $restarts != "$round" ]]
}

# --- Slurm

slurm() { # scontrol, where there is one and it answers
  command -v scontrol >/dev/null && timeout 20 scontrol "$@" 2>/dev/null
}

on_time_limit() {
  say "the time limit is near: save, then queue again"
  stop=time stop_at=$SECONDS
  ask_to_stop
}

on_term() { # scancel, requeue, preemption, node failure: from here on the job is Slurm's
  say "TERM: Slurm ends this job"
  stop=term
}

ask_to_stop() {
  [[ -n $srun ]] || return 0
  printf %s "$token" >"$private/stop" # for this attempt, also when it has not begun to listen
  kill -USR1 "$srun" 2>/dev/null
}

preempted() { slurm show job -o "$SLURM_JOB_ID" | grep -q ' PreemptTime=[0-9]'; }

give_back() { # queue this job again: it goes on when its turn comes
  local answer
  say "queue again: $1, at checkpoint $(newest)"
  while [[ $stop != term ]]; do
    command -v scontrol >/dev/null || break
    if answer=$(timeout 60 scontrol requeue "$SLURM_JOB_ID" 2>&1); then
      for ((i = 0; i < 120; i++)); do [[ $stop == term ]] || sleep 1; done # it comes with TERM
      break
    fi
    say "scontrol requeue: $answer"
    [[ $answer =~ disabled|denied|ermission|nvalid ]] && break # else the controller is away
    nap "$RETRY_SECONDS"
  done
  [[ $stop == term ]] && leave "Slurm has ended the job" 143
  leave "this job cannot be queued again" 75
}

# --- nodes

find_nodes() { # set `nodes` to those that answer, once there are enough; without them, queue again
  local since=$SECONDS
  while :; do
    superseded && leave "the run belongs to $(owner) now"
    left_behind && leave "this job has been queued again: this shell was left behind"
    mapfile -t nodes < <(answering)
    [[ $stop == time ]] && give_back "the time is over"
    ((${#nodes[@]} >= min_nodes)) && return
    say "${#nodes[@]} of ${#all[@]} nodes answer (${nodes[*]-}), $min_nodes are needed: waiting"
    nap "$RETRY_SECONDS"
    [[ $stop == term ]] && leave "Slurm has ended the job" 143
    ((SECONDS - since < NODE_WAIT_SECONDS)) || give_back "nodes are missing"
  done
}

answering() { # the nodes that answer and are prepared for an attempt, one per line
  if prepare "${all[@]}"; then printf '%s\n' "${all[@]}" && return; fi
  local node
  for node in "${all[@]}"; do prepare "$node" && echo "$node" & done
  wait
} 2>/dev/null

prepare() { # NODE...: end what earlier attempts left there, see that the run folder is there
  timeout -k 5 "$PROBE_SECONDS" srun --job-name=prepare --overlap --mem=0 -N$# -n$# \
    --ntasks-per-node=1 -w "$(join "$@")" --kill-on-bad-exit=1 \
    bash "$job/node.sh" prepare </dev/null >/dev/null 2>&1
}

address_of() { # NODE: where the others reach it
  local address
  address=$(slurm show node -o "$1" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
  echo "${address:-$1}"
}

all_nodes() {
  slurm show hostnames "$SLURM_JOB_NODELIST" ||
    srun --overlap --mem=0 -N"$SLURM_JOB_NUM_NODES" -n"$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
      printenv SLURMD_NODENAME </dev/null
}
mapfile -t all < <(all_nodes)

# A range of nodes comes with --no-kill: the allocation outlives a node. But when the node of this
# shell dies, Slurm then neither ends nor requeues the job; so a step on the other nodes does.
start_guard() {
  ((ranged)) || return 0
  srun --job-name=guard --no-kill --overlap --mem=0 -N${#all[@]} -n${#all[@]} --ntasks-per-node=1 \
    bash "$job/node.sh" guard </dev/null >/dev/null 2>&1 &
  guard=$!
}

# --- one attempt

launch() { # begin an attempt on `nodes`
  local count=${#nodes[@]} port log=$private/logs/$token.log
  # Below the ephemeral range, and new each time: no straggler joins the rendezvous.
  port=$((10000 + (SLURM_JOB_ID * 31 + round * 7 + try) % 20000))
  head=$(address_of "${nodes[0]}")
  say "attempt on $(join "${nodes[@]}"), $((count * processes_per_node)) processes, $head:$port," \
    "from checkpoint $before; log: $log"
  began=$SECONDS beat=$(cat "$private/heartbeat" 2>/dev/null) beat_at=''
  exec {out}> >(trap '' TERM USR1; exec tee -a "$log")
  tee=$!
  srun --job-name="attempt-$try" -N"$count" -n"$count" --ntasks-per-node=1 \
    -w "$(join "${nodes[@]}")" --overlap --kill-on-bad-exit=1 --wait=60 \
    ${SITE_SRUN[@]+"${SITE_SRUN[@]}"} \
    bash "$job/node.sh" launch "$token" "$count" "$head" "$port" </dev/null >&"$out" 2>&1 &
  srun=$!
  exec {out}>&-
  [[ $stop == time ]] && ask_to_stop
}

watch() { # until the attempt ends, or has to be ended
  local ending=''
  while kill -0 "$srun" 2>/dev/null; do
    sleep "$POLL_SECONDS" &
    wait -n "$srun" $! 2>/dev/null
    kill -0 "$srun" 2>/dev/null || break
    superseded && ending="the run belongs to $(owner) now"
    [[ $stop != term ]] && stalls && ending="no step for $((SECONDS - ${beat_at:-$began})) s"
    [[ $stop == time ]] && ((SECONDS - stop_at > GRACE_SECONDS)) && ending="not saved in time"
    [[ -z $ending ]] || { end_attempt "$ending" && break; }
  done
  wait "$srun" 2>/dev/null
  code=$? srun=''
  for ((i = 0; i < 20; i++)); do kill -0 "$tee" 2>/dev/null && sleep 0.1; done
  superseded && leave "the run belongs to $(owner) now"
  hear
}

stalls() { # whether nothing has come of the attempt for too long; by this shell's own clock
  local now
  now=$(cat "$private/heartbeat" 2>/dev/null)
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

hear() { # set `outcome` and `reason` to what the attempt said of itself; not to its exit status,
  # which is that of whichever process srun has heard of first
  outcome=failed reason="exit status $code"
  if [[ $(said owner) == "$token" ]]; then
    outcome=$(said outcome) reason=$(said reason)
    [[ $reason != null ]] || reason="exit status $code"
  elif ((code == 2)); then
    outcome=recipe reason="see the log"
  fi
}

said() { # FIELD of status.json, which has one a line
  sed -n "s/^ *\"$1\": //p" "$private/status.json" 2>/dev/null | sed 's/,$//; s/^"//; s/"$//'
}

record() { # one line for this attempt, on the screen and in events.jsonl
  say "ended after $((SECONDS - began)) s: $outcome ($reason), checkpoint $(newest)"
  [[ -s $private/events.jsonl && -n $(tail -c1 "$private/events.jsonl") ]] && echo >>"$private/events.jsonl"
  printf '{"time": "%s", "event": "launch", "owner": "%s", "nodes": "%s", "seconds": %d, "exit": %d, "outcome": "%s", "step": %d}\n' \
    "$(date -u +%FT%T.%3N+00:00)" "$token" "$(join "${nodes[@]}")" $((SECONDS - began)) "$code" \
    "$outcome" "$(newest)" >>"$private/events.jsonl"
}

give_up() {
  reason="$fruitless attempts in a row without a new checkpoint"
  printf '{\n "outcome": "no_progress",\n "reason": "%s",\n "exit": 76,\n "owner": "%s"\n}\n' \
    "$reason" "$token" >"$private/.status.new" && mv -f "$private/.status.new" "$private/status.json"
  leave "no progress: $reason" 76
}

nap() { # SECONDS, or until somebody asks for a stop
  local end=$((SECONDS + $1))
  while ((SECONDS < end)) && [[ -z $stop ]]; do sleep 1; done
}
