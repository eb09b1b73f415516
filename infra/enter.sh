#!/usr/bin/env bash
# What a container starts with. /project is storage that all machines of the cluster share: the project lies
# there, with its data, runs and results; a new image brings new code and leaves these alone. The settings
# are those of /params/params.yaml, where that is mounted.
set -euo pipefail

mkdir -p /project/ucir
cd /project/ucir
if [ "${UCIR_HEAD:-1}" = 1 ]; then # one machine writes
  tar -C /ucir --exclude=./.venv --exclude=./params.yaml -cf - . | tar -xf -
  ln -sfn /ucir/.venv .venv
  [ -e params.yaml ] || cp /ucir/params.yaml .
  [ ! -e /params/params.yaml ] || cp /params/params.yaml .
fi
exec "$@"
