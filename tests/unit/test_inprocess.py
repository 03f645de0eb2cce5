"""The in-process grid: one node, replies in order, errors as Flower gives them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedraclora.engines.inprocess import NODE_ID, InProcessGrid
from fedraclora.errors import WireError


def echo_app() -> ClientApp:
    """Answers with what it was sent, fails on "bad", forgets to answer on "silent"."""
    app = ClientApp()

    @app.train("cohort")
    def train(message: Message, context: Context) -> Message:
        del context
        config = message.content["config"]
        assert isinstance(config, ConfigRecord)
        word = config["word"]
        if word == "bad":
            raise ValueError("this client is broken")
        if word == "silent":
            return "no message"  # type: ignore[return-value]
        return Message(RecordDict({"config": ConfigRecord({"word": word})}), reply_to=message)

    return app


def grid_of(arrange: Callable[[list[Message]], list[Message]] | None = None) -> InProcessGrid:
    return InProcessGrid(echo_app(), arrange)


def messages(grid: Grid, *words: str) -> list[Message]:
    contents = [RecordDict({"config": ConfigRecord({"word": word})}) for word in words]
    return [grid.create_message(c, "train.cohort", NODE_ID, "1") for c in contents]


def word(message: Message) -> str:
    config = message.content["config"]
    assert isinstance(config, ConfigRecord)
    return str(config["word"])


def test_there_is_one_node() -> None:
    assert list(grid_of().get_node_ids()) == [NODE_ID]


def test_replies_come_in_sending_order() -> None:
    grid = grid_of()
    replies = list(grid.send_and_receive(messages(grid, "a", "b", "c")))
    assert [word(r) for r in replies] == ["a", "b", "c"]


def test_replies_can_be_arranged() -> None:
    grid = grid_of(lambda replies: replies[::-1])
    replies = list(grid.send_and_receive(messages(grid, "a", "b", "c"), timeout=1.0))
    assert [word(r) for r in replies] == ["c", "b", "a"]


def test_a_client_that_raises_gives_an_error_reply_and_the_others_go_on() -> None:
    grid = grid_of()
    first, second, third = grid.send_and_receive(messages(grid, "a", "bad", "c"))
    assert second.has_error()
    assert "this client is broken" in str(second.error.reason)
    assert "ValueError" in str(second.error.reason)
    assert [word(first), word(third)] == ["a", "c"]


def test_a_client_that_answers_with_something_else_gives_an_error_reply() -> None:
    grid = grid_of()
    (reply,) = grid.send_and_receive(messages(grid, "silent"))
    assert reply.has_error()


def test_an_unknown_handler_gives_an_error_reply() -> None:
    grid = grid_of()
    content = RecordDict({"config": ConfigRecord({"word": "a"})})
    (reply,) = grid.send_and_receive([grid.create_message(content, "train.other", NODE_ID, "1")])
    assert reply.has_error()


def test_pushed_messages_are_pulled_once() -> None:
    grid = grid_of()
    ids = list(grid.push_messages(messages(grid, "a", "b")))
    assert len(set(ids)) == 2
    assert [word(m) for m in grid.pull_messages([ids[1]])] == ["b"]
    assert [word(m) for m in grid.pull_messages([*ids, "none such"])] == ["a"]
    assert list(grid.pull_messages(ids)) == []


def test_replies_know_the_message_that_they_answer() -> None:
    grid = grid_of()
    sent = messages(grid, "a", "b")
    replies = list(grid.send_and_receive(sent))
    answered = [r.metadata.reply_to_message_id for r in replies]
    assert answered == [m.metadata.message_id for m in sent]
    assert len(set(answered)) == 2


def test_a_grid_that_serves_no_run_says_so() -> None:
    with pytest.raises(WireError, match="serves no Flower run"):
        _ = grid_of().run


def test_client_state_does_not_leak_into_the_context() -> None:
    grid = grid_of()
    list(grid.send_and_receive(messages(grid, "a")))
    assert dict(grid.context.state) == {}
    assert grid.context.node_config["partition-id"] == 0
