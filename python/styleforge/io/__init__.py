"""Reading and writing pictures and videos as 8-bit RGB arrays. Imports neither torch nor PyAV by itself.

``PICTURE_SUFFIXES`` are the file name suffixes, lower case, that are read and written as pictures;
``VIDEO_INPUT_SUFFIXES`` are taken for videos, ``VIDEO_OUTPUT_SUFFIXES`` can be written.
"""

from styleforge.io.errors import MediaError, MissingPackageError
from styleforge.io.files import atomic_path
from styleforge.io.pictures import (
    PICTURE_SUFFIXES,
    Picture,
    fit_longer_side,
    picture_size,
    read_picture,
    write_picture,
)
from styleforge.io.video import VIDEO_INPUT_SUFFIXES, VIDEO_OUTPUT_SUFFIXES, VideoReader, VideoWriter

__all__ = [
    "PICTURE_SUFFIXES",
    "VIDEO_INPUT_SUFFIXES",
    "VIDEO_OUTPUT_SUFFIXES",
    "MediaError",
    "MissingPackageError",
    "Picture",
    "VideoReader",
    "VideoWriter",
    "atomic_path",
    "fit_longer_side",
    "picture_size",
    "read_picture",
    "write_picture",
]
