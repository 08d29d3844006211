"""The one exception type for mistakes that a user can mend."""


class SidError(Exception):
    """A mistake in input, data or environment. The message is one line that names the thing and the numbers;
    the command line prints it after ``sid: error:`` and exits with status 2."""
