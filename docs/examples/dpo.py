"""Preference tuning with TRL's `DPOTrainer`, federated.

    python dpo.py MODEL PAIRS.jsonl first

A row has ``client``, ``prompt``, ``chosen`` and ``rejected``. DPO holds a model near a reference,
and **you choose which**. ``first``: the model that the run began with, as DPO means it; it lies in
memory twice. ``round``: the round's weights with adapters off, at no cost; where a method merges
(Fed-RAC-LoRA) they move, and nothing holds the model near its beginning.
"""

import copy
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
STEPS, BATCH, RATE = 4, 4, 1e-3  # steps of a client in a round: of 0 the trainer takes one


@functools.cache
def load(folder: str) -> tuple[peft.PeftModel, transformers.PreTrainedModel, object]:
    """Give a copy of the model with adapters, the model, and its tokenizer: once in a process."""
    datasets.disable_progress_bars()
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = peft.get_peft_model(copy.deepcopy(base), lora)
    return model, base, transformers.AutoTokenizer.from_pretrained(folder)


def train(round: Round, folder: str, reference: str) -> Trained:
    """Train one client for one round, where its pairs are."""
    model, base, tok = load(folder)
    first = {"first": copy.copy(base), "round": None}[reference]  # TRL wraps its forward
    model = round.install(model)
    with tempfile.TemporaryDirectory() as empty:  # where no checkpoint of another round lies
        args = trl.DPOConfig(
            output_dir=empty,
            **QUIET,
            logging_nan_inf_filter=False,  # else a loss of NaN is told as 0.0
            seed=round.seed,  # of this run, client and round
            max_steps=STEPS,
            learning_rate=RATE * round.rate_scale,
            lr_scheduler_type="constant",  # another would start over in every round
            per_device_train_batch_size=BATCH,
            **PLAIN,
        )
        # A new one in each round: a trainer keeps its optimizer and its count of steps.
        trainer = trl.DPOTrainer(model, first, args, train_dataset=round.data, processing_class=tok)
        if first is None:  # else the reference is a copy of the round's factors
            model.delete_adapter("ref")
        trainer.remove_callback(transformers.PrinterCallback)
        end = trainer.train()
    return round.read(model, samples=len(round.data), steps=end.global_step, loss=end.training_loss)


def main(model: str, pairs: str, reference: str, method: str = "fed_rac_lora", **keys: object):
    """Run it, one client for each value of ``client`` in the file."""
    return fedraclora.simulate(
        model=load(model)[1],
        data=datasets.Dataset.from_pandas(pd.read_json(pairs, lines=True)),
        train=functools.partial(train, folder=model, reference=reference),
        method={"name": method, "rank": RANK, "alpha": ALPHA},
        **{"client": "client", "target_modules": TARGETS, "bias": "frozen", "head": "frozen"}
        | keys,
    )


if __name__ == "__main__":
    main(*sys.argv[1:], rounds=3)
