"""Say before certificates end that they must be renewed, and after that they have ended."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.x509.oid import NameOID

SOON = timedelta(days=30)  # before its end a certificate is spoken of
KINDS = ("*.pem", "*.crt")
SECONDS = 5.0  # for a SuperLink to show its certificate
EXPIRED = 10  # OpenSSL's code of a certificate that has ended
RENEW = "see *Renew certificates* in docs/deploy.md"


def ends(file: Path) -> Iterator[tuple[str, datetime]]:
    """Yield whose each certificate of a PEM file is, and when it ends; none of another file."""
    with suppress(OSError, ValueError):
        for found in x509.load_pem_x509_certificates(file.read_bytes()):
            names = found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
            yield str(names[0].value) if names else "?", found.not_valid_after_utc


def about_end(whose: str, end: datetime) -> str:
    """Say that a certificate ends soon or has ended; empty if it does not."""
    now = datetime.now(UTC)
    if end > now + SOON:
        return ""
    if end <= now:
        return f"the certificate {whose} has expired on {end:%Y-%m-%d %H:%M} UTC"
    return f"the certificate {whose} expires on {end:%Y-%m-%d}, in {(end - now).days} days"


def folder_warnings(folder: Path) -> list[str]:
    """Say which certificates of a folder end soon or have ended, and what to do."""
    files = sorted({file for kind in KINDS for file in folder.glob(kind)})
    found = [about_end(f"of {name} in {file}", end) for file in files for name, end in ends(file)]
    return [f"{said}: renew it, {RENEW}" for said in found if said]


def superlink_warning(address: str, roots: Path) -> str:
    """Say that the certificate of a SuperLink, or of its proxy, ends soon or has ended.

    Args:
        address: HOST:PORT.
        roots: The file of certificates that sign it.

    Returns:
        Empty if it is valid, or if it cannot be seen: Flower says why when it connects.
    """
    host, _, port = address.rpartition(":")
    whose = f"of the SuperLink {address}"
    try:
        context = ssl.create_default_context(cafile=str(roots))
        with (
            socket.create_connection((host.strip("[]"), int(port)), SECONDS) as link,
            context.wrap_socket(link, server_hostname=host.strip("[]")) as secure,
        ):
            until = ssl.cert_time_to_seconds(str((secure.getpeercert() or {})["notAfter"]))
    except ssl.SSLCertVerificationError as error:
        said = f"the certificate {whose}, or that of its authority, has expired"
        return f"{said}: tell the operator" if error.verify_code == EXPIRED else ""
    except (OSError, ValueError, KeyError):
        return ""
    said = about_end(whose, datetime.fromtimestamp(until, UTC))
    return said and f"{said}: tell the operator"
