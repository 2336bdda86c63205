# What job.py is to know: the site's settings and submit.sh's. Sourced by train.sbatch.
# shellcheck shell=bash disable=SC1091,SC2154,SC2034 # job.env sets run, …; train.sbatch reads known
set +u # the site's own; ahead of ours, whatever it calls its variables
source "$job/site.env"
set -u +e -o pipefail
job=${BASH_SOURCE[0]%/*}
source "$job/job.env"

: "${POLL_SECONDS:=5}"         # between looks at an attempt
: "${STARTUP_SECONDS:=3600}"   # until its first step
: "${STALL_SECONDS:=$((hang_timeout + 600))}" # without a sign of life: the run's own limit comes first
: "${GRACE_SECONDS:=$((warning_seconds > 12 ? warning_seconds * 4 / 5 : 10))}" # from the time limit's signal to the end by force
: "${PROBE_SECONDS:=60}"       # for a node to answer
: "${NODE_WAIT_SECONDS:=900}"  # for enough nodes to answer, before the job is queued again
: "${RETRY_SECONDS:=10}"       # between looks at missing nodes, or at a controller that is away
: "${REQUEUE_SECONDS:=1800}"   # for Slurm to queue this job again
: "${MAX_ATTEMPTS:=10}"        # in a row without a new checkpoint

# A step has all that the job has on each node (--whole), whose number of CPUs may differ; and the
# environment of this shell, also where the site has jobs begin without the user's.
unset SLURM_CPUS_PER_TASK SRUN_CPUS_PER_TASK SLURM_TRES_PER_TASK SLURM_EXPORT_ENV SRUN_EXPORT_ENV
# What no job is given by Slurm, and a user's shell may have set for an srun of its own.
unset SLURM_{EXCLUSIVE,CONSTRAINT,EXCLUDE,IMMEDIATE,NO_KILL,TIMELIMIT,THREADS,WORKING_DIR,REMOTE_CWD} \
  SLURM_{LABELIO,UNBUFFEREDIO,STDINMODE,STDOUTMODE,STDERRMODE}
# Of two of these one is the shell's, and srun refuses both. Without them it has the job's memory.
memory=(${SLURM_MEM_PER_NODE+x} ${SLURM_MEM_PER_CPU+x} ${SLURM_MEM_PER_GPU+x})
((${#memory[@]} < 2)) || unset SLURM_MEM_PER_{NODE,CPU,GPU}

known=()
for name in run logs min_nodes ranged gpus processes_per_node submitted_as POLL_SECONDS STARTUP_SECONDS \
  STALL_SECONDS GRACE_SECONDS PROBE_SECONDS NODE_WAIT_SECONDS RETRY_SECONDS REQUEUE_SECONDS MAX_ATTEMPTS; do
  known+=("$name=${!name}")
done
