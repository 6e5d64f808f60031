"""The dtypes that a command, or an argument, may name. They are apart from what reads them, which imports torch."""

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")

BITS = {"int8": 8, "int4": 4}
"""Kinds of integers that values can be stored in, and their bits."""

GROUP = 128
"""Inputs that share a scale of integers, where nothing else is said."""
