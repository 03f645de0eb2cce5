"""Stand between a SuperNode and its SuperLink: check messages, and write them down.

Two functions of Flower's module of the node are replaced. Both get everything by which messages and
their content come and go as arguments.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Error, Message

from fedraclora import flower_internals
from fedraclora.engines import flower_patches
from fedraclora.engines.flower_patches import FLEET, NODE_LOOP
from fedraclora.engines.owner.entries import DOWNLOAD, IN, OUT, REFUSED, WIRE, Entry, now
from fedraclora.engines.owner.gate import Gate, RefusedError
from fedraclora.engines.owner.history import History
from fedraclora.engines.owner.refusal import OwnerRefusal
from fedraclora.engines.owner.request import RunRequest
from fedraclora.engines.replies import OWNER_REFUSES, RECORDS

NUMBERS, SAMPLES = "chunk", "samples"  # where the small records of a reply have them
KEPT = 4  # app bundles that are not downloaded again

Function = Callable[..., Any]


@dataclass
class Content:
    """Count the content of a message.

    Attributes:
        records: Bytes of each kind of object.
        samples: On how many samples clients trained, where the reply says so.
        announced: Bytes by which a message is announced, before its objects come.
    """

    records: dict[str, int] = field(default_factory=dict)
    samples: int | None = None
    announced: int = 0

    @property
    def size(self) -> int:
        """Count all of it."""
        return self.announced + sum(self.records.values())

    def add(self, content: bytes) -> None:
        """Count one object of the message."""
        kind = flower_internals.object_kind(content)
        self.records[kind] = self.records.get(kind, 0) + len(content)
        if kind == ConfigRecord.__name__:
            samples = samples_of(content)
            self.samples = self.samples if samples is None else samples


@dataclass
class Wire:
    """Count what a node sends and receives by HTTP: requests without a message, and headers, too.

    Attributes:
        sent, received: Bytes since they were taken.
        requests: Their number.
    """

    sent: int = 0
    received: int = 0
    requests: int = 0

    def counting(self, client: Any) -> Any:
        """Derive a class from Flower's HTTP client that counts its requests."""
        wire = self

        def send(own: Any, context: Any, **named: Any) -> Any:
            wire.requests += 1
            response = client._send(own, context, **named)  # noqa: SLF001  Flower has no hook here
            request = context.request  # with a signature by now
            wire.sent += len(request.content) + header_bytes(request)
            wire.received += int(response.num_bytes_downloaded) + header_bytes(response)
            return response

        return type(client.__name__, (client,), {"_send": send})

    def take(self) -> dict[str, int]:
        """Return the counts, and begin anew."""
        found = {"sent": self.sent, "received": self.received, "requests": self.requests}
        self.sent = self.received = self.requests = 0
        return found


def header_bytes(message: Any) -> int:
    """Count the bytes of the headers of a request or response, as HTTP/1.1 writes them."""
    return sum(len(name) + len(value) + 4 for name, value in message.headers.raw)


class NodeWatch:
    """Check and write down the messages of this process's SuperNode.

    Args:
        gate: Checks them.
        history: Keeps them.
    """

    def __init__(self, gate: Gate, history: History) -> None:
        self.gate, self.history, self.wire = gate, history, Wire()
        self.runs: dict[int, tuple[RunRequest, Any]] = {}  # with Flower's description
        self.apps: dict[str, Any] = {}  # app bundles by their SHA-256
        self.downloaded: dict[int, int] = {}  # run -> bytes of its bundle, until they are noted
        self.began: dict[str, float] = {}  # message -> when it came

    def pulling(self, pull: Function) -> Function:
        """Wrap Flower's function that pulls and stores a message."""

        def pulled(*, state: Any, object_store: Any, **named: Any) -> int | None:
            content, came = Content(), list[Message]()

            def receive() -> Any:
                if (found := named["receive"]()) is not None:
                    came.append(found[0])
                    content.announced = flower_internals.announcement_bytes(*found)
                    self.meet(found[0].metadata.run_id, named["get_run"], named["get_fab"])
                    about = found[0].metadata
                    self.gate.check(self.runs[about.run_id][0], about.message_type, about.group_id)
                return found

            def pull_object(run: int, name: str) -> bytes:
                piece: bytes = named["pull_object"](run, name)
                content.add(piece)
                return piece

            own = {
                "receive": receive,
                "pull_object": pull_object,
                "get_run": lambda run: self.runs[run][1],
                "get_fab": lambda _, run: self.app_of(run, named["get_fab"]),
            }
            node = state.get_node_id()
            try:
                run: int | None = pull(state=state, object_store=object_store, **{**named, **own})
            except RefusedError as refused:
                reason = refused.refusal.write(named.get("node_config", {}))
                reply = Message(Error(OWNER_REFUSES, reason), reply_to=came[0])
                flower_internals.insert_message(reply, state, object_store)
                self.note_bundle(came[0], node)
                self.note(REFUSED, came[0], node, content, why=str(refused))
                return int(came[0].metadata.run_id)
            if run is not None:
                self.note_bundle(came[0], node)
                self.began[came[0].metadata.message_id] = time.monotonic()
                self.note(IN, came[0], node, content)
            return run

        return pulled

    def pushing(self, push: Function) -> Function:
        """Wrap Flower's function that pushes the replies."""

        def pushed(state: Any, object_store: Any, send: Function, push_object: Function) -> None:
            sent = list[tuple[Message, Content]]()

            def send_next(message: Message, tree: Any, *words: Any) -> Any:
                announced = flower_internals.announcement_bytes(message, tree)
                sent.append((message, Content(announced=announced)))
                return send(message, tree, *words)

            def push_content(run: int, session: str, name: str, content: bytes) -> None:
                sent[-1][1].add(content)
                push_object(run, session, name, content)

            try:
                push(state, object_store, send_next, push_content)
            finally:
                for message, content in sent:
                    if not (message.has_error() and message.error.code == OWNER_REFUSES):
                        self.note(OUT, message, state.get_node_id(), content)
                    self.note_wire(message, state.get_node_id())

        return pushed

    def meet(self, run: int, get_run: Function, get_fab: Function) -> None:
        """Get the description and the app of a run, if it is new."""
        if run not in self.runs:
            about = get_run(run)
            app = self.fetch(about.fab_hash, run, get_fab)
            self.runs[run] = request_of(about, app), about

    def fetch(self, name: str, run: int, get_fab: Function) -> Any:
        """Return an app bundle, which is downloaded once for all runs that have the same one."""
        if name not in self.apps:
            app = get_fab(name, run)
            self.downloaded[run] = len(app.content)
            if hashlib.sha256(app.content).hexdigest() != name:
                return app  # it is not what it is called: nothing is kept under this name
            while len(self.apps) >= KEPT:
                del self.apps[next(iter(self.apps))]
            self.apps[name] = app
        return self.apps[name]

    def app_of(self, run: int, get_fab: Function) -> Any:
        """Return the app that the owner was shown, for Flower to store.

        Raises:
            RefusedError: If the SuperLink has another one by now.
        """
        request, about = self.runs[run]
        app = self.fetch(about.fab_hash, run, get_fab)
        if request_of(about, app).digest != request.digest:
            why = f"the app of the run with digest {request.digest} has changed"
            raise RefusedError(OwnerRefusal(why))
        return app

    def note_bundle(self, message: Message, node: int) -> None:
        """Add a downloaded bundle to the history."""
        if size := self.downloaded.pop(message.metadata.run_id, 0):
            self.note(DOWNLOAD, message, node, Content(announced=size))

    def note_wire(self, message: Message, node: int) -> None:
        """Add what was sent and received since the last message to the history."""
        took = self.wire.take()
        self.note(WIRE, message, node, Content(took), size=took["sent"] + took["received"])

    def note(
        self,
        way: str,
        message: Message,
        node: int,
        content: Content,
        why: str | None = None,
        size: int | None = None,
    ) -> None:
        """Add a message to the history."""
        about, replies = message.metadata, way == OUT
        began = self.began.pop(about.reply_to_message_id, None) if replies else None
        self.history.add(
            Entry(
                time=now(),
                way=way,
                digest=self.runs[about.run_id][0].digest,
                run=about.run_id,
                node=node,
                round=about.group_id,
                kind=about.message_type,
                bytes=content.size if size is None else size,
                records=content.records or None,
                seconds=None if began is None else round(time.monotonic() - began, 3),
                samples=content.samples if replies else None,
                why=why,
            )
        )


def request_of(about: Any, app: Any) -> RunRequest:
    """Describe a run by Flower's description of it and its app bundle."""
    config = flower_internals.run_config(app.content, about)
    return RunRequest.of(about.run_id, app.content, config)


def samples_of(content: bytes) -> int | None:
    """Read the number of samples from a record of a reply; None if it has none."""
    try:
        job = flower_internals.config_record(content)
        numbers: Any = flower_internals.records_from_bytes(job[RECORDS])[NUMBERS]
        return int(np.frombuffer(numbers[SAMPLES], np.int64).sum())
    except Exception:  # another app may send anything
        return None


def install(options: Mapping[str, str | None]) -> None:
    """Watch the SuperNode of this process.

    Args:
        options: ``policy``, as for `Gate`, and the folder ``state``.
    """
    if why := flower_patches.patch_mismatch(flower_patches.OWNER):
        sys.exit(f"--approve and --history do not fit the installed Flower: {why}")
    history, loop = History(Path(str(options["state"]))), import_module(NODE_LOOP)
    watch = NodeWatch(Gate(options["policy"], history), history)
    flower_patches.put(
        NODE_LOOP,
        _pull_and_store_message=watch.pulling(loop._pull_and_store_message),  # noqa: SLF001
        _push_messages=watch.pushing(loop._push_messages),  # noqa: SLF001
    )
    fleet = import_module(FLEET)  # its client is perhaps patched by now
    flower_patches.put(FLEET, FleetHttpClient=watch.wire.counting(fleet.FleetHttpClient))
