#!/usr/bin/env bash
# Prints RabbitMQ's definitions with users who may do what they need on the vote queue and nothing else, with a place
# for the votes that fall out of it, and where its type is given with the queue as well, so that it stands before the
# first vote.
#
#   SERVICE_USER, SERVICE_PASSWORD        declares the queue and consumes from it; can publish nothing
#   PUBLISHER_USER, PUBLISHER_PASSWORD    publishes by the default exchange; can read nothing
#   AUDITOR_USER, AUDITOR_PASSWORD        asks how much the queue holds, for reconcile.py; can neither read nor publish; default
#                                         of the name: votes-auditor; no such user where the password is not set
#   RABBITMQ_QUEUE, RABBITMQ_VHOST        default: votes.aggregation, /
#   RABBITMQ_QUEUE_TYPE                   classic or quorum; default: the vote queue is not among them
#   RABBITMQ_MAX_PRIORITY                 of a classic queue, 0 for one without priorities; default: 10
#   RABBITMQ_VERSION                      of the broker, at least its first number; default: 4
#
# The version decides on the delivery limit of a quorum queue. From 4 on a message is dropped after 20 returns unless the
# limit is -1; before 4 there is none, and -1 drops a message at its first return: RabbitMQ 3.10 refuses a quorum queue that
# is meant for 4. A queue that stands is left as it is, so one that was made before 4, and has no limit of its own, gets -1
# by the policy.
#
# A message that expires, is dropped or is returned too often goes to the queue QUEUE.dead and stays there (docs/RUNBOOK.md,
# Votes that fell out); one that the service rejects, and keeps in its database, to QUEUE.rejected, which holds the newest
# 64 MiB. Where the type is quorum, none is lost on that way.
#
# Each password may be in a file: SERVICE_PASSWORD_FILE and so on; it is the first line. Passwords go out salted and hashed only. An administrator is no part of this: rabbitmqctl needs none.
set -euo pipefail

secret() { # the value of the variable $1, or the first line of the file that $1_FILE names; empty where neither is set
    local file=$1_FILE value=${!1:-}
    if [ -z "$value" ] && [ -n "${!file:-}" ]; then read -r value <"${!file}" || [ -n "$value" ] || return 2; fi
    printf '%s' "${value%$'\r'}"
}

service_password=$(secret SERVICE_PASSWORD)
publisher_password=$(secret PUBLISHER_PASSWORD)
auditor_password=$(secret AUDITOR_PASSWORD)
: "${service_password:?SERVICE_PASSWORD is not set, nor is it in a SERVICE_PASSWORD_FILE}"
: "${publisher_password:?PUBLISHER_PASSWORD is not set, nor is it in a PUBLISHER_PASSWORD_FILE}"
queue=${RABBITMQ_QUEUE:-votes.aggregation}
vhost=${RABBITMQ_VHOST:-/}
type=$(tr '[:upper:]' '[:lower:]' <<<"${RABBITMQ_QUEUE_TYPE:-}")
auditor=${AUDITOR_USER:-votes-auditor}
max_priority=${RABBITMQ_MAX_PRIORITY:-10}
version=${RABBITMQ_VERSION:-4}

wrong() { # variable, its value, what is accepted
    printf "%s is '%s': accepted is %s\n" "$@" >&2
    exit 2
}

[[ $type =~ ^(classic|quorum|)$ ]] || wrong RABBITMQ_QUEUE_TYPE "$RABBITMQ_QUEUE_TYPE" 'classic or quorum'
[[ $max_priority =~ ^(0|[1-9][0-9]{0,2})$ ]] && ((max_priority <= 255)) ||
    wrong RABBITMQ_MAX_PRIORITY "$max_priority" 'a whole number from 0 to 255'
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

queue() { # name, arguments
    printf '{"name": %s, "vhost": %s, "durable": true, "auto_delete": false, "arguments": {%s}}' \
        "$(json "$1")" "$(json "$vhost")" "$2"
}

classic='"x-queue-type": "classic"'
quorum='"x-queue-type": "quorum"'
if ((major >= 4)); then quorum+=', "x-delivery-limit": -1'; fi

vote_queue() { # with the arguments that rabbitmq_client.py declares it with, on a broker of that version
    local priorities=''
    if ((max_priority > 0)); then priorities=', "x-max-priority": '$max_priority; fi
    if [ "$type" = quorum ]; then queue "$queue" "$quorum"; else
        queue "$queue" "$classic$priorities, \"x-queue-version\": 2"
    fi
}

exchange() { # name, type, arguments
    printf '{"name": %s, "vhost": %s, "type": "%s", "durable": true, "auto_delete": false, "internal": false, ' \
        "$(json "$1")" "$(json "$vhost")" "$2"
    printf '"arguments": {%s}}' "$3"
}

binding() { # exchange, queue, arguments
    printf '{"source": %s, "vhost": %s, "destination": %s, "destination_type": "queue", "routing_key": "", ' \
        "$(json "$1")" "$(json "$vhost")" "$(json "$2")"
    printf '"arguments": {%s}}' "$3"
}

policy() { # only one holds for a queue: above those of priority 0, or below, where the limit of a quorum queue may be in them
    local definition='"dead-letter-exchange": '$(json "$queue.dead-letters") priority=1
    case $type in
    quorum)
        definition+=', "dead-letter-strategy": "at-least-once", "overflow": "reject-publish"'
        if ((major >= 4)); then definition+=', "delivery-limit": -1'; fi
        ;;
    '') priority=-1 ;;
    esac
    printf '{"name": %s, "vhost": %s, "pattern": %s, "apply-to": "queues", "definition": {%s}, "priority": %s}' \
        "$(json "$queue.keep")" "$(json "$vhost")" "$(json "$(only "$queue")")" "$definition" "$priority"
}

# of one that was moved back only the last reason tells; before 3.13 there is none
reason=x-last-death-reason
if ((major < 4)); then reason=x-first-death-reason; fi

cat <<END
{
  "vhosts": [{"name": $(json "$vhost")}],
  "users": [
    $(user "$SERVICE_USER" "$service_password"),
    $(user "$PUBLISHER_USER" "$publisher_password")$(
    # all virtual hosts' figures by the management API, which tells them to nobody with less; no message of any
    [ -z "$auditor_password" ] || printf ',\n    %s' "$(user "$auditor" "$auditor_password" '"monitoring"')"
)
  ],
  "permissions": [
    $(permission "$SERVICE_USER" "$(only "$queue")" '^$' "$(only "$queue")"),
    $(permission "$PUBLISHER_USER" '^$' '^amq\.default$' '^$')$(
    [ -z "$auditor_password" ] || printf ',\n    %s' "$(permission "$auditor" '^$' '^$' '^$')"
)
  ],
  "policies": [
    $(policy)
  ],
  "exchanges": [
    $(exchange "$queue.dead-letters" headers "\"alternate-exchange\": $(json "$queue.dead")"),
    $(exchange "$queue.dead" fanout '')
  ],
  "queues": [
    $([ -z "$type" ] || printf '%s,\n    ' "$(vote_queue)")$(
        if [ "$type" = quorum ]; then queue "$queue.dead" "$quorum"; else queue "$queue.dead" "$classic"; fi
    ),
    $(queue "$queue.rejected" "$classic, \"x-max-length-bytes\": 67108864")
  ],
  "bindings": [
    $(binding "$queue.dead-letters" "$queue.rejected" '"x-match": "any-with-x", "'$reason'": "rejected"'),
    $(binding "$queue.dead" "$queue.dead" '')
  ]
}
END
