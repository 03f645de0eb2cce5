"""Choose how a run measures weights, and score multiple-choice questions.

An answer's score is the summed log-likelihood of its tokens after the prompt, without its end
token; nothing is generated. This is multiple choice as in lm-evaluation-harness:
``choice_accuracy`` is its ``acc``, the share of questions whose right answer has the greatest sum,
and ``choice_accuracy_norm`` its ``acc_norm``, that of the sums divided by the characters of each
answer. Among equal scores the first counts.

References:
    Gao et al., *The Language Model Evaluation Harness*, doi 10.5281/zenodo.12608602.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from fedraclora.data.encoders.chat import Encoded, padded
from fedraclora.data.own_loss import IGNORED_TOKEN
from fedraclora.data.samples import Samples
from fedraclora.data.task import CHOICE_METRICS, Task, forward
from fedraclora.data.token_losses import LabelledTokens, output_layer
from fedraclora.errors import ConfigError
from fedraclora.evaluation.evaluate import evaluate, numbered_batches, with_weights
from fedraclora.evaluation.generate import cut
from fedraclora.tree import Tree


def measure_of(task: Task, samples: Samples, batch_size: int) -> Callable[[Tree], dict[str, float]]:
    """Return the function that measures weights in a run.

    It applies `evaluate`; ``gap``, the task's own loss above its known minimum, if there is one;
    and `Questions`, if the task asks some.

    Raises:
        ConfigError: If the task asks questions, and the samples have none.
    """
    asked = None if task.choices is None else Questions.of(task, samples)
    is_own = any(samples is own for own in (task.test, task.validation))

    def measure(weights: Tree) -> dict[str, float]:
        given = task.loss, task.metrics, batch_size, task.like
        found = evaluate(task.model, weights, samples, *given)
        if task.optimum is not None and "loss" in found and is_own:
            found["gap"] = found["loss"] - task.optimum
        return found | (asked.metrics(task.model, weights, batch_size) if asked else {})

    return measure


@dataclass(frozen=True)
class Questions:
    """Score questions with several possible answers.

    If answers differ only in their last token, one row serves all of them: answers of one token
    cost one pass over the prompts.

    Attributes:
        rows: Prompts with an answer each, labelled at the tokens of that.
        owner: The question of each row, int64 [R].
        wanted: The token of each answer at each label of a row that serves it, int64 [R, L, C];
            -1 elsewhere.
        characters: Of each answer, int64 [N, C]; -1 where a question has fewer.
        right: Whether it is the right one, bool [N, C].
        answers: Those of the first question, as text.
    """

    rows: Samples
    owner: torch.Tensor
    wanted: torch.Tensor
    characters: torch.Tensor
    right: torch.Tensor
    answers: tuple[str, ...]

    @classmethod
    def of(cls, task: Task, samples: Samples) -> Questions:
        """Select questions of a task, spread evenly over some samples.

        Raises:
            ConfigError: If one has no choices, or the tokenizer makes two of them equal.
        """
        asked = min(task.choices or 0, len(samples))
        taken = samples.take(
            torch.arange(asked, device=samples.target.device) * len(samples) // asked
        )
        taken = taken.to("cpu")
        rows, owner = list[Encoded](), list[int]()
        slots: list[dict[tuple[int, int], int]] = []
        for number, choices in enumerate(known := _choices(task, taken)):
            ids = taken.inputs["input_ids"][number]
            prompt = cut(ids, taken.target[number])[0].tolist()
            served: list[tuple[list[int], dict[tuple[int, int], int]]] = []
            for place, choice in sorted(enumerate(choices), key=lambda one: -len(one[1])):
                there = (slot for own, slot in served if own[: len(choice) - 1] == choice[:-1])
                if (slot := next(there, None)) is None:
                    served.append((choice, slot := {}))
                slot |= {(k, place): token for k, token in enumerate(choice)}
            for choice, slot in served:
                rows.append(Encoded(prompt + choice, [IGNORED_TOKEN] * len(prompt) + choice))
                owner.append(number)
                slots.append(slot)
        longest = max(label + 1 for slot in slots for label, _ in slot)
        wanted = torch.full((len(rows), longest, taken.beside["right"].shape[1]), -1)
        for row, slot in enumerate(slots):
            for where, token in slot.items():
                wanted[(row, *where)] = token
        table = padded(rows, 0)
        most = getattr(getattr(task.model, "config", None), "max_position_embeddings", None)
        if most is not None and table.padded > most:
            raise ConfigError(
                f"evaluate.choices={task.choices}: a prompt and an answer that it may have are "
                f"{table.padded} tokens, but the model reads {most} at most: lower data.max_length"
            )
        answers = tuple(task.tokenizer.decode(choice) for choice in known[0])
        beside = taken.beside["characters"], taken.beside["right"]
        return cls(table, torch.tensor(owner), wanted, *beside, answers)

    def metrics(self, model: nn.Module, weights: Tree, batch_size: int) -> dict[str, float]:
        """Compute the shares of right answers at the given weights, by sum and by character."""
        sums = self.scores(model, weights, batch_size)
        found = sums, sums / self.characters.clamp(min=1)
        # numpy's argmax returns the first of equal values, torch's returns any
        best = (torch.from_numpy(score.numpy().argmax(axis=1)) for score in found)
        shares = [float(self.right.gather(1, each[:, None]).double().mean()) for each in best]
        return dict(zip(CHOICE_METRICS, shares, strict=True))

    def scores(self, model: nn.Module, weights: Tree, batch_size: int) -> torch.Tensor:
        """Sum the log-likelihoods of each answer, float64 [N, C]; -inf for missing answers."""
        return with_weights(model, weights, self._scores, batch_size)

    def _scores(self, model: nn.Module, batch_size: int) -> torch.Tensor:
        sums = torch.zeros(self.right.shape, dtype=torch.float64)
        device = next(model.parameters()).device
        for rows, batch in numbered_batches(self.rows, batch_size):
            labels = self.wanted[rows].amax(dim=2) >= 0
            owner = self.owner[rows].repeat_interleave(labels.sum(dim=1))
            wanted, start = self.wanted[rows][labels], 0
            for outputs in outputs_at_labels(model, batch.to(device)):
                here = slice(start, start := start + len(outputs))
                exact = torch.promote_types(outputs.dtype, torch.float32)
                each = outputs.to(exact).log_softmax(dim=1).cpu()
                logs = each.gather(1, wanted[here].clamp(min=0)).double()
                sums.index_add_(0, owner[here], logs.where(wanted[here] >= 0, 0.0))
        return sums.masked_fill_(self.characters < 0, -torch.inf)


def _choices(task: Task, samples: Samples) -> list[list[list[int]]]:
    """Return the tokens of the possible answers of each question.

    Raises:
        ConfigError: If there are none, or two are equal.
    """
    lacking = ConfigError(
        f"evaluate.choices={task.choices} wants questions whose possible answers are known, and an "
        "answer that the chat template writes as it is: set data.choices to them, or to the column "
        "that lists them (data.answers does, too; packed samples have none), or evaluate.choices "
        "to null"
    )
    if "right" not in samples.beside:
        raise lacking
    found = []
    tables = samples.beside["choices"], samples.beside["characters"], samples.beside["right"]
    for choices, characters, right in zip(*tables, strict=True):
        some = [choice[choice != IGNORED_TOKEN].tolist() for choice in choices[characters >= 0]]
        if not right.any():
            raise lacking
        if len({tuple(ids) for ids in some}) < max(2, len(some)) or not all(some):
            words = ", ".join(repr(task.tokenizer.decode(ids)) for ids in some)
            raise ConfigError(
                f"evaluate.choices={task.choices}: a question has the choices {words}, as its "
                "tokens are read back, expected two or more that differ, none of them empty"
            )
        found.append(some)
    return found


def outputs_at_labels(model: nn.Module, batch: Samples) -> Iterator[torch.Tensor]:
    """Yield the outputs [tokens, vocabulary] that predict labelled tokens, in parts."""
    head = output_layer(model, "next_token")
    if head is None:
        yield forward(model, batch.inputs)[:, :-1][batch.target[:, 1:] != IGNORED_TOKEN]
        return
    labelled = LabelledTokens.of(model, head, batch)
    for states, _ in labelled.pieces():
        yield labelled.outputs(states)
