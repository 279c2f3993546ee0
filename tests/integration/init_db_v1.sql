-- The schema of the vote aggregation service, for PostgreSQL 14 and later.
--
-- Safe to run any number of times, by several replicas at once, and beside a service that is counting. The service runs
-- it at its start where schema_version is behind (database.py, SCHEMA_VERSION); `psql -f init_db.sql` does the same.

BEGIN;

SET LOCAL client_min_messages = warning;

-- one at a time: CREATE ... IF NOT EXISTS is not safe against itself
SELECT pg_advisory_xact_lock(hashtext('vote-aggregation-schema'));

-- The totals. One row a law, updated by every batch: free space in each page keeps the updates HOT (no index is touched).
CREATE TABLE IF NOT EXISTS vote_results (
    law_id     varchar(64) PRIMARY KEY,
    oui_count  bigint      NOT NULL DEFAULT 0 CHECK (oui_count >= 0),
    non_count  bigint      NOT NULL DEFAULT 0 CHECK (non_count >= 0),
    updated_at timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 50);

-- Every counted vote, for ever: the identity that makes a redelivery harmless, and what the totals are checked against.
CREATE TABLE IF NOT EXISTS vote_audit (
    vote_id     uuid         PRIMARY KEY,
    law_id      varchar(64)  NOT NULL,
    choice      varchar(3)   NOT NULL CHECK (choice IN ('oui', 'non')),
    voted_at    timestamptz,                              -- what the message says
    recorded_at timestamptz  NOT NULL DEFAULT now(),      -- the start of the transaction that counted it
    voter_hash  varchar(128),
    instance    varchar(64)  NOT NULL,                    -- the replica that counted it
    redelivered boolean      NOT NULL                     -- whether the broker had delivered that message before
);

-- one vote per law and voter
CREATE UNIQUE INDEX IF NOT EXISTS vote_audit_law_voter ON vote_audit (law_id, voter_hash) WHERE voter_hash IS NOT NULL;

-- Votes that were not counted because another stands in their way (a plain redelivery by the broker leaves no row).
CREATE TABLE IF NOT EXISTS duplicate_attempts (
    attempt_id      bigint       GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    vote_id         uuid         NOT NULL,
    law_id          varchar(64)  NOT NULL,
    choice          varchar(3)   NOT NULL,
    voter_hash      varchar(128),
    reason          varchar(16)  NOT NULL CHECK (reason IN ('duplicate', 'conflict', 'second_vote')),
    counted_vote_id uuid         NOT NULL,                -- the vote that stands in the way
    counted_law_id  varchar(64)  NOT NULL,
    counted_choice  varchar(3)   NOT NULL,
    detected_at     timestamptz  NOT NULL DEFAULT now(),
    instance        varchar(64)  NOT NULL
);

CREATE INDEX IF NOT EXISTS duplicate_attempts_vote ON duplicate_attempts (vote_id);

-- Messages that are no votes, and votes that the database refused: kept, so that nothing disappears.
CREATE TABLE IF NOT EXISTS rejected_messages (
    body_sha256   bytea        PRIMARY KEY,               -- of the whole body
    body          bytea        NOT NULL,                  -- its first 64 KiB
    body_bytes    integer      NOT NULL,                  -- its full length
    reason        varchar(32)  NOT NULL,
    detail        text         NOT NULL DEFAULT '',
    message_id    text,
    first_seen_at timestamptz  NOT NULL DEFAULT now(),
    last_seen_at  timestamptz  NOT NULL DEFAULT now(),
    times_seen    bigint       NOT NULL DEFAULT 1,
    instance      varchar(64)  NOT NULL
);

-- What is known of the laws. The operator writes it; a vote for a law that has no row counts all the same.
CREATE TABLE IF NOT EXISTS laws (
    law_id     varchar(64) PRIMARY KEY,
    title      text        NOT NULL,
    opens_at   timestamptz,
    closes_at  timestamptz,
    status     varchar(16) NOT NULL DEFAULT 'open' CHECK (status IN ('open', 'closed', 'certified')),
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    CHECK (opens_at < closes_at)
);

-- How each replica worked, a row a minute. For watching, not for proof: it is written outside the batches.
CREATE TABLE IF NOT EXISTS aggregation_stats (
    instance     varchar(64)      NOT NULL,
    minute       timestamptz      NOT NULL,
    batches      bigint           NOT NULL,
    votes        bigint           NOT NULL,               -- counted
    duplicates   bigint           NOT NULL,
    rejected     bigint           NOT NULL,
    busy_seconds double precision NOT NULL,               -- time spent in writing batches
    PRIMARY KEY (instance, minute)
);

CREATE TABLE IF NOT EXISTS schema_version (
    version    integer     PRIMARY KEY,
    applied_at timestamptz NOT NULL DEFAULT now()
);

CREATE OR REPLACE FUNCTION set_updated_at() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.updated_at := now();
    RETURN NEW;
END
$$;

CREATE OR REPLACE TRIGGER vote_results_updated_at
    BEFORE UPDATE ON vote_results FOR EACH ROW EXECUTE FUNCTION set_updated_at();

CREATE OR REPLACE TRIGGER laws_updated_at
    BEFORE UPDATE ON laws FOR EACH ROW EXECUTE FUNCTION set_updated_at();

CREATE OR REPLACE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% is append-only: % is not allowed', TG_TABLE_NAME, TG_OP USING ERRCODE = 'insufficient_privilege';
END
$$;

CREATE OR REPLACE TRIGGER vote_audit_append_only
    BEFORE UPDATE OR DELETE OR TRUNCATE ON vote_audit FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

-- also where session_replication_role = replica switches ordinary triggers off
ALTER TABLE vote_audit ENABLE ALWAYS TRIGGER vote_audit_append_only;

CREATE OR REPLACE VIEW vote_statistics AS
SELECT law_id,
       laws.title,
       coalesce(laws.status, 'open') AS status,
       oui_count,
       non_count,
       oui_count + non_count AS total_count,
       round(100.0 * oui_count / nullif(oui_count + non_count, 0), 2) AS oui_percent,
       round(100.0 * non_count / nullif(oui_count + non_count, 0), 2) AS non_percent,
       vote_results.updated_at
FROM vote_results
LEFT JOIN laws USING (law_id);

CREATE OR REPLACE VIEW duplicate_summary AS
SELECT law_id,
       reason,
       count(*) AS attempts,
       count(DISTINCT vote_id) AS votes,
       min(detected_at) AS first_detected_at,
       max(detected_at) AS last_detected_at
FROM duplicate_attempts
GROUP BY law_id, reason;

INSERT INTO schema_version (version) VALUES (1) ON CONFLICT DO NOTHING;

COMMIT;
