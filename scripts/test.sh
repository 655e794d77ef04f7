#!/usr/bin/env bash
# Everything that decides whether a change is good. Arguments go to pytest: scripts/test.sh -m "not slow"
set -eu
cd "$(dirname "$0")/.."
bash scripts/env.sh
bin=$PWD/.venv/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
# types are checked on the package as it installs: an editable install is invisible to mypy
rm -rf build/types
"$bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --target build/types .
MYPYPATH=build/types "$bin/mypy" -p mllm_factory
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "$bin/python" -m pytest -n 2 --dist worksteal "$@"
