"""The errors of reading and writing pictures and videos."""


class MediaError(Exception):
    """A picture or video cannot be read or written; the message is one line and does not repeat the path."""


class MissingPackageError(Exception):
    """An optional package is needed and not installed; the message says how to install it."""
