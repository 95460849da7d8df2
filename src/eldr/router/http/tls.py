"""TLS towards clients and towards workers."""

from __future__ import annotations

import ssl
from pathlib import Path

from eldr.router.config.settings import ConfigError

OLDEST = ssl.TLSVersion.TLSv1_2
# The connection is closed if the client has not finished the handshake by then.
HANDSHAKE_TIMEOUT_S = 10.0


class ServerTls:
    """The certificate chain that the router shows to clients, and its key. Both can be replaced while it runs.

    protocol: what is spoken over it, as ALPN names it.
    """

    def __init__(self, certificate: Path, key: Path, protocol: str = "http/1.1") -> None:
        self._certificate = certificate
        self._key = key
        self._protocol = protocol
        self.context = self._load(_server_context(protocol))

    def reload(self) -> None:
        """Read the files again, for new connections.

        Raises ConfigError, and changes nothing, if a file cannot be read or the two do not belong together.
        """
        self._load(_server_context(self._protocol))
        self._load(self.context)

    def _load(self, context: ssl.SSLContext) -> ssl.SSLContext:
        try:
            # Without a callback OpenSSL would ask for a passphrase on the terminal.
            context.load_cert_chain(self._certificate, self._key, password=_no_passphrase)
        except (OSError, ssl.SSLError, ConfigError) as error:
            raise ConfigError(f"tls_cert {self._certificate}, tls_key {self._key}: {error}") from None
        return context


def _server_context(protocol: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = OLDEST
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.set_alpn_protocols([protocol])
    return context


def _no_passphrase() -> str:
    raise ConfigError("the key has a passphrase; use a key without one, which only the router can read")


def worker_context(authorities: Path | None) -> ssl.SSLContext:
    """The TLS context for https workers, which checks their certificate and name.

    authorities: the CA certificates, or None for the system's. Raises ConfigError if they cannot be read.
    """
    try:
        context = ssl.create_default_context(cafile=authorities)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"worker_ca {authorities}: {error}") from None
    context.minimum_version = OLDEST
    context.set_alpn_protocols(["http/1.1"])
    return context
