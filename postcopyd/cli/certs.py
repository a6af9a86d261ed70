# SPDX-License-Identifier: Apache-2.0
"""`postcopyd certs`: makes a CA, and certificates for hosts, where there is no other PKI.

Owns the names of the files and how they are put in place: all are written beside their places
first, so that no file is ever half there. Each call makes new host keys. The CA's key is only
needed for making certificates, and on no host.
"""

from __future__ import annotations

import os
import re
import socket
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from postcopyd.errors import PostcopydError

CA_CERT, CA_KEY = "ca-cert.pem", "ca-key.pem"
HOST_CERTS = ("server-cert.pem", "client-cert.pem")
HOST_KEYS = ("server-key.pem", "client-key.pem")

CA_DAYS = 3650
HOST_DAYS = 825
"""The strictest known limit on certificates of a private CA: Apple's."""

EARLY = timedelta(hours=1)
"""How much slower another host's clock may be."""

_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")


class Authority(NamedTuple):
    """A CA: its certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def make(directory: Path, hosts: list[str], authority: Path | None = None) -> list[str]:
    """Makes the five files of a host in `directory`, by the CA in the folder `authority`, or in the
    same folder; makes the CA if there is none. Returns lines for a terminal: what was done and what
    is to be done. Raises PostcopydError; then the host's files are unchanged."""
    names = _general_names(hosts)
    home = authority or directory
    said = []
    try:
        for folder in (home, directory):
            if not folder.exists():
                folder.mkdir(mode=0o700, parents=True)
        ca, is_new = _authority(home)
        if is_new:
            said.append(
                f"made a CA, good for {CA_DAYS // 365} years: {home / CA_CERT} and its key "
                f"{home / CA_KEY}, which no daemon needs: keep it where nobody else reads it"
            )
        _must_replace(directory, ca, hosts)
        certificate, key = host(ca, hosts)
        ca_pem = ca.certificate.public_bytes(serialization.Encoding.PEM)
        files = {name: _private(key) for name in HOST_KEYS}
        files |= {name: certificate.public_bytes(serialization.Encoding.PEM) for name in HOST_CERTS}
        _write(directory, files | ({} if directory == home else {CA_CERT: ca_pem}))
    except OSError as error:
        raise PostcopydError(
            f"making certificates in {directory}: {error.filename or ''}: {error.strerror}; mend "
            f"that or name another folder"
        ) from None
    said.append(
        f"made a certificate of {', '.join(map(_name, names))}, good for {HOST_DAYS} days: "
        f"{directory}/{{{','.join(name.removesuffix('.pem') for name in HOST_CERTS + HOST_KEYS)}}}"
        f".pem"
    )
    said.append(
        f"that host needs these four and {CA_CERT} in /etc/pki/postcopyd, or where `postcopyd "
        f"serve --tls-dir` says; a daemon that runs reads them again on SIGHUP"
    )
    said.append(
        f"for another host: postcopyd certs --ca {home} --dir OTHER_FOLDER --host OTHER_HOST"
    )
    return said


def new_authority(days: int = CA_DAYS) -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "postcopyd"),
            # A new name each time: a person who has two CAs must be able to tell them apart.
            x509.NameAttribute(
                NameOID.COMMON_NAME, f"CA of {socket.gethostname()[:40]} {os.urandom(4).hex()}"
            ),
        ]
    )
    usage = _usage(key_cert_sign=True, crl_sign=True)
    certificate = (
        _builder(name, name, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Authority(certificate, key)


def host(
    ca: Authority,
    hosts: list[str],
    *,
    ends: datetime | None = None,
    purposes: tuple[x509.ObjectIdentifier, ...] = (
        ExtendedKeyUsageOID.SERVER_AUTH,
        ExtendedKeyUsageOID.CLIENT_AUTH,
    ),
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """A certificate with these DNS and IP names, valid for both roles, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "postcopyd"),
            x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64]),
        ]
    )
    signer = ca.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    certificate = (
        _builder(subject, ca.certificate.subject, key.public_key(), HOST_DAYS, ends)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(x509.SubjectAlternativeName(_general_names(hosts)), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(signer), critical=False
        )
        .sign(ca.key, hashes.SHA256())
    )
    return certificate, key


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    days: int,
    ends: datetime | None = None,
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    ends = ends or now + timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, ends) - EARLY)
        .not_valid_after(ends)
    )


def _usage(**used: bool) -> x509.KeyUsage:
    every = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment",
        "key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(**{name: used.get(name, False) for name in every})


def _general_names(hosts: list[str]) -> list[x509.GeneralName]:
    names: list[x509.GeneralName] = []
    for text in hosts:
        try:
            names.append(x509.IPAddress(ip_address(text.strip("[]"))))
            continue
        except ValueError:
            pass
        with suppress(UnicodeError):
            name = text.encode("idna").decode().lower()
            if len(name) <= 253 and all(_LABEL.fullmatch(label) for label in name.split(".")):
                names.append(x509.DNSName(name))
                continue
        raise PostcopydError(
            f"{text!r} cannot be the name of a host: give a DNS name or an IP address, without "
            f"a port",
            "InvalidRequest",
        )
    return names


def _name(name: x509.GeneralName) -> str:
    return str(name.value)


def _authority(home: Path) -> tuple[Authority, bool]:
    """The CA in a folder, and whether it was made by this call. Raises PostcopydError, OSError."""
    certificate, key = home / CA_CERT, home / CA_KEY
    if not certificate.exists() and not key.exists():
        made = new_authority()
        _write(
            home,
            {
                CA_KEY: _private(made.key),
                CA_CERT: made.certificate.public_bytes(serialization.Encoding.PEM),
            },
        )
        return made, True
    for path, other in ((certificate, key), (key, certificate)):
        if not path.exists():
            raise PostcopydError(
                f"{home} has {other.name} and not {path.name}: name the folder where both are, "
                f"where the CA was made, with --ca"
            )
    try:
        found = x509.load_pem_x509_certificate(certificate.read_bytes())
        private = serialization.load_pem_private_key(key.read_bytes(), None)
    except (ValueError, TypeError) as error:
        raise PostcopydError(
            f"reading the CA of {home}: {error}; its files must be PEM, the key without a password"
        ) from None
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise PostcopydError(f"{key} was not made by `postcopyd certs`: use the tool that made it")
    if found.public_key() != private.public_key():
        raise PostcopydError(f"{key} is not the key of {certificate}: find the right one")
    if found.not_valid_after_utc < datetime.now(UTC) + timedelta(days=1):
        raise PostcopydError(
            f"the CA {certificate} has expired: make a new one in another folder, and new "
            f"certificates for every host with it"
        )
    return Authority(found, private), False


def _must_replace(directory: Path, ca: Authority, hosts: list[str]) -> None:
    """Raises PostcopydError if a host's folder has anything but older certificates of the same
    host, by the same CA."""
    other = directory / CA_CERT
    pem = ca.certificate.public_bytes(serialization.Encoding.PEM)
    if other.exists() and other.read_bytes().strip() != pem.strip():
        raise PostcopydError(
            f"{other} is that of another CA: name its folder with --ca, or another --dir"
        )
    for name in HOST_CERTS:
        path = directory / name
        if not path.exists():
            continue
        try:
            old = x509.load_pem_x509_certificate(path.read_bytes())
            names = old.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            assert old.signature_hash_algorithm is not None
            ca.key.public_key().verify(
                old.signature, old.tbs_certificate_bytes, ec.ECDSA(old.signature_hash_algorithm)
            )
        except (ValueError, InvalidSignature, x509.ExtensionNotFound):
            raise PostcopydError(
                f"{path} is not from the CA here and stays as it is: move it away, or name another "
                f"folder with --dir"
            ) from None
        if not set(names) & set(_general_names(hosts)):
            raise PostcopydError(
                f"{directory} has the certificate of another host, {', '.join(map(_name, names))}: "
                f"give {hosts[0]} a folder of its own, with --ca for the CA: postcopyd certs --ca "
                f"{directory} --dir {directory / hosts[0]} --host {hosts[0]}"
            )


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _write(directory: Path, files: dict[str, bytes]) -> None:
    """Replaces files, each as a whole; all are on disk before the first is put in place."""
    new = {name: directory / f".{name}.new" for name in files}
    try:
        for name, data in files.items():
            mode = 0o600 if name.endswith("-key.pem") else 0o644
            new[name].unlink(missing_ok=True)
            fd = os.open(new[name], os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(fd)
        for name, path in new.items():
            path.replace(directory / name)
    finally:
        for path in new.values():
            path.unlink(missing_ok=True)
