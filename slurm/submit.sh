#!/usr/bin/env bash
# Train on a Slurm cluster: slurm/submit.sh RECIPE [options] [--field value ...]
#
#   --nodes N | MIN-MAX    nodes; a range goes on with those that are left (default: 1)
#   --gpus-per-node G      GPUs of each, and processes (default: none: processes on CPU)
#   --time T               time limit, as sbatch takes it; the job queues again until it is finished
#   --dry-run              print the job that would be submitted
#
# Everything else is a field of the recipe. What is this cluster's own stands in slurm/site.env
# (see site.env.example). The strategy is chosen as by launch/train.sh: KEEPSTEP_CONFIG.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
fail() {
  echo "keepstep: $1" >&2
  exit 2
}

submitted_as=("$0" "$@")
nodes=1 gpus=0 time='' dry_run=0 recipe='' overrides=()
while (($#)); do
  case $1 in
    --nodes | --gpus-per-node | --time) (($# > 1)) || fail "$1 needs a value" ;;&
    --nodes) nodes=$2 && shift ;;
    --gpus-per-node) gpus=$2 && shift ;;
    --time) time=$2 && shift ;;
    --dry-run) dry_run=1 ;;
    -h | --help) sed -n '2,10s/^# \{0,1\}//p' "$0" && exit ;;
    -*) overrides+=("$1") ;;
    *) if ((${#overrides[@]})); then overrides+=("$1"); elif [[ -n $recipe ]]; then fail "$1: there is a recipe already"; else recipe=$1; fi ;;
  esac
  shift
done
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || fail "bash $BASH_VERSION is too old: 4.4"
[[ -n $recipe ]] || fail "which recipe? $0 --help"
command -v keepstep >/dev/null || fail "activate keepstep's environment first: source .venv/bin/activate"
[[ $nodes =~ ^[1-9][0-9]*(-[1-9][0-9]*)?$ ]] || fail "--nodes: $nodes is neither N nor MIN-MAX"
((${nodes%-*} <= ${nodes#*-})) || fail "--nodes: $nodes is no range"
[[ $gpus =~ ^[0-9]+$ ]] || fail "--gpus-per-node: $gpus is no number"
[[ " ${overrides[*]-} " != *" --hub_token"* ]] || fail "--hub_token would stand in files; export HF_TOKEN=..."

seconds_of() { # Slurm's [days-]hours:minutes:seconds, minutes:seconds, minutes, days-hours[:minutes]
  local days=0 parts
  [[ $1 == *-* ]] && days=${1%%-*}
  IFS=: read -ra parts <<<"${1#*-}"
  if [[ $1 == *-* ]]; then
    parts+=(0 0)
  elif ((${#parts[@]} == 1)); then
    parts=(0 "${parts[0]}" 0)
  elif ((${#parts[@]} == 2)); then
    parts=(0 "${parts[@]}")
  fi
  echo $((days * 86400 + 10#${parts[0]} * 3600 + 10#${parts[1]} * 60 + 10#${parts[2]}))
}

site=${KEEPSTEP_SITE:-$here/site.env}
[[ -f $site || -z ${KEEPSTEP_SITE:-} ]] || fail "KEEPSTEP_SITE: there is no $site"
SITE_SBATCH=() PROCESSES_PER_NODE=
# shellcheck disable=SC1090 # the site's own
[[ ! -f $site ]] || source "$site" || true
processes=${PROCESSES_PER_NODE:-$((gpus > 0 ? gpus : 1))}

# --- what can be known now: the recipe, its run folder, the time

walltime=()
if [[ -n $time ]]; then
  [[ $time =~ ^([0-9]+-)?[0-9]+(:[0-9]+){0,2}$ ]] || fail "--time: $time is no time limit of sbatch"
  walltime=(--walltime "$(seconds_of "$time")")
fi
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
job=$run/.keepstep/job

case $(df --output=fstype "$(dirname "$run")" 2>/dev/null | tail -n1) in
  tmpfs | overlay | ext4 | xfs) echo "warning: $run looks like this machine's own disk; all nodes must see it" >&2 ;;
esac

if [[ -s $job/id ]]; then
  id=$(<"$job/id")
  state=$(squeue --noheader --job "$id" --format %T 2>&1) || [[ $state == *nvalid* ]] ||
    fail "Slurm does not say whether job $id of this run is at work: $state"
  [[ -z $state || $state == *nvalid* ]] ||
    fail "job $id of this run is $state already
    Hint: keepstep stop $run (ends it with a save), or scancel $id"
fi

# --- the job: this cluster's flags, the script, and what it needs

render() {
  local flag flags=(--nodes="$nodes" --output="${run//%/%%}/.keepstep/logs/%j.log")
  [[ -z $time ]] || flags+=(--time="$time")
  ((gpus == 0)) || flags+=(--gpus-per-node="$gpus")
  [[ $nodes != *-* ]] || flags+=(--no-kill)
  sed -n '1p; /^#SBATCH/p' "$here/train.sbatch"
  for flag in "${flags[@]}" ${SITE_SBATCH[@]+"${SITE_SBATCH[@]}"}; do
    [[ $flag != *' '* ]] || flag="${flag%%=*}=\"${flag#*=}\""
    echo "#SBATCH $flag"
  done
  sed '1d; /^#SBATCH/d' "$here/train.sbatch"
}

describe() { # job.env
  local environment='' name
  for name in KEEPSTEP_CONFIG KEEPSTEP_SITE; do
    [[ -z ${!name:-} ]] || environment+="$name=${!name@Q} "
  done
  printf '# What submit.sh was asked for.\n'
  printf '%s=%q\n' run "$run" min_nodes "${nodes%-*}" ranged "$([[ $nodes == *-* ]] && echo 1 || echo 0)" \
    processes_per_node "$processes" config "$job/accelerate.yaml" hang_timeout "$(field hang_timeout)"
  printf 'overrides=(%s)\n' "${overrides[*]@Q}"
  printf 'submitted_as=%q\n' "cd ${PWD@Q} && $environment${submitted_as[*]@Q}"
}

if ((dry_run)); then
  echo "# sbatch $job/train.sbatch $job   (with beside it:"
  describe | sed 's/^/#   /'
  echo '# )'
  render
  exit
fi

mkdir -p "$run/.keepstep/logs" "$job"
chmod 700 "$job" # the site's file, and the code's changes, are nobody else's
cp "$recipe" "$job/recipe.yaml"
cp "$here/lib.sh" "$here/node.sh" "$job/"
cp "$root/launch/train.sh" "$job/"
cp "$config_file" "$job/accelerate.yaml"
if [[ -f $site ]]; then cp "$site" "$job/site.env"; else : >"$job/site.env"; fi
describe >"$job/job.env"
render >"$job/train.sbatch"
{ git -C "$root" log -1 --format='commit %H%n%s%n' && git -C "$root" status --short && git -C "$root" diff HEAD; } \
  >"$job/git.txt" 2>/dev/null || echo "no git" >"$job/git.txt"

rm -f "$job/fruitless" "$run/.keepstep/stop" # of an earlier job
id=$(sbatch --parsable "$job/train.sbatch" "$job")
id=${id%%;*}
echo "$id" >"$job/id"
quoted=$(printf %q "$run")
cat <<END
Job $id trains $run on $nodes node(s), $processes process(es) each.
  follow  tail -F $quoted/.keepstep/logs/$id.log
  look    keepstep ls $quoted
  stop    keepstep stop $quoted     (saves, and ends; scancel $id: saves if there is time)
  resume  the same command
END
