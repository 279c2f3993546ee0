#!/usr/bin/env bash
# The tables and the roles: init_db.sql and roles.sql, which lie beside this file, by the owner of the tables. Passwords are
# variables as in roles.sql, and PGPASSWORD; or the first line of a file that the variable with _FILE names.
set -euo pipefail

for name in PGPASSWORD SERVICE_PASSWORD SEALER_PASSWORD AUDITOR_PASSWORD CERTIFIER_PASSWORD MONITOR_PASSWORD; do
    file=${name}_FILE
    if [ -z "${!name:-}" ] && [ -n "${!file:-}" ]; then
        read -r value <"${!file}" || [ -n "$value" ] || { echo "${!file} is empty: it is to hold a password" >&2 && exit 2; }
        export "$name=${value%$'\r'}"
    fi
done

folder=$(dirname "${BASH_SOURCE[0]}")
exec psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 --file "$folder/init_db.sql" --file "$folder/roles.sql"
