"""Made `solvers/`: what the published programs of ALPS, SparseGPT, Wanda and RIA do to layers of SmolLM2-135M-Instruct.

    python tests/golden/make_solvers.py MODEL TEXT OUT --alps ALPS --sparsegpt SPARSEGPT --wanda WANDA --ria RIA

MODEL is the dense checkpoint (`benchmarks/make_smollm2.py`; Apache-2.0), TEXT `wiki.valid.raw` of WikiText-2, and the
other four are checkouts, as they were at

    mazumder-lab/ALPS  8af9e6b5c8b1b06a028bde6065e5c38829df3a19
    IST-DASLab/sparsegpt  147d2159dc4f3e9f73e47b32c04d7b3708f44436
    locuslab/wanda  8e8fc87b4a2f9955baa7e76e64d5fce7fa8724a6
    biomedical-cybernetics/Relative-importance-and-activation-pruning  7bc55b06924659ea977f7804b773ce3ef0d55c2f

Their programs are imported from there and run without a change, on the processor. Only results are kept. ALPS runs a
second time with float64 in place of float32: in float32 its products with the Gram matrix round so much that another
order of the calibration windows changes the mask in some thousandths of the groups.

A layer is the first rows and inputs of the model's own, its weight in float16. It is given as many tokens as it has
inputs, with the Gram matrix of the real ones: the columns of its Cholesky factor, of which the lower triangle is all
that is stored. Every row of it is rounded to whole multiples of a power of two, about a thousandth of its norm: then
float32 sums the Gram matrix without rounding, in any order. `--rows 0 --inputs 0` takes layers whole.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from types import FrameType, ModuleType, SimpleNamespace
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_eggs.calibration import token_windows
from optimum_eggs.masks import topn_mask
from optimum_eggs.packing import pack_mask
from optimum_eggs.pattern import NMPattern

LAYERS = {
    "model.layers.14.self_attn.o_proj": ["2:4"],
    "model.layers.14.mlp.up_proj": ["2:4"],
    "model.layers.14.mlp.down_proj": ["2:4", "4:8"],
}
"""Layer -> the patterns that it is pruned to."""

NEARLY_SPARSE = "model.layers.14.self_attn.o_proj"
"""Of this layer there is a smaller piece too, in which two weights of four have been made small: there ALPS lowers its
penalty and begins anew, which it does on none of the layers as they are."""

RUNS = [
    ("alps", torch.float32),
    ("alps-float64", torch.float64),
    ("sparsegpt", torch.float32),
    ("wanda", torch.float32),
    ("ria", torch.float32),
]
"""What is run: a method, and the dtype that its program's `float()` stands for."""

_BATCHES = 16  # that the tokens are given in, as calibration windows are


@torch.no_grad()
def real_layers(model: str, text: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight (out, in) and Gram matrix (in, in), float64, of every layer in the dense model, over 16 x 512 tokens."""
    dense = AutoModelForCausalLM.from_pretrained(model, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    windows = token_windows(text, tokenizer, num_samples=16, seq_len=512, sampling="sequential", seed=0)
    modules = {name: dense.get_submodule(name) for name in LAYERS}
    grams = {name: torch.zeros(module.in_features, module.in_features).double() for name, module in modules.items()}

    def add(name, inputs):
        tokens = inputs.flatten(0, -2)
        grams[name] += tokens.T @ tokens

    for name, module in modules.items():
        module.register_forward_pre_hook(lambda _, inputs, name=name: add(name, inputs[0]))
    for batch in windows.split(4):
        dense(batch)
    return {name: (module.weight.detach(), grams[name]) for name, module in modules.items()}


def cut(weight: Tensor, gram: Tensor, rows: int | None, inputs: int | None) -> tuple[Tensor, Tensor]:
    """The first rows and inputs of a layer: its weight, and the Cholesky factor of a multiple of its Gram matrix."""
    gram = gram[:inputs, :inputs]
    factor = torch.linalg.cholesky(gram) * (2**14 / gram.diagonal().max().sqrt())
    unit = 2 ** (factor.norm(dim=1, keepdim=True) / 2000).log2().ceil()
    factor = (factor / unit).round() * unit
    assert torch.equal(factor.half().double(), factor)
    assert ((factor / unit).norm(dim=1) < 2**11.5).all()  # so every sum of products is below 2^24
    return weight[:rows, :inputs].half(), factor.half()


def nearly_sparse(weight: Tensor) -> Tensor:
    """The weight with all but the two largest of every four at a seventh of what they were."""
    return torch.where(topn_mask(weight.abs(), NMPattern(2, 4)), weight, weight / 7)


def imported(folder: Path, name: str) -> ModuleType:
    """The module `name` of a checkout. Modules beside it are forgotten: those of another have the same names."""
    known = set(sys.modules)
    with mock.patch.object(sys, "path", [str(folder), *sys.path]):
        module = importlib.import_module(name)
    for other in set(sys.modules) - known:
        if Path(getattr(sys.modules[other], "__file__", None) or "/").is_relative_to(folder):
            del sys.modules[other]
    return module


class OnTheProcessor(TorchFunctionMode):
    """Nothing goes to the GPU that a program names, and `float()` gives the default dtype."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.to and len(args) == 2 and isinstance(args[1], str):
            args = (args[0], "cpu")
        elif function is Tensor.float:
            function, args = Tensor.to, (args[0], torch.get_default_dtype())
        return function(*args, **(kwargs or {}))


def linear(weight: Tensor) -> nn.Linear:
    """A layer of its own with this weight (out, in), in the default dtype."""
    layer = nn.Linear(weight.shape[1], len(weight), bias=False)
    layer.weight.data = weight.to(layer.weight.dtype)
    return layer


class OneLayer(nn.Module):
    """A language model, as far as Wanda and RIA ask: one block of one linear layer. "Tokens" are its inputs."""

    class Block(nn.Module):
        """Inputs (1, tokens, in) in and out."""

        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.linear = layer

        def forward(self, inputs, attention_mask, position_ids):
            self.linear(inputs)
            return (inputs,)

    def __init__(self, layer: nn.Linear, seqlen: int) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([self.Block(layer)])
        self.config = SimpleNamespace(use_cache=False, hidden_size=layer.in_features)
        self.hf_device_map, self.seqlen = {}, seqlen

    def forward(self, inputs):
        return self.model.layers[0](inputs, attention_mask=None, position_ids=None)


def scored(module: ModuleType, method: str, layer: nn.Linear, batches: Tensor, pattern: NMPattern) -> None:
    """Prune `layer` in place as the scripts of Wanda and RIA do. batches (batches, tokens, in)."""
    arguments = {"model": "llama", "nsamples": len(batches), "seed": 0, "seqlen": batches.shape[1], "a": 0.5}
    arguments |= {"prune_method": method, "calib_dataset": "c4", "sparsity_ratio": 0.5, "use_variant": False}
    arguments |= {"reconstruction": False, "gptq": False, "reallocation": False, "semi_sparse_acc": False}
    prune = {"wanda": "prune_wanda", "ria": "prune_ria"}[method]
    loaders = [(batch[None],) for batch in batches], None
    with mock.patch.object(module, "get_loaders", return_value=loaders):
        getattr(module, prune)(
            SimpleNamespace(**arguments),
            OneLayer(layer, batches.shape[1]),
            tokenizer=None,
            device=torch.device("cpu"),
            prune_n=pattern.m - pattern.n,  # theirs is the number that goes
            prune_m=pattern.m,
        )


def reconstructed(program: object, layer: nn.Linear, batches: Tensor) -> None:
    """Give the program of a layer its inputs, as the scripts of ALPS and SparseGPT do."""
    for batch in batches:
        program.add_batch(batch[None], layer(batch)[None])


def alps(module: ModuleType, layer: nn.Linear, batches: Tensor, pattern: NMPattern) -> int:
    """Prune `layer` in place; the number of its steps, which the program has in a variable alone."""
    steps = []

    def watch(frame: FrameType, event: str, _: object) -> None:
        if event == "return" and frame.f_code.co_name == "ALPS_admm":
            steps.append(frame.f_locals["i_admm"] + 1)

    with OnTheProcessor():
        program = module.ALPS_prune(layer, nsamples=len(batches), seqlen=batches.shape[1])
        reconstructed(program, layer, batches)
        sys.setprofile(watch)
        program.ALPS_admm(sp=0.5, nm_n=pattern.n, nm_m=pattern.m)
        sys.setprofile(None)
    return steps[0]


def sparsegpt(module: ModuleType, layer: nn.Linear, batches: Tensor, pattern: NMPattern) -> None:
    """Prune `layer` in place."""
    program = module.SparseGPT(layer)
    reconstructed(program, layer, batches)
    program.fasterprune(0.5, prunen=pattern.m - pattern.n, prunem=pattern.m, percdamp=0.01, blocksize=128)


@torch.no_grad()
def results(modules: dict[str, ModuleType], weight: Tensor, factor: Tensor, pattern: NMPattern) -> dict[str, Tensor]:
    """By `pattern/method/what`: the bits of the mask, the relative error, and for ALPS the number of steps."""
    found = {}
    for name, dtype in RUNS:
        torch.set_default_dtype(dtype)
        method, layer = name.split("-")[0], linear(weight)
        tokens = factor.T.to(dtype)  # (tokens, in)
        batches = tokens.reshape(_BATCHES, -1, tokens.shape[1])
        if method == "alps":
            found[f"{pattern}/{name}/steps"] = torch.tensor(alps(modules[method], layer, batches, pattern))
        elif method == "sparsegpt":
            sparsegpt(modules[method], layer, batches, pattern)
        else:
            scored(modules[method], method, layer, batches, pattern)
        torch.set_default_dtype(torch.float32)
        pruned, dense, tokens = layer.weight.double(), weight.double(), tokens.double()
        found[f"{pattern}/{name}/mask"] = pack_mask(pruned != 0)
        found[f"{pattern}/{name}/error"] = ((dense - pruned) @ tokens.T).norm() ** 2 / (dense @ tokens.T).norm() ** 2
    return found


def main() -> None:
    """Write one file for every layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("out", type=Path)
    parser.add_argument("--alps", type=Path, required=True)
    parser.add_argument("--sparsegpt", type=Path, required=True)
    parser.add_argument("--wanda", type=Path, required=True)
    parser.add_argument("--ria", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--inputs", type=int, default=768)
    args = parser.parse_args()

    modules = {
        "alps": imported(args.alps, "alps"),
        "sparsegpt": imported(args.sparsegpt, "sparsegpt"),
        "wanda": imported(args.wanda, "lib.prune"),
        "ria": imported(args.ria, "lib.prune"),
    }
    args.out.mkdir(parents=True, exist_ok=True)

    def write(name: str, weight: Tensor, factor: Tensor, patterns: list[str]) -> None:
        lower = torch.tril_indices(*factor.shape)
        tensors = {"weight": weight, "factor": factor[lower[0], lower[1]]}
        for pattern in patterns:
            tensors |= results(modules, weight, factor, NMPattern.parse(pattern))
        save_file(tensors, args.out / f"{name}.safetensors")

    with mock.patch.object(torch.cuda, "synchronize"):
        layers = real_layers(args.model, args.text)
        for name, (weight, gram) in layers.items():
            write(name, *cut(weight, gram, args.rows or None, args.inputs or None), LAYERS[name])
        weight, factor = cut(*layers[NEARLY_SPARSE], 64, 128)
        write("nearly_sparse", nearly_sparse(weight), factor, ["2:4"])


if __name__ == "__main__":
    main()
