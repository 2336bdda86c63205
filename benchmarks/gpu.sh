#!/usr/bin/env bash
# What one NVIDIA GPU is tried and measured with: three parts of at most ten minutes each, one table.
#   benchmarks/gpu.sh 1|2|3 [--out DIR] [--cpu] [--only WORD ...]
# For a machine without a network that has torch 2.11 (CUDA 13), transformers 5.17, accelerate 1.15
# and peft, what it lacks, fetched and built on another with Linux on x86-64 and a network:
#   benchmarks/gpu.sh wheels DIR              all that the three parts need
#   benchmarks/gpu.sh wheels DIR quantization bitsandbytes; transformers 5.17 stays, for the size
#   WHEELS=DIR benchmarks/gpu.sh 1            unpacks them into a folder of its own, and uses them
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
LIMIT=64000000 # bytes of all wheels together

# Of constraints.txt, or the newest when this was written. What those need else is there already.
WANTED=(trl==1.16.0 datasets==5.2.0 peft==0.21.2 xxhash==4.1.0 dill==0.4.1 multiprocess==0.70.19
  tenacity==9.2.1 hjson==3.1.0 pydantic==2.14.4 pydantic-core==2.50.5 annotated-types==0.8.0
  typing-inspection==0.4.5)
# transformers 5.17 takes no huggingface_hub 2, which publishing needs.
NEWER=(transformers==5.23.0 huggingface_hub==2.4.0 hf-xet==1.8.0 httpx2==2.16.2 httpcore2==2.16.2
  truststore==0.10.5 idna==3.20 click==8.5.1 liger-kernel==0.8.5)
QUANTIZATION=(bitsandbytes==0.50.2)
DEEPSPEED=deepspeed==0.19.8 # a source package; its operators are compiled where they are first used

wheels() {
  local folder=$1 wanted=("${WANTED[@]}") platforms=() total=0 size file
  if [[ ${2:-} == quantization ]]; then wanted+=("${QUANTIZATION[@]}"); else wanted+=("${NEWER[@]}"); fi
  for file in manylinux2014 manylinux_2_17 manylinux_2_24 manylinux_2_28; do
    platforms+=(--platform "${file}_x86_64")
  done
  mkdir -p "$folder"
  "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --dest "$folder" \
    --python-version 3.12 --implementation cp "${platforms[@]}" "${wanted[@]}"
  DS_BUILD_OPS=0 "$PYTHON" -m pip wheel --quiet --no-deps --wheel-dir "$folder" "$DEEPSPEED"
  for file in "$folder"/*.whl; do
    size=$(stat --format %s "$file")
    total=$((total + size))
    printf '%10d  %s\n' "$size" "${file##*/}"
  done
  printf '%10d  bytes in all, of at most %d\n' "$total" "$LIMIT"
  ((total <= LIMIT)) || { echo "$folder holds more than that" >&2; return 1; }
}

if [[ ${1:-} == wheels && -n ${2:-} ]]; then
  wheels "${@:2}"
  exit
fi
if [[ -n ${WHEELS:-} ]]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" \
    "$WHEELS"/*.whl
fi
export PYTHONPATH="$PWD/src:$PWD${site:+:$site}${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
"$PYTHON" -m benchmarks.gpu "$@"
