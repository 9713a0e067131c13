# SPDX-License-Identifier: GPL-2.0-or-later
"""
A guest that migrates, with or without the redirector, while numbered packets
come to it, in the test machine.

    sender -- br0 -+- tap0 -- vhost -- QEMU 0 (source)
                   +- tap1 -- vhost -- QEMU 1 (target)

The guest is that of the demonstration.  Each QEMU is the target of one
migration and the source of the next one.
"""

import json
import socket
import threading
import time

from lib import demo_guest
from lib.common import (
    attempt, interface_statistics, run, silence_ipv6, wait_for)
from lib.demo_guest import GUEST_ADDRESS, GUEST_MAC, HOST_ADDRESS, HOST_MAC
from lib.guest import LIMIT, Guest

# In packets.  Nobody reads the TAP of the source while QEMU saves the devices,
# and on a busy machine the guest may be held up for minutes after that.
QUEUE = 30000
BRIDGE = 'br0'


class Bridge:
    """A bridge that does not flood to TAPs."""

    def __init__(self):
        run('ip', 'link', 'add', BRIDGE, 'type', 'bridge', 'stp_state', '0',
            'forward_delay', '0', 'mcast_snooping', '0',
            # An address that is forgotten would be flooded.
            'ageing_time', '360000',
            # Without it there is one entry of an address for each VLAN.
            'vlan_default_pvid', '0')
        run('ip', 'address', 'add', f'{HOST_ADDRESS}/24', 'dev', BRIDGE)
        run('ip', 'link', 'set', BRIDGE, 'address', HOST_MAC, 'up')
        run('ip', 'neighbour', 'replace', GUEST_ADDRESS, 'lladdr', GUEST_MAC,
            'dev', BRIDGE, 'nud', 'permanent')

    def add(self, tap):
        run('ip', 'tuntap', 'add', tap, 'mode', 'tap', 'vnet_hdr')
        run('ip', 'link', 'set', tap, 'txqueuelen', str(QUEUE),
            'master', BRIDGE, 'up')
        run('bridge', 'link', 'set', 'dev', tap, 'flood', 'off',
            'mcast_flood', 'off', 'bcast_flood', 'off')

    def move(self, tap):
        """Send what is for the guest to TAP, as if it had announced itself
        there."""
        run('bridge', 'fdb', 'replace', GUEST_MAC, 'dev', tap, 'master',
            'dynamic')

    def port(self):
        """The TAP that the guest is learnt to be behind, or None."""
        entries = json.loads(run('bridge', '-j', 'fdb', 'show', 'br', BRIDGE))
        return next((entry['ifname'] for entry in entries
                     if entry['mac'] == GUEST_MAC), None)

    def await_port(self, tap):
        wait_for(f'the bridge to learn that the guest is behind {tap}',
                 lambda: self.port() == tap, LIMIT)


class Vm(Guest):
    """
    A QEMU with a TAP on BRIDGE, and its redirector.  START are the options
    that say what it runs.
    """

    made = 0

    def __init__(self, directory, bridge, name=None, nic=demo_guest.NIC,
                 vhost='on', start=('-incoming', 'defer')):
        self.vhost = vhost
        name = name or str(Vm.made)
        Vm.made += 1
        self.tap = f'tap{name}'
        bridge.add(self.tap)
        super().__init__(
            name, directory, nic, *start, '-netdev', 'tap,id=n0,script=no,'
            f'downscript=no,vhost={vhost},ifname={self.tap}')

    def add_redirector(self, name, device, path, server, **properties):
        """One that has the character device DEVICE, a socket at PATH"""
        self.add_socket(f'{device}0', path, server)
        if self.vhost == 'off':
            properties['packet-socket'] = 'on'
        self.add_filter('redirector', f'{name}0', 'n0', queue='tx',
                        vnet_hdr_support=True,
                        **{f'{device}dev': f'{device}0'}, **properties)

    def listen(self, redirector, while_stopped):
        """Be ready for a migration to here: step 2 of the user's page."""
        if redirector:
            self.add_redirector('inj', 'in', self.path('stream'), True,
                                enable_when_stopped=while_stopped)
        self.qmp('migrate-incoming', uri=self.uri())

    def uri(self):
        return f'unix:{self.path("migration")}'

    def add_capture(self, target):
        """Step 3."""
        self.add_redirector('cap', 'out', target.path('stream'), False,
                            enable_when_running=False,
                            enable_when_stopped=True)

    def remove(self, name, device):
        self.qmp('object-del', id=f'{name}0')
        self.qmp('chardev-remove', id=f'{device}0')

    def taken(self):
        return self.get('cap0', 'capture-packets')

    def statistic(self, name):
        return interface_statistics(self.tap)[name]

    def end(self):
        super().end()
        attempt('ip', 'link', 'delete', self.tap)   # may be gone already


def begin(source, target, *capabilities, redirector=True, slow=False,
          while_stopped=True):
    """
    Steps 2 to 4 of the user's page.  SLOW leaves time while the memory is
    copied; WHILE_STOPPED has the target inject before its guest runs.
    """
    for vm in (source, target):
        vm.qmp('migrate-set-capabilities', capabilities=[
            {'capability': name, 'state': name in capabilities} for name in
            ('postcopy-ram', 'multifd', 'pause-before-switchover')])
    source.qmp('migrate-set-parameters', **{
        'max-bandwidth': (2 << 20) if slow else (1 << 30)})
    target.listen(redirector, while_stopped)
    if redirector:
        source.add_capture(target)
    source.qmp('migrate', uri=target.uri())


def await_copying(source):
    """Wait until some of the memory is copied."""
    wait_for('some memory to be copied', lambda: source.qmp('query-migrate')
             .get('ram', {}).get('transferred', 0) > 1 << 20, LIMIT)


def complete(source, target):
    """Wait for the end of the migration; return the downtime in ms."""
    source.await_status('completed')
    wait_for('the target to run', target.running, LIMIT)
    return source.qmp('query-migrate')['downtime']


def await_transfer(source, target):
    """Step 5: wait until nothing is on the way to TARGET any more."""
    idle = []

    def done():
        idle.append(not (source.get('cap0', 'capture-pending') or
                         target.get('inj0', 'inject-pending')))
        return idle[-2:] == [True, True]
    wait_for('the last packets of the source', done, LIMIT, 1)


def clean_up(source, target, redirector=True):
    """Step 6."""
    if redirector:
        source.remove('cap', 'out')
    source.end()
    if redirector:
        target.remove('inj', 'in')


class Lines(threading.Thread):
    """
    A TCP connection to the guest in VM, which sends each line back.  One is
    sent each PERIOD, in seconds.
    """

    PORT = 7

    def __init__(self, vm, period=0.1):
        super().__init__(daemon=True)
        self.period = period
        vm.ask(f'nc -ll -p {self.PORT} -e cat > /dev/null 2>&1 &')
        self.connection = wait_for('the guest to listen', self.connect,
                                   LIMIT, 1)
        self.sent = []          # when
        self.received = 0
        self.slowest = 0        # in seconds, from line to echo
        self.quit = threading.Event()
        self.wrong = None
        self.start()
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def connect(self):
        try:
            return socket.create_connection((GUEST_ADDRESS, self.PORT),
                                            LIMIT)
        except ConnectionRefusedError:
            return None

    def run(self):
        try:
            while not self.quit.wait(self.period):
                self.sent.append(time.monotonic())
                self.connection.sendall(b'%d\n' % (len(self.sent) - 1))
            self.connection.shutdown(socket.SHUT_WR)
        except OSError as err:
            self.wrong = err

    def read(self):
        try:
            for line in self.connection.makefile('rb'):
                if line != b'%d\n' % self.received:
                    raise OSError(f'line {self.received} is {line}')
                took = time.monotonic() - self.sent[self.received]
                self.received += 1
                self.slowest = max(self.slowest, took)
        except OSError as err:
            self.wrong = err

    def take_slowest(self):
        slowest, self.slowest = self.slowest, 0
        return slowest

    def await_more(self, number):
        wanted = self.received + number
        wait_for('lines from the guest', lambda:
                 self.wrong or self.received >= wanted, LIMIT)

    def result(self):
        """Stop; return (what was sent, what came back, what went wrong)."""
        self.quit.set()
        self.join()
        self.reader.join(LIMIT)
        self.connection.close()
        return len(self.sent), self.received, self.wrong

    def end(self):
        self.quit.set()


def start_guest(state, vm, bridge):
    vm.start(state)
    vm.ask('hello')
    bridge.await_port(vm.tap)


def set_up():
    # Nothing but our packets and what QEMU and the guest announce moves.
    silence_ipv6()
    return Bridge()
