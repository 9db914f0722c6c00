# shellcheck shell=bash disable=SC1091
# A Slurm cluster with GPUs whose srun has PMIx. Copy this file, put in your site's names, and submit with one rank a GPU:
#   scripts/submit.sh --site mine.sh --nodes 16 --ranks-per-node 8 --option '--partition=gpu --gpus-per-node=8' …
# Jobs begin without `module` where the site's profile is read by login shells only.
[[ $(type -t module) == function ]] || . /etc/profile.d/modules.sh
module purge
module load gcc/12 openmpi/5.0 hdf5/1.14 cuda/12 nccl # those that the program was built with
export TATARA_LAUNCHER=srun TATARA_SRUN_MPI=pmix # srun --mpi=list names what there is
export NCCL_SOCKET_IFNAME=ib0 # NCCL's and MPI's first contact, by the fast network
export OMPI_MCA_btl_tcp_if_include=ib0
