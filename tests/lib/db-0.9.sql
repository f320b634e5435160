-- The whole schema. Every worker applies it when it starts: as one query, hence one transaction, and
-- the lock makes workers that start together on an empty database take turns.
-- Needs PostgreSQL 16 or later (STORAGE in CREATE TABLE).

SELECT pg_advisory_xact_lock(hashtext('wav-to-mp3 schema'));

CREATE TABLE IF NOT EXISTS users (
    id_user       bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    username      text        NOT NULL UNIQUE CHECK (char_length(username) BETWEEN 1 AND 255),
    token_sha256  bytea       NOT NULL UNIQUE CHECK (octet_length(token_sha256) = 32),
    created_at    timestamptz NOT NULL DEFAULT now()
);

-- The keys all begin with id_user, and so does every query: the table can be partitioned by hash or
-- distributed by id_user as it is. The second key is the order of the listing.
CREATE TABLE IF NOT EXISTS records (
    id_user          bigint           NOT NULL REFERENCES users,
    id_record        uuid             NOT NULL,
    created_at       timestamptz      NOT NULL DEFAULT now(),
    filename         text             NOT NULL CHECK (octet_length(filename) BETWEEN 1 AND 255),
    size             integer          NOT NULL CHECK (size = octet_length(mp3)),
    sha256           bytea            NOT NULL CHECK (octet_length(sha256) = 32),
    duration         double precision NOT NULL CHECK (duration > 0),
    -- What the client sent, and the digest of its WAV; otherwise id_record, and no digest.
    idempotency_key  text             NOT NULL CHECK (char_length(idempotency_key) BETWEEN 1 AND 255),
    wav_sha256       bytea            CHECK (octet_length(wav_sha256) = 32),
    -- Uncompressed and out of line: a slice costs the same wherever it lies.
    mp3              bytea            STORAGE EXTERNAL NOT NULL,
    PRIMARY KEY (id_user, id_record),
    UNIQUE (id_user, created_at, id_record),
    UNIQUE (id_user, idempotency_key)
);
