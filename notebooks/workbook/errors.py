"""The one exception that a person caused and a person can fix."""


class BadInput(Exception):
    """A parameter, file or environment is not what the exam needs.

    The message is one sentence that names the file or key, the value found and what is expected.
    The command line prints it without a traceback and exits with 2; a notebook shows it alone.
    """

    def _render_traceback_(self) -> list[str]:
        """IPython shows this instead of the traceback."""
        return [f"{type(self).__name__}: {self}"]
