#!/usr/bin/env bash
# Every shell script passes shellcheck.    shellcheck.sh REPOSITORY
set -euo pipefail
cd "$1"
find scripts tests configs -name '*.sh' -print0 | xargs -0 shellcheck .ci/run
