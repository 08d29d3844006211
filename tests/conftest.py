"""Shape and dtype annotations of ops and nn are checked while the tests run (jaxtyping with beartype)."""

import pytest
from jaxtyping import install_import_hook

install_import_hook(["sidlm.ops", "sidlm.nn"], "beartype.beartype")


@pytest.fixture
def unchecked():
    """The function as users have it, without the checkers that the line above installs."""

    def unwrap(function):
        while hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        return function

    return unwrap
