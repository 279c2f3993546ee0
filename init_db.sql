-- The schema of the vote aggregation service, for PostgreSQL 14 and later.
--
-- Safe to run any number of times, by several replicas at once, and beside a service that is counting: batches wait for it,
-- 10 s at most where it waits itself for somebody who reads for long. The service runs it at its start where schema_version
-- is behind (database.py, SCHEMA_VERSION); `psql -f init_db.sql` does the same.

BEGIN;

SET LOCAL client_min_messages = warning;

-- It takes the time that a large log needs, but does not stand long in the way of batches while a reader holds a lock:
-- then it ends with SQLSTATE 55P03, and is run again.
SET LOCAL statement_timeout = 0;
SET LOCAL lock_timeout = '10s';

-- where the service looks, whatever path the role has
SET LOCAL search_path = public, pg_temp;

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
-- by autovacuum, so that nobody else need have the right to
ALTER INDEX vote_audit_txid SET (autosummarize = on);

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

-- whether a copy is recorded already is asked of each that is delivered again, or tried again, however many others there are
CREATE INDEX IF NOT EXISTS duplicate_attempts_record
    ON duplicate_attempts (vote_id, law_id, choice, reason, coalesce(voter_hash, ''), detected_at);
DROP INDEX IF EXISTS duplicate_attempts_vote; -- of versions before 4
DROP INDEX IF EXISTS duplicate_attempts_copy; -- of versions before 8

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
    eligible_voters bigint CHECK (eligible_voters > 0),   -- how many may vote, for the turnout
    CHECK (opens_at < closes_at)
);

-- from version 6
ALTER TABLE laws ADD COLUMN IF NOT EXISTS eligible_voters bigint CHECK (eligible_voters > 0);

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
    leaves        bytea       NOT NULL,                   -- 24 bytes a row: vote_id and the start of its leaf's hash
    records_hash  bytea,                                  -- of certificates and recounts; none before version 5
    salt          bytea       CHECK (octet_length(salt) = 32) -- at random, of each seal its own; none before version 8
);

-- from version 4
ALTER TABLE audit_seals ADD COLUMN IF NOT EXISTS records_hash bytea;

-- from version 7
ALTER TABLE audit_seals ADD COLUMN IF NOT EXISTS salt bytea CHECK (octet_length(salt) = 32);

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
    non_after    bigint      NOT NULL,
    txid         bigint      NOT NULL DEFAULT pg_current_xact_id()::text::bigint -- by which the next seal finds it
);

-- The certificates. What stands here is final, and the triggers below hold the totals to it.
CREATE TABLE IF NOT EXISTS certified_results (
    law_id       varchar(64) PRIMARY KEY,
    oui_count    bigint      NOT NULL,
    non_count    bigint      NOT NULL,
    certified_at timestamptz NOT NULL DEFAULT now(),
    certified_by text        NOT NULL,
    seal_id      bigint      NOT NULL REFERENCES audit_seals,
    certificate  jsonb       NOT NULL,                    -- all of it, as it was printed
    txid         bigint      NOT NULL DEFAULT pg_current_xact_id()::text::bigint
);

-- What the message contract says of a vote (votes.py), held here too: an insider's law of other characters would spoil what
-- is made of them. (Not in sealed_totals: votes of earlier versions, whatever their law, have to be sealed.) And what a
-- certificate may be, since replicas read all of them. The greatest lengths are in the types. Rows of earlier versions are checked where all of a table's pass;
-- where not, they stay, and it takes no more of their kind. (COLLATE "C", and no {0,63}, for speed: 0.7 us a law_id, 1 us a voter_hash.)
DO $$
DECLARE
    wanted record;
    law constant text := $re$%1$I COLLATE "C" ~ '^[A-Za-z0-9][A-Za-z0-9._:-]*$'$re$;
    voter constant text := $re$length(%1$I) >= 16 AND %1$I COLLATE "C" !~ '[^A-Za-z0-9_+/=-]'$re$;
    yes_or_no constant text := $re$%1$I IN ('oui', 'non')$re$;
    in_calendar constant text := $re$%1$I >= '0001-01-01 00:00Z' AND %1$I < '9999-01-01 00:00Z'$re$;
    amount constant text := $re$%1$I BETWEEN 0 AND 1000000000000000$re$; -- so that no sum of them overflows, of fewer than 4,600 laws
    short constant text := $re$length(%1$I) <= 1000$re$;
    small constant text := $re$octet_length(%1$I::text) <= 65536$re$; -- those of certify: 600 to 1,300, and the title
BEGIN
    FOR wanted IN
        SELECT of_table,
               of_table || CASE rule WHEN in_calendar THEN '_moment' WHEN amount THEN '_amounts' WHEN small THEN '_size'
                           ELSE '_contract' END AS name,
               string_agg(format('(' || rule || ')', of_column), ' AND ') AS rules
        FROM (VALUES ('vote_audit', 'law_id', law), ('vote_audit', 'voter_hash', voter), ('vote_audit', 'voted_at', in_calendar),
                     ('vote_results', 'law_id', law),
                     ('duplicate_attempts', 'law_id', law), ('duplicate_attempts', 'counted_law_id', law),
                     ('duplicate_attempts', 'choice', yes_or_no), ('duplicate_attempts', 'counted_choice', yes_or_no),
                     ('duplicate_attempts', 'voter_hash', voter), ('rejected_messages', 'law_id', law),
                     ('vote_results', 'updated_at', in_calendar),
                     ('vote_results', 'oui_count', amount), ('vote_results', 'non_count', amount),
                     ('certified_results', 'oui_count', amount), ('certified_results', 'non_count', amount),
                     ('certified_results', 'law_id', law), ('certified_results', 'certified_by', short),
                     ('certified_results', 'certified_at', in_calendar), ('certified_results', 'certificate', small),
                     ('laws', 'law_id', law), ('recounts', 'law_id', law)
             ) AS contract (of_table, of_column, rule)
        GROUP BY of_table, name
    LOOP
        IF NOT EXISTS (SELECT FROM pg_constraint WHERE conrelid = wanted.of_table::regclass AND conname = wanted.name) THEN
            EXECUTE format('ALTER TABLE %I ADD CONSTRAINT %I CHECK (%s) NOT VALID', wanted.of_table, wanted.name, wanted.rules);
        END IF;
        IF EXISTS (SELECT FROM pg_constraint
                   WHERE conrelid = wanted.of_table::regclass AND conname = wanted.name AND NOT convalidated) THEN
            BEGIN
                EXECUTE format('ALTER TABLE %I VALIDATE CONSTRAINT %I', wanted.of_table, wanted.name);
            EXCEPTION WHEN check_violation THEN
                RAISE WARNING '% has rows that the constraint % would refuse', wanted.of_table, wanted.name;
            END;
        END IF;
    END LOOP;
END
$$;

-- from version 4; what stands already gets the transaction of this upgrade, and so into the next seal
ALTER TABLE recounts ADD COLUMN IF NOT EXISTS txid bigint NOT NULL DEFAULT pg_current_xact_id()::text::bigint;
ALTER TABLE certified_results ADD COLUMN IF NOT EXISTS txid bigint NOT NULL DEFAULT pg_current_xact_id()::text::bigint;

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

-- Certificates and recounts: as votes, each bears the id of its own transaction, and so gets into the next seal.
CREATE OR REPLACE FUNCTION refuse_other_txid() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.txid <> pg_current_xact_id()::text::bigint THEN
        RAISE EXCEPTION 'txid is not that of this transaction' USING ERRCODE = 'insufficient_privilege';
    END IF;
    RETURN NEW;
END
$$;

CREATE OR REPLACE TRIGGER recounts_txid
    BEFORE INSERT ON recounts FOR EACH ROW EXECUTE FUNCTION refuse_other_txid();
CREATE OR REPLACE TRIGGER certified_results_txid
    BEFORE INSERT ON certified_results FOR EACH ROW EXECUTE FUNCTION refuse_other_txid();

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

-- A seal follows the last one, is what it says, and ends at the horizon at most (seals.py, SELECT_HORIZON): replicas stop where
-- transaction ids are below a seal's end, so that whoever may add seals could stop the count. (Its hash: Seal.hash.)
CREATE OR REPLACE FUNCTION guard_seal() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
SET TimeZone = 'UTC' SET DateStyle = 'ISO, YMD' AS $$
DECLARE
    last_id bigint;
    last_end bigint;
    last_hash bytea;
    fault text;
BEGIN
    SELECT seal_id, to_txid, seal_hash INTO last_id, last_end, last_hash
    FROM audit_seals ORDER BY seal_id DESC LIMIT 1;
    IF NOT FOUND THEN
        last_id := 0;
        last_end := 0;
        last_hash := decode(repeat('00', 32), 'hex');
    END IF;
    fault := CASE
        WHEN NEW.seal_id <> last_id + 1 THEN 'its number does not follow'
        WHEN NEW.from_txid <> last_end THEN 'its range does not begin where the one before ends'
        WHEN NEW.to_txid <= NEW.from_txid THEN 'its range is empty'
        WHEN NEW.to_txid > pg_snapshot_xmin(pg_current_snapshot())::text::bigint THEN 'its range is not over'
        WHEN NEW.previous_hash <> last_hash THEN 'it does not hold the hash of the one before'
        WHEN octet_length(NEW.leaves) <> 24 * NEW.votes OR sha256(NEW.leaves) <> NEW.leaves_hash
        THEN 'its leaves are not those of its votes'
        WHEN octet_length(NEW.records_hash) IS DISTINCT FROM 32
        THEN 'it holds no hash of certificates and recounts, as those of earlier versions'
        WHEN octet_length(NEW.salt) IS DISTINCT FROM 32 THEN 'it holds no salt, as those of earlier versions'
        WHEN NEW.sealed_at > now() OR NOT isfinite(NEW.sealed_at) THEN 'its time is yet to come, or none'
        WHEN octet_length(NEW.merkle_root) <> 32 THEN 'its root is no hash'
        WHEN sha256(convert_to(concat_ws(E'\t', 'vote-audit-seal-3', NEW.seal_id, NEW.from_txid, NEW.to_txid, NEW.votes,
                                         encode(NEW.merkle_root, 'hex'), encode(NEW.leaves_hash, 'hex'), NEW.sealed_at,
                                         encode(NEW.previous_hash, 'hex'), encode(NEW.records_hash, 'hex'),
                                         encode(NEW.salt, 'hex')), 'UTF8'))
             <> NEW.seal_hash
        THEN 'its hash is not that of its fields'
    END;
    IF fault IS NOT NULL THEN
        RAISE EXCEPTION 'seal % is refused: %', NEW.seal_id, fault USING ERRCODE = 'insufficient_privilege';
    END IF;
    RETURN NEW;
END
$$;

-- A certificate is of a law that is closed, and says what the totals do. While it is looked at, and from then on, no batch is
-- being written. (That these are the log's, and all other members, is for `reconcile.py certify` to see to, and for verify.)
CREATE OR REPLACE FUNCTION guard_certificate() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
    is_closed boolean;
    oui bigint;
    non bigint;
    seal text;
    fault text;
BEGIN
    PERFORM refuse_old_snapshot();
    PERFORM lock_out_batches();
    SELECT status = 'closed' OR coalesce(closes_at <= now(), false) INTO is_closed FROM laws WHERE law_id = NEW.law_id;
    SELECT oui_count, non_count INTO oui, non FROM vote_results WHERE law_id = NEW.law_id;
    SELECT concat(seal_id, ':', encode(seal_hash, 'hex')) INTO seal FROM audit_seals WHERE seal_id = NEW.seal_id;
    fault := CASE
        WHEN is_closed IS NULL THEN 'the law is not in the table laws'
        WHEN NOT is_closed THEN 'the law is not closed'
        WHEN (NEW.oui_count, NEW.non_count) <> (coalesce(oui, 0), coalesce(non, 0)) THEN 'its numbers are not the totals'
        WHEN seal IS NULL THEN 'its seal is not there'
        WHEN NEW.certified_at > now() THEN 'its time is yet to come'
        WHEN NOT NEW.certificate @> jsonb_build_object(
            'law_id', NEW.law_id, 'oui', NEW.oui_count, 'non', NEW.non_count,
            'total', NEW.oui_count::numeric + NEW.non_count, 'seal', seal, 'certified_by', NEW.certified_by)
        THEN 'its JSON does not say the same'
    END;
    IF fault IS NOT NULL THEN
        RAISE EXCEPTION 'certificate of law % is refused: %', NEW.law_id, fault USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END
$$;

CREATE OR REPLACE TRIGGER certified_results_guard
    BEFORE INSERT ON certified_results FOR EACH ROW EXECUTE FUNCTION guard_certificate();
CREATE OR REPLACE TRIGGER audit_seals_guard
    BEFORE INSERT ON audit_seals FOR EACH ROW EXECUTE FUNCTION guard_seal();
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
ALTER TABLE audit_seals ENABLE ALWAYS TRIGGER audit_seals_guard;
ALTER TABLE recounts ENABLE ALWAYS TRIGGER recounts_append_only;
ALTER TABLE recounts ENABLE ALWAYS TRIGGER recounts_txid;
ALTER TABLE certified_results ENABLE ALWAYS TRIGGER certified_results_append_only;
ALTER TABLE certified_results ENABLE ALWAYS TRIGGER certified_results_txid;
ALTER TABLE certified_results ENABLE ALWAYS TRIGGER certified_results_guard;
ALTER TABLE vote_results ENABLE ALWAYS TRIGGER vote_results_updated_at;
ALTER TABLE vote_results ENABLE ALWAYS TRIGGER vote_results_law_id;
ALTER TABLE vote_results ENABLE ALWAYS TRIGGER vote_results_certified_insert;
ALTER TABLE vote_results ENABLE ALWAYS TRIGGER vote_results_certified_update;
ALTER TABLE vote_results ENABLE ALWAYS TRIGGER vote_results_certified_delete;
ALTER TABLE laws ENABLE ALWAYS TRIGGER laws_guard;
ALTER TABLE laws ENABLE ALWAYS TRIGGER laws_guard_truncate;

-- The percentage of the choice that has `votes` where the other has `others`; NULL where nobody has voted. Whatever shows
-- one has it from here (docs/AUDIT.md, "Percentages"). Two decimals, and as many more as it takes so that a choice with
-- votes is not 0 and one that is behind is not 50. With these the smaller percentage is rounded half up, and the other is
-- what is left of 100.
CREATE OR REPLACE FUNCTION vote_percent(votes bigint, others bigint) RETURNS numeric
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    fewer constant numeric := least(votes, others);
    more constant numeric := greatest(votes, others);
    total constant numeric := fewer + more;
    decimals integer;
    smaller numeric;
BEGIN
    IF total = 0 THEN
        RETURN NULL;
    END IF;
    -- Whole numbers alone: a quotient would be rounded already. With as many decimals as the first length says it is not 0,
    -- since 200 * fewer * 10^decimals >= total then; with those of the second not 50, since
    -- 100 * (more - fewer) * 10^decimals > total.
    decimals := greatest(2, length(div(total - 1, nullif(200 * fewer, 0))::text),
                         length(div(total, nullif(100 * (more - fewer), 0))::text));
    smaller := (div(200 * fewer * ('1e' || decimals)::numeric + total, 2 * total) || 'e-' || decimals)::numeric;
    RETURN CASE WHEN votes > others THEN 100 - smaller ELSE smaller END;
END
$$;
-- also where functions are not for everybody: who reads the view calls it
GRANT EXECUTE ON FUNCTION vote_percent TO PUBLIC;

-- The results as people read them: each law that has votes or is known. Of a certified law, what is certified. (Without a
-- WITH, so that who asks for the first few laws has percentages computed for no others.)
CREATE OR REPLACE VIEW vote_statistics AS
SELECT law_id,
       title,
       status,
       oui_count,
       non_count,
       oui_count + non_count AS total_count,
       vote_percent(oui_count, non_count) AS oui_percent,
       vote_percent(non_count, oui_count) AS non_percent,
       updated_at
FROM (
    SELECT law_id,
           laws.title,
           CASE WHEN final.law_id IS NOT NULL THEN 'certified'
                WHEN laws.status = 'closed' OR laws.closes_at <= now() THEN 'closed'
                ELSE 'open' END::varchar AS status,
           coalesce(final.oui_count, vote_results.oui_count, 0) AS oui_count,
           coalesce(final.non_count, vote_results.non_count, 0) AS non_count,
           vote_results.updated_at
    FROM ONLY vote_results
    FULL JOIN ONLY laws USING (law_id)
    LEFT JOIN ONLY certified_results AS final USING (law_id)
) AS shown;

CREATE OR REPLACE VIEW duplicate_summary AS
SELECT law_id,
       reason,
       count(*) AS attempts,
       count(DISTINCT vote_id) AS votes,
       min(detected_at) AS first_detected_at,
       max(detected_at) AS last_detected_at
FROM ONLY duplicate_attempts
GROUP BY law_id, reason;

-- Writes one batch, all of it: messages that do not count, the identities of votes, the evidence of votes that stand in
-- the way of each other, and the totals. Answers the transaction that it is in, how many votes were inserted, what became
-- of every other one (its position from 1 on, and its outcome), and the new totals of the laws that got any.
--
--   counted         inserted by one of the attempts, earlier transactions of the same batch whose COMMIT was not answered
--   redelivery      counted already, and the broker delivered the message again
--   duplicate       counted already, and published again            }
--   conflict        its vote_id is counted with another content     } each leaves a row in duplicate_attempts
--   second_vote     its voter has another vote for this law         }
--   outside_window  its law was not open at its timestamp; or, where it has none, neither when its message says that it was
--                   sent nor at its receipt
--   certified       the result of its law is final
--
-- Most batches have new votes alone, and are done with the first insert. A copy undoes that one, and then passes follow, mostly
-- one: the next is for what others have committed meanwhile. Rows are inserted in one order, by law and
-- voter, lest two replicas with the same voters wait for each other; the totals, which every replica wants, come last.
--
-- The functions of versions 4 and 5, which lack the last two arguments or the last one, stay beside it for replicas of before.
-- So no argument has a default: a call could mean either. (deploy/postgres/roles.sql drops them.)
CREATE OR REPLACE FUNCTION count_batch(
    replica varchar,
    held_seconds double precision,     -- since the first of the messages came here
    has_rivals boolean,                -- two of the votes differ and have one vote_id, or one voter and law; unknown: true
    vote_ids uuid[], law_ids varchar[], choices varchar[], moments timestamptz[], voter_hashes varchar[],
    redeliveries boolean[],
    attempt_txids bigint[], attempt_times timestamptz[],
    told uuid[],                       -- votes of those attempts that an earlier part of the batch was answered for
    part_times timestamptz[],          -- when the transactions of the earlier parts of the batch began
    body_hashes bytea[], message_ids text[], bodies bytea[], body_sizes integer[], reasons varchar[], details text[],
    rejected_laws varchar[], seen bigint[],
    sent_seconds bigint[],             -- when the messages say that they were sent (Unix time); empty where none has to be known
    expects_copies boolean,            -- of votes that are counted: a guess, which is of no consequence but for the time it takes
    OUT batch_txid bigint, OUT began_at timestamptz, OUT inserted bigint,
    OUT judged integer[], OUT outcomes varchar[], OUT laws varchar[], OUT oui bigint[], OUT non bigint[]
) LANGUAGE plpgsql SECURITY DEFINER AS $$
#variable_conflict use_column
DECLARE
    held_since timestamptz := now() - make_interval(secs => held_seconds);
    late varchar[] := '{}';            -- by position: why the law does not take the vote now, if so; nothing: all take it
    left_over integer[];               -- positions of votes that have no outcome yet
    candidates integer[];              -- those of them that may be inserted now: no rival that counts comes before them
    here record;
    id_ranks integer[];                -- by position: which of their vote_ids it is
    voter_ranks integer[];             -- and which of their laws with voters
    first_of_id integer[];             -- by rank: the position of the candidate with this vote_id, or 0
    first_of_voter integer[];          -- and of that of this law and voter
    before integer;
    new_ids uuid[];                    -- what a pass has inserted
    new_laws varchar[];                -- and so the votes of each law
    new_oui bigint[];
    new_non bigint[];
    added_laws varchar[] := '{}';      -- what all passes have; a law may be there more than once
    added_oui bigint[] := '{}';
    added_non bigint[] := '{}';
    touched_laws bigint;
    passes integer := 0;
BEGIN
    PERFORM refuse_old_snapshot();
    IF NOT coalesce(
        cardinality(vote_ids) = ALL (ARRAY[cardinality(law_ids), cardinality(choices), cardinality(moments),
                                           cardinality(voter_hashes), cardinality(redeliveries)])
        AND cardinality(body_hashes) = ALL (ARRAY[cardinality(message_ids), cardinality(bodies), cardinality(body_sizes),
                                                  cardinality(reasons), cardinality(details), cardinality(rejected_laws),
                                                  cardinality(seen)])
        AND cardinality(attempt_txids) = cardinality(attempt_times)
        AND cardinality(sent_seconds) IN (0, cardinality(vote_ids))
        AND told IS NOT NULL AND part_times IS NOT NULL
        AND held_seconds >= 0 AND has_rivals IN (true, false) AND expects_copies IN (true, false) AND replica <> '', false)
    THEN
        RAISE EXCEPTION 'the arguments of a batch do not fit together' USING ERRCODE = 'invalid_function_definition';
    END IF;
    -- Excludes certifying and recounting from here on. Before this transaction has an id: they wait for those that have.
    LOCK TABLE vote_audit IN ROW EXCLUSIVE MODE;
    batch_txid := pg_current_xact_id()::text::bigint;
    began_at := now();
    inserted := 0;
    judged := '{}';
    outcomes := '{}';

    IF body_hashes <> '{}' THEN
        IF EXISTS (
            SELECT FROM unnest(body_hashes, bodies, body_sizes, seen) AS message (body_sha256, body, body_bytes, times_seen)
            WHERE NOT coalesce(times_seen > 0 AND octet_length(body) <= body_bytes
                               AND (octet_length(body) < body_bytes OR sha256(body) = body_sha256), false))
        THEN
            RAISE EXCEPTION 'a rejected message is not what it is said to be' USING ERRCODE = 'invalid_function_definition';
        END IF;
        INSERT INTO rejected_messages AS kept
            (body_sha256, message_id, body, body_bytes, reason, detail, law_id, times_seen, instance)
        SELECT body_sha256, message_id, body, body_bytes, reason, detail, law_id, times_seen, replica
        FROM unnest(body_hashes, message_ids, bodies, body_sizes, reasons, details, rejected_laws, seen)
             AS message (body_sha256, message_id, body, body_bytes, reason, detail, law_id, times_seen)
        ORDER BY body_sha256, message_id COLLATE "C"
        ON CONFLICT (body_sha256, message_id)
        DO UPDATE SET
            times_seen = least(kept.times_seen::numeric + EXCLUDED.times_seen, 9223372036854775807),
            last_seen_at = EXCLUDED.last_seen_at;
    END IF;

    -- A law takes a vote where opens_at <= its moment < closes_at, and none once it is certified. That a message was sent in time
    -- admits a vote which says no moment itself; no message was sent after its receipt.
    IF EXISTS (SELECT FROM laws) THEN
        late := array(
            SELECT CASE
                       WHEN status = 'certified' OR final.law_id IS NOT NULL THEN 'certified'
                       WHEN (coalesce(voted_at, held_since) < opens_at OR coalesce(voted_at, held_since) >= closes_at)
                            AND (sent_at IS NULL OR voted_at IS NOT NULL OR sent_at > held_since
                                 OR sent_at < opens_at OR sent_at >= closes_at)
                       THEN 'outside_window'
                   END
            FROM unnest(law_ids, moments, sent_seconds) WITH ORDINALITY AS vote (law_id, voted_at, sent_second, n)
            LEFT JOIN laws USING (law_id)
            LEFT JOIN certified_results AS final USING (law_id)
            CROSS JOIN LATERAL (SELECT to_timestamp(sent_second) AS sent_at) AS message
            ORDER BY n);
    END IF;

    -- Positions and subscripts, since an unnest costs a pass over each of its arrays; and NOT IN, since such a subquery is
    -- hashed, while an array would be searched for each vote.
    left_over := array(SELECT generate_series(1, cardinality(vote_ids)));
    IF left_over <> '{}' AND NOT (has_rivals OR expects_copies) AND array_remove(late, NULL) = '{}' THEN
        -- ON CONFLICT looks each key up before it inserts it: a fifth of the whole
        BEGIN
            WITH counted AS (
                INSERT INTO vote_audit (vote_id, law_id, choice, voted_at, voter_hash, redelivered, instance, txid)
                SELECT vote_ids[n], law_ids[n], choices[n], moments[n], voter_hashes[n], redeliveries[n], replica, batch_txid
                FROM unnest(left_over) AS n
                ORDER BY law_ids[n] COLLATE "C", voter_hashes[n] COLLATE "C", vote_ids[n]
                RETURNING law_id, choice
            )
            SELECT array_agg(law_id), array_agg(oui), array_agg(non), coalesce(sum(oui + non), 0)
            INTO added_laws, added_oui, added_non, inserted
            FROM (SELECT law_id, count(*) FILTER (WHERE choice = 'oui') AS oui, count(*) FILTER (WHERE choice = 'non') AS non
                  FROM counted GROUP BY law_id) AS added;
            left_over := '{}';
        EXCEPTION WHEN unique_violation THEN
            NULL;
        END;
    END IF;
    WHILE left_over <> '{}' LOOP
        passes := passes + 1;
        IF passes > 40 THEN
            -- others have inserted rivals meanwhile, each time: the service tries again with halves
            RAISE EXCEPTION 'a batch with more than 40 passes';
        END IF;
        before := cardinality(left_over);
        candidates := left_over;
        IF has_rivals THEN
            -- those that count if the table stays as it is: vote by vote, since what stands in the way of one need not count
            -- itself, and so on, for as long as a publisher likes
            candidates := '{}';
            first_of_id := array_fill(0, ARRAY[before]);
            first_of_voter := first_of_id;
            id_ranks := array_fill(0, ARRAY[cardinality(vote_ids)]);
            voter_ranks := id_ranks;
            FOR here IN
                SELECT n, dense_rank() OVER (ORDER BY vote_ids[n]) AS id_rank, voter_hashes[n] IS NOT NULL AS has_voter,
                       dense_rank() OVER (ORDER BY law_ids[n] COLLATE "C", voter_hashes[n] COLLATE "C") AS voter_rank,
                       late[n] IS NULL AND NOT EXISTS (SELECT FROM vote_audit WHERE vote_id = vote_ids[n])
                       AND NOT EXISTS (SELECT FROM vote_audit
                                       WHERE voter_hash = voter_hashes[n] AND law_id = law_ids[n]) AS is_free
                FROM unnest(left_over) AS n
                ORDER BY n
            LOOP
                id_ranks[here.n] := here.id_rank;
                voter_ranks[here.n] := here.voter_rank;
                IF here.is_free AND first_of_id[here.id_rank] = 0
                   AND (first_of_voter[here.voter_rank] = 0 OR NOT here.has_voter) THEN
                    candidates := candidates || here.n;
                    first_of_id[here.id_rank] := here.n;
                    first_of_voter[here.voter_rank] := here.n;
                END IF;
            END LOOP;
        END IF;
        WITH counted AS (
            INSERT INTO vote_audit (vote_id, law_id, choice, voted_at, voter_hash, redelivered, instance, txid)
            SELECT vote_ids[n], law_ids[n], choices[n], moments[n], voter_hashes[n], redeliveries[n], replica, batch_txid
            FROM unnest(candidates) AS n
            WHERE late[n] IS NULL
            ORDER BY law_ids[n] COLLATE "C", voter_hashes[n] COLLATE "C", vote_ids[n], n
            ON CONFLICT DO NOTHING
            RETURNING vote_id, law_id, choice
        )
        SELECT array_agg(law_id), array_agg(oui), array_agg(non), (SELECT array_agg(vote_id) FROM counted)
        INTO new_laws, new_oui, new_non, new_ids
        FROM (SELECT law_id, count(*) FILTER (WHERE choice = 'oui') AS oui, count(*) FILTER (WHERE choice = 'non') AS non
              FROM counted GROUP BY law_id) AS added;
        added_laws := added_laws || new_laws;
        added_oui := added_oui || new_oui;
        added_non := added_non || new_non;
        inserted := inserted + coalesce(cardinality(new_ids), 0);
        EXIT WHEN inserted = cardinality(vote_ids);
        -- of copies the first was inserted
        left_over := array(
            SELECT n
            FROM unnest(left_over) AS n
            WHERE vote_ids[n] NOT IN (SELECT unnest(new_ids))
               OR n NOT IN (SELECT min(n) FROM unnest(candidates) AS n GROUP BY vote_ids[n]));

        -- What stands in the way of the others: a row with their vote_id, or else with their law and voter; or their law. Not
        -- what this pass has inserted of a vote behind them. Where nothing does, what did was not inserted: the next pass tells.
        WITH looked_at AS (
            SELECT n, vote.vote_id, vote.law_id, vote.choice, vote.voter_hash, vote.redelivered,
                   coalesce(same.vote_id, rival.vote_id) AS counted_vote_id,
                   coalesce(same.law_id, rival.law_id) AS counted_law_id,
                   coalesce(same.choice, rival.choice) AS counted_choice,
                   CASE
                       WHEN rival.vote_id IS NOT NULL THEN 'second_vote'
                       WHEN same.vote_id IS NULL THEN late[n]
                       WHEN (same.law_id, same.choice) <> (vote.law_id, vote.choice)
                            OR same.voter_hash IS DISTINCT FROM vote.voter_hash THEN 'conflict'
                       -- Of two deliveries of one message at least the later is flagged; which of them is here does not
                       -- matter. But what this batch has inserted came with it, and it holds no message twice.
                       WHEN vote.redelivered
                            OR same.redelivered AND same.recorded_at >= held_since
                               AND NOT (same.instance = replica AND same.recorded_at = ANY (part_times || began_at))
                       THEN 'redelivery'
                       ELSE 'duplicate'
                   END AS outcome,
                   same.instance = replica AND EXISTS (
                       SELECT FROM unnest(attempt_txids, attempt_times) AS attempt (txid, recorded_at)
                       WHERE (attempt.txid, attempt.recorded_at) = (same.txid, same.recorded_at)) AS is_own
            FROM (SELECT n, vote_ids[n] AS vote_id, law_ids[n] AS law_id, choices[n] AS choice, voter_hashes[n] AS voter_hash,
                         redeliveries[n] AS redelivered
                  FROM unnest(left_over) AS n) AS vote
            LEFT JOIN LATERAL (
                SELECT * FROM vote_audit WHERE vote_id = vote.vote_id LIMIT 1
            ) AS same ON NOT has_rivals OR first_of_id[id_ranks[n]] <= n
            LEFT JOIN LATERAL (
                SELECT * FROM vote_audit WHERE voter_hash = vote.voter_hash AND law_id = vote.law_id LIMIT 1
            ) AS rival ON same.vote_id IS NULL AND (NOT has_rivals OR first_of_voter[voter_ranks[n]] <= n)
        ),
        settled AS (
            SELECT n, vote_id, law_id, choice, voter_hash, redelivered, counted_vote_id, counted_law_id, counted_choice,
                   CASE
                       WHEN is_own AND outcome <> 'conflict' AND vote_id <> ALL (told)
                            AND row_number() OVER (PARTITION BY vote_id, is_own, outcome = 'conflict' ORDER BY n) = 1
                       THEN 'counted'
                       ELSE outcome
                   END AS outcome
            FROM looked_at
        ),
        recorded AS (
            INSERT INTO duplicate_attempts
                (vote_id, law_id, choice, voter_hash, reason, counted_vote_id, counted_law_id, counted_choice, instance)
            SELECT vote_id, law_id, choice, voter_hash, outcome, counted_vote_id, counted_law_id, counted_choice, replica
            FROM settled AS copy
            WHERE outcome IN ('duplicate', 'conflict', 'second_vote')
              -- an earlier delivery of this message, or an earlier attempt, may have recorded it
              AND NOT (redelivered AND EXISTS (
                  SELECT FROM duplicate_attempts AS earlier
                  WHERE earlier.vote_id = copy.vote_id AND earlier.law_id = copy.law_id
                    AND earlier.choice = copy.choice AND earlier.reason = copy.outcome
                    AND coalesce(earlier.voter_hash, '') = coalesce(copy.voter_hash, '')
                    AND (earlier.instance <> replica OR earlier.detected_at <> ALL (part_times || began_at))))
              AND NOT EXISTS (
                  SELECT FROM unnest(attempt_times) AS attempt (recorded_at)
                  CROSS JOIN LATERAL (
                      SELECT FROM duplicate_attempts AS earlier
                      WHERE earlier.vote_id = copy.vote_id AND earlier.law_id = copy.law_id
                        AND earlier.choice = copy.choice AND earlier.reason = copy.outcome
                        AND coalesce(earlier.voter_hash, '') = coalesce(copy.voter_hash, '')
                        AND earlier.detected_at = attempt.recorded_at AND earlier.instance = replica
                      LIMIT 1) AS record)  -- with = ANY it would read all that differ in nothing but the time
            ORDER BY n
        )
        SELECT judged || coalesce(array_agg(n) FILTER (WHERE outcome IS NOT NULL), '{}'),
               outcomes || coalesce(array_agg(outcome) FILTER (WHERE outcome IS NOT NULL), '{}'),
               coalesce(array_agg(n) FILTER (WHERE outcome IS NULL), '{}')
        INTO judged, outcomes, left_over
        FROM settled;
        IF cardinality(left_over) = before THEN
            RAISE EXCEPTION 'vote_audit takes no row and none stands in the way: is there a trigger?'
                USING ERRCODE = 'invalid_object_definition';
        END IF;
    END LOOP;
    IF inserted + cardinality(judged) <> cardinality(vote_ids) THEN
        RAISE EXCEPTION '% votes have % outcomes: is there a trigger?', cardinality(vote_ids), inserted + cardinality(judged)
            USING ERRCODE = 'invalid_object_definition';
    END IF;

    IF inserted > 0 THEN
        WITH added AS (
            SELECT law_id, sum(oui)::bigint AS oui, sum(non)::bigint AS non
            FROM unnest(added_laws, added_oui, added_non) AS added (law_id, oui, non)
            GROUP BY law_id
        ),
        total AS (
            INSERT INTO vote_results AS so_far (law_id, oui_count, non_count)
            SELECT law_id, added.oui, added.non FROM added ORDER BY law_id COLLATE "C"
            ON CONFLICT (law_id)
            DO UPDATE SET
                -- an insider's total must not be able to make it refuse a vote
                oui_count = least(so_far.oui_count + EXCLUDED.oui_count, 1000000000000000),
                non_count = least(so_far.non_count + EXCLUDED.non_count, 1000000000000000)
            RETURNING law_id, oui_count, non_count
        )
        SELECT array_agg(law_id), array_agg(oui_count), array_agg(non_count), (SELECT count(*) FROM added)
        INTO laws, oui, non, touched_laws
        FROM total;
        IF coalesce(cardinality(laws), 0) <> touched_laws THEN
            RAISE EXCEPTION 'vote_results does not take every row: is there a trigger?'
                USING ERRCODE = 'invalid_object_definition';
        END IF;
    ELSE
        -- A record in the log, so that the COMMIT waits for a standby also where nothing was written: it waits for all
        -- before it too, and so for the commits of the votes that were found here. (An id alone makes no record.)
        PERFORM pg_logical_emit_message(true, 'votes', '');
    END IF;
END
$$;

-- For who certifies or recounts: no batch is being written from here to the end of the transaction. A function, since whoever
-- may take such a lock may otherwise write into the log as well.
CREATE OR REPLACE FUNCTION lock_out_batches() RETURNS void LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    LOCK TABLE vote_audit IN SHARE ROW EXCLUSIVE MODE;
END
$$;

-- A minute of a replica's work is added to what stands.
CREATE OR REPLACE FUNCTION record_minute(
    replica varchar, minute_began timestamptz, more_batches bigint, more_votes bigint, more_duplicates bigint,
    more_rejected bigint, more_seconds double precision
) RETURNS void LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    -- NaN is greater than infinity
    IF NOT coalesce(isfinite(minute_began) AND 0 <= ALL (ARRAY[more_batches, more_votes, more_duplicates, more_rejected])
                    AND more_seconds >= 0 AND more_seconds < 'infinity', false)
    THEN
        RAISE EXCEPTION 'a minute of work is neither negative nor infinite' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    INSERT INTO aggregation_stats AS so_far (instance, minute, batches, votes, duplicates, rejected, busy_seconds)
    VALUES (replica, date_trunc('minute', minute_began), more_batches, more_votes, more_duplicates, more_rejected,
            more_seconds)
    ON CONFLICT (instance, minute)
    DO UPDATE SET
        batches = so_far.batches + EXCLUDED.batches,
        votes = so_far.votes + EXCLUDED.votes,
        duplicates = so_far.duplicates + EXCLUDED.duplicates,
        rejected = so_far.rejected + EXCLUDED.rejected,
        busy_seconds = so_far.busy_seconds + EXCLUDED.busy_seconds;
END
$$;

-- All that run with the owner's rights look in this schema alone, lest a caller's temporary table pass for one of ours.
-- Those that are called are for those alone who are granted them.
DO $$
DECLARE
    found regprocedure;
BEGIN
    FOR found IN
        SELECT oid FROM pg_proc
        WHERE pronamespace = current_schema()::regnamespace
          AND proname IN ('refuse_vote_for_certified_law', 'refuse_change_of_certified_total', 'refuse_removal_of_totals',
                          'guard_law', 'guard_seal', 'guard_certificate', 'refuse_other_txid', 'count_batch',
                          'record_minute', 'lock_out_batches')
    LOOP
        EXECUTE format('ALTER FUNCTION %s SET search_path = %I, pg_temp', found, current_schema());
        EXECUTE format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', found);
    END LOOP;
    -- A plan is kept for a session, and one that was made while the tables were small would read all of them for good. One
    -- for each batch, by the length of its arrays, costs more than the statement.
    FOR found IN
        SELECT oid FROM pg_proc WHERE pronamespace = current_schema()::regnamespace AND proname = 'count_batch'
    LOOP
        EXECUTE format('ALTER FUNCTION %s SET enable_seqscan = off', found);
        EXECUTE format('ALTER FUNCTION %s SET plan_cache_mode = force_generic_plan', found);
    END LOOP;
END
$$;

-- from earlier versions: who may call their count_batch may call the one of now
DO $$
DECLARE
    caller regrole;
BEGIN
    FOR caller IN
        SELECT DISTINCT granted.grantee
        FROM pg_proc, aclexplode(proacl) AS granted
        WHERE pronamespace = current_schema()::regnamespace AND proname = 'count_batch' AND pronargs < 23
          AND granted.privilege_type = 'EXECUTE' AND granted.grantee NOT IN (0, proowner)
    LOOP
        EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %s',
                       (SELECT oid::regprocedure FROM pg_proc WHERE pronamespace = current_schema()::regnamespace
                        AND proname = 'count_batch' AND pronargs = 23), caller);
    END LOOP;
END
$$;

INSERT INTO schema_version (version) VALUES (1), (2), (3), (4), (5), (6), (7), (8) ON CONFLICT DO NOTHING;

COMMIT;
