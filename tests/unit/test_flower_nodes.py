"""One node per client: addresses, what comes back, and all that can go wrong with a runtime."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from flwr.app import ConfigRecord, Error, Message, RecordDict

from fedraclora.config.settings import FlowerConfig
from fedraclora.engines.flower import nodes
from fedraclora.engines.flower.nodes import PROCESS_DIED, NodePerClient
from fedraclora.engines.flower.superlink import run_options
from fedraclora.engines.records import from_records, to_records
from fedraclora.engines.replies import STALE
from fedraclora.errors import ClientError, ConfigError, EngineError
from fedraclora.protocol.downlink import Downlink
from fedraclora.protocol.link import Link
from fedraclora.run.client_state import ClientStore
from fedraclora.weights.replica import JobFolder
from fedraclora.wire.downlink import AskReader
from fedraclora.wire.exchange import Answer, Ask, NoAnswer, TrainRequest
from fedraclora.wire.records import read_tree, tree_record
from fedraclora.wire.reply import write_answer
from tests.messages import become_a_task

PARTITIONS = {71: 2, 5: 0, 99: 3, 12: 1}  # node -> the client that it serves, in no order


class Runtime:
    """Stands for Flower's: answers a message when it is looked for, as told."""

    def __init__(self, partitions: dict[int, int], serve: Callable[[Message], Message | None]):
        become_a_task()
        self.partitions, self.serve = partitions, serve
        self.ids = itertools.count(1)
        self.waiting: dict[str, Message] = {}
        self.most = 0

    def get_node_ids(self) -> Iterable[int]:
        return list(self.partitions)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        pushed = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = name = str(next(self.ids))
            self.waiting[name] = message
            pushed.append(name)
        self.most = max(self.most, len(self.waiting))
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for name in list(message_ids):
            message = self.waiting[name]
            if message.metadata.message_type == "query.partition":
                reply: Message | None = self.which(message)
            else:
                reply = self.serve(message)
            if reply is not None:
                del self.waiting[name]
                replies.append(reply)
        return replies[::-1]

    def which(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        record = ConfigRecord({"id": self.partitions[node]})
        reply = Message(RecordDict({"partition": record}), reply_to=message)
        reply.metadata.__dict__["_src_node_id"] = node
        return reply


def keep(message: Message) -> Message:
    """A client that keeps its id, and notes which node was asked."""
    content = from_records(message.content)
    ask = AskReader().read(content)
    store = ClientStore()
    store.restore(read_tree(content, "kept"))
    ids, none = ask.request.clients, torch.zeros(1, dtype=torch.int64)
    store.stage(ids, ask.request.round_, {"w": ids.double()[:, None]})
    notes = [str(message.metadata.dst_node_id)]
    answer = Answer(1, 0, 0, ids, none.double(), none, none, (torch.zeros(1, 0),), notes=notes)
    kept = tree_record(store.since(ask.request.round_))
    return Message(to_records({**write_answer(answer), "kept": kept}), reply_to=message)


def dead(message: Message) -> Message:
    reason = "<class 'ray.exceptions.ActorDiedError'>:<'The actor 7f3a died unexpectedly ...'>"
    return Message(Error(PROCESS_DIED, reason), reply_to=message)


def ask_for(client: int, round_: int = 1) -> Ask:
    return Ask(TrainRequest(round_, 0, 1.0, torch.tensor([client])), Downlink())


def node_of(came: tuple[Ask, Answer | NoAnswer]) -> int:
    _, answer = came
    assert isinstance(answer, Answer)
    return int(answer.notes[0])


@pytest.fixture
def job() -> Iterator[JobFolder]:
    folder = JobFolder({"seed": 0})
    yield folder
    folder.close()


def grid_on(
    runtime: Runtime, job: JobFolder, clients: int = 4, timeout: float = 5.0, **more: object
) -> NodePerClient:
    return NodePerClient(
        runtime,
        clients,
        job,
        store=ClientStore(),
        timeout=timeout,
        **more,  # type: ignore[arg-type]
    )


def test_a_client_is_reached_at_its_own_node(job: JobFolder) -> None:
    grid = grid_on(Runtime(PARTITIONS, keep), job)
    assert grid.nodes() == [5, 12, 71, 99]
    replies = list(grid.ask([ask_for(3), ask_for(1)]))
    assert sorted(map(node_of, replies)) == [12, 99]


def test_what_clients_keep_comes_back_and_goes_out_again(job: JobFolder) -> None:
    grid = grid_on(Runtime(PARTITIONS, keep), job)
    list(grid.ask([ask_for(3), ask_for(1)]))
    default = {"w": torch.tensor([-1.0], dtype=torch.float64)}
    found = grid.store.read(torch.tensor([1, 2, 3]), 2, default)
    assert found["w"].flatten().tolist() == [1.0, -1.0, 3.0]
    sent: list[Message] = []
    grid.grid.serve = lambda m: (sent.append(m), keep(m))[1]  # type: ignore[attr-defined]
    list(grid.ask([ask_for(3, round_=2)]))
    assert read_tree(from_records(sent[0].content), "kept")
    job_record = sent[0].content["job"]
    assert isinstance(job_record, ConfigRecord)
    assert job_record["folder"] == str(job.folder)


def test_messages_on_their_way_are_limited(job: JobFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "WINDOW", 2)
    runtime = Runtime(PARTITIONS, keep)
    replies = list(grid_on(runtime, job).ask([ask_for(k) for k in range(4)]))
    assert len(replies) == 4
    assert runtime.most == 2


def test_who_is_late_is_left_out(job: JobFolder) -> None:
    def slow(message: Message) -> Message | None:
        return keep(message) if message.metadata.dst_node_id == 12 else None

    runtime = Runtime(PARTITIONS, slow)
    grid = grid_on(runtime, job)
    replies = list(grid.ask([ask_for(3), ask_for(1)], timeout=0.3))
    assert list(map(node_of, replies)) == [12]
    (late,) = runtime.waiting.values()
    assert late.metadata.ttl == 0.3  # nobody trains it hours later


def test_missing_nodes_are_not_waited_for(job: JobFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "PATIENCE", 0.2)
    grid = grid_on(Runtime(PARTITIONS, keep), job, clients=9, timeout=3600.0)
    with pytest.raises(EngineError, match=r"4 nodes are there, .* 9 are wanted.*num-supernodes"):
        grid.nodes()


def test_nodes_that_come_one_by_one_are_waited_for(
    job: JobFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "PATIENCE", 2.0)
    monkeypatch.setattr(nodes, "PAUSE", 0.001)
    there: dict[int, int] = {}
    left = list(PARTITIONS.items())
    runtime = Runtime(there, keep)

    def come() -> list[int]:
        if left:
            there.update([left.pop()])
        return list(there)

    runtime.get_node_ids = come  # type: ignore[method-assign]
    assert grid_on(runtime, job).nodes() == [5, 12, 71, 99]


@pytest.mark.parametrize("partitions", [{1: 0, 2: 1, 3: 1, 4: 2}, {n: n for n in range(5)}])
def test_other_partitions_than_the_clients_are_refused(
    partitions: dict[int, int], job: JobFolder
) -> None:
    grid = grid_on(Runtime(partitions, keep), job)
    with pytest.raises(EngineError, match=r"from 0 to 3 .*num-supernodes must be 4"):
        grid.nodes()


def test_processes_that_cannot_run_the_project_are_said_to(job: JobFolder) -> None:
    runtime = Runtime(PARTITIONS, keep)
    runtime.which = lambda m: Message(Error(1, "No module named 'clients'"), reply_to=m)  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="No module named 'clients'"):
        grid_on(runtime, job).nodes()


def test_a_dead_process_that_is_not_replaced_ends_the_run(job: JobFolder) -> None:
    grid = grid_on(Runtime(PARTITIONS, dead), job)
    wanted = r"round 7: .* trained client 2 died \(ActorDiedError\).* go on with resume"
    with pytest.raises(ClientError, match=wanted):
        grid.ask([ask_for(2, round_=7)])


@pytest.mark.parametrize("times", [1, 2])
def test_a_client_that_asks_for_the_weights_whole_is_asked_once_more(
    times: int, job: JobFolder
) -> None:
    job.publish({"w": torch.zeros(4, 4)}, 0)
    job.publish({"w": torch.zeros(4, 4)}, 1, Link())
    came: list[list[str]] = []

    def serve(message: Message) -> Message:
        came.append(sorted(path.name for path in job.folder.glob("*.safetensors")))
        if len(came) <= times:
            return Message(RecordDict({STALE: ConfigRecord()}), reply_to=message)
        return keep(message)

    ((ask, answer),) = grid_on(Runtime(PARTITIONS, serve), job).ask([ask_for(3)])
    assert came == [["000000.safetensors", "000001.safetensors"], ["000001.safetensors"]]
    if times == 1:
        assert node_of((ask, answer)) == 99
    else:
        assert answer == NoAnswer("it asked for every base weight twice")


def test_a_client_that_raises_is_handed_on(job: JobFolder) -> None:
    def fails(message: Message) -> Message:
        return Message(Error(2, "ValueError: broken"), reply_to=message)

    ((_, answer),) = grid_on(Runtime(PARTITIONS, fails), job).ask([ask_for(2)])
    assert answer == NoAnswer("ValueError: broken")


@pytest.mark.parametrize("what", ["its nodes were there", "all clients had replied"])
def test_a_runtime_that_has_ended_is_not_waited_for(what: str, job: JobFolder) -> None:
    over = threading.Event()
    clients = 5 if "nodes" in what else 4
    grid = grid_on(
        Runtime(PARTITIONS, lambda _: None), job, clients=clients, timeout=3600.0, ended=over.is_set
    )
    if clients == 4:
        grid.nodes()
    over.set()
    with pytest.raises(EngineError, match=f"ended before {what}"):
        list(grid.ask([ask_for(2)]))


def test_more_than_the_machine_has_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"engine.workers is 1000, .* at most \d+ processes"):
        run_options(FlowerConfig(workers=1000), "cpu", 3)
    with pytest.raises(ConfigError, match=r"engine.gpus is 99 .* has \d+ GPU"):
        run_options(FlowerConfig(gpus=99), "cpu", 3)


def test_flwr_run_is_told_of_nodes_and_processes() -> None:
    options = run_options(FlowerConfig(workers=1), "cpu", 12)
    assert (options["num-supernodes"], options["init-args-num-cpus"]) == (12, 1)
