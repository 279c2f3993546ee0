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
    redelivered boolean      NOT NULL,                    -- whether the broker had delivered that message before
    txid        bigint       NOT NULL DEFAULT pg_current_xact_id()::text::bigint -- the transaction that counted it
);

-- from version 1; rows that stand already get the transaction of this upgrade
ALTER TABLE vote_audit ADD COLUMN IF NOT EXISTS txid bigint NOT NULL DEFAULT pg_current_xact_id()::text::bigint;

-- one vote per law and voter; the hash first, since few keys share it. (A database of an earlier version has them the
-- other way round, and keeps that.)
CREATE UNIQUE INDEX IF NOT EXISTS vote_audit_law_voter ON vote_audit (voter_hash, law_id) WHERE voter_hash IS NOT NULL;

-- what was counted in a range of transactions: rows lie in about that order, so that a few pages of index are enough
CREATE INDEX IF NOT EXISTS vote_audit_txid ON vote_audit USING brin (txid)
    WITH (pages_per_range = 32, autosummarize = on);

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

-- Messages that do not count: no votes, votes that the database refused, votes outside the window of their law or for a
-- certified one. Kept, so that nothing disappears.
CREATE TABLE IF NOT EXISTS rejected_messages (
    body_sha256   bytea        NOT NULL,                  -- of the whole body
    message_id    text         NOT NULL DEFAULT '',       -- of the message; two may have one body
    body          bytea        NOT NULL,                  -- its first 64 KiB
    body_bytes    integer      NOT NULL,                  -- its full length
    reason        varchar(32)  NOT NULL,
    detail        text         NOT NULL DEFAULT '',
    law_id        varchar(64),                            -- where the message is a vote
    first_seen_at timestamptz  NOT NULL DEFAULT now(),
    last_seen_at  timestamptz  NOT NULL DEFAULT now(),
    times_seen    bigint       NOT NULL DEFAULT 1,
    instance      varchar(64)  NOT NULL,
    PRIMARY KEY (body_sha256, message_id)
);

-- What is known of the laws. The operator writes it; a vote for a law that has no row counts all the same. A vote counts
-- where opens_at <= its timestamp < closes_at; `certified` is set by `reconcile.py certify` alone.
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

-- from version 1, where the body alone was the key of a rejected message
DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM information_schema.columns WHERE table_schema = current_schema()
                   AND table_name = 'rejected_messages' AND column_name = 'law_id') THEN
        -- closing had no effect on the count before, and there were no certificates
        UPDATE laws SET status = 'closed', closes_at = coalesce(least(closes_at, now()), now())
        WHERE status IN ('closed', 'certified') AND (opens_at IS NULL OR opens_at < now());
        UPDATE rejected_messages SET message_id = '' WHERE message_id IS NULL;
        ALTER TABLE rejected_messages
            ADD COLUMN law_id varchar(64),
            ALTER COLUMN message_id SET DEFAULT '',
            ALTER COLUMN message_id SET NOT NULL,
            DROP CONSTRAINT rejected_messages_pkey,
            ADD PRIMARY KEY (body_sha256, message_id);
    END IF;
END
$$;

-- The seals of the audit log (docs/AUDIT.md): each covers the rows of a range of transactions that are all over, and
-- holds the hash of the seal before it.
CREATE TABLE IF NOT EXISTS audit_seals (
    seal_id       bigint      PRIMARY KEY,                -- 1, 2, 3 without a gap
    from_txid     bigint      NOT NULL,                   -- from_txid <= txid < to_txid
    to_txid       bigint      NOT NULL UNIQUE,
    votes         bigint      NOT NULL,
    merkle_root   bytea       NOT NULL,
    leaves_hash   bytea       NOT NULL,                   -- SHA-256 of leaves
    sealed_at     timestamptz NOT NULL,
    previous_hash bytea       NOT NULL,
    seal_hash     bytea       NOT NULL,
    leaves        bytea       NOT NULL                    -- 24 bytes a row: vote_id and the start of its leaf's hash
);

-- a hash does not get smaller
ALTER TABLE audit_seals ALTER COLUMN leaves SET STORAGE EXTERNAL;

-- What the sealed rows come to, so that totals can be watched without counting the whole log each time.
CREATE TABLE IF NOT EXISTS sealed_totals (
    law_id    varchar(64) PRIMARY KEY,
    oui_count bigint      NOT NULL,
    non_count bigint      NOT NULL
);

-- Totals that were put right from the audit log, with who did it.
CREATE TABLE IF NOT EXISTS recounts (
    recount_id   bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    recounted_at timestamptz NOT NULL DEFAULT now(),
    recounted_by text        NOT NULL,
    law_id       varchar(64) NOT NULL,
    oui_before   bigint      NOT NULL,
    non_before   bigint      NOT NULL,
    oui_after    bigint      NOT NULL,
    non_after    bigint      NOT NULL
);

-- The certificates. What stands here is final, and the triggers below hold the totals to it.
CREATE TABLE IF NOT EXISTS certified_results (
    law_id       varchar(64) PRIMARY KEY,
    oui_count    bigint      NOT NULL,
    non_count    bigint      NOT NULL,
    certified_at timestamptz NOT NULL DEFAULT now(),
    certified_by text        NOT NULL,
    seal_id      bigint      NOT NULL REFERENCES audit_seals,
    certificate  jsonb       NOT NULL                     -- all of it, as it was printed
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
CREATE OR REPLACE TRIGGER audit_seals_append_only
    BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_seals FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE OR REPLACE TRIGGER recounts_append_only
    BEFORE UPDATE OR DELETE OR TRUNCATE ON recounts FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE OR REPLACE TRIGGER certified_results_append_only
    BEFORE UPDATE OR DELETE OR TRUNCATE ON certified_results FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

-- A transaction that goes on seeing what was there at its start would not see a certificate written since.
CREATE OR REPLACE FUNCTION refuse_old_snapshot() RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'votes and totals are written in READ COMMITTED only' USING ERRCODE = 'insufficient_privilege';
    END IF;
END
$$;

-- A row bears the id of its own transaction, or it could get into a range that is sealed. A vote for a certified law: the
-- batch is tried again (class 40), and then sees the certificate and keeps the vote aside.
CREATE OR REPLACE FUNCTION refuse_vote_for_certified_law() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    PERFORM refuse_old_snapshot();
    IF EXISTS (SELECT FROM changed WHERE txid <> pg_current_xact_id()::text::bigint) THEN
        RAISE EXCEPTION 'txid is not that of this transaction' USING ERRCODE = 'insufficient_privilege';
    END IF;
    IF EXISTS (SELECT FROM certified_results) AND EXISTS (SELECT FROM changed JOIN certified_results USING (law_id)) THEN
        RAISE EXCEPTION 'the law is certified: no vote can be added' USING ERRCODE = 'serialization_failure';
    END IF;
    RETURN NULL;
END
$$;

-- Totals of a certified law: nothing but what is certified. (They may be put back to that.)
CREATE OR REPLACE FUNCTION refuse_change_of_certified_total() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    PERFORM refuse_old_snapshot();
    IF EXISTS (SELECT FROM certified_results)
       AND EXISTS (SELECT FROM changed JOIN certified_results AS final USING (law_id)
                   WHERE (changed.oui_count, changed.non_count) <> (final.oui_count, final.non_count)) THEN
        RAISE EXCEPTION 'the law is certified: its totals cannot change' USING ERRCODE = 'insufficient_privilege';
    END IF;
    RETURN NULL;
END
$$;

CREATE OR REPLACE FUNCTION refuse_removal_of_totals() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    PERFORM refuse_old_snapshot();
    IF EXISTS (SELECT FROM certified_results) THEN
        RAISE EXCEPTION 'there are certified laws: no total can be removed' USING ERRCODE = 'insufficient_privilege';
    END IF;
    RETURN NULL;
END
$$;

-- Closing without a moment closes now; a certified law stays as it is; `certified` needs a certificate.
CREATE OR REPLACE FUNCTION guard_law() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    IF TG_OP = 'TRUNCATE' THEN
        IF EXISTS (SELECT FROM certified_results) THEN
            RAISE EXCEPTION 'there are certified laws' USING ERRCODE = 'insufficient_privilege';
        END IF;
        RETURN NULL;
    END IF;
    IF TG_OP <> 'INSERT' AND OLD.status = 'certified' THEN
        RAISE EXCEPTION 'law % is certified: % is not allowed', OLD.law_id, TG_OP USING ERRCODE = 'insufficient_privilege';
    END IF;
    IF TG_OP = 'DELETE' THEN
        RETURN OLD;
    END IF;
    IF TG_OP = 'UPDATE' AND NEW.law_id <> OLD.law_id THEN
        RAISE EXCEPTION 'the identity of a law cannot change' USING ERRCODE = 'insufficient_privilege';
    END IF;
    IF NEW.status = 'certified' AND NOT EXISTS (SELECT FROM certified_results WHERE law_id = NEW.law_id) THEN
        RAISE EXCEPTION 'law % has no certificate: use reconcile.py certify', NEW.law_id
            USING ERRCODE = 'insufficient_privilege';
    END IF;
    IF NEW.status = 'closed' AND (NEW.closes_at IS NULL OR NEW.closes_at > now()) THEN
        NEW.closes_at := greatest(now(), NEW.opens_at + interval '1 microsecond');
    END IF;
    RETURN NEW;
END
$$;

-- Run with the owner's rights and in this schema alone, lest a caller's temporary table pass for one of ours.
DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['refuse_vote_for_certified_law', 'refuse_change_of_certified_total',
                                'refuse_removal_of_totals', 'guard_law'] LOOP
        EXECUTE format('ALTER FUNCTION %I() SET search_path = %I, pg_temp', name, current_schema());
    END LOOP;
END
$$;

CREATE OR REPLACE TRIGGER vote_audit_certified
    AFTER INSERT ON vote_audit REFERENCING NEW TABLE AS changed
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_vote_for_certified_law();
CREATE OR REPLACE TRIGGER vote_results_certified_insert
    AFTER INSERT ON vote_results REFERENCING NEW TABLE AS changed
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change_of_certified_total();
CREATE OR REPLACE TRIGGER vote_results_certified_update
    AFTER UPDATE ON vote_results REFERENCING NEW TABLE AS changed
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change_of_certified_total();
CREATE OR REPLACE TRIGGER vote_results_law_id
    BEFORE UPDATE OF law_id ON vote_results FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE OR REPLACE TRIGGER vote_results_certified_delete
    BEFORE DELETE OR TRUNCATE ON vote_results FOR EACH STATEMENT EXECUTE FUNCTION refuse_removal_of_totals();
CREATE OR REPLACE TRIGGER laws_guard
    BEFORE INSERT OR UPDATE OR DELETE ON laws FOR EACH ROW EXECUTE FUNCTION guard_law();
CREATE OR REPLACE TRIGGER laws_guard_truncate
    BEFORE TRUNCATE ON laws FOR EACH STATEMENT EXECUTE FUNCTION guard_law();

-- also where session_replication_role = replica switches ordinary triggers off
ALTER TABLE vote_audit ENABLE ALWAYS TRIGGER vote_audit_append_only;
ALTER TABLE vote_audit ENABLE ALWAYS TRIGGER vote_audit_certified;
ALTER TABLE audit_seals ENABLE ALWAYS TRIGGER audit_seals_append_only;
ALTER TABLE recounts ENABLE ALWAYS TRIGGER recounts_append_only;
ALTER TABLE certified_results ENABLE ALWAYS TRIGGER certified_results_append_only;
ALTER TABLE vote_results ENABLE ALWAYS TRIGGER vote_results_law_id;
ALTER TABLE vote_results ENABLE ALWAYS TRIGGER vote_results_certified_insert;
ALTER TABLE vote_results ENABLE ALWAYS TRIGGER vote_results_certified_update;
ALTER TABLE vote_results ENABLE ALWAYS TRIGGER vote_results_certified_delete;
ALTER TABLE laws ENABLE ALWAYS TRIGGER laws_guard;
ALTER TABLE laws ENABLE ALWAYS TRIGGER laws_guard_truncate;

-- The results as people read them: each law that has votes or is known. Of a certified law, what is certified.
CREATE OR REPLACE VIEW vote_statistics AS
WITH shown AS (
    SELECT law_id,
           laws.title,
           CASE WHEN final.law_id IS NOT NULL THEN 'certified'
                WHEN laws.status = 'closed' OR laws.closes_at <= now() THEN 'closed'
                ELSE 'open' END::varchar AS status,
           coalesce(final.oui_count, vote_results.oui_count, 0) AS oui_count,
           coalesce(final.non_count, vote_results.non_count, 0) AS non_count,
           vote_results.updated_at
    FROM vote_results
    FULL JOIN laws USING (law_id)
    LEFT JOIN certified_results AS final USING (law_id)
)
SELECT law_id,
       title,
       status,
       oui_count,
       non_count,
       oui_count + non_count AS total_count,
       round(100.0 * oui_count / nullif(oui_count + non_count, 0), 2) AS oui_percent,
       round(100.0 * non_count / nullif(oui_count + non_count, 0), 2) AS non_percent,
       updated_at
FROM shown;

CREATE OR REPLACE VIEW duplicate_summary AS
SELECT law_id,
       reason,
       count(*) AS attempts,
       count(DISTINCT vote_id) AS votes,
       min(detected_at) AS first_detected_at,
       max(detected_at) AS last_detected_at
FROM duplicate_attempts
GROUP BY law_id, reason;

-- Counts a batch in which every vote is new, was delivered for the first time and is taken by its law: the rows of
-- vote_audit, then the totals, of which it returns the new ones. Where one is not, nothing is written and no row returned;
-- the service then looks at each (database.py: INSERT_VOTES and UPSERT_RESULTS write the same, for any batch). A row
-- costs a third less than with ON CONFLICT. The refusal that this risks is caught here, so that neither it nor, with it,
-- the votes get into the server's log. What the batch adds to each law comes sorted by law_id.
CREATE OR REPLACE FUNCTION count_new_votes(
    replica varchar, vote_ids uuid[], law_ids varchar[], choices varchar[], moments timestamptz[], voter_hashes varchar[],
    held_seconds double precision, added_laws varchar[], added_oui bigint[], added_non bigint[]
) RETURNS TABLE (law_id varchar, oui_count bigint, non_count bigint) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    held_since timestamptz := now() - make_interval(secs => held_seconds);
    inserted bigint;
BEGIN
    INSERT INTO vote_audit (vote_id, law_id, choice, voted_at, voter_hash, redelivered, instance, txid)
    SELECT vote_id, law_id, choice, voted_at, voter_hash, false, replica,
           (SELECT pg_current_xact_id()::text::bigint) -- after the lock on vote_audit
    FROM unnest(vote_ids, law_ids, choices, moments, voter_hashes)
         AS vote (vote_id, law_id, choice, voted_at, voter_hash)
    WHERE NOT EXISTS (
        SELECT FROM laws
        WHERE laws.law_id = vote.law_id
          AND (status = 'certified' OR coalesce(voted_at, held_since) < opens_at
               OR coalesce(voted_at, held_since) >= closes_at))
    ORDER BY vote_id;
    GET DIAGNOSTICS inserted = ROW_COUNT;
    IF inserted < cardinality(vote_ids) THEN
        RAISE unique_violation; -- to undo it
    END IF;
    RETURN QUERY
    INSERT INTO vote_results (law_id, oui_count, non_count)
    SELECT * FROM unnest(added_laws, added_oui, added_non)
    ON CONFLICT (law_id)
    DO UPDATE SET
        oui_count = vote_results.oui_count + EXCLUDED.oui_count,
        non_count = vote_results.non_count + EXCLUDED.non_count
    RETURNING law_id, oui_count, non_count;
    GET DIAGNOSTICS inserted = ROW_COUNT;
    IF inserted < cardinality(added_laws) THEN
        RAISE EXCEPTION 'vote_results does not take every total: is there a trigger?';
    END IF;
EXCEPTION WHEN unique_violation THEN
    RETURN;
END
$$;

INSERT INTO schema_version (version) VALUES (1), (2), (3) ON CONFLICT DO NOTHING;

COMMIT;
