# Many runs of one recipe, each submitted as a job of its own. Sourced by submit.sh, for --runs.
# shellcheck shell=bash disable=SC2154 # submit.sh sets runs, at_most, recipe, nodes, …

read_runs() { # set `lines` and `numbers` to what is to be submitted; each has a folder of its own
  local line number=0 padded folder folders=$'\n'
  lines=() numbers=()
  while read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    [[ -n $line && $line != \#* ]] || continue
    padded=" $line "
    [[ $padded =~ [[:space:]]--output_dir([=[:space:]]+)([^[:space:]]+) ]] ||
      fail "line $number of $runs has no --output_dir: each run needs a folder of its own"
    folder=${BASH_REMATCH[2]%/}
    [[ $folders != *$'\n'"$folder"$'\n'* ]] ||
      fail "line $number of $runs: another line has --output_dir $folder already"
    folders+=$folder$'\n' lines+=("$line") numbers+=("$number")
  done <"$runs"
}

submit_each() { # ends with status 2 if one of them could not be submitted
  local i words slot='' left=() common=("$recipe" --nodes "$nodes" "${overrides[@]}")
  [[ -n $runs ]] || fail "--at_most goes with --runs"
  [[ -z $at_most || $at_most =~ ^[1-9][0-9]{0,3}$ ]] || fail "--at_most: $at_most is no number of runs"
  [[ -f $runs && -r $runs ]] || fail "--runs: there is no file $runs"
  read_runs
  ((${#lines[@]})) ||
    fail "--runs: $runs has no runs in it: a line for each, as --output_dir runs/a --learning_rate 1e-4"
  [[ -z $asked_gpus ]] || common+=(--gpus-per-node "$asked_gpus")
  [[ -z $time ]] || common+=(--time "$time")
  ((!dry_run)) || common+=(--dry_run)
  for i in "${!lines[@]}"; do
    # Words as a shell has them, in quotes too; nothing in them is run.
    mapfile -d '' -t words < <(xargs printf '%s\0' <<<"${lines[i]}")
    # Of jobs with one name Slurm runs one at a time: so many names, so many at once.
    [[ -z $at_most ]] || slot=keepstep-$(realpath "$runs" | cksum | cut -d' ' -f1)-$((i % at_most))
    KEEPSTEP_CALLED_AS=$called_as "$0" "${common[@]}" "${words[@]}" --slot "$slot" </dev/null ||
      left+=("${numbers[i]}")
  done
  ((!${#left[@]})) || fail "not submitted: line ${left[*]} of $runs, for the reasons above" \
    "    Hint: mended, the same command leaves those alone that are queued or at work"
  exit 0
}
