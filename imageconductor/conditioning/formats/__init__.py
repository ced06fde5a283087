"""Track files of this project and of other tools; docs/formats.md describes the forms.

Files are recognised by their content. Nothing in them is run: arrays are read by their headers, pickles by a reader
that knows plain containers and NumPy arrays alone.
"""

from imageconductor.conditioning.formats.reading import parse_tracks, read_drawing, read_tracks
from imageconductor.conditioning.formats.registry import FORMATS, Format, find_format, written_formats
from imageconductor.conditioning.formats.track_file import TrackFile
from imageconductor.conditioning.formats.writing import Written, list_written, write_tracks

__all__ = [
    "FORMATS",
    "Format",
    "TrackFile",
    "Written",
    "find_format",
    "list_written",
    "parse_tracks",
    "read_drawing",
    "read_tracks",
    "write_tracks",
    "written_formats",
]
