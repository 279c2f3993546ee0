#!/usr/bin/env bash
# Prints RabbitMQ's definitions with two users who may do what they need on the vote queue and nothing else.
#
#   SERVICE_USER, SERVICE_PASSWORD        declares the queue and consumes from it; can publish nothing
#   PUBLISHER_USER, PUBLISHER_PASSWORD    publishes by the default exchange; can read nothing
#   RABBITMQ_QUEUE, RABBITMQ_VHOST        default: votes.aggregation, /
#
# Passwords go out salted and hashed only. An administrator is no part of this: rabbitmqctl needs none.
set -euo pipefail

queue=${RABBITMQ_QUEUE:-votes.aggregation}
vhost=${RABBITMQ_VHOST:-/}

json() { # a JSON string of $1
    local text=${1//\\/\\\\}
    printf '"%s"' "${text//\"/\\\"}"
}

hash() { # base64 of a salt of four bytes and the SHA-256 of salt and password
    local salt digest
    salt=$(od -An -N4 -tx1 /dev/urandom | tr -d ' \n')
    digest=$({ bytes "$salt" && printf '%s' "$1"; } | sha256sum | cut -d ' ' -f 1)
    bytes "$salt$digest" | base64 -w 0
}

bytes() { # those that the hexadecimal digits of $1 stand for
    # shellcheck disable=SC2059
    printf "$(sed 's/../\\x&/g' <<<"$1")"
}

only() { # a regular expression for this name alone
    printf '^%s$' "$(sed 's/[][(){}.*+?^$|\\]/\\&/g' <<<"$1")"
}

user() { # name, password
    printf '{"name": %s, "password_hash": "%s", "hashing_algorithm": "rabbit_password_hashing_sha256", "tags": []}' \
        "$(json "$1")" "$(hash "$2")"
}

permission() { # name, configure, write, read
    printf '{"user": %s, "vhost": %s, "configure": %s, "write": %s, "read": %s}' \
        "$(json "$1")" "$(json "$vhost")" "$(json "$2")" "$(json "$3")" "$(json "$4")"
}

cat <<END
{
  "vhosts": [{"name": $(json "$vhost")}],
  "users": [
    $(user "$SERVICE_USER" "$SERVICE_PASSWORD"),
    $(user "$PUBLISHER_USER" "$PUBLISHER_PASSWORD")
  ],
  "permissions": [
    $(permission "$SERVICE_USER" "$(only "$queue")" '^$' "$(only "$queue")"),
    $(permission "$PUBLISHER_USER" '^$' '^amq\.default$' '^$')
  ]
}
END
