# SPDX-License-Identifier: GPL-2.0-or-later
"""
The benchmark's rig: a network namespace, TAPs, QEMUs, and the programs of
main.c that send to them and receive from them.

Nothing of a guest runs: the firmware is a HLT.  It is there because the
netdev needs a NIC, for its virtio-net header and to be running.  As with
vhost somebody else reads the TAP: it has two queues, QEMU has the first one,
and a BPF program steers all packets to the second one, which is ours.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import pathlib
import re
import select
import struct
import subprocess
import time

from lib import common, qemu
from lib.common import BUILD, TOP, Failure, libc, run

BENCH = BUILD / 'bench'
TRAFFIC = BENCH / 'traffic'

SYS_BPF = {'x86_64': 321, 'aarch64': 280}
TUNSETIFF = 0x400454ca
TUNSETOFFLOAD = 0x400454d0
TUNSETSTEERINGEBPF = 0x800454e0
TUN_F_CSUM_TSO = 0x1 | 0x2 | 0x4
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_MULTI_QUEUE = 0x2, 0x1000, 0x4000, 0x100

SENDER_CPU, RECEIVER_CPU = 0, 1
START_LIMIT = 20


class Mismatch(Failure):
    """The numbers of a run do not add up."""


def wait_for(what, condition):
    return common.wait_for(what, condition, START_LIMIT, 0.002)


def enter_namespace():
    if os.geteuid() != 0:
        raise Failure('the benchmark makes a network namespace, TAPs and '
                      'packet sockets: run it as root')
    common.enter_namespace()


def compile_programs():
    sources = sorted((TOP / 'dev' / 'bench').glob('*.c'))
    newest = max(path.stat().st_mtime for path in
                 (*sources, TOP / 'dev' / 'bench' / 'traffic.h'))
    if TRAFFIC.exists() and TRAFFIC.stat().st_mtime >= newest:
        return
    BENCH.mkdir(parents=True, exist_ok=True)
    run('gcc', '-std=c11', '-O2', '-Wall', '-Wextra', '-o', TRAFFIC, *sources)


def cpu_ns(pid):
    """The processor time of all threads of a process."""
    total = 0
    for path in pathlib.Path(f'/proc/{pid}/task').glob('*/schedstat'):
        with contextlib.suppress(OSError):
            total += int(path.read_text().split()[0])
    return total


def steering_program():
    """A BPF program that picks the second queue."""
    # mov64 r0, 1; exit
    code = struct.pack('<BBhiBBhi', 0xb7, 0, 0, 1, 0x95, 0, 0, 0)
    code = ctypes.create_string_buffer(code, len(code))
    license_text = ctypes.create_string_buffer(b'GPL')
    attr = struct.pack('<IIQQ', 1, 2, ctypes.addressof(code),
                       ctypes.addressof(license_text)).ljust(128, b'\0')
    attr = ctypes.create_string_buffer(attr, len(attr))
    fd = libc.syscall(SYS_BPF[os.uname().machine], 5, attr, 128)
    if fd < 0:
        raise Failure('the kernel takes no BPF program: '
                      + os.strerror(ctypes.get_errno()))
    return fd


class Tap:
    """
    A TAP.  With STEER what is sent to it goes to the queue READER, that is
    ours; else to the queue QEMU.
    """

    def __init__(self, name, steer=True):
        self.name = name
        self.qemu = self.open_queue(steer)
        self.reader = self.open_queue(steer) if steer else None
        if steer:
            program = steering_program()
            fcntl.ioctl(self.reader, TUNSETSTEERINGEBPF,
                        struct.pack('i', program))
            os.close(program)
        run('ip', 'link', 'set', name, 'up')

    def open_queue(self, several):
        fd = os.open('/dev/net/tun', os.O_RDWR | os.O_NONBLOCK)
        flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | \
            (IFF_MULTI_QUEUE if several else 0)
        fcntl.ioctl(fd, TUNSETIFF,
                    struct.pack('16sH22x', self.name.encode(), flags))
        return fd

    def offload(self):
        """Let GSO frames come whole; QEMU resets this when it starts."""
        fcntl.ioctl(self.qemu, TUNSETOFFLOAD, TUN_F_CSUM_TSO)

    def statistic(self, name):
        return common.interface_statistics(self.name)[name]


class Program:
    """One of the programs of main.c."""

    def __init__(self, name, targets, fds=(), **options):
        self.name = name
        self.process = subprocess.Popen(
            [TRAFFIC, name, *(f'{k}={v}' for k, v in options.items()),
             *map(str, targets)], text=True, pass_fds=fds,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE)

    def read_line(self, limit=30):
        if not select.select([self.process.stdout], [], [], limit)[0]:
            self.process.kill()
            raise Failure(f'traffic {self.name} said nothing for {limit} s')
        line = self.process.stdout.readline()
        if not line:
            raise Failure(self.process.communicate()[1].strip()
                          or f'traffic {self.name} ended by itself')
        return line

    def ready(self):
        if self.read_line() != 'ready\n':
            raise Failure(f'traffic {self.name} is not ready')
        return self

    def tell(self, sent):
        self.process.stdin.write(f'{sent}\n')
        self.process.stdin.flush()

    def result(self, limit=30):
        return json.loads(self.read_line(limit))

    def close(self):
        """A program that was cut short is not waited for."""
        for stream in (self.process.stdin, self.process.stdout,
                       self.process.stderr):
            with contextlib.suppress(OSError):
                stream.close()
        try:
            self.process.wait(0.5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Qemu(qemu.Qemu):
    """A QEMU with one NIC for each of TAPS."""

    ANSWER_LIMIT = START_LIMIT
    VHOST = 'off'
    NIC = ''

    def machine(self, _):
        # The PIT would wake QEMU 36 times a second.
        return ['-machine', 'pc,pit=off,hpet=off', '-accel', 'tcg']

    def __init__(self, name, binary, directory, taps, options=(),
                 socket_env=False, fds=()):
        self.taps = taps
        rom = pathlib.Path(directory, 'hlt.rom')
        # At the reset vector: cli; hlt; jmp to the hlt.
        rom.write_bytes(bytes(0xfff0) + b'\xfa\xf4\xeb\xfd' + bytes(12))
        command = ['-m', '16', '-bios', str(rom),
                   *self.machine(pathlib.Path(directory, name))]
        for i, tap in enumerate(taps):
            command += [
                '-netdev', f'tap,id=n{i},fd={tap.qemu},vhost={self.VHOST}',
                '-device', f'virtio-net-pci,netdev=n{i},romfile=,'
                f'multifunction=on,addr={3 + i // 8:#x}.{i % 8}{self.NIC}']
        env = dict(os.environ,
                   **({'BENCH_PACKET_SOCKET': '1'} if socket_env else {}))
        super().__init__(name, directory, *command, *options, program=binary,
                         pass_fds=[*(tap.qemu for tap in taps), *fds],
                         env=env)
        self.connect(START_LIMIT)
        for tap in taps:
            tap.offload()

    def counters(self, name):
        """The numbers of packets that an object shows."""
        path = f'/objects/{name}'
        return {entry['name']: self.get(name, entry['name'])
                for entry in self.qmp('qom-list', path=path)
                if re.match('(capture|inject)-', entry['name'])
                and entry['type'] == 'uint64'}

    def cpu_ns(self):
        return cpu_ns(self.process.pid)

    def settle(self):
        """Wait until QEMU has nothing to do any more."""
        before = self.cpu_ns()
        for _ in range(100):
            time.sleep(0.003)
            now = self.cpu_ns()
            if now - before < 50000:
                break
            before = now


def environment():
    """Where the numbers come from."""
    cpuinfo = pathlib.Path('/proc/cpuinfo').read_text()
    model = re.search(r'model name\s*: (.*)', cpuinfo)
    return (f'Linux {os.uname().release}, {os.cpu_count()} CPUs '
            f'({model[1] if model else os.uname().machine}), '
            f'{time.strftime("%Y-%m-%d")}')
