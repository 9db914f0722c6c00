#!/usr/bin/env bash
# The job scripts of all schedulers pass shellcheck together with what they share.    lint_batch.sh REPOSITORY
set -euo pipefail
cd "$1"
scripts=(scripts/slurm/train.sbatch scripts/pbs/train.pbs scripts/pjm/train.pjm scripts/sge/train.sge)
shellcheck --external-sources --source-path=. "${scripts[@]}" scripts/submit.sh
echo "${#scripts[@]} job scripts and scripts/submit.sh pass shellcheck"
