# SPDX-License-Identifier: GPL-2.0-or-later
"""
Guests that run Linux, for the tools that show or test traffic.

To boot one in a machine within a machine takes two minutes, so it is booted
on the host, without privilege or network, and its state is put aside in a
file.  Each QEMU starts from a migration: the first one from that file.

What runs in the guest reads requests from its second serial port, a line
each, and writes an answer to each.  A number before the request comes back
before the answer.  The answer to "hello" is "ready".
"""

import hashlib
import os
import pathlib
import shutil
import socket
import subprocess
import time

from lib import common, initramfs
from lib.common import Failure, die_with_parent, wait_for

# The same for every QEMU, or the state of one does not fit another.
MACHINE = (
    '-nodefaults', '-no-user-config', '-display', 'none', '-no-reboot',
    '-machine', 'pc', '-accel', 'tcg', '-cpu', 'qemu64', '-m', '128')
APPEND = 'console=ttyS0 panic=-1 nokaslr mitigations=off tsc=reliable ' \
         'random.trust_cpu=on loglevel=5'

BOOT_LIMIT = 120
# A guest that was just migrated is slow until QEMU has translated its code.
ANSWER_LIMIT = 90


class Qemu:
    """
    A QEMU with the guest's machine and the network device NIC; its sockets
    are in DIRECTORY.  PREFIX is
    a command that runs it.
    """

    def __init__(self, name, directory, nic, *options, prefix=()):
        self.name = name
        self.directory = pathlib.Path(directory)
        self.log = self.path('log')
        self.monitor = None
        self.line = None
        self.received = b''
        self.asked = 0
        with open(self.log, 'wb') as log:
            self.process = subprocess.Popen(
                [*prefix, common.QEMU, '-name', f'guest-{name}', *MACHINE,
                 *initramfs.firmware_options(),
                 '-chardev', f'file,id=console,path={self.path("console")}',
                 '-serial', 'chardev:console',
                 '-chardev', f'socket,id=control,server=on,wait=off,'
                 f'path={self.path("control")}',
                 '-serial', 'chardev:control',
                 '-qmp', f'unix:{self.path("qmp")},server=on,wait=off',
                 '-device', nic, *options],
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


def make_state(kind, init, nic, append, extra, say, scratch):
    """
    Boot a guest unless its state is in build/KIND; return the path of that.
    INIT is its first program and EXTRA what its file system has besides, as
    in initramfs.make(), NIC its network device, APPEND what its kernel is told
    besides.  SAY is called with a text before it is booted; SCRATCH is a
    directory for the time of that.
    """
    if not shutil.which(common.QEMU):
        raise Failure(f"no QEMU at {common.QEMU}: run 'make qemu'")
    version, kernel = initramfs.find_kernel()
    initrd = initramfs.cached(kind, version, ('virtio_pci', 'virtio_net'),
                              init, extra)
    append = f'{APPEND} {append}'
    release = subprocess.run([common.QEMU, '--version'], stdout=subprocess.PIPE,
                             check=True).stdout
    key = hashlib.sha256(repr((release, initrd.name, MACHINE, nic,
                               append)).encode()).hexdigest()
    target = initrd.parent / f'guest-{key[:16]}.state'
    if not target.exists():
        say('booting the guest, once, to put its state aside')
        for old in target.parent.glob('guest-*.state'):
            old.unlink()
        boot(scratch, target, nic, '-kernel', str(kernel),
             '-initrd', str(initrd), '-append', append)
    return target


def boot(scratch, target, nic, *options):
    qemu = Qemu('boot', scratch, nic, '-netdev', 'hubport,id=n0,hubid=0',
                *options)
    part = target.with_suffix(f'.{os.getpid()}')
    try:
        qemu.connect()
        wait_for('the guest to boot', qemu.greeted, BOOT_LIMIT)
        qemu.migrate(f'file:{part}', BOOT_LIMIT)
        part.rename(target)
    finally:
        part.unlink(missing_ok=True)
        qemu.end()
