"""Downlinks and uplinks as Flower records, and the count of their bytes."""

from __future__ import annotations

from fedraclora.wire.downlink import (
    Order,
    Packed,
    Reader,
    pack_downlink,
    payload_bytes,
    unpack_downlink,
    uplink_layout,
)
from fedraclora.wire.records import DTYPES, clients_of, round_of
from fedraclora.wire.reply import Reply, pack_trial, unpack_trial

__all__ = [
    "DTYPES",
    "Order",
    "Packed",
    "Reader",
    "Reply",
    "clients_of",
    "pack_downlink",
    "pack_trial",
    "payload_bytes",
    "round_of",
    "unpack_downlink",
    "unpack_trial",
    "uplink_layout",
]
