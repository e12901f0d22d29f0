"""The one exception that means "the user can mend this": the command line prints its message as a single line."""


class UserError(ValueError):
    """A mistake in an option, a config or a file.

    The message is one line that names the option or file, what it was and what would be right. `dar` prints it to
    stderr without a traceback and exits with status 2.
    """
