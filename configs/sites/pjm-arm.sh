# shellcheck shell=bash disable=SC1091
# Fugaku and its kin: PJM, A64FX, Fujitsu's MPI. Copy this file, put in your site's names, and submit with a rank for each
# of the four groups of cores that a node has:
#   scripts/submit.sh --site mine.sh --nodes 384 --ranks-per-node 4 --option '-g group -L rscgrp=large' \
#       --option '-x PJM_LLIO_GFSCACHE=/vol0004' …
module load lang/tcsds-1.2.41 # that the program was built with
export TATARA_LAUNCHER_KIND=none TATARA_MPIRUN=mpiexec # it knows the job's nodes
export PLE_MPI_STD_EMPTYFILE=off # no empty file for each rank that prints nothing
