# SPDX-License-Identifier: GPL-2.0-or-later
"""
A guest that migrates, with or without the redirector, while packets come to
it.

    sender -- br0 -+- tap0 -- vhost -- QEMU 0 (source)
                   +- tap1 -- vhost -- QEMU 1 (target)

Each QEMU is the target of one migration and the source of the next one.
"""

import os
import subprocess

from lib.common import (
    PACKAGES, TOP, Failure, attempt, run, silence_ipv6, tx_dropped,
    wait_for)
from lib.guest import (
    GUEST_ADDRESS, GUEST_MAC, HOST_ADDRESS, HOST_MAC, LIMIT, Guest)

PROGRAM = TOP / 'contrib/migrate-packets/migrate-packets'
# In packets.  Nobody reads the TAP of the source while QEMU saves the devices,
# and on a busy machine the guest may be held up for minutes after that.
QUEUE = 30000
BRIDGE = 'br0'


def set_up():
    """Make a bridge that learns where the guest is, and forgets nothing."""
    # Nothing but our packets and what QEMU and the guest announce moves.
    silence_ipv6()
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


class Vm(Guest):
    """A QEMU with a TAP on the bridge, which does not flood to it"""

    def __init__(self, name, directory, vhost='on'):
        self.tap = f'tap{name}'
        run('ip', 'tuntap', 'add', self.tap, 'mode', 'tap', 'vnet_hdr')
        run('ip', 'link', 'set', self.tap, 'txqueuelen', str(QUEUE),
            'master', BRIDGE, 'up')
        run('bridge', 'link', 'set', 'dev', self.tap, 'flood', 'off',
            'mcast_flood', 'off', 'bcast_flood', 'off')
        super().__init__(
            name, directory, '-incoming', 'defer', '-netdev', 'tap,id=n0,'
            f'script=no,downscript=no,vhost={vhost},ifname={self.tap}')

    def start(self, state):
        super().start(state)
        # The bridge learns where the guest is.
        said = self.ask(f'ping -c 1 {HOST_ADDRESS}')
        if ' 0% packet loss' not in said:
            raise self.failure(f'the guest does not reach the host: {said}')

    def uri(self):
        return f'unix:{self.path("migration")}'

    def tx_dropped(self):
        return tx_dropped(self.tap)

    def end(self):
        super().end()
        attempt('ip', 'link', 'delete', self.tap)   # may be gone already


def begin(source, target):
    """Begin a migration."""
    target.qmp('migrate-incoming', uri=target.uri())
    source.qmp('migrate', uri=target.uri())


def complete(source, target):
    """Wait for the end of the migration; return the downtime in ms."""
    source.await_completed()
    wait_for('the target to run', target.running, LIMIT)
    return source.qmp('query-migrate')['downtime']


def migrate(source, target, redirector):
    """Migrate, with contrib/migrate-packets or not; return the downtime."""
    if redirector:
        done = subprocess.run(
            [PROGRAM, '--source', source.path('qmp2'),
             '--target', target.path('qmp2'), '--uri', target.uri(),
             '--stream', target.path('stream')],
            env=dict(os.environ, PYTHONPATH=str(PACKAGES)), check=False)
        # The guest tells whether it lost packets.
        if done.returncode not in (0, 1):
            raise Failure(f'migrate-packets: exit status {done.returncode}')
    else:
        begin(source, target)
    return complete(source, target)
