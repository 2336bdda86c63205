#!/usr/bin/env bash
# shellcheck disable=SC1091,SC2154 # submit.sh writes job.env and site.env; job.env sets run, …
# What one node does in a step of the job: node.sh prepare | guard | launch TOKEN NODES HEAD PORT
set -u -o pipefail
job=$(dirname "$0")
source "$job/job.env" && source "$job/site.env"

case $1 in
  prepare) # end what other attempts than the owner of the run have left here
    read -r owner _ <"$run/.keepstep/owner" || exit 1
    leftovers() {
      local file
      # shellcheck disable=SC2013 # there are no blanks in these names
      for file in $(grep -lzxs "KEEPSTEP_RUN=$run" /proc/[0-9]*/environ); do
        grep -qzxs "KEEPSTEP_OWNER=$owner" "$file" || echo "${file//[!0-9]/}"
      done
    }
    # They are gone once their memory is free.
    for ((i = 0; i < 50; i++)); do
      pids=$(leftovers)
      [[ -n $pids ]] || exit 0
      # shellcheck disable=SC2086 # one word each
      kill -KILL $pids 2>/dev/null
      sleep 0.1
    done
    exit 1
    ;;
  guard) # see start_guard in lib.sh; one question every 15 s, however many nodes there are
    sleep $((15 * SLURM_PROCID))
    while sleep $((15 * SLURM_NTASKS)); do
      facts=$(scontrol show job -o "$SLURM_JOB_ID") || continue
      batch_host=$(sed -n 's/.* BatchHost=\([^ ]*\).*/\1/p' <<<"$facts")
      allocated=$(sed -n 's/.* NodeList=\([^ ]*\).*/\1/p' <<<"$facts")
      [[ -n $batch_host && -n $allocated ]] || continue
      scontrol show hostnames "$allocated" | grep -qx "$batch_host" || scontrol requeue "$SLURM_JOB_ID"
    done
    ;;
  launch)
    declare -F site_setup >/dev/null && site_setup
    export PYTHONUNBUFFERED=1 # srun's --unbuffered would be a terminal, with progress bars
    export KEEPSTEP_OWNER=$2 KEEPSTEP_RUN=$run KEEPSTEP_CONFIG=$config
    export KEEPSTEP_PROCESSES=$(($3 * processes_per_node))
    export KEEPSTEP_LAUNCH_ARGS="--num_machines $3 --machine_rank $SLURM_PROCID --main_process_ip $4 --main_process_port $5"
    exec ${SITE_CONTAINER[@]+"${SITE_CONTAINER[@]}"} "$job/launch/train.sh" "$job/recipe.yaml" \
      ${overrides[@]+"${overrides[@]}"}
    ;;
esac
