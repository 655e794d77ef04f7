"""Presets of this pack, found through ``hydra.searchpath=[pkg://gated_pack.conf]``."""
