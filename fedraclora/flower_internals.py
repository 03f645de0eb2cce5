"""Uses of Flower beyond its public modules, in one place.

``flwr.app``, ``flwr.clientapp`` and ``flwr.serverapp`` are Flower's interface, and are imported
where they are used. All else may move with any release of Flower: it is imported here alone, when
a function is called. What is replaced in Flower stands in `fedraclora.engines.flower_patches`.
"""

from __future__ import annotations

import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx
    from cryptography.hazmat.primitives.asymmetric import ec
    from flwr.app import ConfigRecord, Message, RecordDict

KNOWN, UNKNOWN = "known", "unknown"  # the key of a node, to a SuperLink

# --- messages ------------------------------------------------------------------------------------


def records_to_bytes(records: RecordDict) -> bytes:
    """Serialize records, as Flower does where they are not split into objects."""
    from flwr.common.serde import recorddict_to_proto

    data: bytes = recorddict_to_proto(records).SerializeToString()
    return data


def records_from_bytes(data: Any) -> RecordDict:
    """Read what `records_to_bytes` wrote.

    Raises:
        Exception: Of several kinds, if ``data`` are no such bytes.
    """
    from flwr.common.serde import recorddict_from_proto
    from flwr.proto.recorddict_pb2 import RecordDict as Proto

    return recorddict_from_proto(Proto.FromString(data))


def part_sizes(message: Message) -> list[int]:
    """Count the bytes of each part of a message: Flower sends each in a request of its own."""
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

    return [len(part.deflate()) for part in get_all_nested_objects(message).values()]


def message_bytes(message: Message) -> int:
    """Count the bytes of a message as Flower sends it: a tree of objects, large arrays in parts."""
    return sum(part_sizes(message))


def error_code(name: str) -> int:
    """Return the number of an error of a message, by Flower's name of it."""
    from flwr.common.constant import ErrorCode

    return int(getattr(ErrorCode, name))


def push_refused() -> type[Exception]:
    """Return Flower's error for a part of a message that the SuperLink refuses."""
    from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

    return ObjectPushError


# --- shares of a secret --------------------------------------------------------------------------


def create_shares(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Split a secret by Shamir's scheme: any ``threshold`` of ``count`` shares give it back."""
    from flwr.common.secure_aggregation.crypto import shamir

    return shamir.create_shares(secret, threshold, count)


def join_shares(shares: list[bytes]) -> bytes:
    """Rebuild a secret from shares of `create_shares`.

    Raises:
        ValueError: If they do not fit together.
    """
    from flwr.common.secure_aggregation.crypto.shamir import combine_shares

    return combine_shares(shares)


# --- a node and its SuperLink --------------------------------------------------------------------


def node_arguments(words: Sequence[str]) -> Namespace:
    """Parse the arguments of ``flower-supernode``."""
    from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode

    return _parse_args_run_supernode().parse_args(words)


def node_config(text: str | None) -> dict[str, Any]:
    """Parse a ``--node-config``; empty without one.

    Raises:
        click.ClickException: If it cannot be read.
    """
    from flwr.common.config import parse_config_args

    return dict(parse_config_args([text] if text else None))


@contextmanager
def refused_activation(
    address: str, key: ec.EllipticCurvePrivateKey, roots: bytes | None, *, insecure: bool
) -> Iterator[tuple[httpx.Response, httpx.Client] | None]:
    """Ask a SuperLink to activate a node without a heartbeat, which Flower refuses.

    So nothing changes there, whoever asks, and the refusal says whether the key is registered
    (`key_state`).

    Args:
        address: HOST:PORT of the SuperLink.
        key: Of the node.
        roots: Root certificates in PEM; None: those of the system.
        insecure: Whether to speak without TLS.

    Yields:
        The response, and the client that has the root certificates; None without a refusal.
    """
    import httpx
    from cryptography.hazmat.primitives import serialization
    from flwr.proto.fleet_pb2 import ActivateNodeRequest
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    public = key.public_key()
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    asked = ActivateNodeRequest(public_key=public.public_bytes(serialization.Encoding.PEM, form))
    signed = [NodeAuthHttpInterceptor(key, public)]
    with FleetHttpClient.from_server_address(address, insecure, roots, signed) as client:
        try:
            client.ActivateNode(asked)
        except httpx.HTTPStatusError as refused:
            yield refused.response, client._client  # noqa: SLF001
            return
        yield None


def key_state(refusal: str) -> str | None:
    """Read from a refusal of `refused_activation` whether the key is `KNOWN` or `UNKNOWN`.

    Returns:
        None if another program than a SuperLink answered.
    """
    from flwr.supercore.error import ApiErrorCode, FlowerError

    error = FlowerError.from_json(refusal)
    states: dict[int, str] = {
        ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL: KNOWN,
        ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED: UNKNOWN,
    }
    return None if error is None else states.get(error.code)


# --- inside a node -------------------------------------------------------------------------------


def app_bundle(folder: Path) -> bytes:
    """Build the bundle of an app, as ``flwr run`` does: the same bytes each time."""
    from flwr.cli.build import build_fab_from_disk

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a library that Flower uses
        return build_fab_from_disk(folder)


def config_overrides(file: Path) -> dict[str, Any]:
    """Read a file of run config, as ``flwr run`` does."""
    from flwr.common.config import parse_config_args

    return dict(parse_config_args([str(file)]))


def run_config(app: bytes, run: Any) -> dict[str, Any]:
    """Return the config of a run: that of its app bundle, with what the run changes.

    Args:
        app: The bytes of the bundle.
        run: Flower's description of the run.
    """
    from flwr.common.config import get_fused_config_from_fab

    return dict(get_fused_config_from_fab(app, run))


def insert_message(message: Message, state: Any, store: Any) -> None:
    """Put a reply where a node takes what it sends from."""
    from flwr.supernode.start_client_internal import _insert_message

    _insert_message(message, state, store)


def announcement_bytes(message: Message, tree: Any) -> int:
    """Count the bytes by which a SuperLink announces a message, without its content.

    Args:
        message: The message.
        tree: The names of its objects, as Flower sends them.
    """
    from flwr.common.serde_utils import metadata_to_proto

    size: int = metadata_to_proto(message.metadata).ByteSize() + tree.ByteSize()
    return size


def object_kind(content: bytes) -> str:
    """Return the class of an object of a message, by the bytes that travel."""
    from flwr.supercore.inflatable.inflatable_object import get_object_type_from_object_content

    return get_object_type_from_object_content(content)


def config_record(content: bytes) -> ConfigRecord:
    """Read a config record from the bytes of an object of a message."""
    from flwr.app import ConfigRecord

    return ConfigRecord.inflate(content)
