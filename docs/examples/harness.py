"""Questions of a run as a task for lm-evaluation-harness, which then needs no network.

The prompts are those that the run itself asks: the last answer of each of its test samples, after
its chat template. The harness must not put its own around them (no --apply_chat_template).

    python harness.py RUN TASKS
    fedraclora export RUN --format hf --out exported
    lm_eval --model hf --model_args pretrained=exported --tasks questions --include_path TASKS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import fedraclora
from fedraclora.evaluation.generate import cut

TASK = """\
task: questions
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{right}}}}"
target_delimiter: "{delimiter}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def write(run: fedraclora.RunResult, folder: Path) -> None:
    """Write the test questions of a run, and the task that reads them."""
    task = run.builder.built.task
    samples, tokenizer, decode = task.test, task.tokenizer, task.tokenizer.decode
    questions, fits = [], {"": True, " ": True}  # what stands before an answer
    for row, (choices, right) in enumerate(
        zip(samples.beside["choices"], samples.beside["right"], strict=True)
    ):
        before = cut(samples.inputs["input_ids"][row], samples.target[row])[0]
        spoken = [ids[ids >= 0] for ids in choices if ids[0] >= 0]
        prompt, words = decode(before), [decode(ids) for ids in spoken]
        questions.append({"prompt": prompt, "choices": words, "right": int(right.int().argmax())})
        for delimiter in fits:
            for word, ids in zip(words, spoken, strict=True):
                read = tokenizer(prompt + delimiter + word, add_special_tokens=False)["input_ids"]
                fits[delimiter] &= read == [*before.tolist(), *ids.tolist()]
    if not any(fits.values()):
        raise SystemExit("texts that are put together have other tokens than the run has read")
    delimiter = next(text for text, fit in fits.items() if fit)
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "questions.jsonl").resolve()
    file.write_text("".join(json.dumps(asked) + "\n" for asked in questions))
    text = TASK.format(file=json.dumps(str(file)), delimiter=delimiter)
    (folder / "questions.yaml").write_text(text)


if __name__ == "__main__":
    write(fedraclora.read_run(sys.argv[1]), Path(sys.argv[2]))
