# SPDX-License-Identifier: GPL-2.0-or-later
"""
A QEMU that runs, and its monitor.
"""

import pathlib
import subprocess

from lib import common
from lib.common import Failure, die_with_parent, wait_for

# Where it is, lib.common says.
from qemu.qmp import ConnectError, QMPError
from qemu.qmp.legacy import QEMUMonitorProtocol


class Qemu:
    """
    A QEMU with a monitor for us, and one for another program.  Its files are
    in DIRECTORY and are called NAME.*.  PREFIX is a command that runs it.
    """

    # Seconds.  A QEMU that saves its devices does not answer.
    ANSWER_LIMIT = 120

    def __init__(self, name, directory, *options, program=None, prefix=(),
                 **process_options):
        self.name = name
        self.directory = pathlib.Path(directory)
        self.log = self.path('log')
        self.monitor = None
        monitors = [word for kind in ('qmp', 'qmp2') for word in
                    ('-qmp', f'unix:{self.path(kind)},server=on,wait=off')]
        with open(self.log, 'wb') as log:
            self.process = subprocess.Popen(
                [*prefix, program or common.QEMU, '-name', f'test-{name}',
                 '-nodefaults', '-no-user-config', '-display', 'none',
                 *monitors, *options],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                preexec_fn=die_with_parent, **process_options)

    def path(self, kind):
        return self.directory / f'{self.name}.{kind}'

    def said(self):
        return self.log.read_text(errors='replace')

    def failure(self, text):
        return Failure(f'{text}\n{self.said()[-2000:]}'.rstrip())

    def alive(self):
        if self.process.poll() is not None:
            raise self.failure(f'QEMU {self.name} ended by itself')
        return True

    def connect(self, limit=60):
        """Connect to the monitor, as soon as it is there."""
        try:
            wait_for(f'the monitor of {self.name}', self.try_to_connect,
                     limit, 0.01)
        except Failure:
            self.end()
            raise

    def try_to_connect(self):
        self.alive()
        monitor = QEMUMonitorProtocol(str(self.path('qmp')))
        try:
            monitor.connect()
        except ConnectError:
            return False
        monitor.settimeout(self.ANSWER_LIMIT)
        self.monitor = monitor
        return True

    def qmp(self, command, **arguments):
        self.alive()
        try:
            return self.monitor.cmd(command, **arguments)
        except (QMPError, OSError, EOFError) as err:
            raise self.failure(f'{command} on QEMU {self.name}: '
                               f'{str(err) or "no answer"}') from err

    def running(self):
        return self.qmp('query-status')['running']

    def get(self, name, prop):
        return self.qmp('qom-get', path=f'/objects/{name}', property=prop)

    def set(self, name, prop, value):
        self.qmp('qom-set', path=f'/objects/{name}', property=prop,
                 value=value)

    def add_socket(self, name, path, server):
        """Add a character device that listens or connects at PATH."""
        self.qmp('chardev-add', id=name, backend={'type': 'socket', 'data': {
            'addr': {'type': 'unix', 'data': {'path': str(path)}},
            'server': server, **({'wait': False} if server else {})}})

    def add_filter(self, kind, name, netdev, **properties):
        self.qmp('object-add', **{'qom-type': f'filter-{kind}', 'id': name,
                                  'netdev': netdev, **properties})

    def end(self):
        if self.monitor:
            try:
                self.monitor.close()
            except (QMPError, OSError, EOFError):
                pass            # It is gone already.
            self.monitor = None
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
