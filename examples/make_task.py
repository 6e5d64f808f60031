"""Make a multiple-choice task for lm-evaluation-harness from a text: which of four continuations is the real one?

    python examples/make_task.py examples/data/judge.txt my-tasks
    optimum-cli eggs evaluate PACKED --tasks continuation --include-path my-tasks

Contexts and continuations are runs of words of the text; the wrong ones come from other places in it. For the harness'
own tasks (`--tasks arc_easy hellaswag`) nothing has to be made, but their data come from the Hub.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

TASK = """\
task: continuation
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="text file")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--context", type=int, default=24, help="words before the question")
    parser.add_argument("--words", type=int, default=8, help="words in each continuation")
    parser.add_argument("--questions", type=int, default=100, help="the most that are made")
    args = parser.parse_args()

    words = args.text.read_text(encoding="utf-8").split()
    length = args.context + args.words
    runs = [words[start : start + length] for start in range(0, len(words) - length + 1, length)]
    if len(runs) < 4:
        parser.error(f"{args.text} has {len(words)} words; four questions of {length} words need {4 * length}")
    draw = random.Random(0)
    lines = []
    for index, run in enumerate(runs[: args.questions]):
        others = draw.sample(runs[:index] + runs[index + 1 :], 3)
        choices = [" ".join(other[args.context :]) for other in others]
        answer = draw.randrange(4)
        choices.insert(answer, " ".join(run[args.context :]))
        lines.append(json.dumps({"context": " ".join(run[: args.context]), "choices": choices, "answer": answer}))
    args.output.mkdir(parents=True, exist_ok=True)
    data = (args.output / "continuation.jsonl").absolute()
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    (args.output / "continuation.yaml").write_text(TASK.format(data=json.dumps(str(data))), encoding="utf-8")
    print(f"{len(lines)} questions in {args.output}; run them with --tasks continuation --include-path {args.output}")


if __name__ == "__main__":
    main()
