#!/usr/bin/env bash
# Create $VENV and install wellposed with the extras of "lab" (the command) or "dev" (the checks).
set -euo pipefail
cd "$(dirname "$0")/.."
kind=${1:?usage: scripts/setup.sh lab|dev}
python=${PYTHON:-python3}
venv=${VENV:-.venv}

if ! command -v "$python" >/dev/null; then
  echo "error: '$python' was not found; install Python 3.11 or newer, or name one: make PYTHON=python3.12 ..." >&2
  exit 1
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "error: wellposed needs Python 3.11 or newer, but '$python' is $("$python" -c 'import platform; print(platform.python_version())'); name another: make PYTHON=python3.12 ..." >&2
  exit 1
fi

if [ ! -x "$venv/bin/python" ]; then
  echo "creating $venv with $("$python" --version)"
  "$python" -m venv "$venv" || { echo "error: '$python -m venv' failed; on Debian: apt install python3-venv" >&2; exit 1; }
fi
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt)

if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
  echo "installing torch: about 200 MB as a CPU build, several GB with CUDA (TORCH_INDEX=<address> picks a CPU build)"
  "${pip[@]}" ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
fi
case $kind in
  lab) extras=lab; size="about 150 MB" ;;
  dev) extras=lab,dev; size="about 250 MB" ;;
  *) echo "error: unknown kind '$kind'; allowed: lab, dev" >&2; exit 2 ;;
esac
echo "installing wellposed[$extras] and what it needs ($size where nothing is cached)"
"${pip[@]}" -e ".[$extras]"
touch "$venv/.installed-$kind"
[ "$kind" = dev ] && touch "$venv/.installed-lab"
exit 0
