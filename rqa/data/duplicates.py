"""What was seen before, remembered on disk when there is much of it."""

import sqlite3
from hashlib import blake2b


def normalize(text: str) -> str:
    """Text as duplicates are compared: in lower case, any white space one space."""
    return " ".join(text.lower().split())


def digest(*parts: str) -> bytes:
    """16 bytes that stand for a text, in parts whose boundaries count."""
    hashed = blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        hashed.update(len(data).to_bytes(8, "little") + data)
    return hashed.digest()


class Seen:
    """A set of texts, kept as hashes in a temporary database that spills to the disk and vanishes with the process."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None)  # "": a temporary file, unlinked by SQLite
        self._database.execute("CREATE TABLE seen (hash BLOB PRIMARY KEY) WITHOUT ROWID")
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("BEGIN")

    def add(self, *parts: str) -> bool:
        """Remember a text, in parts whose boundaries count; False if it was there already."""
        return self._database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest(*parts),)).rowcount == 1
