#!/usr/bin/env bash
# Every script that people start says with --help how to use it, and does nothing else.    help.sh REPOSITORY
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir "$folder/repository" "$folder/empty"
cp -r "$1/scripts" "$folder/repository"
cd "$folder/empty"
before=$(find "$folder")
bad=0
while read -r script; do
    said=$(timeout 20 "$script" --help 2>&1 </dev/null) && status=0 || status=$?
    left=$(diff <(sort <<<"$before") <(find "$folder" | sort)) || true
    if [[ $status -ne 0 || $said != *"  ${script#"$folder/repository/"}"* || -n $left ]]; then
        printf '%s --help: status %d\n%s\n%s\n' "$script" "$status" "$said" "$left" && bad=1
    fi
done < <(find "$folder/repository/scripts" -name '*.sh' -executable)
exit $bad
