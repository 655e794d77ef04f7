"""``python -m mllm_factory``: the same as the command ``mllm-factory``; what torchrun starts."""

import sys

from mllm_factory import torchrun
from mllm_factory.cli import main

torchrun.end_with_it()
sys.exit(main())
