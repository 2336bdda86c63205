#!/usr/bin/env bash
# Train on a Slurm cluster: slurm/submit.sh (or keepstep submit) RECIPE [options] [--field value ...]
#
#   --nodes N | MIN-MAX        nodes; a range goes on with those that are left (default: 1)
#   --gpus-per-node [TYPE:]G   GPUs of each, and processes (default: the site's; none: CPU)
#   --time T                   time limit, as sbatch takes it; the job queues again until it is finished
#   --runs FILE                a run for each line of it: the flags that it has beside these
#   --at_most N                of these runs so many at once
#   --dry_run                  print the job that would be submitted
#
# Everything else is a field of the recipe. What is this cluster's own stands in slurm/site.env (see
# site.env.example), else ~/.config/keepstep/site.env. The strategy is chosen as by launch/train.sh.
set -euo pipefail

fail() {
  printf 'keepstep: %s\n' "$@" >&2
  exit 2
}

# What is this cluster's own comes first: whatever it calls its variables, ours are set after it.
unset SITE_SBATCH SITE_SRUN SITE_CONTAINER PROCESSES_PER_NODE CPUS_PER_PROCESS JOB_FOLDERS
find_site() { # its path; of this checkout, else this user's
  local own
  own=$(dirname "${BASH_SOURCE[0]}")/site.env
  [[ -f $own ]] || own=${XDG_CONFIG_HOME:-${HOME:-/nowhere}/.config}/keepstep/site.env
  realpath -m -- "${KEEPSTEP_SITE:-$own}"
}
site=$(find_site)
[[ -f $site || -z ${KEEPSTEP_SITE:-} ]] || fail "KEEPSTEP_SITE: there is no $KEEPSTEP_SITE"
if [[ -f $site ]]; then
  wrong=$(bash -n "$site" 2>&1) || fail "$site is not bash:" "$wrong"
  trap 'fail "$(find_site) has called exit: it may only set variables and functions"' EXIT
  set +eu # the site's own
  # shellcheck disable=SC1090
  source "$site"
  set -eu
  trap - EXIT
fi

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here") package=$(dirname "$here")/src/keepstep
[[ -d $package ]] || package=$(dirname "$root") # installed: this is keepstep/files/slurm
site=$(find_site)
submitted_as=("$0" "$@")
called_as=${KEEPSTEP_CALLED_AS:-}
[[ -z $called_as ]] || submitted_as=("${called_as% *}" "${called_as#* }" "$@")
unset KEEPSTEP_CALLED_AS # it is no business of the job
nodes=1 asked_gpus='' time='' dry_run=0 recipe='' overrides=() runs='' at_most='' this_job=0
slot='' of_many=0 # one of --runs
while (($#)); do
  case $1 in
    --nodes=* | --gpus[-_]per[-_]node=* | --time=* | --runs=* | --at[-_]most=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
  esac
  case $1 in
    --nodes | --gpus[-_]per[-_]node | --time | --runs | --at[-_]most) (($# > 1)) || fail "$1 needs a value" ;;&
    --nodes) nodes=$2 && shift ;;
    --gpus[-_]per[-_]node) asked_gpus=$2 && shift ;;
    --time) time=$2 && shift ;;
    --runs) runs=$2 && shift ;;
    --at[-_]most) at_most=$2 && shift ;;
    --slot) slot=$2 of_many=1 && shift ;; # by this script: jobs of one name run one after the other
    --this_job) this_job=1 ;;             # by train.sbatch: here and now, in the job that it is
    --dry_run | --dry-run) dry_run=1 ;;
    -h | --help) sed -n '2,12s/^# \{0,1\}//p' "$0" && exit ;;
    -*) overrides+=("$1") ;;
    *) if ((${#overrides[@]})); then overrides+=("$1"); elif [[ -n $recipe ]]; then fail "$1: there is a recipe already"; else recipe=$1; fi ;;
  esac
  shift
done
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || fail "bash $BASH_VERSION is too old: 4.4"
[[ -n $recipe ]] || fail "which recipe? $0 --help"
[[ -f $recipe && -r $recipe ]] || fail "there is no recipe $recipe"
command -v keepstep >/dev/null || fail "activate keepstep's environment first: source .venv/bin/activate"
((dry_run || this_job)) || command -v sbatch >/dev/null || fail "there is no sbatch: is this a login node of a Slurm cluster?"
if ((this_job)); then # what it has been given
  [[ -n ${SLURM_JOB_ID:-} ]] || fail "--this_job: this is no job of Slurm's"
  [[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || fail "an array of jobs on one run: all of them would train it" \
    "    Hint: slurm/submit.sh RECIPE --runs FILE, a run for each line of it"
  SITE_SBATCH=() nodes=$SLURM_JOB_NUM_NODES asked_gpus=${asked_gpus:-${SLURM_GPUS_ON_NODE:-}} time=''
  submitted_as=(sbatch --nodes="$nodes" "$here/train.sbatch" "$recipe" "${overrides[@]}")
fi
[[ $nodes =~ ^[1-9][0-9]*(-[1-9][0-9]*)?$ ]] || fail "--nodes: $nodes is neither N nor MIN-MAX"
((${nodes%-*} <= ${nodes#*-})) || fail "--nodes: $nodes is no range"
[[ -z $asked_gpus || $asked_gpus =~ ^([A-Za-z][A-Za-z0-9_.-]*:)?[0-9]+$ ]] || fail "--gpus-per-node: $asked_gpus is no number"
[[ " ${overrides[*]-} " != *" --hub_token"* ]] || fail "--hub_token would stand in files; export HF_TOKEN=..."

if [[ -n $runs$at_most ]]; then
  # shellcheck source-path=SCRIPTDIR source=runs.sh
  source "$here/runs.sh"
  submit_each
fi

# shellcheck source-path=SCRIPTDIR source=times.sh
source "$here/times.sh"

# --- what the site's flags ask for

for name in SITE_SBATCH SITE_SRUN SITE_CONTAINER; do
  [[ $(declare -p "$name" 2>/dev/null) == "declare -a"* || ${!name:-} != *\ * ]] ||
    fail "$name of $site is one text, and would be one word: $name=(${!name})"
done
SITE_SBATCH=("${SITE_SBATCH[@]}")
[[ ! " ${SITE_SBATCH[*]}" =~ \ (-N|--nodes($|[ =])) ]] ||
  fail "SITE_SBATCH of $site asks for nodes, and the job must know how many: submit.sh --nodes"

[[ -z ${SBATCH_ARRAY_INX:-} && ! " ${SITE_SBATCH[*]}" =~ \ (-a|--array($|[ =])) ]] ||
  fail "SITE_SBATCH of $site, or SBATCH_ARRAY_INX, asks for an array: all its jobs would train one run" \
    "    Hint: --runs FILE, a run for each line of it"

number_of() { # LIST: of Slurm's [NAME:]NUMBER,…
  local item total=0
  for item in ${1//,/ }; do
    [[ $item =~ (^|[:=])([0-9]+)(\(.*)?$ ]] && total=$((total + 10#${BASH_REMATCH[2]})) || total=$((total + 1))
  done
  echo "$total"
}

site_gpus() { # on each node, as far as the site's flags ask for some
  local flags=("${SITE_SBATCH[@]}") i flag value item
  for ((i = 0; i < ${#flags[@]}; i++)); do
    flag=${flags[i]%%=*} value=${flags[i]#*=}
    [[ ${flags[i]} != -G?* ]] || flag=-G value=${flags[i]#-G}
    [[ ${flags[i]} == *=* || $flag != "${flags[i]}" ]] || value=${flags[i + 1]:-}
    case $flag in
      --gres)
        for item in ${value//,/ }; do
          [[ $item =~ ^(gres[:/])?gpu($|[:=]) ]] && number_of "$item"
        done
        ;;
      --gpus-per-node | --gpus-per-task) number_of "$value" ;;
      --gpus | -G)
        [[ $nodes != *-* && $(($(number_of "$value") % nodes)) == 0 ]] ||
          fail "$flag $value of $site is for all nodes, and does not tell how many each of $nodes has" \
            "    Hint: --gpus-per-node"
        echo $(($(number_of "$value") / nodes))
        ;;
    esac
  done
  return 0
}

gpus=$(number_of "$asked_gpus") theirs=$(site_gpus)
if [[ -n $theirs ]]; then
  theirs=$(number_of "$theirs")
  [[ -z $asked_gpus || $gpus == "$theirs" ]] ||
    fail "--gpus-per-node: $gpus, and the flags of $site ask for $theirs: leave one of them out"
  gpus=$theirs asked_gpus=''
fi
processes=${PROCESSES_PER_NODE:-$((gpus > 0 ? gpus : 1))}
[[ $processes =~ ^[1-9][0-9]*$ ]] || fail "PROCESSES_PER_NODE: $processes is no number"
cores=${CPUS_PER_PROCESS:-$((gpus > 0 ? 4 : 1))}
[[ $cores =~ ^[1-9][0-9]*$ ]] || fail "CPUS_PER_PROCESS: $cores is no number"

# Bash and Python reckon with them, hours later.
for name in {STARTUP,STALL,GRACE,PROBE,NODE_WAIT,RETRY,REQUEUE}_SECONDS MAX_ATTEMPTS; do
  [[ -z ${!name:-} || ${!name} =~ ^(0|[1-9][0-9]{0,8})$ ]] ||
    fail "$name: ${!name} is no whole number: see $site"
done

# --- what can be known now: the recipe, its run folder, the time

limit='' walltime=()
if [[ -n $time && ! $time =~ ^(0|UNLIMITED|INFINITE)$ ]]; then
  [[ $time =~ ^([0-9]+-)?[0-9]+(:[0-9]+){0,2}$ ]] || fail "--time: $time is no time limit of sbatch"
  limit=$(seconds_of "$time") walltime=(--walltime "$limit")
fi
warning=$(warning_seconds "$limit")
config=${KEEPSTEP_CONFIG:-}
if [[ -z $config ]]; then
  config=$( ((gpus > 0)) && echo zero3 || echo cpu_zero3)
  [[ $nodes != 1 || $processes != 1 ]] || config=${config/3/2}
fi
config_file=$config
[[ -f $config ]] || config_file=$root/accelerate_configs/$config.yaml
[[ -f $config_file ]] || fail "KEEPSTEP_CONFIG: $config is neither a file nor one of accelerate_configs"
checked=$(keepstep check "$recipe" "${walltime[@]}" --config_file "$config_file" \
  --num_processes $((${nodes#*-} * processes)) --json "${overrides[@]}") && wrong=0 || wrong=2
[[ $checked == "{"* ]] || fail "keepstep check did not come to its end"
field() { python -c "import json, sys; print(json.load(sys.stdin)['$1'])" <<<"$checked"; }
field report >&2
((wrong == 0)) || exit "$wrong"
run=$(field output_dir)
node_local=$(field node_local)
shared=$run/.keepstep
job=$shared/job look="keepstep ls $(printf %q "$run")"
if [[ $node_local == True ]]; then # nobody but its node sees that folder
  job=${JOB_FOLDERS:-$HOME/.keepstep/jobs}/$(basename "$run")-$(cksum <<<"$run" | cut -d' ' -f1)
  shared=$job look="keepstep ls $(printf %q "$(field mirror)")"
fi

there=$shared
until [[ -e $there ]]; do there=$(dirname "$there"); done
case $(stat -f -c %T "$there") in
  tmpfs | ramfs | overlay* | ext* | xfs | btrfs | zfs | f2fs)
    echo "warning: $shared looks like this machine's own disk or memory; all nodes must see it" >&2
    ;;
esac

restarted=0 # a job that has prepared itself, and was queued again: what it runs is what it began with
if ((this_job)) && [[ -s $job/id && $(<"$job/id") == "$SLURM_JOB_ID" ]]; then
  restarted=1
elif [[ -s $job/id ]] && command -v squeue >/dev/null; then
  id=$(<"$job/id")
  state=$(squeue --noheader --job "$id" --format %T 2>&1) || [[ $state == *nvalid* ]] ||
    fail "Slurm does not say whether job $id of this run is at work: $state"
  if ((of_many)) && [[ -n $state && $state != *nvalid* ]]; then
    echo "Job $id of $run is $state already: it is left alone."
    exit
  fi
  [[ -z $state || $state == *nvalid* ]] ||
    fail "job $id of this run is $state already" \
      "    Hint: keepstep stop $run (ends it with a save), or scancel $id"
fi

# --- the job: its flags, the script, and what it needs

# Flags, not lines of the script, where a name could be anything.
[[ $shared != *\\* ]] || fail "output_dir: $run has a backslash in it, and Slurm could not name the log there"
flags=(--nodes="$nodes" --output="${shared//%/%%}/logs/%j.log")
[[ -z $asked_gpus || $gpus == 0 ]] || flags+=(--gpus-per-node="$asked_gpus")
[[ $nodes != *-* ]] || flags+=(--no-kill)
[[ " ${SITE_SBATCH[*]-}" =~ \ (-c|--cpus-per-|--exclusive|--mincpus|-n|--ntasks) ]] ||
  flags+=(--cpus-per-task=$((processes * cores)))
[[ $warning == 300 || " ${SITE_SBATCH[*]-}" == *" --signal"* ]] || flags+=(--signal="B:USR1@$warning")
flags+=("${SITE_SBATCH[@]}")
[[ -z $time ]] || flags+=(--time="$time") # sbatch takes the last one
[[ -z $slot ]] || flags+=(--job-name="$slot" --dependency=singleton)

describe() { # job.env
  local environment='' name launcher
  launcher=$(command -v accelerate || true)
  for name in KEEPSTEP_CONFIG KEEPSTEP_SITE; do
    [[ -z ${!name:-} ]] || environment+="$name=${!name@Q} "
  done
  printf '# What submit.sh was asked for.\n'
  printf '%s=%q\n' run "$run" logs "$shared/logs" environment "${launcher%/*}" \
    min_nodes "${nodes%-*}" ranged "$([[ $nodes == *-* ]] && echo 1 || echo 0)" gpus "$gpus" \
    processes_per_node "$processes" config "$job/accelerate.yaml" hang_timeout "$(field hang_timeout)" \
    warning_seconds "$warning"
  printf 'overrides=(%s)\n' "${overrides[*]@Q}"
  printf 'submitted_as=%q\n' "cd ${PWD@Q} && $environment${submitted_as[*]@Q}"
}

if ((dry_run)); then
  printf '# sbatch'
  printf ' %q' "${flags[@]}" "$job/train.sbatch" "$job"
  printf '   (with beside it:\n'
  describe | sed 's/^/#   /'
  echo '# )'
  cat "$here/train.sbatch"
  exit
fi

((!restarted)) || exec bash "$job/train.sbatch" "$job"
mkdir -p "$shared/logs" "$job"
chmod 700 "$job" # the site's file, and the code's changes, are nobody else's
cp "$recipe" "$job/recipe.yaml"
cp "$here/"{train.sbatch,settings.sh,node.sh,{job,supervisor,attempt,cluster,files,log,signals}.py} "$root/launch/"{train,preflight}.sh \
  "$package/policy/next_step.py" "$job/"
cp "$config_file" "$job/accelerate.yaml"
if [[ -f $site ]]; then cp "$site" "$job/site.env"; else : >"$job/site.env"; fi
describe >"$job/job.env"
{ [[ -e $root/.git ]] && git -C "$root" log -1 --format='commit %H%n%s%n' && git -C "$root" status --short && git -C "$root" diff HEAD; } \
  >"$job/git.txt" 2>/dev/null || echo "no git: keepstep $(keepstep --version)" >"$job/git.txt"

rm -f "$job/fruitless" "$job/ended" "$run/.keepstep/stop" # of an earlier job
if ((this_job)); then
  echo "$SLURM_JOB_ID" >"$job/id"
  exec bash "$job/train.sbatch" "$job"
fi
clean=() # the new job is no part of one that this shell may be in, and inherits nothing of it
for name in $(compgen -e); do
  [[ ! $name =~ ^(SLURM|SLURMD|SRUN)_ || $name =~ ^SLURM_(CONF|CONF_SERVER|JWT|CLUSTERS)$ ]] || clean+=(-u "$name")
done
id=$(env ${clean[@]+"${clean[@]}"} sbatch --parsable "${flags[@]}" "$job/train.sbatch" "$job") ||
  fail "sbatch has refused the job, for the reason above" "    Hint: SITE_SBATCH and CPUS_PER_PROCESS in $site; --dry_run shows the command"
id=${id%%;*}
echo "$id" >"$job/id"
stop="keepstep stop $(printf %q "$run")     (saves, and ends; scancel $id: saves if there is time)"
[[ $shared != "$job" ]] || stop="scancel $id     (saves, and ends)"
cat <<END
Job $id trains $run on $nodes node(s), $processes process(es) each.
  follow  tail -F $(printf %q "$shared")/logs/$id.log
  look    $look
  stop    $stop
  resume  the same command
END
