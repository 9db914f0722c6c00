"""A Slurm cluster of several nodes on this machine, for tests.

    with Cluster() as cluster:
        job = cluster.command("sbatch", "--parsable", "script").strip()

Each node is a slurmd with its own hostname, /etc/hosts and /dev/shm. All that is written lies in one temporary folder,
all sockets are bound to loopback, and every process is ended by its id. A node's processes are found by the UTS
namespace that gives the node its name, so that what outlives its slurmd is found, too. Needs root.
"""
import contextlib
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time

PROGRAMS = ["munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "unshare"]
CONF = """
ClusterName=tatara
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
TmpFS={folder}/tmp/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=pmix
ReturnToService=2
KillWait=5
SlurmdTimeout=6
SlurmctldTimeout=10
MessageTimeout=5
KillOnBadExit=1
JobRequeue=1
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
NodeName={names} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports} CPUs=4 RealMemory=2000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
# Several nodes on one machine talk over loopback; nothing else of Open MPI's choice is changed.
MPI = {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl_tcp_if_include": "lo", "OMPI_MCA_oob_tcp_if_include": "lo",
       "PMIX_MCA_ptl_tcp_if_include": "lo", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
       "OMPI_MCA_mpi_yield_when_idle": "1", "OMP_WAIT_POLICY": "passive"}


def missing():
    """Why no cluster can be started here, or None."""
    lacking = [program for program in PROGRAMS if not find(program)]
    if lacking:
        return f"not installed: {' '.join(lacking)} (scripts/install.sh slurm)"
    if os.geteuid() != 0:
        return "a Slurm of several nodes on one machine needs root"
    tried = subprocess.run(["unshare", "--uts", "--mount", "--propagation", "private", "mount", "-t", "tmpfs", "none",
                            "/dev/shm"], capture_output=True, text=True, check=False, timeout=20)
    return f"unshare is not permitted: {tried.stderr.strip()}" if tried.returncode != 0 else None


def find(program):
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def free_ports(n):
    """n ports that were free a moment ago."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def wait_for(what, condition, timeout):
    """Polls until the condition holds, and returns its value."""
    end = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {timeout} s")
        time.sleep(0.1)


class Node:
    """A slurmd, and what runs on it."""

    def __init__(self, name):
        self.name, self.slurmd, self.namespace, self.inode = name, None, None, None

    def processes(self):
        """Ids of the processes of this node."""
        return [] if self.inode is None else [pid for pid in all_processes() if uts_inode(pid) == self.inode]

    def release(self):
        if self.namespace is not None:
            os.close(self.namespace)
        self.namespace = self.inode = None


def all_processes():
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def uts_inode(pid):
    try:
        return os.stat(f"/proc/{pid}/ns/uts").st_ino
    except OSError:
        return None


def command_line(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").replace("\0", " ").strip()
    except OSError:
        return ""


def send(pid, number):
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass  # it has ended


class Cluster:
    """A running Slurm; to be used in `with`."""

    def __init__(self, nodes=4):
        self.temporary = tempfile.TemporaryDirectory(prefix="tatara-slurm-", ignore_cleanup_errors=True)
        self.folder = pathlib.Path(self.temporary.name)
        self.nodes = {f"node{i + 1}": Node(f"node{i + 1}") for i in range(nodes)}
        self.daemons = []
        self.environment = {**os.environ, **MPI, "SLURM_CONF": str(self.folder / "slurm.conf")}
        for name in list(self.environment):
            if name.startswith(("SLURM_", "SBATCH_", "SRUN_")) and name != "SLURM_CONF":
                del self.environment[name]

    def __enter__(self):
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_):
        self.stop()

    def start(self):
        for name in ["munge", "state", "log", "etc"]:
            (self.folder / name).mkdir(mode=0o755)
        for kind in ["spool", "tmp"]:
            for name in self.nodes:
                (self.folder / kind / name).mkdir(parents=True)
        self.folder.chmod(0o755)  # munged wants its socket to be reachable
        key = self.folder / "munge/key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        hosts = "127.0.0.1 localhost\n" + "".join(f"127.0.0.1 {name}\n" for name in self.nodes)
        (self.folder / "etc/hosts").write_text(hosts)
        controller, *ports = free_ports(1 + len(self.nodes))
        conf = CONF.format(folder=self.folder, controller_port=controller, names=",".join(self.nodes),
                           ports=",".join(map(str, ports)))
        (self.folder / "slurm.conf").write_text(conf)
        munge = self.folder / "munge"
        self.daemon("munged", "--foreground", "--force", f"--socket={munge}/socket", f"--key-file={key}",
                    f"--log-file={munge}/log", f"--pid-file={munge}/pid", f"--seed-file={munge}/seed",
                    "--origin=127.0.0.1")
        wait_for("munged", (munge / "socket").exists, 20)
        self.daemon("slurmctld", "-D", "-c", "-f", self.environment["SLURM_CONF"])
        for name in self.nodes:
            self.power_on(name)
        wait_for("idle nodes", lambda: self.states() == dict.fromkeys(self.nodes, "idle"), 60)

    def daemon(self, program, *words):
        with open(self.folder / f"log/{program}.out", "ab") as output:
            process = subprocess.Popen([find(program), *words], stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                       env=self.environment, start_new_session=True)
        self.daemons.append(process)
        return process

    def power_on(self, name):
        """Starts a node, with nothing left of what ran on it before."""
        node = self.nodes[name]
        node.release()
        script = ('hostname "$1"; mount --bind "$2/etc/hosts" /etc/hosts; mount -t tmpfs shm /dev/shm; '
                  'exec "$3" -D -N "$1" -f "$2/slurm.conf"')
        node.slurmd = self.daemon("unshare", "--uts", "--mount", "--propagation", "private", "sh", "-e", "-c", script,
                                  "sh", name, str(self.folder), find("slurmd"))
        own = uts_inode(os.getpid())
        wait_for(f"{name}'s namespace", lambda: uts_inode(node.slurmd.pid) not in (own, None), 20)
        # An open descriptor keeps the number from being given to another namespace.
        node.namespace = os.open(f"/proc/{node.slurmd.pid}/ns/uts", os.O_RDONLY)
        node.inode = os.fstat(node.namespace).st_ino

    def power_cut(self, name):
        """Ends all that runs on a node, at once."""
        node = self.nodes[name]
        for number in [signal.SIGSTOP, signal.SIGKILL]:
            for pid in node.processes():
                send(pid, number)
        wait_for(f"the end of {name}", lambda: (node.slurmd.poll() is not None) and not self.alive(node), 20)

    @staticmethod
    def alive(node):
        return [pid for pid in node.processes() if command_line(pid)]  # a zombie has no command line

    def kill_slurmd(self, name):
        """Ends a node's slurmd; its jobs go on, unknown to Slurm."""
        self.nodes[name].slurmd.kill()
        self.nodes[name].slurmd.wait()

    def ranks(self, name, program):
        """Ids of the processes on a node whose program is this one."""
        found = []
        for pid in self.nodes[name].processes():
            words = command_line(pid).split(" ")
            if words[0] == str(program):
                found.append(pid)
        return found

    def stop(self):
        for node in self.nodes.values():
            if node.inode is not None:
                self.power_cut(node.name)
            node.release()
        for process in reversed(self.daemons):
            process.kill()
            process.wait()
        self.daemons.clear()
        self.temporary.cleanup()

    def command(self, *words, check=True, timeout=60, **more):
        """Runs a Slurm command, or another that calls one; returns what it prints."""
        environment = {**self.environment, **more.pop("environment", {})}
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False,
                              timeout=timeout, env=environment, **more)
        if check and done.returncode != 0:
            raise AssertionError(f"{' '.join(map(str, words))}: status {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def states(self):
        """The state of each node, as sinfo says it."""
        lines = self.command("sinfo", "-h", "-N", "-o", "%N %T", check=False).splitlines()
        return dict(line.split() for line in lines)

    def job(self, job):
        """What scontrol knows of a job, by name; {} when it knows nothing any more."""
        text = self.command("scontrol", "-o", "show", "job", job, check=False).splitlines()
        return dict(re.findall(r"(\w+)=(\S*)", text[0])) if text else {}

    def steps(self, job):
        """Ids of the processes that watch over a job's steps, on nodes whose slurmd lives."""
        alive = [node for node in self.nodes.values() if node.slurmd.poll() is None]
        return [pid for node in alive for pid in node.processes()
                if re.match(rf"slurmstepd: \[{job}[.\]]", command_line(pid))]

    def queue(self):
        """Ids of the jobs that run or wait."""
        return self.command("squeue", "-h", "-a", "-o", "%A").split()

    def queue_running(self):
        """Ids of the jobs that run; JOB_TASK in an array, where JOB names all its jobs."""
        return self.command("squeue", "-h", "-a", "-t", "R", "-o", "%i").split()

    def hurry(self, job):
        """Lets a requeued job start now: Slurm itself waits for two minutes."""
        self.command("scontrol", "update", f"jobid={job}", "StartTime=now", check=False)
