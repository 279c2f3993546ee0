-- The roles of the service and of the people around it, each with the rights that it uses and no others. Run by the owner of
-- the tables, who may create roles, after init_db.sql, any number of times (on an upgrade, after the last replica of the earlier
-- version has gone: docs/CHANGELOG.md):
--
--   SERVICE_ROLE=votes SERVICE_PASSWORD=... psql --set ON_ERROR_STOP=1 --file deploy/postgres/roles.sql
--
-- Each of these makes another role, where it is set:
--   SEALER_PASSWORD     votes_sealer, for `reconcile.py seal`: the service cannot write seals, and the sealer cannot count
--   AUDITOR_PASSWORD    votes_auditor, who reads all: `reconcile.py`, verify, prove, results, export-audit
--   CERTIFIER_PASSWORD  votes_certifier, who closes, certifies and recounts
--   MONITOR_PASSWORD    votes_monitor, for PostgreSQL's exporter
--
-- What only a superuser may do is told at the end, where the owner is none. Needs psql 15 or later.

\getenv service_role SERVICE_ROLE
\getenv service_password SERVICE_PASSWORD
\set sealer_password ''
\getenv sealer_password SEALER_PASSWORD
\set auditor_password ''
\getenv auditor_password AUDITOR_PASSWORD
\set certifier_password ''
\getenv certifier_password CERTIFIER_PASSWORD
\set monitor_password ''
\getenv monitor_password MONITOR_PASSWORD

BEGIN;

-- where the service looks, whatever path the owner has
SET LOCAL search_path = public, pg_temp;

-- no statement with a password in it is to reach the server's log (only a superuser can see to that)
SELECT set_config(name, value, true)
FROM (VALUES ('log_statement', 'none'), ('log_min_duration_statement', '-1')) AS quiet (name, value)
WHERE (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) \g /dev/null

-- one at a time: two replicas of an installer would both find the role missing
SELECT pg_advisory_xact_lock(hashtext('vote-aggregation-schema')) \g /dev/null

-- The roles, and an end to all that they may do here. What a role must not have is taken away only where it has it: a
-- superuser's attributes are not even to be named by others.
SELECT statement
FROM (VALUES (:'service_role', :'service_password', -1), ('votes_sealer', :'sealer_password', 5),
             ('votes_auditor', :'auditor_password', 10), ('votes_certifier', :'certifier_password', 10),
             ('votes_monitor', :'monitor_password', 5)) AS wanted (role, password, connections)
LEFT JOIN pg_roles ON rolname = role
CROSS JOIN LATERAL (VALUES
    (1, CASE WHEN rolname IS NULL THEN format('CREATE ROLE %I', role) END),
    (2, 'ALTER ROLE ' || quote_ident(role) || nullif(concat(
            CASE WHEN rolsuper THEN ' NOSUPERUSER' END, CASE WHEN rolcreatedb THEN ' NOCREATEDB' END,
            CASE WHEN rolcreaterole THEN ' NOCREATEROLE' END, CASE WHEN rolreplication THEN ' NOREPLICATION' END,
            CASE WHEN rolbypassrls THEN ' NOBYPASSRLS' END), '')),
    (3, format('ALTER ROLE %I LOGIN CONNECTION LIMIT %s PASSWORD %L', role, connections, password)),
    (4, format('REVOKE ALL ON ALL TABLES IN SCHEMA public FROM %I', role)),
    (5, format('GRANT USAGE ON SCHEMA public TO %I', role))
) AS steps (step, statement)
WHERE password <> ''
ORDER BY role, step \gexec

SELECT set_config('votes.roles', array_to_string(array_remove(ARRAY[
    :'service_role', CASE WHEN :'sealer_password' <> '' THEN 'votes_sealer' END,
    CASE WHEN :'auditor_password' <> '' THEN 'votes_auditor' END, CASE WHEN :'certifier_password' <> '' THEN 'votes_certifier' END,
    CASE WHEN :'monitor_password' <> '' THEN 'votes_monitor' END], NULL), ','), true) \g /dev/null
SELECT :'sealer_password' <> '' AS with_sealer, :'auditor_password' <> '' AS with_auditor,
       :'certifier_password' <> '' AS with_certifier \gset

GRANT SELECT ON vote_audit, duplicate_attempts, rejected_messages, vote_results, aggregation_stats, schema_version, laws,
    vote_statistics, duplicate_summary, sealed_totals TO :"service_role";
-- what the results page publishes of seals and certificates: of a seal all but the leaves, which hold every vote_id
GRANT SELECT (seal_id, from_txid, to_txid, votes, merkle_root, leaves_hash, sealed_at, previous_hash, records_hash, salt,
              seal_hash)
    ON audit_seals TO :"service_role";
GRANT SELECT ON certified_results TO :"service_role";
-- by which replicas of schema versions 3 and 4 wrote; that of versions 5 to 7 stays for one version more, so that they can come back
SELECT format('DROP FUNCTION %s', oid::regprocedure)
FROM pg_proc
WHERE pronamespace = 'public'::regnamespace
  AND (proname = 'count_new_votes' OR proname = 'count_batch' AND pronargs < 22) \gexec

-- it writes by these two, which run with the rights of their owner
GRANT EXECUTE ON FUNCTION record_minute TO :"service_role";
SELECT format('GRANT EXECUTE ON FUNCTION %s TO %I', oid::regprocedure, :'service_role')
FROM pg_proc
WHERE pronamespace = 'public'::regnamespace AND proname = 'count_batch' \gexec

\if :with_sealer
    GRANT SELECT ON vote_audit, vote_results, certified_results, recounts TO votes_sealer;
    GRANT SELECT, INSERT ON audit_seals TO votes_sealer;
    GRANT SELECT, INSERT, UPDATE ON sealed_totals TO votes_sealer;
\endif

\if :with_auditor
    GRANT SELECT ON ALL TABLES IN SCHEMA public TO votes_auditor;
\endif

\if :with_certifier
    GRANT SELECT ON ALL TABLES IN SCHEMA public TO votes_certifier;
    GRANT UPDATE (status, closes_at) ON laws TO votes_certifier;
    GRANT INSERT ON certified_results, recounts TO votes_certifier;
    GRANT INSERT (law_id, oui_count, non_count), UPDATE (oui_count, non_count) ON vote_results TO votes_certifier;
    -- instead of a right to write into the log, which a lock would ask for
    GRANT EXECUTE ON FUNCTION lock_out_batches TO votes_certifier;
\endif

-- What the owner of the tables may not do is left out, and told. Statements of these roles hold ballots, and nobody is to read
-- those in the server's log or in its statistics: neither the statement (of an error, a slow one, a sample, a plan), nor the row
-- that a constraint refuses (a DETAIL, which terse leaves out), nor what a deadlock tells of both sessions in the log of either,
-- which comes from where pg_stat_activity has it. In force for connections that are made from now on.
DO $$
DECLARE
    here constant name := current_database();
    owns_database constant boolean := pg_has_role((SELECT datdba FROM pg_database WHERE datname = here), 'USAGE');
    owns_schema constant boolean := pg_has_role((SELECT nspowner FROM pg_namespace WHERE nspname = 'public'), 'USAGE');
    roles constant name[] := string_to_array(current_setting('votes.roles'), ',');
    quiet constant text[] := ARRAY[
        'track_activities = off', 'log_min_error_statement = panic', 'log_error_verbosity = terse', 'log_statement = none',
        'log_min_duration_statement = -1', 'log_min_duration_sample = -1', 'log_transaction_sample_rate = 0',
        'log_parameter_max_length = 0', 'log_parameter_max_length_on_error = 0', 'debug_print_parse = off',
        'debug_print_rewritten = off', 'debug_print_plan = off', 'auto_explain.log_min_duration = -1',
        'pg_stat_statements.track = none', 'pgaudit.log = none'];
    wanted record;
    left_out text[] := '{}';
BEGIN
    FOR wanted IN
        SELECT 'REVOKE CREATE ON SCHEMA public FROM PUBLIC' AS statement, owns_schema AS may
        WHERE EXISTS (SELECT FROM pg_namespace, aclexplode(nspacl)
                      WHERE nspname = 'public' AND grantee = 0 AND privilege_type = 'CREATE')
        UNION ALL SELECT format('REVOKE ALL ON DATABASE %I FROM PUBLIC', here), owns_database
        -- without an entry everybody may connect
        WHERE EXISTS (SELECT FROM pg_database LEFT JOIN aclexplode(datacl) AS entry ON true
                      WHERE datname = here AND coalesce(grantee, 0) = 0)
        UNION ALL SELECT format('GRANT %s ON DATABASE %I TO %I', privilege, here, role), owns_database
        FROM unnest(roles) AS role, unnest(ARRAY['CONNECT', 'TEMPORARY']) AS privilege
        -- a recount makes a temporary table
        WHERE (privilege = 'CONNECT' OR role = 'votes_certifier')
          AND NOT EXISTS (SELECT FROM pg_database, aclexplode(datacl)
                          WHERE datname = here AND grantee = quote_ident(role)::regrole AND privilege_type = privilege)
        UNION ALL SELECT format('ALTER ROLE %I SET %s', role, setting), true
        FROM unnest(roles) AS role, unnest(quiet) AS setting
        WHERE NOT EXISTS (SELECT FROM pg_db_role_setting
                          WHERE setrole = quote_ident(role)::regrole AND setdatabase = 0 AND replace(setting, ' = ', '=') = ANY (setconfig))
        -- the exporter's role needs this, and had the right to read everybody's statements before
        UNION ALL SELECT 'GRANT EXECUTE ON FUNCTION pg_catalog.pg_ls_waldir() TO votes_monitor', true
        WHERE 'votes_monitor' = ANY (roles)
          AND NOT has_function_privilege(to_regrole('votes_monitor'), 'pg_catalog.pg_ls_waldir()', 'EXECUTE')
        UNION ALL SELECT 'REVOKE pg_monitor FROM votes_monitor', true
        FROM pg_auth_members WHERE roleid = 'pg_monitor'::regrole AND member = to_regrole('votes_monitor')
    LOOP
        BEGIN
            IF NOT wanted.may THEN  -- where it would be a warning only
                RAISE insufficient_privilege;
            END IF;
            EXECUTE wanted.statement;
        EXCEPTION WHEN insufficient_privilege THEN
            left_out := left_out || wanted.statement;
        END;
    END LOOP;
    IF left_out <> '{}' THEN
        RAISE NOTICE E'% may not do this; let a superuser do it, in this database:\n%;', current_user,
            array_to_string(left_out, E';\n');
    END IF;
END
$$;

COMMIT;
