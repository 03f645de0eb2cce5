"""``fedraclora federation ACTION connection=NAME [NODE]``: see and steer a federation.

  status        who is registered and connected, which clients each node serves, its last reply,
                why it does not take part, and which certificate ends in a month
  pause         runs wait before their next round; `resume` ends that
  drain NODE    the node finishes its round, and takes part in no other; `undrain NODE` ends that
  remove NODE   its key is refused from now on; a connected node must be drained first
  log           who started which run, with which code, and how it ended

A node is named by its name or its number. What nodes serve, and the log, are in files of
``FLWR_HOME``: run this on the SuperLink's host, as its user, with its ``FLWR_HOME``.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace

from fedraclora.compose.words import part
from fedraclora.engines.deploy.control import Connection
from fedraclora.engines.deploy.federation import HOME, FederationFiles, NodeFacts
from fedraclora.engines.programs import command_line
from fedraclora.errors import ConfigError, unknown
from fedraclora.terminal.tables import TextTable

LISTED = 20  # entries of the log
LONGEST_STATE = 100  # characters of how a run ended: run.log has all


def main(words: Sequence[str]) -> int:
    """Do an action; return the exit status.

    Raises:
        ConfigError: If the arguments do not name an action, a connection and, if needed, a node.
    """
    own, rest = part(words, ("connection",))
    if not rest:
        raise ConfigError(f"name an action: {', '.join(ACTIONS)}, as in federation status ...")
    action, *named = rest
    if action not in ACTIONS:
        raise unknown("action", action, tuple(ACTIONS))
    takes_node = ACTIONS[action] in OF_A_NODE
    if len(named) != takes_node:
        wanted = "the name or number of one node" if takes_node else "no further word"
        raise ConfigError(
            f"federation {action} takes {wanted}, and got {' '.join(named) or 'none'}"
        )
    if not own.get("connection"):
        raise ConfigError("give connection=NAME, a section of Flower's config.toml")
    files = FederationFiles.of(os.environ)
    if files is None:
        raise ConfigError(f"set {HOME} to that of the SuperLink, where the files of runs are")
    connection = Connection(str(own["connection"]), command_line(os.environ))
    ACTIONS[action](connection, files, *named)
    return 0


def show_status(connection: Connection, files: FederationFiles) -> None:
    """Print the nodes of a federation, and its runs."""
    known, wishes = files.nodes(), files.wishes()
    rows = [
        status_row(node, known.get(number_of(node), NodeFacts()), number_of(node) in wishes.drained)
        for node in connection.nodes()
        if node["status"] != "unregistered"
    ]
    running = connection.running()
    notes = [f"run {run} has not ended" for run in running] or ["no run at present"]
    if wishes.paused:
        notes.append("paused: runs wait before their next round (fedraclora federation resume)")
    if rows and not known:
        notes.append(f"no run has written to {files.folder} yet, so names and clients are unknown")
    notes += connection.certificate_warnings()
    if rows:
        TextTable.of(rows, notes).print()
    else:
        print("\n".join(["no node is registered", *notes]))


def status_row(node: dict[str, object], facts: NodeFacts, drained: bool) -> dict[str, object]:
    """Describe a node: what Flower says of it, and what the last run knew."""
    state = str(node["status"])
    since = node["online-at"] if state == "online" else node["offline-at"]
    why = {"offline": "not connected", "registered": "never connected"}.get(state, facts.why)
    return {
        "node": facts.name or str(node["node-id"]),
        "number": str(node["node-id"]),
        "state": "drained" if drained and state == "online" else state,
        "since": None if since in ("", "N/A") else since,
        "clients": ", ".join(map(str, facts.clients)) or None,
        "last reply": facts.replied[:19].replace("T", " ") or None,
        "why absent": why or None,
    }


def number_of(node: dict[str, object]) -> int:
    """Return Flower's number of a listed node."""
    return int(str(node["node-id"]))


def find_node(connection: Connection, files: FederationFiles, word: str) -> dict[str, object]:
    """Return the registered node of a name or number.

    Raises:
        ConfigError: If there is none, or several have the name.
    """
    known = files.nodes()
    listed = [node for node in connection.nodes() if node["status"] != "unregistered"]
    names = {number_of(node): known.get(number_of(node), NodeFacts()).name for node in listed}
    found = [n for n in listed if word in (str(n["node-id"]), names[number_of(n)])]
    if len(found) != 1:
        each = ", ".join(f"{number}{f' ({name})' * bool(name)}" for number, name in names.items())
        many = "several nodes have" if found else "no registered node has"
        raise ConfigError(f"{many} the name or number {word}: give one of {each or 'none'}")
    return found[0]


def pause(_: Connection, files: FederationFiles) -> None:
    """Have runs wait before their next round."""
    files.wish(replace(files.wishes(), paused=True))
    files.audit("pause")
    print("runs finish their round, and wait before the next")


def resume(_: Connection, files: FederationFiles) -> None:
    """End a pause."""
    files.wish(replace(files.wishes(), paused=False))
    files.audit("resume")
    print("runs go on")


def drain(connection: Connection, files: FederationFiles, word: str) -> None:
    """Have a node take part in no further round."""
    node, wishes = number_of(find_node(connection, files, word)), files.wishes()
    files.wish(replace(wishes, drained=wishes.drained | {node}))
    files.audit("drain", node=node, name=word)
    print(f"node {node} finishes its round, and takes part in no other")


def undrain(connection: Connection, files: FederationFiles, word: str) -> None:
    """Have a drained node take part again."""
    node, wishes = number_of(find_node(connection, files, word)), files.wishes()
    files.wish(replace(wishes, drained=wishes.drained - {node}))
    files.audit("undrain", node=node, name=word)
    print(f"node {node} takes part from the next round on")


def remove(connection: Connection, files: FederationFiles, word: str) -> None:
    """Unregister a node.

    Raises:
        ConfigError: If it is connected and not drained.
    """
    found, wishes = find_node(connection, files, word), files.wishes()
    node = number_of(found)
    if found["status"] == "online" and node not in wishes.drained and connection.running():
        raise ConfigError(
            f"node {node} may be in a round: run `fedraclora federation drain "
            f"connection={connection.name} {word}` first, and remove it when that round has ended"
        )
    connection.unregister(node)
    files.wish(replace(wishes, drained=wishes.drained - {node}, removed=wishes.removed | {node}))
    files.audit("remove", node=node, name=word)
    facts = files.nodes().get(node, NodeFacts())
    about = [f"node {node}"] * bool(facts.name)
    about += [f"clients {', '.join(map(str, facts.clients))}"] * bool(facts.clients)
    who = (facts.name or f"node {node}") + (f" ({', '.join(about)})" if about else "")
    print(
        f"{who} is removed: the SuperLink refuses its key, and a run says so before its next round"
    )


def show_log(connection: Connection, files: FederationFiles) -> None:
    """Print the audit log, with the state of each run at the SuperLink."""
    runs = {str(run["run-id"]): run for run in connection.runs()}
    rows = list[dict[str, object]]()
    for entry in files.entries():
        run = runs.pop(str(entry.get("run")), None) if entry["what"] == "start" else None
        about = [str(entry[key]) for key in ("run", "node", "name", "folder") if entry.get(key)]
        state = entry.get("status") or (None if run is None else run["status"])
        rows.append(log_row(entry, " ".join(about), state))
    for number, run in runs.items():  # started from another host, or by Flower's own command
        entry = {"time": str(run["pending-at"]), "who": "another", "what": "start"}
        entry |= {"code": str(run["fab-hash"])}
        rows.append(log_row(entry, number, run["status"]))
    rows.sort(key=lambda row: str(row["time (UTC)"]))
    shown = rows[-LISTED:]
    note = f"{len(shown)} of {len(rows)} entries; those of this host are in {files.folder}"
    if rows:
        TextTable.of(shown, [note]).print()
    else:
        print("nothing has happened yet")


def log_row(entry: dict[str, object], about: str, state: object) -> dict[str, object]:
    """Describe an entry of the log."""
    return {
        "time (UTC)": str(entry["time"])[:19].replace("T", " "),
        "who": entry["who"],
        "what": entry["what"],
        "of": about or None,
        "digest": str(entry.get("digest", ""))[:12] or None,
        "code": str(entry.get("code", ""))[:12] or None,
        "ended": None if state is None else textwrap.shorten(str(state), LONGEST_STATE),
    }


Action = Callable[..., None]
OF_A_NODE: tuple[Action, ...] = (drain, undrain, remove)
ACTIONS: dict[str, Action] = {
    "status": show_status,
    "pause": pause,
    "resume": resume,
    "drain": drain,
    "undrain": undrain,
    "remove": remove,
    "log": show_log,
}
