"""The hooks into transformers."""
