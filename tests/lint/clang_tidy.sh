#!/usr/bin/env bash
# clang-tidy with the checks of .clang-tidy over what the build compiles; in tests without the static analyser, which takes
# longer than all else together.    clang_tidy.sh BUILD_FOLDER
set -euo pipefail
# Each file once, though two programs are made of some.
once=$(mktemp -d)
trap 'rm -rf "$once"' EXIT
python3 -c 'import json, sys
json.dump(list({entry["file"]: entry for entry in json.load(sys.stdin)}.values()), sys.stdout)' \
    <"$1/compile_commands.json" >"$once/compile_commands.json"
# Kernels for the GPU and their emulation are C++ for two compilers, of which clang is none.
run-clang-tidy -quiet -p "$once" -j "$(nproc)" '^(?!.*/(kernels/cuda|tests)/).*$'
run-clang-tidy -quiet -p "$once" -j "$(nproc)" -checks='-clang-analyzer-*' '/tests/(?!cuda_emu/)'
