from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

import sidlm
from sidlm.cli import main as cli
from sidlm.errors import SidError


def command(*argv: str, **kwargs) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": os.path.dirname(os.path.dirname(sidlm.__file__))}
    return subprocess.run(
        [sys.executable, "-m", "sidlm.cli.main", *argv], capture_output=True, text=True, env=env, timeout=120, **kwargs
    )


def test_help_names_every_command(sid):
    status, out, err = sid("--help")
    assert status == 0 and not err
    for name in cli.COMMANDS:
        assert f"\n  {name} " in out


def test_help_and_version_import_neither_torch_nor_transformers():
    code = (
        "import sys; from sidlm.cli.main import main; main(['--help']); main(['--version']); "
        "heavy = {'torch', 'transformers', 'rich', 'numpy'} & set(sys.modules); sys.exit(f'{heavy}' if heavy else 0)"
    )
    env = os.environ | {"PYTHONPATH": os.path.dirname(os.path.dirname(sidlm.__file__))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"sid {sidlm.__version__}" in done.stdout


def test_help_is_fast():
    times = []
    for _ in range(3):
        start = time.perf_counter()
        assert command("--help").returncode == 0
        times.append(time.perf_counter() - start)
    assert min(times) < 0.3


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_explains_itself(name, capsys):
    try:
        status = cli.main([name, "--help"])
    except SystemExit as stop:
        status = stop.code
    out = capsys.readouterr().out
    assert status == 0
    assert f"sid {name}" in out and len(out.splitlines()) > 5


def test_unknown_command_names_the_nearest(fails):
    assert fails("evalute") == "unknown command 'evalute'; did you mean 'evaluate'?"
    assert fails("zzz").startswith("unknown command 'zzz'; there are demo, plan, train,")


def test_unknown_option_names_the_nearest(fails):
    assert fails("generate", "x", "y", "--temprature", "1").startswith(
        "sid generate: unknown argument '--temprature'; did you mean --temperature?"
    )
    assert "the following arguments are required: prompt" in fails("generate", "x")
    assert "argument --top-p: must be between 0 and 1, got 1.5" in fails("generate", "x", "y", "--top-p", "1.5")
    assert "argument --num: 'two' is not an integer" in fails("generate", "x", "y", "--num", "two")


def test_without_a_command_the_usage_and_status_2(sid):
    status, out, _ = sid()
    assert status == 2 and out.startswith("usage: sid COMMAND")


def raising(monkeypatch, error):
    def run(argv):
        raise error

    monkeypatch.setattr(cli, "run", run)


@pytest.mark.parametrize("error", [SidError("two\nlines  of it"), FileNotFoundError(2, "No such file", "x.txt")])
def test_mistakes_are_one_line(monkeypatch, fails, error):
    raising(monkeypatch, error)
    assert fails() in ("two lines of it", "x.txt: No such file")


def test_a_bug_keeps_its_traceback(monkeypatch):
    raising(monkeypatch, ValueError("raised outside the package"))
    with pytest.raises(ValueError, match="outside the package"):
        cli.main([])
    code = "import sidlm.cli.main as m, sys; m.run = lambda argv: int('x'); sys.exit(m.main([]))"
    env = os.environ | {"PYTHONPATH": os.path.dirname(os.path.dirname(sidlm.__file__))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith("Traceback")


def test_a_value_error_raised_by_the_package_is_a_mistake(monkeypatch, fails):
    from sidlm.data.config import parse_source

    monkeypatch.setattr(cli, "run", lambda argv: parse_source(""))
    assert fails() == "a data source is an empty string"


def test_ctrl_c_is_130(monkeypatch, sid):
    raising(monkeypatch, KeyboardInterrupt())
    status, _, err = sid()
    assert status == 130 and err == "sid: interrupted\n"


@pytest.mark.skipif(os.name == "nt", reason="pipes of a POSIX shell")
@pytest.mark.parametrize("lines", [3, 100000])  # less than the buffer, which fails at exit only, and more
def test_a_closed_pipe_is_no_error(lines):
    env = os.environ | {"PYTHONPATH": os.path.dirname(os.path.dirname(sidlm.__file__)), "PYTHONUNBUFFERED": ""}
    code = (
        "import sidlm.cli.main as m, sys, time\n"
        f"def run(argv):\n    time.sleep(0.5)\n    for i in range({lines}): print(i)\n    return 0\n"
        "m.run = run\nsys.exit(m.main([]))"
    )
    script = f"{sys.executable} -c '{code}' | true"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", script], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0 and done.stderr == ""
