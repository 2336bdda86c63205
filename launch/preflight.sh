# What train.sh looks at before it launches: half a minute later each of these would be a traceback
# of every rank. Sourced there; sets config, processes, python, TORCH_EXTENSIONS_DIR.
# shellcheck shell=bash disable=SC2154 # train.sh sets recipe, root, gpus, config, processes

fail() { fail_with 2 "$@"; } # LINE [HINT]

fail_with() { # STATUS LINE [HINT]
  printf 'keepstep: %s\n' "$2" >&2
  (($# == 2)) || printf '    Hint: %s\n' "$3" >&2
  end "$1"
}

end() { # STATUS; a job hears of it in a file: srun tells that of whichever process it likes
  [[ -z ${KEEPSTEP_EXIT_FILE:-} ]] || echo "$1" >"$KEEPSTEP_EXIT_FILE" || true
  exit "$1"
}

check_environment() { # and set `python`, `prefix`, its folder, and `headers`, that of Python.h
  local launcher activate="source .venv/bin/activate (make install makes it)"
  [[ ! -f $root/.venv/bin/activate ]] || activate="source $root/.venv/bin/activate"
  launcher=$(command -v accelerate-launch) ||
    fail "there is no accelerate: keepstep's environment is not activated" "$activate"
  python=$(dirname "$launcher")/python
  [[ -x $python ]] || python=python3
  { read -r prefix && read -r headers; } < <("$python" -c 'import keepstep, sys, sysconfig
print(sys.prefix, sysconfig.get_path("include"), sep="\n")' 2>/dev/null) ||
    fail "$launcher is of an environment without keepstep" "$activate"
}

check_settings() {
  local name=$config names=("$root"/accelerate_configs/*.yaml)
  if [[ ! -f $config ]]; then
    config=$root/accelerate_configs/$name.yaml names=("${names[@]##*/}")
    [[ -f $config ]] ||
      fail "KEEPSTEP_CONFIG: $name is neither a file nor one of accelerate_configs" "${names[*]%.yaml}"
  fi
  [[ $processes =~ ^[1-9][0-9]{0,4}$ ]] ||
    fail "KEEPSTEP_PROCESSES: $processes is no number of processes"
}

check_temporary_folder() { # a container whose root file system is read-only
  local folder=${TMPDIR:-/tmp} made status=2
  [[ -z ${KEEPSTEP_EXIT_FILE:-} ]] || status=70 # a job has other nodes, and tries again
  { made=$(mktemp -d 2>/dev/null) && rmdir "$made"; } ||
    fail_with "$status" "nothing can be written in ${TMPDIR:+TMPDIR, }$folder, the folder for temporary files" \
      "export TMPDIR=FOLDER; in a pod: mount an emptyDir at /tmp"
}

makes() { mkdir -p "$1" 2>/dev/null && [[ -w $1 ]]; } # FOLDER

# On CPU DeepSpeed compiles a part of itself. In the environment's own folder: shared between
# environments it would be compiled anew at every launch.
check_extensions() {
  local compiler=${CXX:-c++} own without="or without DeepSpeed: KEEPSTEP_CONFIG=ddp"
  if [[ -z ${TORCH_EXTENSIONS_DIR:-} ]]; then
    TORCH_EXTENSIONS_DIR=$prefix/torch_extensions
    if ! makes "$TORCH_EXTENSIONS_DIR"; then # somebody else's environment
      own=$(cksum <<<"$prefix")
      TORCH_EXTENSIONS_DIR=${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/keepstep/torch_extensions-${own// /-}
    fi
  fi
  export TORCH_EXTENSIONS_DIR
  grep -q '^distributed_type: *DEEPSPEED' "$config" || return 0
  makes "$TORCH_EXTENSIONS_DIR" ||
    fail "nothing can be written in TORCH_EXTENSIONS_DIR, $TORCH_EXTENSIONS_DIR" \
      "export TORCH_EXTENSIONS_DIR=FOLDER, one that lasts: DeepSpeed compiles a part of itself there"
  ! compgen -G "$TORCH_EXTENSIONS_DIR/deepspeed_shm_comm/*.so" >/dev/null || return 0
  command -v "${compiler%% *}" >/dev/null ||
    fail "no compiler, and DeepSpeed compiles a part of itself on CPU: ${compiler%% *} (g++) is not installed" \
      "apt-get install g++; $without"
  [[ -f $headers/Python.h ]] ||
    fail "DeepSpeed compiles a part of itself on CPU, and there is no $headers/Python.h" \
      "apt-get install python3-dev; $without"
  echo "keepstep: compiling a part of DeepSpeed, once: this takes a minute or two" || true
}
