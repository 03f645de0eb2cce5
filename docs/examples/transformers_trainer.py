"""Text classification with `transformers.Trainer`, federated.

    python transformers_trainer.py MODEL ROWS.jsonl

A row has ``client``, ``text`` and ``label``, a whole number from 0. Copy the file; yours to change
are the numbers, `base`, and what `TrainingArguments` says.
"""

import functools
import sys
import tempfile

import datasets
import pandas as pd
import peft
import transformers

import fedraclora
from fedraclora.client import Round, Trained

RANK, ALPHA, TARGETS, CLASSES = 8, 16, ["query", "value"], 2
QUIET = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
STEPS, RATE = 4, 2e-3  # steps of a client in a round, 1 or more: of 0 the trainer takes one


def base(folder: str) -> transformers.PreTrainedModel:
    """Give the model, with the same new head each time."""
    transformers.set_seed(0)
    auto = transformers.AutoModelForSequenceClassification
    return auto.from_pretrained(folder, num_labels=CLASSES, dtype="float32")


@functools.cache
def load(folder: str) -> tuple[peft.PeftModel, transformers.PreTrainedTokenizerBase]:
    """Give the model with its adapters, and its tokenizer: once in a process."""
    lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="SEQ_CLS")
    return peft.get_peft_model(base(folder), lora), transformers.AutoTokenizer.from_pretrained(
        folder
    )


def train(round: Round, folder: str) -> Trained:
    """Train one client for one round, where its rows are."""
    model, tok = load(folder)
    model = round.install(model)
    rows = [tok(row["text"], truncation=True) | {"labels": row["label"]} for row in round.data]
    with tempfile.TemporaryDirectory() as empty:  # where no checkpoint of another round lies
        args = transformers.TrainingArguments(
            output_dir=empty,
            **QUIET,
            logging_nan_inf_filter=False,  # else a loss of NaN is told as 0.0
            seed=round.seed,  # of this run, client and round
            max_steps=STEPS,
            learning_rate=RATE * round.rate_scale,
            lr_scheduler_type="constant",  # another would start over in every round
            per_device_train_batch_size=8,
        )
        # A new one in each round: a trainer keeps its optimizer and its count of steps.
        trainer = transformers.Trainer(model, args, train_dataset=rows, processing_class=tok)
        trainer.remove_callback(transformers.PrinterCallback)
        end = trainer.train()
    return round.read(model, samples=len(round.data), steps=end.global_step, loss=end.training_loss)


def main(
    model: str, rows: str, method: str = "fed_rac_lora", **keys: object
) -> fedraclora.RunResult:
    """Run it, one client for each value of ``client`` in the file."""
    return fedraclora.simulate(
        model=base(model),
        data=datasets.Dataset.from_pandas(pd.read_json(rows, lines=True)),
        train=functools.partial(train, folder=model),
        method={"name": method, "rank": RANK, "alpha": ALPHA},
        **{"client": "client", "target_modules": TARGETS, "bias": "frozen", "head": "full"} | keys,
    )


if __name__ == "__main__":
    main(*sys.argv[1:], rounds=3)
