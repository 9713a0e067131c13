# SPDX-License-Identifier: GPL-2.0-or-later
"""
Numbers that are sent to the guest, which sends them back.
"""

import contextlib
import socket
import struct
import threading
import time

from lib import common
from lib.common import Failure, wait_for
from lib.guest import GUEST_ADDRESS, LIMIT, PORT

# Packets per second: so few that a guest under TCG within TCG loses none outside
# a migration.
RATE = 100


class Traffic(threading.Thread):
    """
    Sends a number each PERIOD, in seconds, and keeps those that come back.
    Those derived from it have send(), and some collect().
    """

    def __init__(self, sock, period):
        super().__init__(daemon=True)
        self.socket = sock
        self.period = period
        self.sent = []          # when each number was
        self.received = []      # numbers
        self.slowest = 0        # in seconds, from here to the guest and back
        self.sending = True
        self.error = None
        self.start()

    def run(self):
        due = time.monotonic()
        try:
            while self.sending:
                self.sent.append(time.monotonic())
                self.send(len(self.sent) - 1)
                now = time.monotonic()
                # No burst after the machine was held up
                due = max(due + self.period, now)
                time.sleep(due - now)
        except OSError as err:
            self.error = err

    def collect(self):
        """Keep what came."""

    def take_slowest(self):
        slowest, self.slowest = self.slowest, 0
        return slowest

    def wait_for(self, what, condition):
        def done():
            self.collect()
            return self.error or condition()

        wait_for(what, done, LIMIT)
        if self.error:
            raise Failure(f'{what}: {self.error}')

    def await_more(self, seconds):
        """Wait until what is sent in so many SECONDS has come back."""
        self.collect()
        wanted = len(self.received) + seconds / self.period
        self.wait_for('packets from the guest',
                      lambda: len(self.received) >= wanted)

    def result(self):
        """Stop sending; return what became of it."""
        self.stop()
        self.wait_for('the last packet from the guest',
                      lambda: len(self.sent) - 1 in self.received)
        return Result(len(self.sent), self.received)

    def stop(self):
        self.sending = False
        self.join()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


class Packets(Traffic):
    """ICMP echo requests, which take nothing but the guest's kernel."""

    number = 0      # of the first one

    def __init__(self):
        # Not those of another run
        Packets.number += 1 << 20
        self.first = Packets.number
        sock = socket.socket(socket.AF_INET, socket.SOCK_RAW,
                             socket.IPPROTO_ICMP)
        common.force_buffer(sock, common.SO_RCVBUFFORCE, 16 << 20)
        sock.connect((GUEST_ADDRESS, 0))
        super().__init__(sock, 1 / RATE)

    def send(self, number):
        number += self.first
        words = (8 << 8) + (number >> 16) + (number & 0xffff)
        self.socket.send(struct.pack('!BBHI56x', 8, 0, 0xffff - words % 0xffff,
                                     number))

    def collect(self):
        # They wait in the socket's buffer: to take each when it comes would
        # take time of the machine that the guest lacks.
        with contextlib.suppress(BlockingIOError):
            while True:
                packet = self.socket.recv(1000, socket.MSG_DONTWAIT)
                kind, number = struct.unpack_from('!B3xI', packet, 20)
                number -= self.first
                if kind == 0 and number in range(len(self.sent)):
                    self.received.append(number)


class Lines(Traffic):
    """A TCP connection, with a number in each line"""

    def __init__(self, period=0.1):
        super().__init__(socket.create_connection((GUEST_ADDRESS, PORT),
                                                  LIMIT), period)
        threading.Thread(target=self.read, daemon=True).start()

    def send(self, number):
        self.socket.sendall(b'%d\n' % number)

    def read(self):
        try:
            for line in self.socket.makefile('rb'):
                number = int(line)
                took = time.monotonic() - self.sent[number]
                self.received.append(number)
                self.slowest = max(self.slowest, took)
            self.error = 'the guest hung up'
        except (OSError, ValueError, IndexError) as err:
            self.error = err


class Result:
    """What became of SENT numbers, of which RECEIVED came back"""

    def __init__(self, sent, received):
        lost = sorted(set(range(sent)) - set(received))
        self.sent, self.lost = sent, len(lost)
        self.twice = len(received) - len(set(received))
        self.range = f'{lost[0]}..{lost[-1]}' if lost else '-'
        self.text = f'{sent} sent, {self.lost} lost, {self.twice} twice'
        if lost:
            self.text += f', lost {self.range}'
