"""The one exception that a user's mistake raises."""


class UserError(Exception):
    """Bad input. The message is one sentence: the file, key or argument, what is wrong, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """
