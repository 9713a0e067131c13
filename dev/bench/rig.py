# SPDX-License-Identifier: GPL-2.0-or-later
"""
The benchmark's rig: a network namespace, TAPs, sockets, QEMUs, and the
programs of traffic.c that send to them and receive from them.

Nothing of a guest runs: the firmware is a HLT.  It is there because the
netdev needs a NIC, for its virtio-net header and to be running.  As with
vhost somebody else reads the TAP: it has two queues, QEMU has the first one,
which is detached, so that all packets come to the second one, which is ours.
"""

import contextlib
import fcntl
import itertools
import json
import os
import pathlib
import re
import socket
import struct
import subprocess
import time

from lib import common, qemu
from lib.common import BUILD, TOP, Failure, die_with_parent, run

BENCH = BUILD / 'bench'
TRAFFIC = BENCH / 'traffic'
SOURCE = TOP / 'dev/bench/traffic.c'

TUNSETIFF = 0x400454ca
TUNSETOFFLOAD = 0x400454d0
TUNSETQUEUE = 0x400454d9
TUN_F_CSUM_TSO = 0x1 | 0x2 | 0x4
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_MULTI_QUEUE = 0x2, 0x1000, 0x4000, 0x100
IFF_DETACH_QUEUE = 0x400

# Of the kernel's headers; Python has no names for them.
SOL_PACKET, PACKET_STATISTICS, PACKET_VNET_HDR = 263, 6, 15
PACKET_QDISC_BYPASS = 20
SO_RCVBUFFORCE = 33
ETH_P_ALL = 3

# Where the programs run; "capture" is a contestant, and free to choose.
CPUS = {'send': 0, 'write': 0, 'read': 1, 'tap': 1}
START_LIMIT, TRIAL_LIMIT = 20, 120


class Mismatch(Failure):
    """What came is not what was sent."""


def wait_for(what, condition):
    return common.wait_for(what, condition, START_LIMIT, 0.002)


def enter_namespace():
    if os.geteuid() != 0:
        raise Failure('the benchmark makes a network namespace, TAPs and '
                      'packet sockets: run it as root')
    common.enter_namespace()


def compile_traffic():
    if not TRAFFIC.exists() or \
            TRAFFIC.stat().st_mtime < SOURCE.stat().st_mtime:
        BENCH.mkdir(parents=True, exist_ok=True)
        run('gcc', '-std=c11', '-O2', '-Wall', '-Wextra', '-o', TRAFFIC,
            SOURCE)


def cpu_ns(pid):
    """The processor time of all threads of a process."""
    total = 0
    for path in pathlib.Path(f'/proc/{pid}/task').glob('*/schedstat'):
        with contextlib.suppress(OSError):
            total += int(path.read_text().split()[0])
    return total


class Tap:
    """
    A TAP.  With STEER what is sent to it goes to the queue READER, that is
    ours; else to the queue QEMU.
    """

    numbers = itertools.count()

    def __init__(self, steer=True):
        self.name = f'tap{next(self.numbers)}'
        self.qemu = self.open_queue(steer)
        self.reader = self.open_queue(steer) if steer else None
        if steer:
            fcntl.ioctl(self.qemu, TUNSETQUEUE,
                        struct.pack('16xH22x', IFF_DETACH_QUEUE))
        run('ip', 'link', 'set', self.name, 'up')

    def open_queue(self, several):
        queue = open('/dev/net/tun', 'r+b', buffering=0)
        os.set_blocking(queue.fileno(), False)
        flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | \
            (IFF_MULTI_QUEUE if several else 0)
        fcntl.ioctl(queue, TUNSETIFF,
                    struct.pack('16sH22x', self.name.encode(), flags))
        return queue

    def offload(self):
        """Let GSO frames come whole; QEMU resets this when it starts."""
        fcntl.ioctl(self.qemu, TUNSETOFFLOAD, TUN_F_CSUM_TSO)

    def tx_dropped(self):
        return common.tx_dropped(self.name)


def connect(path):
    peer = socket.socket(socket.AF_UNIX)
    peer.connect(str(path))
    return peer


def packet_socket(name, protocol=0, bypass=False):
    """One on the interface NAME; with the protocol 0 it receives nothing."""
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    sock.setsockopt(SOL_PACKET, PACKET_VNET_HDR, True)
    sock.setsockopt(SOL_PACKET, PACKET_QDISC_BYPASS, bypass)
    sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 2 << 20)
    sock.bind((name, protocol))
    return sock


def packet_socket_drops(sock):
    """Since it was asked before"""
    return struct.unpack('II', sock.getsockopt(
        SOL_PACKET, PACKET_STATISTICS, 8))[1]


@contextlib.contextmanager
def all_closed(sockets):
    """Yields SOCKETS, and closes them in the end."""
    try:
        yield sockets
    finally:
        for sock in sockets:
            sock.close()


class Program:
    """One of the programs of traffic.c, with FILES and a Load."""

    def __init__(self, name, files, load):
        self.name = name
        fds = [file.fileno() for file in files]
        self.process = subprocess.Popen(
            [TRAFFIC, name, *map(str, fds)], text=True, pass_fds=fds,
            env={key: str(value) for key, value in vars(load).items()},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, preexec_fn=self.prepare)

    def prepare(self):
        die_with_parent()
        if self.name in CPUS:
            os.sched_setaffinity(0, {CPUS[self.name]})

    def ready(self):
        """A receiver is, before something is sent."""
        if self.process.stdout.readline() != 'ready\n':
            raise Failure(self.process.communicate()[1].strip())
        return self

    def result(self, sent=''):
        """A receiver has to be told how many frames were sent."""
        said, error = self.process.communicate(f'{sent}\n', TRIAL_LIMIT)
        if self.process.returncode:
            raise Mismatch(error.strip())
        return json.loads(said)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()


class Qemu(qemu.Qemu):
    """A QEMU with one NIC for each of TAPS."""

    ANSWER_LIMIT = START_LIMIT
    VHOST = 'off'
    NIC = ''

    # The PIT would wake QEMU 36 times a second.
    MACHINE = 'pc,pit=off,hpet=off'

    def machine(self, _):
        return ['-machine', self.MACHINE, '-accel', 'tcg']

    def __init__(self, name, binary, directory, taps, options, sock=None):
        rom = pathlib.Path(directory, 'hlt.rom')
        # At the reset vector: cli; hlt; jmp to the hlt.
        rom.write_bytes(bytes(0xfff0) + b'\xfa\xf4\xeb\xfd' + bytes(12))
        command = ['-m', '16', '-bios', str(rom),
                   *self.machine(pathlib.Path(directory, name))]
        fds = [tap.qemu.fileno() for tap in taps]
        for i, fd in enumerate(fds):
            command += [
                '-netdev', f'tap,id=n{i},fd={fd},vhost={self.VHOST}',
                '-device', f'virtio-net-pci,netdev=n{i},romfile=,'
                f'multifunction=on,addr={3 + i // 8:#x}.{i % 8}{self.NIC}']
        env = dict(os.environ)
        if sock:
            fds.append(sock.fileno())
            env['BENCH_CAPTURE_SOCKET'] = str(fds[-1])
        super().__init__(name, directory, *command, *options, program=binary,
                         pass_fds=fds, env=env)
        self.connect(START_LIMIT)
        for tap in taps:
            tap.offload()

    def cpu_ns(self):
        return cpu_ns(self.process.pid)


def environment():
    """Where the numbers come from."""
    cpuinfo = pathlib.Path('/proc/cpuinfo').read_text()
    model = re.search(r'model name\s*: (.*)', cpuinfo)
    return (f'Linux {os.uname().release}, {os.cpu_count()} CPUs '
            f'({model[1] if model else os.uname().machine}), '
            f'{time.strftime("%Y-%m-%d")}')
