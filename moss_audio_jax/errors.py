"""The two ways a caller can be wrong; the command line makes one line and an exit code of them."""


class InputError(ValueError):
    """An input cannot be used: a file, a checkpoint, a row. The message names it (exit code 1)."""


class UsageError(ValueError):
    """The request itself makes no sense: options that contradict each other (exit code 2)."""
