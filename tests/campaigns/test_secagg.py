"""A short form of the campaign, and the attacks and faults that it came from, by hand."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message

from fedraclora.clients.secure import answer_stage
from fedraclora.errors import ClientError, RoundLostError
from fedraclora.privacy.secagg import SecAgg, SecAggTerms
from fedraclora.run.client_state import ClientStore
from fedraclora.strategies.steps.secure import SecureSum
from fedraclora.strategies.steps.unmask import CulpritError
from fedraclora.wire.answers import Answer
from fedraclora.wire.exchange import Ask, Stage, TrainRequest
from fedraclora.wire.secagg import LARGEST, signed
from tests.campaigns.secagg import (
    CLIP,
    FOREIGN_KEYS,
    ROUND,
    WEIGHT,
    Client,
    Random,
    Wire,
    campaign,
    put_stage,
    resealed,
    stage_of,
    sum_of,
)
from tests.campaigns.secure_measuring import campaign as measured


@pytest.mark.long
def test_forty_mutants() -> None:
    assert sum(campaign(40, first=10_000).values()) == 40


@pytest.mark.long
def test_two_thousand_mutants() -> None:
    assert sum(campaign(2000).values()) == 2000


def secure_sum() -> SecureSum:
    return SecureSum(SecAgg(CLIP, max_weight=WEIGHT))


def six() -> dict[int, Client]:
    return {c: Client(c, 3) for c in range(6)}


def exactly(uplinks: Any, clients: dict[int, Client], members: list[int]) -> None:
    """The sum is that of these clients, to the last step."""
    assert uplinks.clients.tolist() == members
    step = SecAgg(CLIP, max_weight=WEIGHT).step(len(clients), CLIP, LARGEST)
    whole = signed(np.sum([clients[c].whole(step) for c in members], axis=0, dtype=np.uint32))
    start = torch.full((6,), 0.25, dtype=torch.float64)
    assert torch.equal(uplinks.summed, start * float(whole[-2]) + whole[:-2].double() * step)


def bend(stage: str, client: int, change: Any) -> Any:
    """Change what one client says at one stage."""

    def bent(name: str, who: Client, message: Message) -> list[Message]:
        said = stage_of(message.content) if not message.has_error() else None
        if name == stage and who.number == client and said is not None:
            data = {c: change(copy.deepcopy(data)) for c, data in said.data.items()}
            put_stage(message.content, Stage(name, {}, data))
        return [message]

    return bent


# ---- A round is answered once -------------------------------------------------------------------


def test_two_sums_of_a_round_cannot_be_subtracted() -> None:
    """Asked again without client 2, under new keys: the difference would be its update."""
    clients = six()
    _, first = sum_of(secure_sum(), Wire(clients))
    exactly(first, clients, [*range(6)])
    others = {c: client for c, client in clients.items() if c != 2}
    exchange, second = sum_of(secure_sum(), Wire(others))
    assert isinstance(second, ClientError)
    reasons = [f.reason for f in exchange.failures]
    assert len(reasons) == 5
    assert all("masked vector in round 4" in reason for reason in reasons)


def test_an_earlier_round_is_not_answered_later() -> None:
    clients = six()
    sum_of(secure_sum(), Wire(clients))
    for round_, answers in ((ROUND - 1, False), (ROUND, False), (ROUND + 1, True)):
        stage = Stage("keys", {}, {1: None})
        request = TrainRequest(round_, 0, 1.0, torch.tensor([1]))
        said = answer_stage(request, stage, clients[1].store, clients[1].terms).stage
        assert said is not None
        assert bool(said.data) == answers


def test_a_round_that_failed_goes_on_and_asks_nobody_twice() -> None:
    """Four clients are cut off when vectors are gathered: the next attempt asks these alone."""
    clients, cut = six(), {0, 1, 4, 5}
    secure, wire = secure_sum(), Wire(clients)
    whole = Client.said

    def cut_off(self: Client, ask: Ask, stage: Stage) -> Answer:
        if stage.name == "masked" and self.number in cut:
            raise ClientError("its machine was restarted")
        return whole(self, ask, stage)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Client, "said", cut_off)
        _, first = sum_of(secure, wire)
    assert isinstance(first, ClientError)
    again = Wire(clients)
    exchange, second = sum_of(secure, again)
    exactly(second, clients, [*range(6)])
    assert exchange.failures == []
    assert {c for stage, c in again.asked if stage == "masked"} == cut
    assert not [c for stage, c in again.asked if stage in {"keys", "shares"}]


def test_a_node_repeats_its_answer_and_gives_no_other(tmp_path: Path) -> None:
    clients = {c: Client(c, 3, tmp_path / str(c)) for c in range(4)}
    wire = Wire(clients)
    _, got = sum_of(secure_sum(), wire)
    exactly(got, clients, [*range(4)])
    anew = Client(2, 3, tmp_path / "2")  # another process, with what is on the disk alone
    anew.store.restore(clients[2].store.since(0))
    for stage in ("masked", "unmask"):
        content = wire.asked[stage, 2]
        replies = [anew.answer(copy.deepcopy(content)) for _ in range(2)]
        assert replies[0] == replies[1]
        put_stage(content, Stage(stage, {"step": 1.0}, stage_of(content).data))
        with pytest.raises(ClientError, match=r"request in round 4.* once"):
            anew.answer(content)
    header = json.loads(str(content["config"]["header"]))
    header["request"]["round_"] = 11
    content["config"]["header"] = json.dumps(header)
    with pytest.raises(ClientError, match=r"round 11: .*does not have"):
        anew.answer(content)


# ---- What a client insists on -------------------------------------------------------------------


@pytest.mark.parametrize(("told", "fewest"), [(1, 3), (4, 6), (0, 3)])
def test_a_client_wants_its_own_number_of_neighbours(told: int, fewest: int) -> None:
    terms = SecAggTerms(SecAgg(CLIP), "uniform", fewest)
    store, keys = ClientStore(), {}
    request = TrainRequest(1, 0, 1.0, torch.arange(6))
    for client in range(6):
        stage = Stage("keys", {}, {client: None})
        said = answer_stage(request, stage, store, terms).stage
        assert said is not None
        keys[client] = {name: said.data[client][name] for name in ("mask", "box")}
    stage = Stage("shares", {"threshold": 1}, {0: {str(c): keys[c] for c in range(1, 1 + told)}})
    (why,) = answer_stage(request, stage, store, terms).failures.values()
    assert f"named {told} neighbours" in why
    assert f"at least {fewest - 1}" in why


def test_of_a_graph_a_client_wants_its_degree() -> None:
    assert [SecAgg(neighbours=6).least(n) for n in (3, 5, 7, 100)] == [2, 4, 6, 6]
    assert [SecAgg().least(n) for n in (1, 3, 20)] == [2, 2, 19]


# ---- Whose fault it is --------------------------------------------------------------------------


@pytest.mark.parametrize("key", FOREIGN_KEYS, ids=range(len(FOREIGN_KEYS)))
def test_a_key_of_another_kind_is_its_senders_failure(key: str) -> None:
    clients = six()
    exchange, got = sum_of(
        secure_sum(), Wire(clients, bend("keys", 3, lambda s: s | {"mask": key}))
    )
    exactly(got, clients, [0, 1, 2, 4, 5])
    (failure,) = exchange.failures
    assert failure.client == 3
    assert "a point of the curve" in failure.reason or "cannot be read" in failure.reason


def garbage(receivers: list[str]) -> Any:
    return lambda said: {c: ["garbage", *v[1:]] if c in receivers else v for c, v in said.items()}


def test_who_seals_garbage_for_all_is_left_out() -> None:
    clients = six()
    change = garbage([*"01245"])
    exchange, got = sum_of(secure_sum(), Wire(clients, bend("shares", 3, change)))
    exactly(got, clients, [0, 1, 2, 4, 5])
    (failure,) = exchange.failures
    assert failure.client == 3
    assert "[0, 1, 2, 4, 5] cannot open" in failure.reason


def test_garbage_for_one_neighbour_costs_nobody_the_round() -> None:
    """Which of the two lies is not known, and need not be."""
    clients, secure = six(), secure_sum()
    exchange, got = sum_of(secure, Wire(clients, bend("shares", 3, garbage(["4"]))))
    exactly(got, clients, [*range(6)])
    assert exchange.failures == []
    assert secure.row["notes"] == ["client 4 cannot open the shares of [3]"]


def test_shares_that_are_of_no_secret_are_their_senders_fault() -> None:
    clients, secure = six(), secure_sum()
    draw: Random = np.random.default_rng(0)
    change = bend("shares", 3, lambda said: resealed(clients[3], said, draw))
    _, got = sum_of(secure, Wire(clients, change))
    assert isinstance(got, CulpritError)
    assert [*secure.banned] == [3]
    later = {c: Client(c, 3) for c in range(6)}
    secure.session = None
    exchange, got = sum_of(secure, Wire(later))
    exactly(got, later, [0, 1, 2, 4, 5])
    assert [f.client for f in exchange.failures] == [3]


@pytest.mark.parametrize("share", [5, None, "zz", "ab", ["ab"], "ab" * 52, "x" * 10_000])
def test_a_share_that_is_none_is_not_used(share: object) -> None:
    clients, secure = six(), secure_sum()

    def change(said: Any) -> Any:
        return said | {"alive": said["alive"] | {"1": share}}

    exchange, got = sum_of(secure, Wire(clients, bend("unmask", 3, change)))
    exactly(got, clients, [*range(6)])
    assert exchange.failures == []
    (note,) = secure.row["notes"]  # type: ignore[misc]
    assert "client 3 gave no shares" in note


def test_a_sum_that_nobody_can_be_blamed_for_is_lost() -> None:
    """Of three clients all are needed: where two of them disagree, neither is called a liar."""
    clients = {c: Client(c, 3) for c in range(3)}
    exchange, got = sum_of(secure_sum(), Wire(clients, bend("shares", 1, garbage(["2"]))))
    assert isinstance(got, RoundLostError)
    assert "either may be at fault" in str(got)
    assert exchange.failures == []


def test_bytes_are_those_of_the_words() -> None:
    clients = six()
    exchange, _ = sum_of(secure_sum(), Wire(clients))
    assert exchange.received == 6 * (6 + 2) * 4


# ---- What clients measure -----------------------------------------------------------------------


@pytest.mark.long
def test_four_hundred_measurements() -> None:
    assert sum(measured(400).values()) == 400


@pytest.mark.slow
def test_twenty_measurements() -> None:
    assert sum(measured(20, first=10_000).values()) == 20
