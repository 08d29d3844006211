"""The pages' commands use the tiny run that the command-line tests train."""

import importlib.util
from pathlib import Path

_spec = importlib.util.spec_from_file_location("cli_conftest", Path(__file__).parents[1] / "cli" / "conftest.py")
_cli = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_cli)

cache, corpus, demo_run = _cli.cache, _cli.corpus, _cli.demo_run
