"""Export a packed model as an ordinary dense checkpoint, zeros in place."""

from __future__ import annotations

import argparse
import json

from .arguments import add_shard_size, add_trust
from .printing import others_on_stderr


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `export`."""
    parser.add_argument("model", metavar="DIR", help="folder of a packed model")
    parser.add_argument("output", metavar="OUT", help="folder to make")
    parser.add_argument("--format", choices=["dense"], default="dense", help="format to write (default: dense)")
    add_trust(parser.add_argument, "DIR")
    add_shard_size(parser.add_argument)
    parser.add_argument("--overwrite", action="store_true", help="replace what this package wrote at OUT (default: no)")


def run(args: argparse.Namespace) -> int:
    """Load, make dense, save."""
    from ..errors import ModelError
    from ..evaluation.size import model_size
    from ..folders import check_output, new_folder
    from ..hf.loading import has_tokenizer, load_model, load_tokenizer
    from ..nn import MatrixNorm, packed_layers
    from ..sharing import own_card, put_card

    path = check_output(args.output, args.overwrite, sources=[args.model])
    own = own_card(path)
    with others_on_stderr():
        tokenizer = (
            load_tokenizer(args.model, trust_remote_code=args.trust_remote_code) if has_tokenizer(args.model) else None
        )
        model = load_model(args.model, trust_remote_code=args.trust_remote_code)
        layers = packed_layers(model)
        if not layers:
            raise ModelError(f"{args.model}: has no packed layers, so it is dense already")
        needs = model_size(model, None).parameters * model.dtype.itemsize
        turned = any(isinstance(module, MatrixNorm) for module in model.modules())
        if turned:  # the dense model has a head of its own
            needs += model.get_input_embeddings().num_embeddings * model.config.hidden_size * model.dtype.itemsize
        count = len(layers)
        del layers  # or packed and dense ones are in memory together
        with new_folder(args.output, args.overwrite, sources=[args.model], needs=needs) as folder:
            model = model.dequantize()
            model.save_pretrained(folder, max_shard_size=args.max_shard_size)
            put_card(own, folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
    if args.json:
        print(json.dumps({"output": args.output, "format": args.format, "layers": count}))
    else:
        print(f"{count} layers made dense, saved to {args.output}")
    return 0
