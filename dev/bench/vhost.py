# SPDX-License-Identifier: GPL-2.0-or-later
"""
A capture while a vhost worker brings the same packets to a guest.  The guest
is its memory and its ring, whose buffers a process gives back.
"""

import ctypes
import mmap
import multiprocessing
import struct
import time

from contestants import Redirector
from lib.common import Failure, die_with_parent
from rig import Qemu, connect, wait_for

RAM = 16 << 20
# Two legacy virtio rings; that which receives has as many descriptors as
# entries.
RING, TX_RING, BUFFERS = 1 << 20, 0x120000, 2 << 20
ENTRIES, BUFFER = 1024, 2048
AVAIL, USED = RING + 16 * ENTRIES, RING + 0x5000
PORT = 0xc000
CSUM_TSO_MRG = 1 << 1 | 1 << 7 | 1 << 8 | 1 << 15


class VhostQemu(Qemu):
    """A QEMU whose guest's driver is set up from here, by the qtest port."""

    VHOST = 'on'
    NIC = f',disable-modern=on,rx_queue_size={ENTRIES}'

    def machine(self, path):
        return ['-machine', f'{self.MACHINE},memory-backend=ram',
                '-object', f'memory-backend-file,id=ram,size={RAM},share=on,'
                f'mem-path={path}.ram', '-accel', 'qtest',
                '-qtest', f'unix:{path}.qtest,server=on,wait=off',
                '-qtest-log', 'none']

    def __init__(self, *args):
        super().__init__(*args)
        self.port = connect(self.path('qtest'))
        with open(self.path('ram'), 'r+b') as file:
            self.ram = mmap.mmap(file.fileno(), RAM)
        self.used = ctypes.c_uint16.from_buffer(self.ram, USED + 2)
        self.start_driver()
        multiprocessing.get_context('fork').Process(
            target=self.refill, daemon=True).start()

    def out(self, width, port, value):
        self.port.sendall(f'out{width} {port:#x} {value:#x}\n'.encode())
        said = b''
        while not said.endswith(b'\n'):
            said += self.port.recv(100)
        if not said.startswith(b'OK'):
            raise Failure(f'qtest: {said.decode().strip()}')

    def start_driver(self):
        # No interrupts: with KVM they would not pass through QEMU either.
        struct.pack_into('<H', self.ram, AVAIL, 1)
        for i in range(ENTRIES):
            struct.pack_into('<QIHH', self.ram, RING + 16 * i,
                             BUFFERS + i * BUFFER, BUFFER, 2, 0)
            struct.pack_into('<H', self.ram, AVAIL + 4 + 2 * i, i)
        for register, value in ((0x10, PORT), (4, 7)):
            self.out('l', 0xcf8, 0x80001800 | register)
            self.out('l', 0xcfc, value)
        self.out('b', PORT + 18, 3)
        self.out('l', PORT + 4, CSUM_TSO_MRG)
        for queue, address in ((0, RING), (1, TX_RING)):
            self.out('w', PORT + 14, queue)
            self.out('l', PORT + 8, address >> 12)
        self.out('b', PORT + 18, 7)
        wait_for('vhost', self.vhost_started)

    def vhost_started(self):
        try:
            self.qmp('x-query-virtio-vhost-queue-status',
                     path='/machine/peripheral-anon/device[0]/virtio-backend',
                     queue=0)
        except Failure:
            return False
        return True

    def refill(self):
        """Make each buffer available again that vhost has used."""
        die_with_parent()
        available = ctypes.c_uint16.from_buffer(self.ram, AVAIL + 2)
        while True:
            available.value = self.used.value + ENTRIES
            time.sleep(0.001)

    def kick(self):
        self.out('w', PORT + 16, 0)


class WithVhost(Redirector):
    QEMU = VhostQemu
    STEER = False

    def capture(self, load):
        before = self.qemu.used.value
        self.qemu.kick()
        metrics = super().capture(load)
        if self.qemu.used.value == before:
            raise Failure('vhost brought nothing to the guest')
        return metrics
