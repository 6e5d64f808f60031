"""The dtypes that a command, or an argument, may name. They are apart from what reads them, which imports torch."""

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
