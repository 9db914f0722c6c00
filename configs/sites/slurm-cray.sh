# shellcheck shell=bash disable=SC1091
# A Cray with Slurm and Cray MPICH. Copy this file, put in your site's names, and submit:
#   scripts/submit.sh --site mine.sh --nodes 16 --ranks-per-node 2 --option '--account=… --qos=regular' …
# Jobs begin without `module` where the site's profile is read by login shells only.
[[ $(type -t module) == function ]] || . /etc/profile.d/modules.sh
module load PrgEnv-gnu cray-mpich cray-hdf5 # those that the program was built with
export TATARA_LAUNCHER=srun TATARA_SRUN_MPI=cray_shasta # older ones: pmi2; none where srun needs no --mpi
# With PBS in Slurm's place, ranks are started by PALS, whose mpiexec binds each to one core if it is let:
#   export TATARA_LAUNCHER_KIND=pals TATARA_MPIRUN='mpiexec --cpu-bind none'
