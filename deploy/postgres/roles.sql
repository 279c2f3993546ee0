-- The role of the service, with the rights that it uses and no others. Run by the owner of the tables, after
-- init_db.sql, any number of times (on an upgrade, after the last replica of the earlier version has gone: docs/CHANGELOG.md):
--
--   SERVICE_ROLE=votes SERVICE_PASSWORD=... psql --set ON_ERROR_STOP=1 --file deploy/postgres/roles.sql
--
-- With SEALER_PASSWORD set there is also votes_sealer, for `reconcile.py seal`: the service cannot write seals, and the
-- sealer cannot count. With MONITOR_PASSWORD set there is votes_monitor, for PostgreSQL's exporter. Needs psql 15 or later.

\getenv service_role SERVICE_ROLE
\getenv service_password SERVICE_PASSWORD
\set sealer_password ''
\getenv sealer_password SEALER_PASSWORD
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

SELECT format('CREATE ROLE %I', :'service_role')
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = :'service_role') \gexec

ALTER ROLE :"service_role" LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS
    PASSWORD :'service_password';

-- everything that stands here, and no more
REVOKE ALL ON ALL TABLES IN SCHEMA public FROM :"service_role";
REVOKE CREATE ON SCHEMA public FROM PUBLIC;
SELECT format('REVOKE ALL ON DATABASE %I FROM PUBLIC', current_database()) \gexec
SELECT format('GRANT CONNECT ON DATABASE %I TO %I', current_database(), :'service_role') \gexec

GRANT USAGE ON SCHEMA public TO :"service_role";
GRANT SELECT ON vote_audit, duplicate_attempts, rejected_messages, vote_results, aggregation_stats, schema_version, laws,
    vote_statistics, duplicate_summary, sealed_totals TO :"service_role";
GRANT SELECT (seal_id, to_txid, sealed_at) ON audit_seals TO :"service_role";
-- by which replicas of schema versions 3 and 4 wrote
SELECT format('DROP FUNCTION %s', oid::regprocedure)
FROM pg_proc
WHERE pronamespace = 'public'::regnamespace
  AND (proname = 'count_new_votes' OR proname = 'count_batch' AND pronargs = 21) \gexec

-- it writes by these two, which run with the rights of their owner
GRANT EXECUTE ON FUNCTION count_batch, record_minute TO :"service_role";

SELECT :'sealer_password' <> '' AS with_sealer \gset
\if :with_sealer
    SELECT 'CREATE ROLE votes_sealer' WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'votes_sealer') \gexec
    ALTER ROLE votes_sealer LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS
        PASSWORD :'sealer_password';
    REVOKE ALL ON ALL TABLES IN SCHEMA public FROM votes_sealer;
    SELECT format('GRANT CONNECT ON DATABASE %I TO votes_sealer', current_database()) \gexec
    GRANT USAGE ON SCHEMA public TO votes_sealer;
    GRANT SELECT ON vote_audit, vote_results, certified_results, recounts TO votes_sealer;
    GRANT SELECT, INSERT ON audit_seals TO votes_sealer;
    GRANT SELECT, INSERT, UPDATE ON sealed_totals TO votes_sealer;
\endif

SELECT :'monitor_password' <> '' AS with_monitor \gset
\if :with_monitor
    SELECT 'CREATE ROLE votes_monitor' WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'votes_monitor') \gexec
    ALTER ROLE votes_monitor LOGIN CONNECTION LIMIT 5 PASSWORD :'monitor_password';
    GRANT pg_monitor TO votes_monitor;
    SELECT format('GRANT CONNECT ON DATABASE %I TO votes_monitor', current_database()) \gexec
\endif

COMMIT;
