# SPDX-License-Identifier: GPL-2.0-or-later
"""
A guest that migrates, with or without the redirector, while numbered packets
come to it, in the test machine.

    sender -- br0 -+- tap0 -- vhost -- QEMU 0 (source)
                   +- tap1 -- vhost -- QEMU 1 (target)

The guest is that of the demonstration.  Each QEMU is the target of one migration and the source of the next one.
"""

import json
import socket
import threading
import time

from lib import demo_guest
from lib.common import (
    Failure, interface_statistics, run, silence_ipv6, wait_for)
from lib.demo_guest import GUEST_ADDRESS, GUEST_MAC, HOST_ADDRESS, HOST_MAC
from lib.guest import LIMIT, Guest

# In packets.  Nobody reads the TAP of the source while QEMU saves the devices,
# and on a busy machine the guest may be held up for minutes after that.
QUEUE = 30000

# A NIC that not all guests have.
SECOND_MAC, SECOND_ADDRESS = '52:54:00:00:00:03', '198.51.100.2'
SECOND_HOST = '198.51.100.1'
SECOND_NIC = {
    'driver': 'virtio-net-pci', 'id': 'nic1', 'netdev': 'n1',
    'mac': SECOND_MAC, 'romfile': '', 'queue_reset': False, 'mq': True,
    'vectors': 6, 'addr': '0x10'}


class Bridge:
    """A bridge that does not flood to TAPs."""

    def __init__(self, name, address, guest_mac, guest_address):
        self.name = name
        self.mac = guest_mac
        run('ip', 'link', 'add', name, 'type', 'bridge', 'stp_state', '0',
            'forward_delay', '0', 'mcast_snooping', '0',
            # An address that is forgotten would be flooded.
            'ageing_time', '360000',
            # Without it there is one entry of an address for each VLAN.
            'vlan_default_pvid', '0')
        run('ip', 'address', 'add', f'{address}/24', 'dev', name)
        run('ip', 'link', 'set', name, 'address', HOST_MAC, 'up')
        run('ip', 'neighbour', 'replace', guest_address, 'lladdr', guest_mac,
            'dev', name, 'nud', 'permanent')

    def add(self, tap, *options):
        run('ip', 'tuntap', 'add', tap, 'mode', 'tap', 'vnet_hdr', *options)
        run('ip', 'link', 'set', tap, 'txqueuelen', str(QUEUE),
            'master', self.name, 'up')
        run('bridge', 'link', 'set', 'dev', tap, 'flood', 'off',
            'mcast_flood', 'off', 'bcast_flood', 'off')

    def move(self, tap):
        """Send what is for the guest to TAP, as if it had announced itself
        there."""
        run('bridge', 'fdb', 'replace', self.mac, 'dev', tap, 'master',
            'dynamic')

    def port(self):
        """The TAP that the guest is learnt to be behind, or None."""
        entries = json.loads(run('bridge', '-j', 'fdb', 'show', 'br',
                                 self.name))
        return next((entry['ifname'] for entry in entries
                     if entry['mac'] == self.mac), None)

    def await_port(self, tap):
        wait_for(f'{self.name} to learn that the guest is behind {tap}',
                 lambda: self.port() == tap, LIMIT)


class Vm(Guest):
    """
    A QEMU with a TAP on each of BRIDGES, and its redirectors.  The second TAP
    has two queues.  Its NIC is there from the start unless PLUG_LATER.  START
    are the options that say what it runs.
    """

    made = 0

    def __init__(self, directory, bridges, plug_later=False, name=None,
                 nic=demo_guest.NIC, vhost='on',
                 start=('-incoming', 'defer')):
        self.taps = []
        self.vhost = vhost
        options = []
        name = name or str(Vm.made)
        Vm.made += 1
        for i, bridge in enumerate(bridges):
            tap = f'tap{name}{"b" * i}'
            bridge.add(tap, *(['multi_queue'] if i else []))
            self.taps.append(tap)
            options += ['-netdev', f'tap,id=n{i},ifname={tap},script=no,'
                        f'downscript=no,vhost={vhost}'
                        + (',queues=2' if i else '')]
            if i and not plug_later:
                options += ['-device', json.dumps(SECOND_NIC)]
        self.tap = self.taps[0]
        super().__init__(name, directory, nic, *start, *options)

    def add_filter(self, kind, name, netdev, **properties):
        if self.vhost == 'off':
            properties['packet-socket'] = 'on'
        super().add_filter(kind, name, netdev, **properties)

    def listen(self, redirector, while_stopped):
        """Be ready for a migration to here: step 2 of the user's page."""
        for i, _ in enumerate(self.taps if redirector else ()):
            self.add_socket(f'in{i}', self.path(f'stream{i}'), True)
            self.add_filter('redirector', f'inj{i}', f'n{i}', queue='tx',
                            indev=f'in{i}', vnet_hdr_support=True,
                            enable_when_stopped=while_stopped)
        self.qmp('migrate-incoming', uri=self.uri())

    def uri(self):
        return f'unix:{self.path("migration")}'

    def add_capture(self, target, status='on'):
        """Step 3."""
        for i, _ in enumerate(self.taps):
            self.add_socket(f'out{i}', target.path(f'stream{i}'), False)
            self.add_filter('redirector', f'cap{i}', f'n{i}', queue='tx',
                            outdev=f'out{i}', vnet_hdr_support=True,
                            enable_when_running=False,
                            enable_when_stopped=True, status=status)

    def remove(self, filter_name, chardev):
        for i, _ in enumerate(self.taps):
            self.qmp('object-del', id=f'{filter_name}{i}')
            self.qmp('chardev-remove', id=f'{chardev}{i}')

    def taken(self):
        return self.get('cap0', 'capture-packets')

    def statistic(self, name):
        return sum(interface_statistics(tap)[name] for tap in self.taps)

    def end(self):
        super().end()
        for tap in self.taps:
            run('ip', 'link', 'delete', tap)
        self.taps = []


def begin(source, target, *capabilities, redirector=True, status='on',
          slow=False, while_stopped=True):
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
        source.add_capture(target, status)
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
        pending = [source.get(f'cap{i}', 'capture-pending') or
                   target.get(f'inj{i}', 'inject-pending')
                   for i, _ in enumerate(source.taps)]
        idle.append(not any(pending))
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
    return Bridge('br0', HOST_ADDRESS, GUEST_MAC, GUEST_ADDRESS)


def add_second_bridge():
    return Bridge('br1', SECOND_HOST, SECOND_MAC, SECOND_ADDRESS)


def plug_second(vm, bridge):
    """Plug in the second NIC and have the guest use both of its queues."""
    vm.qmp('device_add', **SECOND_NIC)
    wait_for('the guest to find its second NIC', lambda: vm.ask(
        'cat /sys/class/net/eth1/address') == SECOND_MAC, LIMIT, 1)
    said = vm.ask(' && '.join((
        f'ip address add {SECOND_ADDRESS}/24 dev eth1', 'ip link set eth1 up',
        f'arp -s {SECOND_HOST} {HOST_MAC}', 'demo-packets queues eth1 2',
        f'arping -q -U -c 1 -w 1 -I eth1 {SECOND_ADDRESS}')))
    if said:
        raise Failure(f'the guest: {said}')
    bridge.await_port(vm.taps[1])
