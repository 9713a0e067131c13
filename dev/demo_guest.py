# SPDX-License-Identifier: GPL-2.0-or-later
"""
The guest of the demonstration: a Linux that counts numbered UDP packets.

To boot it in a machine within a machine takes two minutes, so it is booted
on the host, without privilege or network, and its state is put aside in a
file.  Each QEMU of the demonstration starts from a migration: the first one
from that file.
"""

import ctypes
import hashlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import initramfs

sys.path.append(str(initramfs.ROOT / 'usr/lib/python3/dist-packages'))

DEMO = initramfs.BUILD / 'demo'
QEMU = os.environ.get('VM_QEMU') or \
    str(initramfs.BUILD / 'qemu/qemu-system-x86_64')
PROGRAM = DEMO / 'demo-packets'

GUEST_MAC, GUEST_ADDRESS = '52:54:00:00:00:02', '192.0.2.2'
HOST_MAC, HOST_ADDRESS = '52:54:00:00:00:01', '192.0.2.1'
PORT = 9000

# A permanent neighbour, so that no packet ever waits for an address.  The
# packets are polled for every 20 ms: an interrupt for each would take most of
# the time of a guest that is emulated by an emulated machine.
INIT = f'''#!/bin/sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for module in $(cat /lib/modules/order); do
    insmod /lib/modules/$module.ko
done
ip address add {GUEST_ADDRESS}/24 dev eth0
ip link set eth0 up
echo 1000000 > /sys/class/net/eth0/napi_defer_hard_irqs
echo 20000000 > /sys/class/net/eth0/gro_flush_timeout
arp -s {HOST_ADDRESS} {HOST_MAC}
exec demo-packets receive {PORT} /dev/ttyS1
'''

# The same for every QEMU, or the state of one does not fit another.
MACHINE = (
    '-nodefaults', '-no-user-config', '-display', 'none', '-no-reboot',
    '-machine', 'pc', '-accel', 'tcg', '-cpu', 'qemu64', '-m', '128')
# The guest is booted without vhost: it must not be offered what vhost lacks.
NIC = f'virtio-net-pci,id=nic,netdev=n0,mac={GUEST_MAC},romfile=,' \
      'queue_reset=off,rx_queue_size=1024'
APPEND = 'console=ttyS0 panic=-1 nokaslr mitigations=off tsc=reliable ' \
         'random.trust_cpu=on ipv6.disable=1 loglevel=5'

BOOT_LIMIT = 120
# A guest that was just migrated is slow until QEMU has translated its code.
ANSWER_LIMIT = 90


class Failure(Exception):
    """The demonstration could not run; the text says why."""


def wait_for(what, condition, limit, pause=0.2):
    """Poll until CONDITION() returns something, and return that.  A poll
    takes time of the machine that the guest lacks, so PAUSE in between."""
    end = time.monotonic() + limit
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() > end:
            raise Failure(f'waited {limit} s in vain for {what}')
        time.sleep(pause)


def die_with_parent(signum=signal.SIGKILL):
    """In a child: get SIGNUM when the parent ends, however it does."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signum)


class Qemu:
    """A QEMU with the guest's machine; its sockets are in DIRECTORY."""

    def __init__(self, name, directory, *options):
        self.name = name
        self.directory = pathlib.Path(directory)
        self.log = self.path('log')
        self.monitor = None
        self.line = None
        self.received = b''
        self.asked = 0
        with open(self.log, 'wb') as log:
            self.process = subprocess.Popen(
                [QEMU, '-name', f'demo-{name}', *MACHINE,
                 *initramfs.firmware_options(),
                 '-chardev', f'file,id=console,path={self.path("console")}',
                 '-serial', 'chardev:console',
                 '-chardev', f'socket,id=control,server=on,wait=off,'
                 f'path={self.path("control")}',
                 '-serial', 'chardev:control',
                 '-qmp', f'unix:{self.path("qmp")},server=on,wait=off',
                 '-device', NIC, *options],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                preexec_fn=die_with_parent)

    def path(self, kind):
        return self.directory / f'{self.name}.{kind}'

    def failure(self, text):
        said = ''
        for log in (self.log, self.path('console')):
            if log.exists():
                said += log.read_text(errors='replace')[-2000:]
        return Failure(f'{text}\n{said}'.rstrip())

    def alive(self):
        if self.process.poll() is not None:
            raise self.failure(f'QEMU {self.name} ended by itself')
        return True

    def connect(self):
        """Connect to the monitor and to the guest's second serial port."""
        # Not found before apt-other-suites has run.
        from qemu.qmp.legacy import QEMUMonitorProtocol

        for kind in ('qmp', 'control'):
            wait_for(f'the socket of {self.name}', lambda kind=kind:
                     self.alive() and self.path(kind).exists(), 60)
        self.monitor = QEMUMonitorProtocol(str(self.path('qmp')))
        self.monitor.connect()
        self.line = socket.socket(socket.AF_UNIX)
        self.line.connect(str(self.path('control')))

    def qmp(self, command, **arguments):
        from qemu.qmp import QMPError

        self.alive()
        try:
            return self.monitor.cmd(command, **arguments)
        except QMPError as err:
            raise self.failure(f'{command} on QEMU {self.name}: {err}'
                               ) from err

    def running(self):
        return self.alive() and self.qmp('query-status')['running']

    def ask(self, request, limit=ANSWER_LIMIT):
        """Send REQUEST to the program in the guest; return its answer."""
        # The number tells the answer from a late one to an earlier request.
        self.asked += 1
        end = time.monotonic() + limit
        try:
            self.line.sendall(f'{self.asked} {request}\n'.encode())
            while True:
                self.line.settimeout(max(end - time.monotonic(), 0.001))
                number, _, answer = self.read_line().partition(' ')
                if number == str(self.asked):
                    return answer
        except TimeoutError as err:
            raise self.failure(f'the guest of {self.name} did not answer '
                               f'"{request}" within {limit} s') from err

    def read_line(self):
        while b'\n' not in self.received:
            received = self.line.recv(100)
            if not received:
                raise self.failure(f'QEMU {self.name} hung up')
            self.received += received
        line, _, self.received = self.received.partition(b'\n')
        return line.decode(errors='replace').strip()

    def greeted(self):
        """Is the program in the guest there?"""
        try:
            return self.alive() and self.ask('hello', 1) == 'ready'
        except Failure:
            self.alive()
            return False

    def migrate(self, uri, limit):
        """Migrate to URI and return what the monitor says of it."""
        self.qmp('migrate', uri=uri)

        def done():
            info = self.qmp('query-migrate')
            if info['status'] in ('failed', 'cancelled'):
                raise self.failure(f'the migration of {self.name} failed: '
                                   + info.get('error-desc', ''))
            return info if info['status'] == 'completed' else None
        return wait_for(f'the migration of {self.name}', done, limit)

    def end(self):
        if self.monitor:
            try:
                self.monitor.close()
            except Exception:  # It may be gone already.
                pass
        if self.line:
            self.line.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def compile_program():
    source = initramfs.TOP / 'dev/demo-packets.c'
    DEMO.mkdir(parents=True, exist_ok=True)
    if PROGRAM.exists() and \
            PROGRAM.stat().st_mtime >= source.stat().st_mtime:
        return
    run = subprocess.run(['gcc', '-std=gnu11', '-static', '-O2', '-Wall',
                          '-o', PROGRAM, source], check=False)
    if run.returncode:
        raise Failure('cannot compile dev/demo-packets.c: install gcc and '
                      'libc6-dev')


def make_state(scratch, say):
    """Boot the guest unless its state is there; return the state's path."""
    if not shutil.which(QEMU):
        raise Failure(f"no QEMU at {QEMU}: run 'make qemu'")
    compile_program()
    version, kernel = initramfs.find_kernel()
    initrd = initramfs.cached('demo', version, ('virtio_pci', 'virtio_net'),
                              INIT, {'bin/demo-packets': PROGRAM.read_bytes()})
    release = subprocess.run([QEMU, '--version'], stdout=subprocess.PIPE,
                             check=True).stdout
    key = hashlib.sha256(repr((release, initrd.name, MACHINE, NIC,
                               APPEND)).encode()).hexdigest()
    target = DEMO / f'guest-{key[:16]}.state'
    if not target.exists():
        say('booting the guest, once, to put its state aside')
        for old in DEMO.glob('guest-*.state'):
            old.unlink()
        boot(scratch, kernel, initrd, target)
    return target


def boot(scratch, kernel, initrd, target):
    qemu = Qemu('boot', scratch, '-netdev', 'hubport,id=n0,hubid=0',
                '-kernel', str(kernel), '-initrd', str(initrd),
                '-append', APPEND)
    part = target.with_suffix(f'.{os.getpid()}')
    try:
        qemu.connect()
        wait_for('the guest to boot', qemu.greeted, BOOT_LIMIT)
        qemu.migrate(f'file:{part}', BOOT_LIMIT)
        part.rename(target)
    finally:
        part.unlink(missing_ok=True)
        qemu.end()
