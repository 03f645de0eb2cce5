"""Messages as tests make and read them, outside a runtime of Flower's too."""

from __future__ import annotations

import json

from flwr.app import Message, RecordDict

from fedraclora.engines.asks import AskWriter, read_ask
from fedraclora.engines.post import PostedGrid
from fedraclora.engines.records import read_answer
from fedraclora.protocol.instructions import RoundInstructions
from fedraclora.wire.answers import Answer, NoAnswer
from fedraclora.wire.exchange import DTYPES, Ask, Stage, TrainRequest


def pack_downlink(downlink: RoundInstructions, request: TrainRequest, dtype: str) -> RecordDict:
    """Write a downlink for the clients of one request."""
    return AskWriter().write(Ask(request, downlink.to(DTYPES[dtype]), apart=True))


def unpack_downlink(content: RecordDict) -> tuple[RoundInstructions, TrainRequest]:
    """Read what one train message asks of its clients."""
    ask = read_ask(content)
    return ask.own, ask.request


def stage_in(records: RecordDict) -> Stage | None:
    """The stage of secure aggregation that a message asks for or answers, if it does."""
    name = "secure" if "secure" in records else "config"
    plain = json.loads(str(records.config_records[name]["header"]))
    plain = plain if name == "secure" else plain.get("stage")
    if plain is None:
        return None
    data = {int(client): said for client, said in plain["data"].items()}
    return Stage(plain["name"], plain["settings"], data)


def answer_to(reply: Message, ask: Ask) -> Answer | NoAnswer:
    """Read a reply as the grid of real hosts does."""
    if reply.has_error():
        return PostedGrid.refusal(reply)
    return read_answer(reply.content, ask)
