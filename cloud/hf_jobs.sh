#!/usr/bin/env bash
# A Hugging Face Job: cloud/hf_jobs.sh (HF_JOBS_ARGS="--dry-run": print what would be sent)
# The job's disk goes with it; what stays is a bucket of the Hub, which is the mirror. The Hub begins a job
# that failed anew, as often as --attempts says, also after 2 and 76: these end within a minute. The run is
# told its limit, so that it has saved and copied before: it ends with 75, which is a failure to the Hub.
set -euo pipefail
image=${IMAGE:-registry.example.com/keepstep:0.2.0} # kubernetes/Dockerfile, where the Hub can pull it
bucket=${BUCKET:-owner/name}                        # hf buckets create owner/name --private
hours=${HOURS:-12}
read -ra more <<<"${HF_JOBS_ARGS:-}"
# Recipe and rows lie in the bucket, too: hf buckets cp recipe.yaml hf://buckets/owner/name/recipe.yaml
exec hf jobs run --flavor "${FLAVOR:-h200x8}" --timeout "${hours}h" --attempts "${ATTEMPTS:-10}" \
  --secrets HF_TOKEN --env "KEEPSTEP_MIRROR=hf://buckets/$bucket/runs" \
  --volume "hf://buckets/$bucket:/bucket:ro" "${more[@]}" "$image" \
  keepstep launch /bucket/recipe.yaml --output_dir runs/mine --time_limit "$((hours * 60 - 10))m"
