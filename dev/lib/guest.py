# SPDX-License-Identifier: GPL-2.0-or-later
"""
The guest of the programs that show or test traffic.  It runs Linux.

To boot it in a machine within a machine takes two minutes, so it is booted
on the host, without privilege or network, and its state is put aside in a
file.  Each QEMU starts from a migration: the first one from that file.

A shell in the guest reads commands from its second serial port, a line each,
and writes what each prints, as one line.  A number before the command comes
back before the answer.  The answer to "hello" is "ready".  The guest sends
back what it gets on the TCP port PORT.
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

GUEST_MAC, GUEST_ADDRESS = '52:54:00:00:00:02', '192.0.2.2'
HOST_MAC, HOST_ADDRESS = '52:54:00:00:00:01', '192.0.2.1'
PORT = 7

# The guest is booted without vhost: it must not be offered what vhost lacks.
NIC = f'virtio-net-pci,id=nic,netdev=n0,mac={GUEST_MAC},romfile=,' \
      'queue_reset=off,rx_queue_size=1024'

# A permanent neighbour, so that no packet ever waits for an address.  The
# packets are polled for every 20 ms: an interrupt for each would take most of
# the time of a guest that is emulated by an emulated machine.  A backlog of
# replies needs room.
INIT = f'''echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6
for module in $(cat /lib/modules/order); do
    insmod /lib/modules/$module.ko
done
ip address add {GUEST_ADDRESS}/24 dev eth0
ip link set eth0 up
echo 30000 > /sys/class/net/eth0/tx_queue_len
echo 1000000 > /sys/class/net/eth0/napi_defer_hard_irqs
echo 20000000 > /sys/class/net/eth0/gro_flush_timeout
arp -s {HOST_ADDRESS} {HOST_MAC}
nc -ll -p {PORT} -e cat > /dev/null 2>&1 &
exec < /dev/ttyS1 > /dev/ttyS1
stty raw -echo
hello() {{ echo ready; }}
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
    """A QEMU with the guest's machine and a NIC, whose netdev is n0."""

    def __init__(self, name, directory, *options, nic=NIC):
        super().__init__(
            name, directory, *MACHINE, *initramfs.firmware_options(),
            '-chardev', f'file,id=console,path={directory}/{name}.console',
            '-serial', 'chardev:console',
            '-chardev', 'socket,id=control,server=on,wait=off,'
            f'path={directory}/{name}.control',
            '-serial', 'chardev:control', '-device', nic, *options)
        self.connect()
        self.line = Line(name, self.path('control'))

    def said(self):
        console = self.path('console')
        return super().said() + (console.read_text(errors='replace')
                                 if console.exists() else '')

    def ask(self, request):
        try:
            return self.line.ask(request)
        except Failure as err:
            raise self.failure(err) from err

    def greeted(self):
        return self.alive() and self.line.greeted()

    def start(self, state):
        """Have the guest go on from the file STATE."""
        self.qmp('migrate-incoming', uri=f'file:{state}')
        wait_for(f'the guest to run in {self.name}', self.running, LIMIT)

    def await_completed(self):
        """Wait until the migration from here has completed."""
        def completed():
            info = self.qmp('query-migrate')
            if info.get('status') in ('failed', 'cancelled'):
                raise self.failure(f'the migration of {self.name}: {info}')
            return info.get('status') == 'completed'
        wait_for(f'the migration of {self.name}', completed, LIMIT)


def make_state():
    """Boot the guest unless its state is there; return the state's path."""
    if not shutil.which(common.QEMU):
        raise Failure(f"no QEMU at {common.QEMU}: run 'make qemu'")
    version, kernel = initramfs.find_kernel()
    initrd = initramfs.cached('guest', version, ('virtio_pci', 'virtio_net'),
                              INIT)
    release = subprocess.run([common.QEMU, '--version'], check=True,
                             stdout=subprocess.PIPE).stdout
    key = hashlib.sha256(repr((release, initrd.name, MACHINE, NIC,
                               APPEND)).encode()).hexdigest()
    target = initrd.parent / f'guest-{key[:16]}.state'
    if target.exists():
        return target
    common.say('booting the guest, once, to put its state aside')
    for old in target.parent.glob('guest-*.state'):
        old.unlink(missing_ok=True)
    part = target.with_suffix(f'.{os.getpid()}')
    with tempfile.TemporaryDirectory(prefix='guest-') as scratch:
        qemu = Guest('boot', scratch, '-netdev', 'hubport,id=n0,hubid=0',
                     '-kernel', str(kernel), '-initrd', str(initrd),
                     '-append', APPEND)
        try:
            wait_for('the guest to boot', qemu.greeted, BOOT_LIMIT)
            qemu.qmp('migrate', uri=f'file:{part}')
            qemu.await_completed()
            part.rename(target)
        finally:
            part.unlink(missing_ok=True)
            qemu.end()
    return target


def run_parts(parser, inside, timeout, make=make_state, host=False):
    """
    The main() of a program of two parts.  The one on the host has MAKE() boot
    the guest, and runs the program again in the test machine; that part is
    INSIDE(options).

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
        state = make()
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
    print('# starting the test machine', flush=True)
    vm = subprocess.Popen(
        [TOP / 'dev/vm', '--timeout', str(timeout), '--',
         os.path.abspath(sys.argv[0]), '--inside', state, *sys.argv[1:]],
        preexec_fn=lambda: die_with_parent(signal.SIGTERM))
    try:
        return vm.wait()
    except KeyboardInterrupt:
        # The terminal told dev/vm as well.
        return vm.wait()
    finally:
        if vm.poll() is None:
            vm.terminate()
            vm.wait()
