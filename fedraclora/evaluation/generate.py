"""Generate a language model's answers to the prompts of held-out samples."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from fedraclora.data.own_loss import IGNORED_TOKEN
from fedraclora.data.samples import Samples
from fedraclora.errors import ConfigError
from fedraclora.evaluation.evaluate import with_weights
from fedraclora.tree import Tree

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generated:
    """Hold a prompt, its reference answer and the generated answer."""

    prompt: str
    wanted: str
    answer: str

    @property
    def right(self) -> bool:
        """Return whether the two answers are equal, ignoring surrounding space."""
        return self.wanted.strip() == self.answer.strip()


@dataclass(frozen=True)
class Prompt:
    """Hold a prompt, its reference answer, and the number of compared tokens; None: all."""

    prompt: torch.Tensor
    wanted: torch.Tensor
    compared: int | None


@dataclass(frozen=True)
class GreedyGeneration:
    """Generate answers to prompts greedily, the same prompts each time.

    Attributes:
        model: The network, with transformers' ``generate``.
        tokenizer: A tokenizer of transformers.
        samples: Held-out samples: tokens with labels on the answers. If a sample has several
            answers, the last is generated; if none, its continuation. An answer that is cut by
            ``data.max_length``, or longer than ``new_tokens``, is compared up to there.
        every: Rounds between generations; the initial and the final weights are included.
        count: Number of prompts, spread evenly over the samples.
        new_tokens: Most tokens of an answer.
        shown: Number of answers kept in the ledger.
        batch_size: Prompts per batch.

    Raises:
        ConfigError: If the model does not generate, or there is no tokenizer.
    """

    model: nn.Module
    tokenizer: Any
    samples: Samples
    every: int
    count: int
    new_tokens: int
    shown: int
    batch_size: int

    def __post_init__(self) -> None:
        """Refuse a model or task that generates no text."""
        if self.tokenizer is None or not callable(getattr(self.model, "generate", None)):
            raise ConfigError(
                f"evaluate.generate={self.every} wants answers, but this model or these data have "
                "no text to generate: it is for model=causal_lm with data=instructions; set it to "
                "null"
            )
        asked = [one for one in self.asked if len(one.wanted)]
        if part := sum(one.compared is not None for one in asked):
            log.warning(
                "exact_match: %d of %d answers were cut by data.max_length, or are longer than "
                "evaluate.new_tokens=%d: they are compared as far as they go",
                *(part, len(asked), self.new_tokens),
            )

    @cached_property
    def asked(self) -> list[Prompt]:
        """List the prompts, spread evenly over the samples."""
        chosen = min(self.count, len(self.samples))
        rows = torch.arange(chosen) * len(self.samples) // chosen
        tokens = self.samples.inputs["input_ids"], self.samples.target
        ids, labels = (t[rows.to(t.device)].cpu() for t in tokens)
        lengths = self.samples.lengths
        ends = [ids.shape[1]] * chosen if lengths is None else lengths.cpu()[rows].tolist()
        found = []
        for row, own, end in zip(ids, labels, ends, strict=True):
            prompt, wanted = cut(row[:end], own[:end])
            spoken = len(wanted) - int(wanted[-1:].tolist() == [self.tokenizer.eos_token_id])
            whole = not len(wanted) or (spoken < len(wanted) and spoken <= self.new_tokens)
            found.append(Prompt(prompt, wanted, None if whole else min(spoken, self.new_tokens)))
        return found

    def due(self, round_: int, last: int) -> bool:
        """Check whether to generate answers in a round."""
        return round_ % self.every == 0 or round_ == last

    def columns(self, weights: Tree) -> tuple[dict[str, float], list[dict[str, str]]]:
        """Return the metric ``exact_match`` of all answers, and the texts of the first ones."""
        found = self.answers(weights)
        match = sum(answer.right for answer in found) / len(found)
        return {"exact_match": match}, [vars(answer) for answer in found[: self.shown]]

    def answers(self, weights: Tree) -> list[Generated]:
        """Generate answers at the given weights, each beside its reference."""
        decode, given = self.tokenizer.decode, self.written(weights)
        return [
            Generated(
                decode(one.prompt),
                *(
                    decode(tokens[: one.compared], skip_special_tokens=True)
                    for tokens in (one.wanted, own)
                ),
            )
            for one, own in zip(self.asked, given, strict=True)
        ]

    def texts(self, weights: Tree) -> list[str]:
        """Generate answers at the given weights; return whole texts."""
        return [self.tokenizer.decode(t, skip_special_tokens=True) for t in self.written(weights)]

    def written(self, weights: Tree) -> list[torch.Tensor]:
        """Generate answers at the given weights, greedily, as tokens."""
        asked = self.asked
        order = sorted(range(len(asked)), key=lambda place: len(asked[place].prompt))
        given: dict[int, torch.Tensor] = {}
        device = next(iter(weights.values())).device
        for start in range(0, len(asked), self.batch_size):
            places = order[start : start + self.batch_size]
            prompts = [asked[place].prompt for place in places]
            more = with_weights(self.model, weights, self._continued, prompts, device)
            given.update(zip(places, more.cpu(), strict=True))
        return [given[place] for place in range(len(asked))]

    def _continued(
        self, model: nn.Module, prompts: list[torch.Tensor], device: torch.device
    ) -> torch.Tensor:
        """Continue some prompts greedily; return the new tokens."""
        end = self.tokenizer.eos_token_id
        pad = self.tokenizer.pad_token_id
        pad = (0 if end is None else end) if pad is None else pad
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), longest), pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # pad on the left, so that answers begin together
            ids[row, longest - len(prompt) :] = prompt
            mask[row, longest - len(prompt) :] = 1
        generate: Any = model.generate
        written: torch.Tensor = generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=self.new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            use_cache=True,
            eos_token_id=end,
            pad_token_id=pad,
        )
        return written[:, longest:]


def cut(ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split a sample into the tokens before its last answer, and those of the answer.

    A sample without an answer is a prompt.

    Example:
        >>> ids, no = torch.tensor([5, 6, 7, 8, 0]), -100
        >>> cut(ids, torch.tensor([no, no, 7, 8, no]))
        (tensor([5, 6]), tensor([7, 8]))
    """
    labelled = labels != IGNORED_TOKEN
    if not labelled.any():
        return ids, ids[:0]
    end = int(labelled.nonzero().max()) + 1
    before = (~labelled[:end]).nonzero()
    start = int(before.max()) + 1 if len(before) else 1
    return ids[:start], ids[start:end]
