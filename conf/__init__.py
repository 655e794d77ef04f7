"""The YAML tree, reached by Hydra as pkg://mllm_factory.conf."""
