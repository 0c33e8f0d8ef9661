"""dnsmasq as the DNS server of one name, on a port of its own. Needs no root, also to install."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

NAME = "vit.test"
# What kubeadm's CoreDNS says of a headless service. gRPC does not look at it.
TTL = 30


class DnsError(Exception):
    """dnsmasq cannot be installed or does not start; the message is for the person."""


class Dns:
    """A running dnsmasq."""

    def __init__(self, process: "subprocess.Popen[str]", port: int, hosts: Path) -> None:
        self.authority = f"127.0.0.1:{port}"
        self._process = process
        self._hosts = hosts

    def publish(self, addresses: Iterable[str]) -> None:
        """From now on the name has these addresses."""
        self._hosts.write_text("".join(f"{address} {NAME}\n" for address in addresses))
        self._process.send_signal(signal.SIGHUP)
        self.wait_for("read ")

    def wait_for(self, words: str) -> None:
        """Return when dnsmasq's log says so."""
        said = []
        for line in self._process.stderr or ():
            if words in line:
                return
            said.append(line)
        raise DnsError("dnsmasq ended: " + "".join(said))


@contextlib.contextmanager
def serving() -> Iterator[Dns]:
    """dnsmasq on loopback, with no address for the name yet."""
    binary, env = install()
    with tempfile.TemporaryDirectory() as folder:
        hosts = Path(folder) / "hosts"
        hosts.touch()
        port = _free_port()
        command = [binary, "--keep-in-foreground", "--conf-file=/dev/null", "--log-facility=-"]
        command += [f"--port={port}", "--listen-address=127.0.0.1", "--bind-interfaces"]
        command += ["--no-resolv", "--no-hosts", f"--addn-hosts={hosts}", f"--local-ttl={TTL}"]
        # The user it runs as: who started it. It has no upstream to ask about other names.
        command += ["--user=", "--pid-file", f"--local=/{NAME.rpartition('.')[2]}/"]
        with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
            try:
                dns = Dns(process, port, hosts)
                dns.wait_for("read ")
                yield dns
            finally:
                process.terminate()


def install() -> tuple[Path, dict[str, str]]:
    """dnsmasq and the environment for it: the machine's own, or Debian's package unpacked in this
    virtual environment.

    Raises:
        DnsError: there is none, and apt cannot fetch it.
    """
    if own := shutil.which("dnsmasq", path=f"{os.environ.get('PATH', '')}:/usr/sbin"):
        return Path(own), dict(os.environ)
    root = Path(sys.prefix) / "dnsmasq"
    if not root.is_dir():
        if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
            raise DnsError("no dnsmasq, and no apt to fetch it with: install dnsmasq")
        with tempfile.TemporaryDirectory(dir=sys.prefix) as folder:
            unpacked = _unpack("dnsmasq-base", Path(folder))
            with contextlib.suppress(FileExistsError):
                unpacked.rename(root)
    libraries = ":".join(str(path) for path in (root / "usr" / "lib").glob("*-linux-gnu"))
    return root / "usr" / "sbin" / "dnsmasq", {**os.environ, "LD_LIBRARY_PATH": libraries}


def _unpack(package: str, folder: Path) -> Path:
    """A Debian package, with the libraries that this machine lacks, unpacked in a folder."""
    # Lists, cache and locks of its own: those of the system belong to root, and may be empty.
    options = {
        "Dir::State::Lists": folder / "lists",
        "Dir::Cache": folder,
        "Dir::Cache::archives": folder / "archives",
        "Debug::NoLocking": 1,
        "APT::Sandbox::User": "",
        "Acquire::Languages": "none",
    }
    for name in ("lists", "archives"):
        (folder / name / "partial").mkdir(parents=True)
    apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in options.items())]
    download = ["install", "--yes", "--no-install-recommends", "--download-only", package]
    for arguments in (["update"], download):
        done = subprocess.run([*apt, *arguments], capture_output=True, text=True)
        if done.returncode != 0:
            raise DnsError(f"no dnsmasq, and apt-get cannot fetch it: {done.stderr.strip()}")
    for archive in (folder / "archives").glob("*.deb"):
        subprocess.run(["dpkg-deb", "--extract", archive, folder / "root"], check=True)
    return folder / "root"


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
