#!/usr/bin/env bash
# Run every benchmark, one after another; each prints a table.
set -euo pipefail
cd "$(dirname "$0")/.."
for file in benchmarks/*.py; do
  echo "── $file"
  "${VENV:-.venv}/bin/python" "$file"
done
