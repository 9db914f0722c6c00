# shellcheck shell=bash disable=SC1091
# A cluster with Grid Engine, such as TSUBAME. Copy this file, put in your site's names, and submit; how nodes are asked
# for differs from site to site:
#   scripts/submit.sh --site mine.sh --nodes 4 --ranks-per-node 4 --option '-l node_f=4' --option '-g group' …
# Jobs begin without `module` where the site's profile is read by login shells only.
[[ $(type -t module) == function ]] || . /etc/profile.d/modules.sh
module load openmpi/5.0 hdf5 # those that the program was built with
export TATARA_MPIRUN='mpirun --bind-to none'
export OMPI_MCA_btl_tcp_if_include=ib0 PRTE_MCA_oob_tcp_if_include=ib0
