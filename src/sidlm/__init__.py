"""Sid: Llama-family language models that need fewer tokens and fewer FLOPs."""

__version__ = "0.1.0"
