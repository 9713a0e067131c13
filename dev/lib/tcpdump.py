# SPDX-License-Identifier: GPL-2.0-or-later
"""
What tcpdump sees.
"""

import subprocess

from lib.common import Failure, die_with_parent, wait_for


class Tcpdump:
    """
    Keeps what tcpdump sees on INTERFACE until the end of "with".  PREFIX is a
    command that runs it.
    """

    def __init__(self, interface, directory, prefix=()):
        self.path = directory / f'{interface}.pcap'
        self.log = directory / f'{interface}.log'
        with open(self.log, 'wb') as log:
            self.process = subprocess.Popen(
                [*prefix, 'tcpdump', '-i', interface, '-Z', 'root', '-s',
                 '0', '-B', '65536', '--immediate-mode', '-U', '-w',
                 self.path], stdout=log, stderr=log,
                preexec_fn=die_with_parent)
        wait_for(f'tcpdump on {interface}', self.listens)

    def listens(self):
        if self.process.poll() is not None:
            raise Failure(f'tcpdump: {self.log.read_text()}')
        return 'listening on' in self.log.read_text()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()
