"""Local training of one client, written to be read: the oracle of the tests.

Dense effective weights, ``torch.optim``, autograd through everything. No batching of clients, no
closed forms: the proximal term is the penalty itself, clipping is torch's own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn
from torch.func import functional_call

from fedraclora.data.samples import Samples
from fedraclora.data.task import Task, loss_function
from fedraclora.privacy.sample_level import answer_keys, seed_key
from fedraclora.protocol.method import Adapter, Plan, RoundInstructions
from fedraclora.protocol.program import ClientChunk, GradientStage, Hook
from fedraclora.protocol.rank_budgets import rank_axes, spans
from fedraclora.rng import cohort_permutations, hash_key
from fedraclora.strategies.methods.galore_average import ProjectGradients
from fedraclora.strategies.shared.walking import MOVES
from fedraclora.training.cohort_layers import CohortContext, CohortDropout
from fedraclora.training.extras.settings import LocalSettings
from fedraclora.training.precision import FLOAT32, products_in
from fedraclora.training.vmapped import effective_weights
from fedraclora.tree import Tree
from tests.reference.dp_sgd import set_noisy_gradients
from tests.reference.galore import LocalGalore
from tests.reference.pairs import LocalGates, LocalRite, adjust_gradients
from tests.reference.walking import along, applied_moves, room, shadow, slopes


def train_one(
    task: Task,
    plan: Plan,
    local: LocalSettings,
    base: Tree,
    downlink: RoundInstructions,
    *,
    client: int,
    place: int,
    round_: int,
    seed: int,
    rate_scale: float = 1.0,
    precision: str = FLOAT32,
) -> tuple[Tree, float]:
    """Train one client.

    Args:
        task: Model, loss and client data.
        plan: Views of the adapted matrices.
        local: Local settings.
        base: Global weights.
        downlink: What to train; the client's own row of per-client values is ``place``.
        client: Its id.
        place: Its place in the cohort.
        round_: From 1.
        seed: Of the run.
        rate_scale: Of the step sizes.
        precision: One of `fedraclora.training.precision.PRECISIONS`.

    Returns:
        The trained tensors, and the mean loss over the local steps.
    """
    program = downlink.program
    looks = program.forms_gradients
    if program.moves_weights and not looks:
        inner = program.trained_model(downlink, plan)
        given = {"client": client, "place": place, "round_": round_, "seed": seed}
        after, mean = train_one(task, plan, local, base, inner, **given, rate_scale=rate_scale)
        return {MOVES: shadow(downlink, base, after)}, mean
    sent, given_base = downlink, base
    downlink = downlink if looks else program.trained_model(downlink, plan)
    starts, frozen = own_tensors(downlink, base, place)
    held, values = base, starts
    base = program.fold(base, plan)[0]
    own = None if downlink.ranks is None else downlink.ranks[place : place + 1]
    if own is not None:
        base, values, frozen = within_budget(base, downlink, plan, values, frozen, own)
    values = {n: v.clone().requires_grad_() for n, v in values.items()}
    parts = {n: part_of(n, downlink, starts[n].shape, own) for n in values}

    chunk = ClientChunk(
        downlink=downlink,
        clients=torch.tensor([client]),
        seed=seed,
        round_=round_,
        key=None,
        values={n: v.detach()[None] for n, v in values.items()},
        starts={n: v[None] for n, v in starts.items()},
        frozen=frozen,
        ranks=own,
        masks={},
        local=local,
    )
    hook = program.hooks(chunk).get(GradientStage.PROGRAM, lambda gradients, _: gradients)
    sums = dict[str, torch.Tensor]()
    model, context = with_seeded_dropout(task.model, client, seed, round_)
    optimizer = make_optimizer(local, downlink, values, frozen, rate_scale)
    start_weights = effective_weights(base, downlink, plan, values, frozen)
    start_weights = {n: w.detach().clone() for n, w in start_weights.items()}
    clients, losses = torch.tensor([client]), []
    samples = task.train.gather(clients, torch.arange(int(task.train.sizes(clients)))[None])
    most = room(downlink) if looks else None
    for step, rows in enumerate(batches(len(samples), client, local, seed, round_)[:most]):
        context.step, context.rows = step, len(rows)
        weights = effective_weights(base, downlink, plan, values, frozen)
        if looks:
            weights = applied_moves(downlink, held, base, client, values[MOVES].detach())
        each, counts = sample_losses(model, weights, samples.take(rows), task.loss, precision)
        loss = each.sum() / counts.sum().clamp(min=1)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        if looks:
            at = along(downlink, held, client, len(values[MOVES].flatten()), step)

            def there(z: Tree, by: float, now: Tree = weights, rows: torch.Tensor = rows) -> float:
                moved = {n: w + by * z[n] for n, w in now.items()}
                each, counts = sample_losses(model, moved, samples.take(rows), task.loss, precision)
                return float(each.sum() / counts.sum().clamp(min=1))

            gradient, losses[-1] = slopes(downlink, weights, at, there)
            values[MOVES].grad = gradient.view_as(values[MOVES]).to(values[MOVES])
        elif local.dp is None:
            loss.backward(retain_graph=True)
        else:
            like = {n: start[None] for n, start in starts.items()}
            noise = local.dp.noise(like, answer_keys(seed_key(seed), round_, clients), step)
            noise = {n: noise[n][0][parts[n]] for n in values}
            set_noisy_gradients(each / counts.clamp(min=1), values, local.dp, noise)
        if local.prox:
            gap = [weights[n] - w for n, w in start_weights.items()]
            (local.prox / 2 * torch.stack([g.square().sum() for g in gap]).sum()).backward()
        add_extras(values, downlink, place)
        shape_gradients(values, frozen, hook, local, downlink)
        if program.trains:
            optimizer.step()
            continue
        sums = {n: sums.get(n, 0) + v.grad for n, v in values.items() if v.grad is not None}
    trained = {name: start.clone() for name, start in starts.items()}
    for name, value in values.items():
        trained[name][parts[name]] = value.detach() if program.trains else sums[name] / len(losses)
    if downlink is not sent:  # the program sends what the client's model does not have
        stacked = {n: t[None] for n, t in trained.items()}
        trained = {n: t[0] for n, t in program.upload(chunk, given_base, stacked).items()}
    return trained, sum(losses) / max(1, len(losses))


def own_tensors(downlink: RoundInstructions, base: Tree, place: int) -> tuple[Tree, Tree]:
    """Return one client's trained tensors at their start, and its frozen factors."""
    frozen, values = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for weight, adapter in downlink.adapters.items():
        for label, part in adapter.factors.items():
            name = f"{weight}/{label}"
            if not part.trained:
                own = part.draw()[place] if part.per_client else part.draw()
                frozen[name] = own.to(base[weight].dtype)
    for name, slot in downlink.trained().items():
        start = slot.opening()
        if start is None:
            start = base.get(name, torch.zeros(slot.shape))
        start = start.to(next(iter(base.values())).dtype)
        values[name] = start[place] if start.dim() > len(slot.shape) else start
    return values, frozen


def part_of(
    name: str, downlink: RoundInstructions, shape: torch.Size, ranks: torch.Tensor | None
) -> tuple[slice, ...]:
    """Return the part of a tensor that a client trains under its budget; all of it: ()."""
    weight, _, label = name.rpartition("/")
    if ranks is None or weight not in downlink.adapters:
        return ()
    return window(downlink.adapters[weight], label, shape, ranks)


def window(
    adapter: Adapter, label: str, shape: tuple[int, ...], ranks: torch.Tensor
) -> tuple[slice, ...]:
    """Return the part of a factor that one client has; ``ranks`` as in `spans`, with K = 1."""
    cut = [slice(None)] * len(shape)
    for axis in rank_axes(adapter, label):
        first, end = spans(ranks, shape[axis])
        cut[axis] = slice(int(first), int(end))
    return tuple(cut)


def within_budget(
    base: Tree,
    downlink: RoundInstructions,
    plan: Plan,
    values: Tree,
    frozen: Tree,
    ranks: torch.Tensor,
) -> tuple[Tree, Tree, Tree]:
    """Cut factors to a client's components; the rest of each term goes into the base."""

    def cut(tensors: Tree) -> Tree:
        out = dict(tensors)
        for weight, adapter in downlink.adapters.items():
            for label in adapter.factors:
                name = f"{weight}/{label}"
                if name in out:
                    out[name] = out[name][window(adapter, label, out[name].shape, ranks)]
        return out

    terms = replace(downlink, dense={})  # alone
    whole = effective_weights(base, terms, plan, values, frozen)
    values, frozen = cut(values), cut(frozen)
    part = effective_weights(base, terms, plan, values, frozen)
    rest = {weight: base[weight] + (whole[weight] - part[weight]) for weight in downlink.adapters}
    return base | rest, values, frozen


def sample_losses(
    model: nn.Module, weights: Tree, batch: Samples, loss: str, precision: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and count of each sample of a batch under the given weights."""
    plain = set(batch.inputs) == {"x"}
    own = next(iter(weights.values()))
    with products_in(precision, own.device):
        output = functional_call(
            model, weights, (batch.inputs["x"],) if plain else (), None if plain else batch.inputs
        )
    logits = getattr(output, "logits", output).to(own.dtype)
    return loss_function(loss)(logits, batch.target)


def batches(
    size: int, client: int, local: LocalSettings, seed: int, round_: int
) -> list[torch.Tensor]:
    """Row numbers of every local step: epochs in turn, each reshuffled, the last batch short."""
    width = local.batch_size or size
    key = hash_key(seed, "shuffle", round_)
    steps: list[torch.Tensor] = []
    count = local.steps if local.steps is not None else local.epochs * -(-size // width)
    epoch = 0
    while len(steps) < count:
        rows = torch.arange(size)
        if local.shuffle:
            rows = cohort_permutations(key, torch.tensor([client]), torch.tensor([size]), epoch)[0]
        steps.extend(rows.split(width))
        epoch += 1
    return steps[:count]


def make_optimizer(
    local: LocalSettings, downlink: RoundInstructions, values: Tree, frozen: Tree, rate_scale: float
) -> torch.optim.Optimizer | LocalGates | LocalGalore:
    """Build the torch optimizer, with one step size for the method's own and one beside it."""
    slots, decay, betas = downlink.trained(), local.weight_decay, (local.beta1, local.beta2)

    def make(named: Iterable[tuple[str, torch.Tensor]]) -> torch.optim.Optimizer:
        groups = [
            {"params": [v], "lr": local.rate(slots[n].main, rate_scale), "name": n}
            for n, v in named
        ]
        if local.optimizer == "sgd":
            return torch.optim.SGD(
                groups, momentum=local.momentum, nesterov=local.nesterov, weight_decay=decay
            )
        if local.optimizer == "lora_rite":
            return LocalRite(groups, frozen, betas=betas, eps=local.eps, weight_decay=decay)
        return torch.optim.AdamW(groups, betas=betas, eps=local.eps, weight_decay=decay)

    if isinstance(downlink.program, ProjectGradients):
        return LocalGalore(local, values, downlink, rate_scale)
    if local.gate_penalty is not None:
        return LocalGates(local, values, downlink, make)
    return make(values.items())


def shape_gradients(
    values: Tree, frozen: Tree, hook: Hook, local: LocalSettings, downlink: RoundInstructions
) -> None:
    """Do to the gradients of a step what program and settings say, in place."""
    gradients = {n: v.grad[None] for n, v in values.items() if v.grad is not None}
    for name, gradient in hook(gradients, values).items():
        values[name].grad = gradient[0]
    adjust_gradients(local, downlink, values, frozen)
    if local.clip is not None and downlink.program.trains:
        groups: dict[str, list[torch.Tensor]] = {}
        for name, value in values.items():
            module = name.split("/")[0].rsplit(".", 1)[0] if local.clip_by == "layer" else ""
            groups.setdefault(module, []).append(value)
        for group in groups.values():
            nn.utils.clip_grad_norm_(group, local.clip)


def add_extras(values: Tree, sent: RoundInstructions, place: int) -> None:
    """Add what travels beside to the gradients of the one client at ``place``, in place."""
    for added in sent.extras.values():
        for name, value in added.items():
            own = value[place] if value.dim() > values[name].dim() else value
            gradient = values[name].grad
            values[name].grad = own.to(values[name]) + (0 if gradient is None else gradient)


def with_seeded_dropout(
    model: nn.Module, client: int, seed: int, round_: int
) -> tuple[nn.Module, CohortContext]:
    """Give a model with the seeded dropout in place of its own, for a batch of one client."""
    context = CohortContext(active=1, clients=torch.tensor([client]), seed=seed, round_=round_)
    if not any(isinstance(module, nn.Dropout) for module in model.modules()):
        return model.eval(), context
    # The weights of a forward pass are given to it: those of the model need no copy.
    shared = {id(parameter): parameter for parameter in model.parameters()}
    copied = copy.deepcopy(model, shared).eval()
    for name, module in list(copied.named_modules()):
        if isinstance(module, nn.Dropout):
            parent, _, leaf = name.rpartition(".")
            setattr(copied.get_submodule(parent), leaf, CohortDropout(module, name, context))
    return copied, context
