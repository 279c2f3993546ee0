#!/bin/bash
# What the entrypoint of the image `rabbitmq` does, as far as docker-compose.yml uses it.
set -euo pipefail
if [[ ${1:-} == rabbitmq* ]] && [ "$(id -u)" = 0 ]; then
    find /var/lib/rabbitmq \! -user rabbitmq -exec chown rabbitmq '{}' +
    exec setpriv --reuid rabbitmq --regid rabbitmq --init-groups "$0" "$@"
fi
exec "$@"
