"""Supervised fine-tuning with TRL's `SFTTrainer`, federated.

    python sft.py MODEL ROWS.jsonl

A row has ``client``, ``prompt`` and ``completion``. Copy the file; yours to change are the numbers,
`load`, and what `SFTConfig` says.
"""

import functools
import sys
import tempfile

import datasets
import pandas as pd
import peft
import transformers
import trl

import fedraclora
from fedraclora.client import Round, Trained

RANK, ALPHA, TARGETS = 8, 16, ["q_proj", "v_proj"]
PLAIN = {"bf16": False, "gradient_checkpointing": False}  # in TRL both are True by default
QUIET = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
STEPS, RATE = 4, 2e-3  # steps of a client in a round, 1 or more: of 0 the trainer takes one


@functools.cache
def load(folder: str) -> tuple[peft.PeftModel, transformers.PreTrainedTokenizerBase]:
    """Give the model with its adapters, and its tokenizer: once in a process."""
    datasets.disable_progress_bars()
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    return peft.get_peft_model(base, lora), transformers.AutoTokenizer.from_pretrained(folder)


def train(round: Round, folder: str) -> Trained:
    """Train one client for one round, where its rows are."""
    model, tok = load(folder)
    model = round.install(model)
    with tempfile.TemporaryDirectory() as empty:  # where no checkpoint of another round lies
        args = trl.SFTConfig(
            output_dir=empty,
            **QUIET,
            logging_nan_inf_filter=False,  # else a loss of NaN is told as 0.0
            seed=round.seed,  # of this run, client and round
            max_steps=STEPS,
            learning_rate=RATE * round.rate_scale,
            lr_scheduler_type="constant",  # another would start over in every round
            per_device_train_batch_size=4,
            **PLAIN,
        )
        # A new one in each round: a trainer keeps its optimizer and its count of steps.
        trainer = trl.SFTTrainer(model, args, train_dataset=round.data, processing_class=tok)
        trainer.remove_callback(transformers.PrinterCallback)
        end = trainer.train()
    return round.read(model, samples=len(round.data), steps=end.global_step, loss=end.training_loss)


def main(
    model: str, rows: str, method: str = "fed_rac_lora", **keys: object
) -> fedraclora.RunResult:
    """Run it, one client for each value of ``client`` in the file."""
    return fedraclora.simulate(
        model=transformers.AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
        data=datasets.Dataset.from_pandas(pd.read_json(rows, lines=True)),
        train=functools.partial(train, folder=model),
        method={"name": method, "rank": RANK, "alpha": ALPHA},
        **{"client": "client", "target_modules": TARGETS, "bias": "frozen", "head": "frozen"}
        | keys,
    )


if __name__ == "__main__":
    main(*sys.argv[1:], rounds=3)
