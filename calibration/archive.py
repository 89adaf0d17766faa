"""Opening a torch archive from an unknown source.

`torch.load(weights_only=True)` runs no code from a file. But it does not compare checksums, it
trusts all classes that other extensions have declared safe, and a pickle of 30 bytes can make it
allocate gigabytes. So an archive is checked here before torch sees it: it may hold only what a
statistics file holds.
"""

from __future__ import annotations

import io
import os
import pickletools
import re
import zipfile

from .regular import open_regular

MAX_FILE_BYTES = 256 << 20
"""SDXL's statistics are 8 MiB."""

MAX_MEMBERS = 1 << 13
MAX_PICKLE_BYTES = 8 << 20
MAX_OPERATIONS = 1 << 18
"""SDXL's pickle has 35,000 operations in 143 KB. Each takes up to 64 bytes of memory to check."""

_MEMBER = re.compile(r"[^/]+/(data\.pkl|byteorder|version|data/[^/]+)")
_DIRECTORY_ENTRY = b"PK\x01\x02"
_PLAIN_GLOBAL = re.compile(
    r"collections OrderedDict"
    r"|torch\._utils _rebuild_(tensor_v2|parameter)"
    r"|torch (Size|bool|(b?float|u?int)\d+|[A-Z][A-Za-z0-9]+Storage)"
)
_STATEFUL = ("BUILD", "NEWOBJ")  # operations of a pickle that fill or make an object


def checked_archive(path: str | os.PathLike) -> io.BytesIO:
    """Return a copy, in memory, of those parts of an archive that torch reads, all checked.

    A refused file takes no more memory than twice its size.

    Raises:
        OSError: the file cannot be read, or is not a regular file.
        ValueError, zipfile.BadZipFile, RuntimeError, NotImplementedError: it is too large,
            damaged, or not what torch.save writes of tensors and plain values.
    """
    content = _content(path)
    copy = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(copy, "w") as target:
        members = _checked_members(source, len(content))
        for member in members:
            if member.filename.endswith(".pkl"):
                _check_pickle(source.read(member))
        for member in members:  # read raises an error if the checksum differs
            target.writestr(member.filename, source.read(member))
    copy.seek(0)
    return copy


def _content(path: str | os.PathLike) -> bytes:
    """Read a file, and refuse one that is too large or has too many members."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_FILE_BYTES:
            raise ValueError(f"it has {size} bytes, and none has more than {MAX_FILE_BYTES}")
        content = file.read(size)
    if not content.startswith(b"PK\x03\x04"):
        raise ValueError("it is not an archive that torch.save writes")
    if content.count(_DIRECTORY_ENTRY) > MAX_MEMBERS:
        raise ValueError(f"it has more than {MAX_MEMBERS} members")
    return content


def _checked_members(archive: zipfile.ZipFile, size: int) -> list[zipfile.ZipInfo]:
    """Return the members that torch reads; refuse an archive that would grow when unpacked.

    `size` is that of the archive in bytes.
    """
    members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("it is compressed, which torch.save never does")
    names = {member.filename for member in members}
    if len(names) < len(members) or sum(member.file_size for member in members) > size:
        raise ValueError("its members overlap")
    return [member for member in members if _MEMBER.fullmatch(member.filename)]


def _check_pickle(data: bytes) -> None:
    """Refuse a pickle that is too long, or makes other things than containers, values, tensors."""
    if len(data) > MAX_PICKLE_BYTES:
        raise ValueError(
            f"its pickle has {len(data)} bytes, and none has more than {MAX_PICKLE_BYTES}"
        )
    for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if number >= MAX_OPERATIONS:
            raise ValueError(f"its pickle has more than {MAX_OPERATIONS} operations")
        if opcode.name == "PROTO" and argument != 2:
            raise ValueError(f"its pickle has protocol {argument}, but torch.save's has 2")
        if opcode.name in _STATEFUL:
            raise ValueError("it holds objects, not just tensors and plain values")
        if opcode.name == "GLOBAL" and not _PLAIN_GLOBAL.fullmatch(argument):
            name = argument.replace(" ", ".")[:100]
            raise ValueError(f"it holds {name}, not just tensors and plain values")
