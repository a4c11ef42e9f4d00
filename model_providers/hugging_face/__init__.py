"""Weights and configurations of Hugging Face's architectures, from and to ours; transformers is not imported."""
