#!/usr/bin/env bash
# From nothing to a trained and evaluated multimodal model. Overrides pass through: scripts/quickstart.sh seed=1
set -eu
cd "$(dirname "$0")/.."
bash scripts/env.sh
.venv/bin/mllm-factory train experiment=quickstart "$@"
