#!/usr/bin/env bash
# shellcheck disable=SC1091,SC2154 # submit.sh writes job.env and site.env; job.env sets run, …
# What one node does in a step of the job: node.sh prepare TOKEN | guard | launch TOKEN NODES HEAD PORT
set -u -o pipefail
set +u # the site's own; ahead of ours, whatever it calls its variables
source "$(dirname "$0")/site.env"
set -u +e
job=$(dirname "$0")
source "$job/job.env"
name=$(printf %q "$run") # on one line, whatever the folder is called

case $1 in
  prepare) # end what other attempts than the owner of the run have left here
    leftovers() {
      local file
      # shellcheck disable=SC2013 # there are no blanks in these names
      for file in $(grep -lzxsF "KEEPSTEP_RUN=$name" /proc/[0-9]*/environ); do
        grep -qzxsF "KEEPSTEP_OWNER=$2" "$file" || echo "${file//[!0-9]/}"
      done
    }
    # They are gone once their memory is free.
    for ((i = 0; i < 50; i++)); do
      pids=$(leftovers "$@")
      [[ -n $pids ]] || exit 0
      # shellcheck disable=SC2086 # one word each
      kill -KILL $pids 2>/dev/null
      sleep 0.1
    done
    echo "${SLURMD_NODENAME:-}: processes that were left here do not end: ${pids//$'\n'/ }" >&2
    exit 1
    ;;
  guard) # see start_guard in cluster.py; one question every 15 s, however many nodes there are
    sleep $((15 * SLURM_PROCID))
    while sleep $((15 * SLURM_NTASKS)); do
      facts=$(scontrol show job -o "$SLURM_JOB_ID") || continue
      [[ $facts =~ \ NodeList=([^ ]+) ]] || continue
      names=$(scontrol show hostnames "${BASH_REMATCH[1]}")
      [[ $facts =~ \ BatchHost=([^ ]+) && -n $names ]] || continue
      [[ $'\n'$names$'\n' == *$'\n'"${BASH_REMATCH[1]}"$'\n'* ]] || scontrol requeue "$SLURM_JOB_ID"
    done
    ;;
  launch)
    set +u
    if declare -F site_setup >/dev/null && ! site_setup; then
      echo "keepstep: site_setup of site.env has failed on ${SLURMD_NODENAME:-this node}: its last command did" >&2
      exit 1
    fi
    set -u +e
    given=${TMPDIR:-/tmp} # this node's own disk may be full, and that is no fault of the run
    for folder in "$given" /tmp /var/tmp /dev/shm; do
      made=$(mktemp -d -p "$folder" 2>/dev/null) && rmdir "$made" && break
    done
    if [[ $folder != "$given" ]]; then
      echo "keepstep: nothing can be written in $given on ${SLURMD_NODENAME:-this node}: temporary files go to $folder" >&2
      export TMPDIR=$folder
    fi
    if [[ -n $environment && ! -v SITE_CONTAINER ]] && ! command -v accelerate >/dev/null; then
      export PATH=$environment:$PATH # as it was when the job was submitted
    fi
    export PYTHONUNBUFFERED=1 # srun's --unbuffered would be a terminal, with progress bars
    export KEEPSTEP_OWNER=$2 KEEPSTEP_RUN=$name KEEPSTEP_CONFIG=$config
    export KEEPSTEP_COMMAND=$submitted_as
    export KEEPSTEP_EXIT_FILE=$logs/$2.$SLURM_PROCID.exit
    export KEEPSTEP_PROCESSES=$(($3 * processes_per_node))
    export KEEPSTEP_LAUNCH_ARGS="--num_machines $3 --machine_rank $SLURM_PROCID --main_process_ip $4 --main_process_port $5"
    exec ${SITE_CONTAINER[@]+"${SITE_CONTAINER[@]}"} "$job/train.sh" "$job/recipe.yaml" \
      ${overrides[@]+"${overrides[@]}"}
    ;;
esac
