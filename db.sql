-- The whole schema. Every worker applies it when it starts: as one query, hence one transaction, and
-- the lock makes workers that start together take turns. It brings any earlier state of itself
-- forward, and where there is nothing to do, it waits for nobody. Where the service's role may not
-- create anything, an administrator applies it, and lets the role use it:
--     psql --single-transaction --set ON_ERROR_STOP=1 --file db.sql
--     GRANT USAGE ON SCHEMA wav_to_mp3 TO role;
--     GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA wav_to_mp3 TO role;
-- Needs PostgreSQL 16 or later (STORAGE in CREATE TABLE).

SELECT pg_advisory_xact_lock(hashtext('wav-to-mp3 schema'));

CREATE SCHEMA IF NOT EXISTS wav_to_mp3;

-- Until version 1.0 the tables stood where search_path leads. They are moved, not copied; tables
-- that only have their names are somebody else's, and stay.
DO $$
DECLARE
    old_users    regclass := to_regclass('users');
    old_records  regclass := to_regclass('records');
    columns_of   CONSTANT text := $columns$
        SELECT string_agg(attname, ' ' ORDER BY attname)
        FROM pg_attribute
        WHERE attrelid = $1 AND attnum > 0 AND NOT attisdropped
    $columns$;
    columns      text;
BEGIN
    IF to_regclass('wav_to_mp3.users') IS NULL AND old_users IS NOT NULL THEN
        EXECUTE columns_of INTO columns USING old_users;
        IF columns <> 'created_at id_user token_sha256 username' THEN RETURN; END IF;
        EXECUTE columns_of INTO columns USING old_records;
        IF columns IS DISTINCT FROM 'created_at duration filename id_record id_user'
            ' idempotency_key mp3 sha256 size wav_sha256' THEN RETURN; END IF;
        EXECUTE format('ALTER TABLE %s SET SCHEMA wav_to_mp3', old_users);
        EXECUTE format('ALTER TABLE %s SET SCHEMA wav_to_mp3', old_records);
    END IF;
END $$;

CREATE TABLE IF NOT EXISTS wav_to_mp3.users (
    id_user       bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    username      text        NOT NULL UNIQUE CHECK (char_length(username) BETWEEN 1 AND 255),
    token_sha256  bytea       NOT NULL UNIQUE CHECK (octet_length(token_sha256) = 32),
    created_at    timestamptz NOT NULL DEFAULT now(),
    kept_bytes    bigint      NOT NULL DEFAULT 0  -- of MP3 in all records: see the triggers
);

-- The keys all begin with id_user, and so does every query: the table can be partitioned by hash or
-- distributed by id_user as it is. The second key is the order of the listing.
CREATE TABLE IF NOT EXISTS wav_to_mp3.records (
    id_user          bigint           NOT NULL
                     CONSTRAINT records_id_user_fkey REFERENCES wav_to_mp3.users ON DELETE CASCADE,
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

-- A user's quota is checked before every upload, so the sum is kept beside the user, and by the
-- database: also for other releases that run beside this one, and for what is deleted by hand.
CREATE OR REPLACE FUNCTION wav_to_mp3.add_kept_bytes() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE wav_to_mp3.users
    SET kept_bytes = kept_bytes + NEW.size
    WHERE id_user = NEW.id_user;
    RETURN NULL;
END $$;

CREATE OR REPLACE FUNCTION wav_to_mp3.subtract_kept_bytes() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE wav_to_mp3.users
    SET kept_bytes = kept_bytes - bytes
    FROM (SELECT id_user, sum(size) AS bytes FROM deleted GROUP BY id_user) AS deletions
    WHERE users.id_user = deletions.id_user;
    RETURN NULL;
END $$;

-- IF NOT EXISTS would wait for all who write to the table, only to find that there is nothing to do.
DO $$
BEGIN
    IF NOT EXISTS (
        SELECT FROM pg_attribute
        WHERE attrelid = 'wav_to_mp3.users'::regclass AND attname = 'kept_bytes'
    ) THEN
        ALTER TABLE wav_to_mp3.users ADD COLUMN kept_bytes bigint NOT NULL DEFAULT 0;
        ALTER TABLE wav_to_mp3.records
            DROP CONSTRAINT records_id_user_fkey,
            ADD CONSTRAINT records_id_user_fkey
                FOREIGN KEY (id_user) REFERENCES wav_to_mp3.users ON DELETE CASCADE;
        UPDATE wav_to_mp3.users
        SET kept_bytes = bytes
        FROM (SELECT id_user, sum(size) AS bytes FROM wav_to_mp3.records GROUP BY id_user) AS kept
        WHERE users.id_user = kept.id_user;
    END IF;
    IF to_regclass('wav_to_mp3.records_created_at_idx') IS NULL THEN
        CREATE INDEX records_created_at_idx ON wav_to_mp3.records (created_at);  -- for the sweep
    END IF;
    IF NOT EXISTS (
        SELECT FROM pg_trigger
        WHERE tgrelid = 'wav_to_mp3.records'::regclass AND tgname = 'records_inserted'
    ) THEN
        -- A table of what was inserted would be a copy of the MP3; of what was deleted it is not.
        CREATE TRIGGER records_inserted AFTER INSERT ON wav_to_mp3.records
            FOR EACH ROW EXECUTE FUNCTION wav_to_mp3.add_kept_bytes();
        CREATE TRIGGER records_deleted AFTER DELETE ON wav_to_mp3.records
            REFERENCING OLD TABLE AS deleted
            FOR EACH STATEMENT EXECUTE FUNCTION wav_to_mp3.subtract_kept_bytes();
    END IF;
END $$;
