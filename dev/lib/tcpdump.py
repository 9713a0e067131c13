# SPDX-License-Identifier: GPL-2.0-or-later
"""
What tcpdump sees.
"""

import struct
import subprocess

from lib.common import Failure, die_with_parent, wait_for


class Tcpdump:
    """
    Keeps what tcpdump sees on INTERFACE, in one DIRECTION or both, until the
    end of "with" or end().  PREFIX is a command that runs it.
    """

    def __init__(self, interface, directory, direction='inout', prefix=()):
        self.path = directory / f'{interface}.{direction}.pcap'
        self.log = directory / f'{interface}.{direction}.log'
        with open(self.log, 'wb') as log:
            self.process = subprocess.Popen(
                [*prefix, 'tcpdump', '-i', interface, '-Q', direction,
                 '-Z', 'root', '-s', '0', '-B', '65536', '--immediate-mode',
                 '-U', '-w', self.path], stdout=log, stderr=log,
                preexec_fn=die_with_parent)
        wait_for(f'tcpdump on {interface}', self.listens)

    def listens(self):
        if self.process.poll() is not None:
            raise Failure(f'tcpdump: {self.log.read_text()}')
        return 'listening on' in self.log.read_text()

    def frames(self):
        contents = self.path.read_bytes()
        place, found = 24, []
        while place + 16 <= len(contents):
            size, whole = struct.unpack_from('<II', contents, place + 8)
            assert size == whole
            found.append(contents[place + 16:place + 16 + size])
            place += 16 + size
        return found

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end()

    def end(self):
        self.process.terminate()
        self.process.wait()
