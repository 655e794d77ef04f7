"""``python -m mllm_factory``: the same as the command ``mllm-factory``; what torchrun starts."""

import sys

from mllm_factory.cli import main

sys.exit(main())
