"""Kept values to integer codes, so that what a layer computes changes as little as it can."""

from __future__ import annotations

import torch
from torch import Tensor

from ..packing.codes import Coding, nearest_codes, whole_range
from .problem import Problem

# Of the largest value, what the highest code stands for.
_CLIPS = (1.15, 1.08, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)
_BLOCK = 64  # columns after which the rest of the matrix is brought up to date
_NUMBERS = 1 << 26  # of the scales' normal equations, that exist at a time


def nearest(values: Tensor, coding: Coding) -> tuple[Tensor, Tensor]:
    """Round each value to the nearest code, by a scale at which the largest of its group is the highest code.

    Args:
        values: (out, in), float32; a zero stays one.
        coding: Of the values.

    Returns:
        Codes (out, in), int8, and scales (out, scales), bfloat16.
    """
    scale = whole_range(values, coding, coding.group)
    return nearest_codes(values, scale.to(values.dtype), coding, coding.group), scale


def round_values(
    weight: Tensor, values: Tensor, mask: Tensor, problem: Problem, coding: Coding, rounds: int = 2, sweeps: int = 2
) -> tuple[Tensor, Tensor]:
    """Minimise ‖(W − Z)X‖²_F + λ‖W − Z‖²_F over the Z that codes and scales can be, on the mask, from values near it.

    Column by column, each value is rounded and its error passed on to the columns to the right (Frantar et al. 2023,
    arXiv 2210.17323, with the factor of all inputs); the scale of a group is that, of some parts of its range, whose
    rounding weighs least. Then in turn: the best scales for these codes, by least squares, and sweeps in which every
    code becomes the best for all others.

    Args:
        weight: W (out, in), in the dtype of the Gram matrix.
        values: What to begin with (out, in), zero off the mask.
        mask: (out, in), boolean.
        problem: Of the layer's inputs.
        coding: Of the values.
        rounds: How often scales and codes are improved.
        sweeps: Over all columns, in each round.

    Returns:
        Codes (out, in), int8, zero off the mask, and scales (out, scales), bfloat16.

    Raises:
        ShapeError: the shapes do not belong together.
        NumericalError: the Gram matrix cannot be factorised.
    """
    problem.check(weight, mask)
    codes, scale = _pass_on(values, mask, problem, coding)
    for _ in range(rounds):
        scale = _fit_scales(weight, codes, scale, problem, coding)
        codes = _descend(weight, codes, scale, mask, problem, coding, sweeps)
    return codes.to(torch.int8), scale


def _pass_on(values: Tensor, mask: Tensor, problem: Problem, coding: Coding) -> tuple[Tensor, Tensor]:
    """Codes (out, in) in the values' dtype, and scales (out, scales): rounded from left to right, errors passed on."""
    factor = problem.inverse_factor.to(values.dtype)
    rest, codes = values.clone(), torch.zeros_like(values)
    scales = []
    for start in range(0, values.shape[1], coding.group):
        stop = min(start + coding.group, values.shape[1])
        block, kept = rest[:, start:stop].t().contiguous(), mask[:, start:stop]  # (in, out): a column is in one place
        local = factor[start:stop, start:stop]
        scale = _search(block.t(), kept, local.diagonal().square().reciprocal(), coding)
        errors = torch.empty_like(block)
        for i in range(stop - start):
            code = to_codes(block[i], scale, kept[:, i], coding)
            codes[:, start + i] = code
            errors[i] = (block[i] - code * scale) / local[i, i]
            block[i + 1 :].addr_(local[i, i + 1 :], errors[i], alpha=-1)
        rest[:, stop:].addmm_(errors.t(), factor[start:stop, stop:], alpha=-1)
        scales.append(scale)
    return codes, torch.stack(scales, 1).to(torch.bfloat16)


def _search(values: Tensor, mask: Tensor, weighing: Tensor, coding: Coding) -> Tensor:
    """The scale (out,) of a group (out, group) whose errors of rounding, squared and weighed (group,), are least.

    Bytes have range enough for the largest value.
    """
    largest = (values * mask).abs().amax(1)
    if coding.bits == 8:
        return _rounded(largest / -(coding.lowest + 1))
    least, best = torch.full_like(largest, torch.inf), largest
    for clip in _CLIPS:
        scale = _rounded(largest * (clip / -coding.lowest))
        error = (to_codes(values, scale[:, None], mask, coding) * scale[:, None] - values * mask).square() @ weighing
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


def _fit_scales(weight: Tensor, codes: Tensor, scale: Tensor, problem: Problem, coding: Coding) -> Tensor:
    """The scales (out, scales) at which fixed codes come nearest to the weight: least squares, a few unknowns a row.

    Where a group is all zeros, or the equations of a row have no answer that rounds, the row keeps its scales.
    """
    groups, columns = scale.shape[1], weight.shape[1]
    bounds = [slice(start, min(start + coding.group, columns)) for start in range(0, columns, coding.group)]
    found = scale.clone()
    height = max(1, _NUMBERS // (groups**2 + columns))
    for rows in torch.arange(len(weight)).split(height):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        code, own = codes[part], problem.times(weight[part])
        normal = weight.new_empty(len(rows), groups, groups)
        for number, bound in enumerate(bounds):
            image = code[:, bound] @ problem.gram[bound]
            image[:, bound].addcmul_(code[:, bound], problem.shift)
            normal[:, :, number] = _sums(image.mul_(code), coding)
        right = _sums(own.mul_(code), coding)
        ridge = 1e-6 * normal.diagonal(dim1=1, dim2=2).mean(1)
        normal.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
        lower, failed = torch.linalg.cholesky_ex(normal)
        solved = torch.cholesky_solve(right[:, :, None], lower)[:, :, 0]
        usable = (failed == 0) & torch.isfinite(solved).all(1)
        found[part] = torch.where(usable[:, None], solved.to(torch.bfloat16), scale[part])
    return found


def _descend(
    weight: Tensor, codes: Tensor, scale: Tensor, mask: Tensor, problem: Problem, coding: Coding, sweeps: int
) -> Tensor:
    """Codes (out, in), each the best while all others stay, column by column."""
    spaced = spread(scale.to(weight.dtype), weight.shape[1], coding)
    values = codes * spaced
    slope = problem.times(weight - values)  # how much the error would fall with every value
    gram, diagonal, columns = problem.gram, problem.diagonal, weight.shape[1]
    for _ in range(sweeps):
        for start in range(0, columns, _BLOCK):
            stop = min(start + _BLOCK, columns)
            local = gram[start:stop, start:stop].clone()
            local.diagonal().add_(problem.shift)
            block = slope[:, start:stop].t().contiguous()  # (in, out)
            steps = torch.zeros_like(block)
            for i in range(stop - start):
                j = start + i
                best = values[:, j] + block[i] / diagonal[j].clamp_min(torch.finfo(weight.dtype).tiny)
                code = to_codes(best, spaced[:, j], mask[:, j], coding)
                steps[i] = code * spaced[:, j] - values[:, j]
                values[:, j] += steps[i]
                codes[:, j] = code
                block.addr_(local[i], steps[i], alpha=-1)
            slope.addmm_(steps.t(), gram[start:stop], alpha=-1)
            slope[:, start:stop] = block.t()
    return codes


def to_codes(values: Tensor, scale: Tensor, mask: Tensor, coding: Coding) -> Tensor:
    """The nearest codes, as floats; zero off the mask and where the scale is zero."""
    codes = (values / torch.where(scale == 0, 1, scale)).round_().clamp_(coding.lowest, -(coding.lowest + 1))
    return codes.mul_(mask & (scale != 0))


def _groups(values: Tensor, coding: Coding) -> Tensor:
    """Rows (out, in) in groups (out, scales, group), the last one padded with zeros."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % coding.group))
    return padded.unflatten(1, (-1, coding.group))


def _sums(values: Tensor, coding: Coding) -> Tensor:
    """Sums of the groups (out, scales)."""
    return _groups(values, coding).sum(2)


def _rounded(scale: Tensor) -> Tensor:
    """A scale as it is stored, in the dtype that it is computed in."""
    return scale.to(torch.bfloat16).to(scale.dtype)


def spread(scale: Tensor, columns: int, coding: Coding) -> Tensor:
    """Scales (out, scales) for every column (out, in)."""
    return scale.repeat_interleave(coding.group, 1)[:, :columns]
