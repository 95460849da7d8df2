"""The command line: help, exit codes, messages, and that the base install is enough to start it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from eldr.cli.main import main
from eldr.policies import PolicyOptions
from tests.synthetic import make_calibration


@pytest.mark.parametrize(
    "command",
    ["serve", "epp", "record", "fit", "inspect", "replay", "place-experts", "decisions", "calibrate-cost", "demo"],
)
def test_every_command_explains_itself_with_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"eldr {command}" in capsys.readouterr().out.split("examples:")[1]


@pytest.mark.parametrize("command", ["serve", "epp", "replay", "decisions"])
def test_help_states_the_defaults_of_policy_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = " ".join(capsys.readouterr().out.partition("examples:")[0].split())
    defaults = PolicyOptions()
    for name in ("tau", "refit_window_s", "others_weight", "anchor", "tail_guard", "cost_scope"):
        flag = "--" + name.removesuffix("_s").replace("_", "-")
        described = re.split(r" --[a-z]", shown.rpartition(f"{flag} ")[2])[0]
        default = getattr(defaults, name)
        assert f"({default if isinstance(default, str) else f'{default:g}'})" in described, name


@pytest.mark.parametrize("arguments", [[], ["fly"], ["fit"], ["fit", "t.npz", "--workers", "0", "-o", "x"]])
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: eldr" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["fit", "absent.npz", "--workers", "2", "-o", "out.npz"],
        ["inspect", "absent.npz"],
        ["decisions", "absent.jsonl"],
        ["record", "absent.jsonl", "--url", "http://127.0.0.1:9", "-o", "out.npz"],
        ["serve", "--config", "absent.toml"],
    ],
)
def test_an_absent_file_is_named_and_exits_with_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("eldr: ")
    assert "absent" in error
    assert list(tmp_path.iterdir()) == []


def test_serve_without_workers_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--policy", "jsq"]) == 2
    assert "prefill" in capsys.readouterr().err


def test_a_missing_extra_is_named() -> None:
    """With scipy hidden, `eldr fit` says what to install."""
    code = "import sys; sys.modules['scipy'] = None; sys.modules['rich'] = None; import eldr.cli.main; "
    code += "sys.exit(eldr.cli.main.main(['fit', 'x', '--workers', '2', '-o', 'y']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "install eldr[fit]" in done.stderr


def test_the_connector_s_side_imports_numpy_alone() -> None:
    """What lives inside a user's vLLM environment must not fight its pins."""
    code = (
        "import json, sys; sys.modules.update(pybase64=None); "  # used where they are, never needed
        "before = set(sys.modules); import eldr.cli.main, eldr.counts, eldr.expert_rows; "
        # Cython makes modules in memory, which nobody has to install.
        "new = [m for m in set(sys.modules) - before if getattr(sys.modules[m], '__file__', None)]; "
        "print(json.dumps(sorted({m.partition('.')[0] for m in new})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    foreign = set(json.loads(done.stdout)) - sys.stdlib_module_names - {"eldr", "numpy"}
    assert not {name for name in foreign if not name.startswith("_")}


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    """`eldr inspect FILE --json | head -1` ends quietly; `true` reads nothing at all."""
    path = tmp_path / "calibration.npz"
    make_calibration().save(path)
    command = f"{sys.executable} -m eldr inspect {path} --json | true"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
