# SPDX-License-Identifier: GPL-2.0-or-later
"""
Guests that run Linux, for the programs that show or test traffic.

To boot one in a machine within a machine takes two minutes, so it is booted
on the host, without privilege or network, and its state is put aside in a
file.  Each QEMU starts from a migration: the first one from that file.

A shell in the guest reads commands from its second serial port, a line each,
and writes what each prints, as one line.  A number before the command comes
back before the answer.  The answer to "hello" is "ready".
"""

import argparse
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

from lib import common, initramfs
from lib.common import TOP, Failure, die_with_parent, wait_for
from lib.qemu import Qemu

# The same for every QEMU, or the state of one does not fit another.
MACHINE = ('-no-reboot', '-machine', 'pc', '-accel', 'tcg', '-cpu', 'qemu64',
           '-m', '128')
APPEND = 'console=ttyS0 panic=-1 nokaslr mitigations=off tsc=reliable ' \
         'random.trust_cpu=on loglevel=5'

# The end of the guest's first program
ANSWER = '''exec < /dev/ttyS1 > /dev/ttyS1
stty raw -echo
hello() { echo ready; }
while read -r id request; do
    echo "$id" $(eval "$request" 2>&1)
done
'''

BOOT_LIMIT = 120
# For a machine that is busy.  A guest that was just migrated is slow until
# QEMU has translated its code.
LIMIT = 420


class Line:
    """The guest's second serial port, at PATH."""

    def __init__(self, name, path):
        self.name = name
        self.asked = 0
        self.received = b''
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))

    def ask(self, request, limit=LIMIT):
        """Return what the command REQUEST prints in the guest."""
        # The number tells the answer from a late one to an earlier request.
        self.asked += 1
        end = time.monotonic() + limit
        try:
            self.socket.sendall(f'{self.asked} {request}\n'.encode())
            while True:
                self.socket.settimeout(max(end - time.monotonic(), 0.001))
                number, _, answer = self.read_line().partition(' ')
                if number == str(self.asked):
                    return answer
        except TimeoutError as err:
            raise Failure(f'the guest of {self.name} did not answer '
                          f'"{request}" within {limit} s') from err

    def read_line(self):
        while b'\n' not in self.received:
            received = self.socket.recv(100)
            if not received:
                raise Failure(f'the QEMU of {self.name} hung up')
            self.received += received
        line, _, self.received = self.received.partition(b'\n')
        return line.decode(errors='replace').strip()

    def greeted(self):
        """Does the guest answer?"""
        try:
            return self.ask('hello', 1) == 'ready'
        except Failure:
            return False


class Guest(Qemu):
    """A QEMU with the guest's machine and the network device NIC."""

    def __init__(self, name, directory, nic, *options, **process_options):
        super().__init__(
            name, directory, *MACHINE, *initramfs.firmware_options(),
            '-chardev', f'file,id=console,path={directory}/{name}.console',
            '-serial', 'chardev:console',
            '-chardev', 'socket,id=control,server=on,wait=off,'
            f'path={directory}/{name}.control',
            '-serial', 'chardev:control', '-device', nic, *options,
            **process_options)
        self.connect()
        self.line = Line(name, self.path('control'))

    def said(self):
        console = self.path('console')
        return super().said() + (console.read_text(errors='replace')
                                 if console.exists() else '')

    def ask(self, request, limit=LIMIT):
        try:
            return self.line.ask(request, limit)
        except Failure as err:
            raise self.failure(err) from err

    def greeted(self):
        return self.alive() and self.line.greeted()

    def start(self, state):
        """Have the guest go on from the file STATE."""
        self.qmp('migrate-incoming', uri=f'file:{state}')
        wait_for(f'the guest to run in {self.name}', self.running, LIMIT)

    def await_status(self, *wanted):
        """Wait until the migration from here is in a state of WANTED."""
        def reached():
            info = self.qmp('query-migrate')
            status = info.get('status')
            if status in ('failed', 'cancelled', 'completed') and \
                    status not in wanted:
                raise self.failure(f'the migration of {self.name} is {status} '
                                   f'and not {wanted[0]}: '
                                   + info.get('error-desc', ''))
            return status in wanted
        wait_for(f'the migration of {self.name} to be {wanted[0]}', reached,
                 LIMIT)


def make_state(kind, init, nic, append, extra, say, scratch):
    """
    Boot a guest unless its state is in build/KIND; return the path of that.
    INIT is how its first program begins, and EXTRA what its file system has
    besides, as in initramfs.cached(), NIC its network device, APPEND what its
    kernel is told besides.  SAY is called with a text before it is booted;
    SCRATCH is a directory for the time of that.
    """
    if not shutil.which(common.QEMU):
        raise Failure(f"no QEMU at {common.QEMU}: run 'make qemu'")
    version, kernel = initramfs.find_kernel()
    initrd = initramfs.cached(kind, version, ('virtio_pci', 'virtio_net'),
                              init + ANSWER, extra)
    append = f'{APPEND} {append}'
    release = subprocess.run([common.QEMU, '--version'], check=True,
                             stdout=subprocess.PIPE).stdout
    key = hashlib.sha256(repr((release, initrd.name, MACHINE, nic,
                               append)).encode()).hexdigest()
    target = initrd.parent / f'guest-{key[:16]}.state'
    if target.exists():
        return target
    say('booting the guest, once, to put its state aside')
    for old in target.parent.glob('guest-*.state'):
        old.unlink(missing_ok=True)
    part = target.with_suffix(f'.{os.getpid()}')
    qemu = Guest('boot', scratch, nic, '-netdev', 'hubport,id=n0,hubid=0',
                 '-kernel', str(kernel), '-initrd', str(initrd),
                 '-append', append)
    try:
        wait_for('the guest to boot', qemu.greeted, BOOT_LIMIT)
        qemu.qmp('migrate', uri=f'file:{part}')
        qemu.await_status('completed')
        part.rename(target)
    finally:
        part.unlink(missing_ok=True)
        qemu.end()
    return target


def run_parts(parser, make, inside, timeout, kernels=(None,), host=False):
    """
    The main() of a program of two parts.  The one on the host has
    MAKE(scratch) boot the guest, and runs the program again in the test
    machine, on each of KERNELS; that part is INSIDE(options).

    With HOST the second part can also run on the host's kernel, where guests
    are ten times as fast, with options.vhost 'off'.
    """
    parser.add_argument('--inside', metavar='STATE', help=argparse.SUPPRESS)
    if host:
        parser.add_argument('--host', action='store_true', help="on the "
                            "host's kernel, with vhost=off")
    options = parser.parse_args()
    options.vhost = 'off' if host and options.host else 'on'
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if options.inside:
        return inside(options)
    try:
        with tempfile.TemporaryDirectory(prefix='guest-') as scratch:
            state = make(scratch)
    except (Failure, OSError) as err:
        print(f'{parser.prog}: {err}', file=sys.stderr)
        return 125
    if options.vhost == 'off':
        options.inside = state
        try:
            common.enter_namespace()
        except common.Skip as err:
            print(f'1..1\nok 1 - on the host # SKIP {err}')
            return 0
        return inside(options)
    status = 0
    for kernel in kernels:
        print(f'# starting the test machine, kernel {kernel or "6.1"}',
              flush=True)
        vm = subprocess.Popen(
            [TOP / 'dev/vm', '--timeout', str(timeout),
             *(['--kernel', kernel] if kernel else []), '--',
             os.path.abspath(sys.argv[0]), '--inside', state, *sys.argv[1:]],
            preexec_fn=lambda: die_with_parent(signal.SIGTERM))
        try:
            status = vm.wait() or status
        except KeyboardInterrupt:
            # The terminal told dev/vm as well.
            return vm.wait()
        finally:
            if vm.poll() is None:
                vm.terminate()
                vm.wait()
    return status
