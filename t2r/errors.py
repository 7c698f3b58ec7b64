"""The one exception a user is meant to read."""


class InputError(ValueError):
    """Wrong usage or bad input. One line that names the object, its field or file, the value and the rule it breaks.

    The command line prints it without a traceback and exits with ``exit_code``. Everything else that escapes is a
    defect of ours or a failure of the machine, and keeps its traceback.
    """

    exit_code = 2
