#!/usr/bin/env bash
# Prints RabbitMQ's definitions with users who may do what they need on the vote queue and nothing else, and where
# its type is given with the queue as well, so that it stands before the first vote.
#
#   SERVICE_USER, SERVICE_PASSWORD        declares the queue and consumes from it; can publish nothing
#   PUBLISHER_USER, PUBLISHER_PASSWORD    publishes by the default exchange; can read nothing
#   AUDITOR_USER, AUDITOR_PASSWORD        asks how much the queue holds, for reconcile.py; can neither read nor publish; default
#                                         of the name: votes-auditor; no such user where the password is not set
#   RABBITMQ_QUEUE, RABBITMQ_VHOST        default: votes.aggregation, /
#   RABBITMQ_QUEUE_TYPE                   classic or quorum; default: no queue
#   RABBITMQ_MAX_PRIORITY                 of a classic queue; default: 10
#   RABBITMQ_VERSION                      of the broker, at least its first number; default: 4
#
# The version decides on the delivery limit of a quorum queue. From 4 on a message is dropped after 20 returns unless the
# limit is -1; before 4 there is none, and -1 drops a message at its first return. RabbitMQ 3.10 takes nothing of what is
# meant for 4 but users and rights. A queue that stands is left as it is, so one that was made before 4, and has no limit
# of its own, gets -1 by a policy.
#
# Passwords go out salted and hashed only. An administrator is no part of this: rabbitmqctl needs none.
set -euo pipefail

queue=${RABBITMQ_QUEUE:-votes.aggregation}
vhost=${RABBITMQ_VHOST:-/}
type=$(tr '[:upper:]' '[:lower:]' <<<"${RABBITMQ_QUEUE_TYPE:-}")
auditor=${AUDITOR_USER:-votes-auditor}
auditor_password=${AUDITOR_PASSWORD:-}
max_priority=${RABBITMQ_MAX_PRIORITY:-10}
version=${RABBITMQ_VERSION:-4}

wrong() { # variable, its value, what is accepted
    printf "%s is '%s': accepted is %s\n" "$@" >&2
    exit 2
}

[[ $type =~ ^(classic|quorum|)$ ]] || wrong RABBITMQ_QUEUE_TYPE "$RABBITMQ_QUEUE_TYPE" 'classic or quorum'
[[ $max_priority =~ ^[1-9][0-9]{0,2}$ ]] && ((max_priority <= 255)) ||
    wrong RABBITMQ_MAX_PRIORITY "$max_priority" 'a whole number from 1 to 255'
[[ $version =~ ^([1-9][0-9]{0,2})([.+~-].*)?$ ]] || wrong RABBITMQ_VERSION "$version" 'a version, as 4 or 4.1.2'
major=${BASH_REMATCH[1]}

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

user() { # name, password, tags as JSON
    printf '{"name": %s, "password_hash": "%s", "hashing_algorithm": "rabbit_password_hashing_sha256", "tags": [%s]}' \
        "$(json "$1")" "$(hash "$2")" "${3:-}"
}

permission() { # name, configure, write, read
    printf '{"user": %s, "vhost": %s, "configure": %s, "write": %s, "read": %s}' \
        "$(json "$1")" "$(json "$vhost")" "$(json "$2")" "$(json "$3")" "$(json "$4")"
}

queue() { # with the arguments that rabbitmq_client.py declares it with, on a broker of that version
    local arguments='"x-queue-type": "classic", "x-max-priority": '$max_priority', "x-queue-version": 2'
    if [ "$type" = quorum ]; then
        arguments='"x-queue-type": "quorum"'
        if ((major >= 4)); then arguments+=', "x-delivery-limit": -1'; fi
    fi
    printf '{"name": %s, "vhost": %s, "durable": true, "auto_delete": false, "arguments": {%s}}' \
        "$(json "$queue")" "$(json "$vhost")" "$arguments"
}

policy() {
    printf '{"name": "no-delivery-limit", "vhost": %s, "pattern": %s, "apply-to": "quorum_queues", ' \
        "$(json "$vhost")" "$(json "$(only "$queue")")"
    printf '"definition": {"delivery-limit": -1}, "priority": 0}'
}

cat <<END
{
  "vhosts": [{"name": $(json "$vhost")}],
  "users": [
    $(user "$SERVICE_USER" "$SERVICE_PASSWORD"),
    $(user "$PUBLISHER_USER" "$PUBLISHER_PASSWORD")$(
    # all virtual hosts' figures by the management API, which tells them to nobody with less; no message of any
    [ -z "$auditor_password" ] || printf ',\n    %s' "$(user "$auditor" "$auditor_password" '"monitoring"')"
)
  ],
  "permissions": [
    $(permission "$SERVICE_USER" "$(only "$queue")" '^$' "$(only "$queue")"),
    $(permission "$PUBLISHER_USER" '^$' '^amq\.default$' '^$')$(
    [ -z "$auditor_password" ] || printf ',\n    %s' "$(permission "$auditor" '^$' '^$' '^$')"
)
  ]$([ "$type" != quorum ] || ((major < 4)) || printf ',\n  "policies": [%s]' "$(policy)")$(
    [ -z "$type" ] || printf ',\n  "queues": [%s]' "$(queue)"
)
}
END
