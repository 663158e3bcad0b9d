"""A real Slurm of two nodes on this machine: munge, MariaDB, slurmdbd, slurmctld, and two slurmd in their namespaces.

As root on Debian, without systemd. A node shares files and network with the machine, not its name nor its processes,
so that killing a node's first process is a power cut. `python -m tests.slurm.cluster` keeps one up to try things on.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from string import Template

HERE = Path(__file__).parent
PORT = 28817
PACKAGES = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
    "slurmdbd": "slurmdbd slurm-wlm-mysql-plugin",
    "mariadbd": "mariadb-server-core",
}
NODES = ("node1", "node2")


class Unavailable(Exception):
    """Why Slurm can't be started here."""


def install() -> None:
    """Install what is missing. Unavailable where that can't be done."""
    if os.geteuid() != 0:
        raise Unavailable("starting Slurm takes root")
    missing = " ".join(package for command, package in PACKAGES.items() if not shutil.which(command)).split()
    if not missing:
        return
    if not shutil.which("apt-get"):
        raise Unavailable("Slurm is installed by apt-get, which is not here")
    policy = Path("/usr/sbin/policy-rc.d")  # 101: packages may not start their services
    forbid = not policy.exists()
    if forbid:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        for words in (["update"], ["install", "-y", "--no-install-recommends", *missing]):
            environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
            done = subprocess.run(
                ["apt-get", "-qq", *words], env=environment, capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise Unavailable(f"apt-get {words[0]}: {done.stderr.strip().splitlines()[-1]}")
    finally:
        if forbid:
            policy.unlink()


class Cluster:
    """Nodes `node1` and `node2` of 8 CPUs and one pretended GPU each, partitions `main` and `urgent`, which preempts.

    `environment` is what a user's commands need to find it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self.small_disk = folder / "small"  # 300 MB
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Return when both nodes take jobs. Unavailable, with the daemon's last words, where one does not start."""
        self._unmount()
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in ("log", "state", "spool/node1", "spool/node2", "db", "small"):
            (self.folder / name).mkdir(parents=True)
        self._run_once("mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", str(self.small_disk))
        self._configure()
        self._start_munge()
        self._start_accounting()
        self._daemon("slurmctld", "slurmctld", "-D")
        self._until("slurmctld", lambda: "is UP" in self.run("scontrol", "ping"))
        for node in NODES:
            self.power_on(node)
        self._until("slurmctld", lambda: self.run("sinfo", "-h", "-o", "%t %D").split() == ["idle", "2"])

    def stop(self) -> None:
        """End every daemon, the last one started first."""
        for node in NODES:
            self.power_cut(node)
        for name, daemon in reversed(self._daemons.items()):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                print(f"{name} does not end")
                daemon.kill()
                daemon.wait()
        self._daemons.clear()
        self._unmount()

    def _unmount(self) -> None:
        subprocess.run(["umount", "--quiet", self.small_disk], check=False)

    def power_on(self, node: str) -> None:
        """Boot a node."""
        namespaces = ("--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
        self._daemon(node, "unshare", *namespaces, str(HERE / "node-init"), node, str(self.folder / "hosts"))

    def power_cut(self, node: str) -> None:
        """Kill the node's first process, and with it all of them, at once."""
        if node in self._daemons:
            daemon = self._daemons.pop(node)
            daemon.kill()  # --kill-child: its child is the node's first process
            daemon.wait()

    def run(self, *command: str) -> str:
        """What a command of Slurm prints; empty where it fails."""
        return subprocess.run(
            command, env=os.environ | self.environment, capture_output=True, text=True, check=False
        ).stdout

    def _configure(self) -> None:
        ports = {"port": PORT, "dbd_port": PORT - 1, "db_port": PORT - 2}
        ports |= {"node1_port": PORT + 1, "node2_port": PORT + 2}
        values = {"dir": self.folder, "host": socket.gethostname(), **ports}
        for name in ("slurm.conf", "slurmdbd.conf"):
            self._write(name, Template((HERE / name).read_text()).safe_substitute(values))
        self._write("hosts", f"127.0.0.1 localhost {socket.gethostname()}\n127.0.0.11 node1\n127.0.0.12 node2\n")
        self._write("gres.conf", f"NodeName=node[1-2] Name=gpu File={self.folder}/gpu0\n")
        self._write("plugstack.conf", "")
        os.mknod(self.folder / "gpu0", 0o20666, os.makedev(1, 3))  # what /dev/null is
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o600)

    def _write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o600 if name == "slurmdbd.conf" else 0o644)

    def _start_munge(self) -> None:
        files = {name: self.folder / f"munge.{name}" for name in ("socket", "pid", "log", "seed", "key")}
        options = [f"--{name}{'-file' * (name != 'socket')}={path}" for name, path in files.items()]
        self._daemon("munged", "munged", "--foreground", *options)
        self._until("munged", lambda: bool(self.run("munge", "--no-input", f"--socket={files['socket']}")))

    def _start_accounting(self) -> None:
        plain = ("--no-defaults", "--user=root", f"--datadir={self.folder}/db")
        sql = [Path("/usr/share/mysql", f"mysql_system_tables{part}.sql").read_text() for part in ("", "_data")]
        self._run_once(
            "mariadbd", *plain, "--bootstrap", given="\n".join(["CREATE DATABASE mysql;", "USE mysql;", *sql])
        )
        small = ("--innodb-buffer-pool-size=64M", "--innodb-lock-wait-timeout=900", "--skip-grant-tables")
        listen = ("--bind-address=127.0.0.1", f"--port={PORT - 2}", f"--socket={self.folder}/db.socket")
        self._daemon("mariadbd", "mariadbd", *plain, *small, *listen)
        self._until("mariadbd", (self.folder / "db.socket").exists)
        self._daemon("slurmdbd", "slurmdbd", "-D")
        self._until("slurmdbd", lambda: "Cluster" in self.run("sacctmgr", "show", "cluster"))
        self._run_once("sacctmgr", "--immediate", "add", "cluster", "lctrain")

    def _run_once(self, *command: str, given: str = "") -> None:
        environment = os.environ | self.environment
        done = subprocess.run(command, env=environment, input=given, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unavailable(f"{command[0]}: {(done.stdout + done.stderr).strip()[-500:]}")

    def _daemon(self, name: str, *command: str) -> None:
        """Runs until it is stopped, or until this process ends, however it ends."""
        with (self.folder / "log" / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig=KILL", *command],
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _until(self, name: str, ready: Callable[[], bool], seconds: float = 30) -> None:
        try:
            wait_for(ready, seconds, every=0.1, alive=lambda: self._daemons[name].poll() is None)
        except TimeoutError:
            said = (self.folder / "log" / f"{name}.out").read_text(errors="replace")
            raise Unavailable(f"{name} does not start: {said.strip()[-500:]}") from None


def wait_for(
    ready: Callable[[], bool], seconds: float, *, every: float = 0.2, alive: Callable[[], bool] = lambda: True
) -> None:
    """Return when `ready`; TimeoutError after so many seconds, or where it can't become so any more."""
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end or not alive():
            raise TimeoutError(f"not ready after {seconds} s")
        time.sleep(every)


if __name__ == "__main__":
    install()
    cluster = Cluster(Path("/tmp/slurm-lctrain"))
    cluster.start()
    input(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}\nEnter ends it ")
    cluster.stop()
