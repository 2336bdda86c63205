#!/usr/bin/env bash
# The demo behind `make demo`: train, look, kill a run in the middle, run the same command again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
recipe=launch/recipes/demo.yaml
export HF_HUB_OFFLINE=1 HF_DATASETS_CACHE=$PWD/.demo/cache # nothing is fetched

bold='' plain=''
if [[ -t 1 && -z ${NO_COLOR:-} && ${TERM:-dumb} != dumb ]]; then bold=$'\033[1m' plain=$'\033[0m'; fi
say() { printf '\n%s%s%s\n' "$bold" "$*" "$plain"; }

rm -rf runs/demo runs/demo-interrupted
say "1. Make a tiny model and data from nothing"
python launch/examples/make_demo.py .demo

say "2. Fine-tune it: 2 processes, DeepSpeed ZeRO-3, a checkpoint every 20 steps, 3 of them kept"
launch/train.sh $recipe

say "3. Which checkpoints are there, and are they intact?"
keepstep ls runs/demo
keepstep verify --deep runs/demo

say "4. Start another run, and kill it (SIGKILL, every process) after its first checkpoint"
launch/train.sh $recipe --output_dir runs/demo-interrupted --max_steps 60 &
script=$!
until [[ -d runs/demo-interrupted/checkpoint-20 ]]; do
  kill -0 "$script" || exit 1
  sleep 0.2
done
sleep 1.5 # somewhere between two checkpoints
launcher=$(pgrep -P "$script" -f accelerate-launch)
kill -KILL $(pgrep -P "$launcher") "$launcher"
wait "$script" || echo "(the run ended with exit status $?)"
keepstep ls runs/demo-interrupted

say "5. The same command again"
launch/train.sh $recipe --output_dir runs/demo-interrupted --max_steps 60

say "What happened"
cat <<END
The first run learned and then overfitted: its best checkpoint is not its last, and both are kept.
  keepstep ls runs/demo
The second was killed in mid-step, and carried on from its newest complete checkpoint.
  keepstep log runs/demo-interrupted
All of it as a page with charts:
  keepstep report runs/demo-interrupted --out report.html
The best model: runs/demo/best, loaded by AutoModelForCausalLM.from_pretrained.
END
