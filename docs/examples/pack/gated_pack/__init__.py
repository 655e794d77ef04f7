"""A pack of components. Empty on purpose: whoever looks for the presets in ``gated_pack.conf`` must not import torch."""
