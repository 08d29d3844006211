"""The command ``sid``: one small file per command, each with ``main(argv) -> exit status``."""
