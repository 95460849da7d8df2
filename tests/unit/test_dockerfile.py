"""The Dockerfile, as far as it can be tested without a container engine: what it copies, installs, runs and probes."""

import json
import re
import subprocess
import sys
import threading
import tomllib
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from eldr.cli.main import main

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COPIES = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
COPIED = [source for sources in COPIES for source in sources.split()]


def command(instruction: str) -> list[str]:
    match = re.search(rf"^{instruction} .*?(\[.*\])$", DOCKERFILE, re.MULTILINE)
    assert match is not None
    arguments: list[str] = json.loads(match[1])
    return arguments


def in_the_context(path: str) -> bool:
    """Whether .dockerignore lets `path` in: the last pattern that matches decides."""
    inside = True
    for pattern in (ROOT / ".dockerignore").read_text().splitlines():
        if pattern and not pattern.startswith("#") and fnmatch(path, pattern.removeprefix("!")):
            inside = pattern.startswith("!")
    return inside


@pytest.mark.parametrize("source", COPIED)
def test_what_is_copied_exists_and_is_in_the_context(source: str) -> None:
    assert (ROOT / source).exists()
    assert in_the_context(source)


def test_what_the_build_reads_is_copied() -> None:
    needed = {"pyproject.toml", "setup.py", "src", PROJECT["readme"], *PROJECT["license-files"]}
    assert needed <= set(COPIED)


def test_the_installation_names_extras_and_constraints_that_are_there() -> None:
    match = re.search(r"pip install .*--constraint (\S+) '\.\[(.+)\]'$", DOCKERFILE, re.MULTILINE)
    assert match is not None
    assert match[1] in COPIED
    assert set(match[2].split(",")) <= PROJECT["optional-dependencies"].keys()


def test_both_stages_have_the_same_python() -> None:
    stages = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert len(stages) == 2
    assert len(set(stages)) == 1


def test_the_entry_point_is_a_command_of_eldr(capsys: pytest.CaptureFixture[str]) -> None:
    program, *arguments = command("ENTRYPOINT")
    assert program in PROJECT["scripts"]
    # Unknown flags end in SystemExit, a fleet without workers in an error of eldr's own.
    assert main(arguments) == 2
    assert "no workers are given" in capsys.readouterr().err


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False), (None, False)])
def test_the_health_check_is_the_status_of_health(status: int | None, healthy: bool) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if status and self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    if status is None:
        server.shutdown()
        server.server_close()
    try:
        python, *arguments = command("HEALTHCHECK")
        assert python == "python"
        assert re.search(r"^EXPOSE 8000$", DOCKERFILE, re.MULTILINE)
        at_the_server = [argument.replace(", 8000,", f", {server.server_port},") for argument in arguments]
        assert at_the_server != arguments
        code = subprocess.run([sys.executable, *at_the_server], stderr=subprocess.DEVNULL, timeout=60).returncode
        assert (code == 0) is healthy
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
