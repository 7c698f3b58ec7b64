"""The one exception of this package that a user is meant to read."""


class InputError(ValueError):
    """Wrong usage or bad input, told in one line; the command line prints it without a traceback."""

    exit_code = 2
