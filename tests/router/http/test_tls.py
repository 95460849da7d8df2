"""TLS towards clients."""

from __future__ import annotations

import ssl
import warnings
from pathlib import Path

import aiohttp
import pytest

from eldr.router.config.settings import ConfigError, RouterConfig
from eldr.router.http.tls import ServerTls
from tests.router.certificates import certificate
from tests.router.harness import ASK, on_uvloop, running


def too_old(authority: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=authority)
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    return context


@on_uvloop
async def test_tls_towards_clients(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "router")
    async with running(tls_cert=cert, tls_key=key) as s:
        url = f"https://127.0.0.1:{s.router.port}"
        tls = ssl.create_default_context(cafile=cert)
        async with s.session.post(url + "/v1/completions", json={**ASK, "stream": True}, ssl=tls) as answer:
            assert answer.status == 200
            assert (await answer.read()).endswith(b"data: [DONE]\n\n")
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await s.session.get(url + "/health")  # the system's authorities do not know this certificate
        with pytest.raises(aiohttp.ClientConnectorError):
            await s.session.get(url + "/health", ssl=too_old(cert))
        with pytest.raises(aiohttp.ClientError):
            await s.get("/health")  # plain HTTP to the same port
        renewed, _ = certificate(tmp_path, "router")  # over the old files
        s.router.reload_secrets()
        async with (
            aiohttp.ClientSession() as fresh,
            fresh.get(url + "/health", ssl=ssl.create_default_context(cafile=renewed)) as answer,
        ):
            assert answer.status == 200
        async with aiohttp.ClientSession() as fresh:
            with pytest.raises(aiohttp.ClientConnectorCertificateError):
                await fresh.get(url + "/health", ssl=tls)


def test_certificate_and_key_must_belong_together(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "one")
    _, other = certificate(tmp_path, "other")
    with pytest.raises(ConfigError, match="tls_cert"):
        ServerTls(cert, other)
    served = ServerTls(cert, key)
    key.write_bytes(other.read_bytes())
    with pytest.raises(ConfigError, match="tls_key"):
        served.reload()
    with pytest.raises(ConfigError, match="go together"):
        RouterConfig.of(prefill=("http://p",), decode=("http://d",), tls_cert=cert)
