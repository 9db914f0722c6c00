# shellcheck shell=bash disable=SC1091
# A cluster with PBS Pro and Open MPI as a module. Copy this file, put in your site's names, and submit:
#   scripts/submit.sh --site mine.sh --nodes 8 --ranks-per-node 2 --option '-q large' --option '-P project' …
# Jobs begin without `module` where the site's profile is read by login shells only.
[[ $(type -t module) == function ]] || . /etc/profile.d/modules.sh
module purge
module load gcc/12 openmpi/4.1 hdf5/1.14 # those that the program was built with
export TATARA_MPIRUN='mpirun --map-by ppr:1:socket --bind-to socket' # ranks that keep to their socket's memory
export OMPI_MCA_pml=ucx UCX_NET_DEVICES=mlx5_0:1
# For Intel MPI: module load intel-mpi, and no TATARA_MPIRUN; its launcher is known by what it says of itself.
