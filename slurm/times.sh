# Times as Slurm writes them, and when a job hears of its limit. Sourced by submit.sh.
# shellcheck shell=bash disable=SC2154 # submit.sh sets site

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
  echo $((10#$days * 86400 + 10#${parts[0]} * 3600 + 10#${parts[1]} * 60 + 10#${parts[2]}))
}

warning_seconds() { # LIMIT: how long ahead of it, in seconds, a job is told; of a short job a quarter of it
  local flags=" ${SITE_SBATCH[*]-} " limit=${1:-1200} signal
  if [[ $flags =~ .*\ --signal[=\ ]([^ ]+) ]]; then
    signal=${BASH_REMATCH[1]}
    [[ $signal =~ ^([BR]+:)?(SIG)?(USR1|USR2|10|12)(@([0-9]+))?$ ]] ||
      fail "SITE_SBATCH of $site has --signal=$signal, and a job queues itself again at USR1 or USR2 alone" \
        "    Hint: --signal=B:USR1@300, 300 s ahead of the time limit"
    echo "${BASH_REMATCH[5]:-60}"
  else
    echo $((limit < 1200 ? limit / 4 : 300))
  fi
}
