"""Packed models in servers that are not transformers."""
