"""Every command and every Python snippet in the documentation is run here, or named below with the reason why not.

A fenced block of ``bash`` holds commands, one per line; ``python`` is executed; a block whose info string ends in a
file name (```` ```yaml my.yaml ````) is written to that file first. Blocks of one page run in order in one folder that
holds nothing but a small trained model at runs/demo, the repository's configs and two texts.
"""

from __future__ import annotations

import contextlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from sidlm.cli.main import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

# command -> why it is not run here; prefixes are matched word by word
NOT_RUN = {
    "git clone": "needs the network",
    "cd": "goes with git clone",
    "python -m venv": "makes an environment; continuous integration installs into one",
    ". .venv/bin/activate": "goes with python -m venv",
    "pip install": "needs the network; continuous integration installs the package itself",
    "torchrun": "several processes; tests/train/test_processes.py runs them",
    "make": "continuous integration runs the targets themselves",
    "sid demo": "trains for minutes; tests/cli/test_demo.py runs it with fewer steps",
    "sid launch": "several processes; tests/train/test_bad_input.py runs it",
    "sid extend": "trains until every gate is passed; tests/train/test_extend.py runs it",
    "sid chat": "reads from a terminal; tests/cli/test_chat.py drives it",
    "pytest": "this very suite",
    "ruff": "continuous integration runs it",
    "pyright": "continuous integration runs it",
    "python tools/config_reference.py": "tests/docs/test_config_reference.py compares the file",
}
LANGUAGES = {"bash", "python", "yaml", "json", "jsonl", "text", "console", ""}


class Block(NamedTuple):
    line: int
    language: str
    file: str
    text: str


def blocks(page: Path) -> list[Block]:
    found, fence, start, info, body = [], "", 0, "", []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        opening = re.match(r"\s*(```+|~~~+)\s*(.*)$", line)
        if not fence and opening:
            fence, info, start, body = opening[1], opening[2].strip(), number, []
        elif fence and line.strip() == fence:
            language, _, file = info.partition(" ")
            found.append(Block(start, language, file.strip(), "\n".join(body) + "\n"))
            fence = ""
        elif fence:
            body.append(line)
    assert not fence, f"{page.name}:{start}: a fenced block does not end"
    return found


def commands(block: Block) -> list[str]:
    lines = block.text.replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines for part in line.split(" && ")]
    return [part for part in parts if shlex.split(part, comments=True)]


def reason_not_to_run(command: str) -> str | None:
    words = shlex.split(command, comments=True)
    for prefix, reason in NOT_RUN.items():
        if words[: len(prefix.split())] == prefix.split():
            return reason
    return None


def run(command: str, monkeypatch: pytest.MonkeyPatch, servers: "list[Server] | None" = None) -> int:
    words = shlex.split(command, comments=True)
    with monkeypatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "0")  # a user has no interpreter on
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            name, _, value = words.pop(0).partition("=")
            patch.setenv(name, value)
        if words[0] == "python" and words[1].startswith("examples/"):
            return script(words[1:], patch)
        if words[:2] == ["sid", "serve"] and servers is not None:
            servers.append(Server(words))
            return 0
        if words[0] == "python" and servers:
            return servers[-1].ask(words[1])
        if words[0] != "sid":
            raise AssertionError(f"unknown command {words[0]!r}: run it here or name it in NOT_RUN with the reason")
        if words[1:2] == ["train"] and "--help" not in words:
            words += ["--train.steps", "3", "--validation.documents", "4", "--samples.max_new_tokens", "4"]
            if any(word.startswith("configs/") for word in words):  # sizes for a laptop's hour and for a GPU
                words += ["--schedule.warmup_steps", "1", "--train.batch_size", "2", "--data.seq_len", "32"]
                words += ["--model.preset", "nano", "--data.vocab_size", "512"]
        if words[1:2] == ["generate"]:
            words += ["--max-new-tokens", "4"]
        with contextlib.suppress(SystemExit):  # what --help raises
            return main(words[1:])
        return 0


def script(words: list[str], patch: pytest.MonkeyPatch) -> int:
    """Runs an example with few steps, in this process."""
    patch.syspath_prepend(str(ROOT / "examples"))
    patch.setattr(sys, "argv", [*words, "--steps", "2"])
    runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    sys.modules.pop("common", None)
    return 0


class Server:
    """What `sid serve` starts, in a process of its own on a free port, until the page ends."""

    def __init__(self, words: list[str]):
        at = words.index("--port") + 1
        self.said, command = words[at], [*words[1:at], "0", *words[at + 1 :]]
        path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "sidlm.cli.main", *command]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("listening on http://127.0.0.1:"), line
        self.port = line.split()[-1].split(":")[2].split("/")[0]

    def ask(self, file: str) -> int:
        """Runs a script that asks it, and wants an answer."""
        text = Path(file).read_text(encoding="utf-8").replace(self.said, self.port)
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120)
        print(done.stderr, file=sys.stderr)
        assert done.returncode or done.stdout, "no answer"
        return done.returncode

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(60)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_of_a_page_run(page, tmp_path, monkeypatch, demo_run, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    shutil.copytree(demo_run, tmp_path / "runs" / "demo")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for name in ("notes.txt", "more-notes.txt"):
        shutil.copy(ROOT / "LICENSE", tmp_path / name)
    names: dict[str, object] = {"__name__": "docs"}
    servers: list[Server] = []
    try:
        run_page(page, tmp_path, monkeypatch, capsys, names, servers)
        assert [server.stop() for server in servers] == [0] * len(servers)
    finally:
        for server in servers:
            server.process.kill()
            server.process.wait()


def run_page(page, tmp_path, monkeypatch, capsys, names, servers):
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        assert block.language in LANGUAGES, f"{where}: block of unknown language {block.language!r}"
        if block.file:
            (tmp_path / block.file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            exec(compile(block.text, where, "exec"), names)
        elif block.language == "bash":
            for command in commands(block):
                if reason_not_to_run(command) is None:
                    status = run(command, monkeypatch, servers)
                    said = capsys.readouterr()
                    assert status == 0, f"{where}: `{command}` exited {status}\n{said.err}"


def test_the_pages_a_stranger_needs_exist():
    names = {page.name for page in PAGES}
    assert {"README.md", "getting-started.md", "architecture.md", "your-own-data.md", "config-reference.md"} <= names


def test_every_command_is_documented():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [name for name in COMMANDS if f"sid {name}" not in text] == []


def links(page: Path) -> list[tuple[Path, str]]:
    """(page or file, heading or "") of every relative link."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:", target)]
    parts = [target.partition("#") for target in targets]
    return [((page.parent / file).resolve() if file else page, heading) for file, _, heading in parts]


def headings(page: Path) -> set[str]:
    """As links name them: lower case, hyphens for spaces, no other punctuation."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", x.lower()).replace(" ", "-") for x in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


def test_links_lead_somewhere_and_to_every_page():
    pages = [*PAGES, *(ROOT / "docs" / "results").glob("*.md"), *(ROOT / "src").rglob("README.md")]
    reached = set()
    for page in pages:
        for file, heading in links(page):
            assert file.exists(), f"{page.name} links to {file.relative_to(ROOT)}, which is not there"
            if heading:
                assert heading in headings(file), f"{page.name}: {file.name} has no heading {heading!r}"
            reached |= {file} - {page}
    assert {page for page in pages if ROOT / "docs" in page.parents} <= reached


def test_every_result_is_on_a_page():
    pages = [*ROOT.glob("docs/*.md"), *ROOT.glob("docs/results/*.md")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    assert [file.name for file in (ROOT / "benchmarks" / "results").iterdir() if file.name not in text] == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("```bash\nrm -rf /tmp/x\n```\n", "unknown command 'rm'"),
        ("```bash\nsid evalute x\n```\n", "exited 2"),
        ("```bash\ncd sid && rm -rf x\n```\n", "unknown command 'rm'"),
        ("```fortran\nprint *\n```\n", "unknown language"),
        ("```bash\nsid --help\n", "does not end"),
        ("```python\nraise AssertionError('seen')\n```\n", "seen"),
    ],
)
def test_this_test_can_fail(text, problem, tmp_path, monkeypatch, demo_run, capsys):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(AssertionError, match=problem):
        test_blocks_of_a_page_run(page, tmp_path, monkeypatch, demo_run, capsys)


def test_environment_words_and_continued_lines(monkeypatch, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("```bash\n# a comment\nSID_IMPL=simplicial=reference sid \\\n  --version  # and another\n\n```\n")
    (command,) = commands(blocks(page)[0])
    assert run(command, monkeypatch) == 0
    assert capsys.readouterr().out.startswith("sid ")
    assert "SID_IMPL" not in os.environ
