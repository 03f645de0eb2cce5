"""Downlinks and uplinks as Flower records, and the count of their bytes."""

from __future__ import annotations

from fedraclora.wire.changes import Changes, Coded, uploaded_bytes
from fedraclora.wire.downlink import (
    Packed,
    Reader,
    TrainRequest,
    pack_downlink,
    payload_bytes,
    unpack_downlink,
    uplink_layout,
)
from fedraclora.wire.records import DTYPES, clients_of, round_of
from fedraclora.wire.reply import Reply, pack_result, unpack_result

__all__ = [
    "DTYPES",
    "Changes",
    "Coded",
    "Packed",
    "Reader",
    "Reply",
    "TrainRequest",
    "clients_of",
    "pack_downlink",
    "pack_result",
    "payload_bytes",
    "round_of",
    "unpack_downlink",
    "unpack_result",
    "uplink_layout",
    "uploaded_bytes",
]
