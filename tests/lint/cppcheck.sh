#!/usr/bin/env bash
# cppcheck over what the build compiles.    cppcheck.sh BUILD_FOLDER
# What it is told to leave alone, and why, is in cppcheck.supp beside this script. Its results are kept in the build
# folder, so that a second run reads only what changed.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1/cppcheck"
cppcheck --project="$1/compile_commands.json" --cppcheck-build-dir="$1/cppcheck" --quiet -j "$(nproc)" \
    --enable=warning,performance,portability,style --std=c11 --std=c++17 \
    --library=posix --library="$here/tatara.cfg" --inline-suppr --suppressions-list="$here/cppcheck.supp" \
    --error-exitcode=1
