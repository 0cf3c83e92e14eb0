#!/usr/bin/env bash
# All checks of CI, or those named: scripts/check.sh [lint] [types] [floors] [docs] [ledger] [unit]
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${VENV:-.venv}/bin
started=$SECONDS

lint() { "$bin/ruff" check . && "$bin/ruff" format --check .; }
types() { "$bin/mypy"; }
floors() { PYTHONPATH=src "$bin/lint-imports"; }
docs() { "$bin/python" scripts/generate_docs.py --check; }
ledger() { "$bin/wellposed" ledger --check; }
unit() { OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 "$bin/python" -m pytest -q -n 2 --durations=10; }

for check in ${*:-lint types floors docs ledger unit}; do
  echo "── $check"
  "$check"
done
echo "all checks passed in $((SECONDS - started)) s"
