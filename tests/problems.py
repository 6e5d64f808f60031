"""Least-squares problems of every kind that calibration brings."""

import torch
from oracles import gaussian

COLUMNS = 32
KINDS = ["random", "correlated", "dead inputs", "duplicate inputs", "few tokens", "one large input"]


def inputs(kind, columns=COLUMNS, seed=1):
    """Layer inputs X (in, tokens), float64."""
    x = gaussian(columns, 200, seed=seed, dtype=torch.float64)
    if kind == "correlated":
        x = gaussian(columns, columns, seed=seed + 1, dtype=torch.float64) @ x
    elif kind == "dead inputs":
        x[::3] = 0
    elif kind == "duplicate inputs":
        x[1::2] = x[::2]
    elif kind == "few tokens":
        x = x[:, :5]
    elif kind == "one large input":
        x[7] *= 1000
    elif kind == "no input":
        x.zero_()
    return x


def layer(kind="random", rows=32, dtype=torch.float64, seed=0):
    """Weight (rows, 32) and gram (32, 32)."""
    x = inputs(kind)
    return gaussian(rows, COLUMNS, seed=seed, dtype=dtype), (x @ x.T).to(dtype)
