"""Records put straight into the database, and what reading them costs there."""

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from support import Server, User, query

INSERT = """
INSERT INTO wav_to_mp3.records
    (id_user, id_record, idempotency_key, created_at, filename, size, sha256, duration, mp3)
SELECT
    $1, gen_random_uuid(), gen_random_uuid(), created_at, $3,
    octet_length($4::bytea), sha256($4), 1, $4
FROM unnest($2::timestamptz[]) AS created_at
RETURNING id_record
"""

COUNT = """
UPDATE wav_to_mp3.users
SET kept_bytes = kept_bytes + $2
WHERE id_user = $1
"""

SETTLE = """
ALTER TABLE wav_to_mp3.records SET (autovacuum_enabled = false, toast.autovacuum_enabled = false)
"""

# A session reports what it has read at its end, and before that only now and then.
END_SESSIONS = """
SELECT pg_terminate_backend(pid, 30000)
FROM pg_stat_activity
WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()
"""

BLOCKS = """
SELECT
    (heap_blks_hit + heap_blks_read + idx_blks_hit + idx_blks_read)::integer AS metadata,
    (toast_blks_hit + toast_blks_read)::integer AS mp3
FROM pg_statio_user_tables
WHERE relname = 'records'
"""


def store(
    server: Server,
    user: User,
    mp3: bytes = b"mp3",
    filename: str = "speech.mp3",
    created_at: datetime | None = None,
) -> str:
    """Return the link of a new record."""
    (link,) = store_many(server, user, [created_at or datetime.now(UTC)], mp3, filename)
    return link


def store_many(
    server: Server,
    user: User,
    times: Sequence[datetime],
    mp3: bytes = b"mp3",
    filename: str = "speech.mp3",
) -> list[str]:
    """Return the links of new records, one of each time."""
    # Without its triggers, which would bring the user's row up to date for each of them.
    url = f"{server.database_url}&session_replication_role=replica"
    rows = query(url, INSERT, user.id, times, filename, mp3)
    query(server.database_url, COUNT, user.id, len(rows) * len(mp3))
    link = f"{server.url}/api/download?id_record={{}}&id_user={user.id}"
    return [link.format(row["id_record"]) for row in rows]


def store_large(server: Server, user: User) -> tuple[str, bytes]:
    """Return the link and the content of a record of which sockets can hold but a part."""
    content = os.urandom(8 << 20)
    return store(server, user, content), content


class Blocks(NamedTuple):
    """How many blocks of PostgreSQL's were looked at."""

    metadata: int
    mp3: int


def blocks_read(server: Server) -> Blocks:
    """All that have been read of the records so far. Takes the service's connections away."""
    query(server.database_url, SETTLE)
    query(server.database_url, END_SESSIONS)
    return Blocks(*query(server.database_url, BLOCKS)[0])
