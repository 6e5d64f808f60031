"""The least-squares problem that all rows of all layers that read the same inputs have in common."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..errors import NumericalError, ShapeError
from ..ranks import ALONE, Ranks
from .factor import cholesky, invert


@dataclass(frozen=True)
class Problem:
    """Minimise ‖(W − Z)X‖²_F + λ‖W − Z‖²_F over Z, for the rows of any W; λ = damping · mean(diag XXᵀ).

    Every row is a problem of its own, so a solver may be given some of a layer's rows. SparseGPT's factor and the scale
    serve all layers that read X; ADMM's penalty goes another way in each, and its factors are not kept. Where the
    damping alone keeps it from being singular, it is factorised in float64, whatever the dtype of the Gram matrix: a
    factorisation loses as many digits as the root of the condition number has.

    Args:
        gram: XXᵀ (in, in), summed over the calibration tokens, float32 or float64: the dtype that solvers work in.
        damping: Relative size of λ; what keeps the problem definite when inputs are dead or dependent.
        ranks: The processes that have the same problem, and share the work on it: all must ask for the same.
    """

    gram: Tensor
    damping: float = 0.01
    ranks: Ranks = ALONE

    def check(self, weight: Tensor, mask: Tensor | None = None) -> None:
        """Raise unless weight (out, in) and mask (out, in) belong to these inputs.

        Raises:
            ShapeError: they do not.
        """
        of_mask = "" if mask is None else f", mask {tuple(mask.shape)}"
        fits = (
            weight.dim() == 2
            and self.gram.shape == (weight.shape[1],) * 2
            and (mask is None or mask.shape == weight.shape)
        )
        if not fits:
            raise ShapeError(
                f"weight {tuple(weight.shape)} and gram {tuple(self.gram.shape)}{of_mask} do not belong together; "
                "weight and mask must be (out, in), gram (in, in)"
            )

    @property
    def shift(self) -> Tensor:
        """λ, a scalar."""
        return self.damping * self.gram.diagonal().mean()

    @property
    def diagonal(self) -> Tensor:
        """Of XXᵀ + λI, (in,)."""
        return self.gram.diagonal() + self.shift

    def times(self, rows: Tensor) -> Tensor:
        """Of rows (out, in) and XXᵀ + λI, the product: a new tensor (out, in)."""
        return (rows @ self.gram).addcmul_(rows, self.shift)

    @cached_property
    def inverse_factor(self) -> Tensor:
        """U (in, in), upper triangular with UᵀU = H⁻¹, in the dtype of the Gram matrix.

        H = XXᵀ + λI as SparseGPT has it: an input that was always zero counts with H_jj = 1 before damping.

        Raises:
            NumericalError: H cannot be factorised.
        """
        # With rows and columns turned round, H = LLᵀ; L⁻¹ turned round is U.
        hessian = self.gram.flip(0, 1).to(torch.float64)
        diagonal = hessian.diagonal()
        diagonal[diagonal == 0] = 1
        diagonal += self.damping * diagonal.mean()
        factor = invert(self._cholesky(hessian), self.ranks).to(self.gram.dtype)
        del hessian, diagonal
        return factor.flip(0, 1)

    @cached_property
    def scale(self) -> Tensor:
        """√diag(XXᵀ + λI) (in,), 1 for a dead input without damping."""
        scale = self.diagonal.sqrt()
        return torch.where(scale > 0, scale, 1)

    def penalised(self, penalty: float) -> Tensor:
        """L (in, in), lower triangular with LLᵀ = H + ρI, H = XXᵀ + λI scaled to a unit diagonal.

        In the dtype of the Gram matrix, where a hundredth of ρ is more than what it rounds: the eigenvalues of H add up
        to in, so this is of the order of in · ε. Otherwise in float64.

        Raises:
            NumericalError: H + ρI cannot be factorised.
        """
        rounds = len(self.gram) * torch.finfo(self.gram.dtype).eps
        dtype = self.gram.dtype if penalty > 100 * rounds else torch.float64
        scale = self.scale.to(dtype)
        scaled = self.gram.to(dtype, copy=True)
        scaled.diagonal().add_(self.shift.to(dtype))
        scaled.div_(scale).div_(scale[:, None]).diagonal().add_(penalty)
        return self._cholesky(scaled)

    def _cholesky(self, matrix: Tensor) -> Tensor:
        """The lower factor of a symmetric matrix (in, in), in its place: of 10000 inputs it takes 800 MB in float64."""
        try:
            return cholesky(matrix, self.ranks)
        except torch.linalg.LinAlgError as error:
            raise NumericalError(
                f"gram cannot be factorised with damping={self.damping}: some inputs depend on others up to rounding; "
                "raise `damping`, and if that does not help look for NaN or infinite values in the statistics"
            ) from error
