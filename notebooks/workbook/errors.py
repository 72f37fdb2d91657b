"""The exceptions that are a sentence for a person, and need no traceback."""


class _Sentence(Exception):
    def _render_traceback_(self) -> list[str]:
        """IPython shows this instead of the traceback."""
        return [f"{type(self).__name__}: {self}"]


class BadInput(_Sentence):
    """A parameter, file or environment is not what the exam needs.

    The message is one sentence that names the file or key, the value found and what is expected.
    The command line prints it without a traceback and exits with 2; a notebook shows it alone.
    """


class Stopped(_Sentence):
    """The load ended before all of it was measured; the message is one sentence that says why and where.

    What was measured is kept, and marked partial: it is never compared, recorded or blessed.
    """
