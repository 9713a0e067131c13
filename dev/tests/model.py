# SPDX-License-Identifier: GPL-2.0-or-later
"""
A QEMU with TAPs and no guest, what is done to it, and where each frame must
have come to; for test-model.
"""

import bisect
import collections
import fcntl
import itertools
import os
import pathlib
import random
import re
import select
import socket
import struct
import subprocess
import termios
import time

from lib import common
from lib.common import SO_RCVBUFFORCE, SO_SNDBUFFORCE, force_buffer
from lib.qemu import Qemu

LIMIT = 10              # seconds that anything may take
SOON = 1.0              # the same, where QEMU is to be quick
LOOKS = 30              # and how often it must have answered meanwhile
TAPS = 2
RESTART = 200           # sequences that one QEMU sees
MAX_MTU = 65521
HEAD = struct.Struct('>6s6sHII')
TO, FROM, ETHERTYPE = b'\2\0\0\0\0\1', b'\2\0\0\0\0\2', 0x88b5
FILL = memoryview(random.Random(1).randbytes(1 << 17))
MIB = 1 << 20
QUEUE_LEN = 8000        # of the TAP, in frames

SOL_PACKET, PACKET_IGNORE_OUTGOING = 263, 23
SIOCSIFFLAGS, SIOCSIFMTU, SIOCSIFTXQLEN = 0x8914, 0x8922, 0x8943
IFF_UP = 1

# The steps after which captures may have other sources
CHANGES = ('add', 'status', 'stop', 'cont', 'close', 'connect', 'up')
COUNTERS = ('capture-kernel-drops', 'capture-peer-drops',
            'capture-skipped')
INJECT_COUNTERS = ('inject-packets', 'inject-skipped',
                   'inject-interface-drops')


class Failure(Exception):
    def __init__(self, kind, text):
        super().__init__(f'{kind}: {text}')
        self.kind, self.text = kind, text


def enter_namespace():
    """A network namespace of our own, without a sound of its own."""
    common.enter_namespace()
    path = pathlib.Path('/proc/sys/net/unix/max_dgram_qlen')
    if path.exists():
        path.write_text(str(1 << 20))


class Interface:
    """A TAP, its hub, and what stands for the guest."""

    def __init__(self, world, number):
        self.world, self.number = world, number
        self.name = f'mt{number}'
        self.up = True
        self.mtu = MAX_MTU
        qmp = world.qemu.qmp
        self.guest, other = socket.socketpair(socket.AF_UNIX,
                                              socket.SOCK_DGRAM)
        for end in self.guest, other:
            force_buffer(end, SO_SNDBUFFORCE, 256 * MIB)
        self.guest.setblocking(False)
        world.qemu.monitor.send_fd_scm(other.fileno())
        qmp('getfd', fdname=f'g{number}')
        other.close()
        qmp('netdev_add', type='tap', id=f'n{number}', ifname=self.name,
            script='no', downscript='no', vhost=False)
        qmp('netdev_add', type='hubport', id=f'h{number}', hubid=number,
            netdev=f'n{number}')
        qmp('netdev_add', type='dgram', id=f'd{number}',
            local={'type': 'fd', 'str': f'g{number}'})
        qmp('netdev_add', type='hubport', id=f'p{number}', hubid=number,
            netdev=f'd{number}')
        self.host = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self.control(SIOCSIFTXQLEN, QUEUE_LEN)
        self.control(SIOCSIFMTU, MAX_MTU)
        self.control(SIOCSIFFLAGS, IFF_UP)
        self.host.bind((self.name, 0))
        force_buffer(self.host, SO_SNDBUFFORCE, 64 * MIB)
        # What leaves the TAP toward the network
        self.network = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self.network.setblocking(False)
        self.network.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        force_buffer(self.network, SO_RCVBUFFORCE, 64 * MIB)
        self.network.bind((self.name, 3))
        self.reset()

    def control(self, request, value):
        fcntl.ioctl(self.host, request,
                    struct.pack('16si12x', self.name.encode(), value))

    def reset(self):
        """At the beginning of a sequence"""
        self.sent = 0                   # toward the guest
        self.arrived = set()            # of these and of what was injected
        self.arrived_sent = 0
        self.arrived_network = set()
        self.last = {}                  # of each origin, at each receiver
        self.lost = 0                   # with a filter that had taken them
        self.dropped = self.tx_dropped()
        self.was_down = False

    def tx_dropped(self):
        return common.interface_statistics(self.name)['tx_dropped']

    def close(self):
        """Take the netdev away, with its filters."""
        for kind in 'nhpd':
            self.world.qemu.qmp('netdev_del', id=f'{kind}{self.number}')
        for sock in self.guest, self.host, self.network:
            sock.close()


class Object:
    """A filter, its character devices, and who is at their other ends."""

    def __init__(self, spec, slot, tap):
        self.spec, self.tap = spec, tap
        self.id = f'o{slot}'
        self.captures = spec['kind'] != 'inject'
        self.injects = spec['kind'] in ('inject', 'both')
        self.dump = spec['kind'] == 'dump'
        # Of each record of the file or the stream
        self.head = struct.Struct('<8xII' if self.dump else
                                  '>II' if spec['vnet'] else '>I')
        self.takes = spec['kind'] == 'redirector' and not spec['running']
        self.chardevs = {}              # for 'out' and 'into'
        self.limit = spec['size'] or 8 * MIB
        self.queue = spec['queue']
        self.status = spec['status']
        self.stalled = spec['stalled']
        self.exists = True              # until it is deleted
        self.out = self.into = None     # the peers' sockets
        self.buffer = bytearray()       # read and not a frame yet
        self.progress = time.monotonic()
        self.offered = self.offered_bytes = 0
        self.ranges = collections.deque()
        self.got = 0
        self.got_bytes = 0              # of the stream
        self.peers = 0
        self.to_write = bytearray()
        self.written = 0                # frames to inject
        self.unsure = 0                 # of these, may not have been read
        self.reached = 0                # of these, came to the guest or network
        self.counters = {}

    def source(self, running):
        """What the manual says."""
        works = self.status and self.spec['running' if running else 'stopped']
        if self.takes:
            return 'chain' if works else 'none'
        if works and self.captures and (self.out or self.dump):
            return 'packet-socket'
        return 'none'

    def expect(self, number):
        """A frame was copied."""
        while self.ranges and self.ranges[0][1] <= number:
            self.ranges.popleft()
        if not self.ranges or self.ranges[0][0] > number:
            raise Failure('order', f'{self.id}: got frame {number}, which '
                          'it had before, or was not to get')
        self.ranges[0][0] = number + 1

    def lengths(self, data, at):
        """Of a record: what is behind its head, and the header in that"""
        length, *more = self.head.unpack_from(data, at)
        header = 0
        if self.dump:
            good = more == [length]
        else:
            header = more[0] if more else 0
            good = header <= length <= 69632
        if not good:
            raise Failure('order', f'{self.id}: a record of {length}, {more}')
        return length, header

    def account(self):
        return self.got + sum(self.counters[name] for name in COUNTERS)


class World:
    """QEMU and everything around it."""

    def __init__(self, directory):
        self.directory = pathlib.Path(directory)
        self.qemu = None
        self.serial = 0
        self.taps = []
        self.objects = {}
        self.names = 0

    # QEMU

    def start(self):
        self.qemu = Qemu('qemu', self.directory, '-machine', 'none',
                         '-accel', 'tcg')
        self.qemu.ANSWER_LIMIT = LIMIT
        self.qemu.connect(LIMIT)
        self.running = True
        self.taps = [Interface(self, number) for number in range(TAPS)]
        self.age = 0

    def quit(self):
        try:
            self.qemu.qmp('quit')
            status = self.qemu.process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            status = 'none'
        if status:
            raise Failure('alive', f'after "quit", status {status}: '
                          f'{self.qemu.said()[-500:]}')
        self.stop()

    def stop(self):
        if not self.qemu:
            return
        self.qemu.end()
        for tap in self.taps:
            for sock in tap.guest, tap.host, tap.network:
                sock.close()
        self.qemu = None
        self.taps = []

    def check_alive(self):
        said = self.qemu.said()
        bad = re.search(r'.*(assert|Sanitizer|runtime error|abort).*', said,
                        re.I)
        if bad:
            raise Failure('alive', bad[0])
        if self.qemu.process.poll() is not None:
            raise Failure('alive', 'QEMU ended with status '
                          f'{self.qemu.process.returncode}: {said[-500:]}')

    def fds(self):
        directory = f'/proc/{self.qemu.process.pid}/fd'
        found = []
        for name in os.listdir(directory):
            try:
                found.append(os.readlink(f'{directory}/{name}'))
            except FileNotFoundError:
                pass
        return sorted(found)

    def hooked(self):
        """Packet sockets that get frames, other than ours"""
        ours = {os.fstat(tap.network.fileno()).st_ino for tap in self.taps}
        return len(set(common.hooked_sockets()) - ours)

    def expect_idle(self, when):
        clock = (~self.qemu.process.pid << 3) | 2
        # A short look is enough, nearly always.
        for window in 0.003, 0.01, 0.03, 0.1, 0.1, 0.1, 0.1, 0.1:
            used = time.clock_gettime(clock)
            time.sleep(window)
            used = time.clock_gettime(clock) - used
            if used < 0.2 * window:
                return
        raise Failure('idle', f'{when}, QEMU uses {used * 1000:.0f} ms of CPU '
                      f'time in {window * 1000:.0f} ms')

    def wait(self, kind, what, condition, limit=LIMIT):
        """Until CONDITION() returns nothing; it returns what is wrong."""
        end = time.monotonic() + limit
        pause = 0.0003
        for looks in itertools.count():
            self.pump()
            wrong = condition()
            if not wrong:
                return
            if looks > LOOKS and time.monotonic() > end:
                self.check_alive()
                raise Failure(kind, f'{what}: {wrong}')
            time.sleep(pause)
            pause = min(2 * pause, 0.005)

    # Frames

    def frame(self, number, size):
        return HEAD.pack(TO, FROM, ETHERTYPE, self.serial, number)[:size] + \
            FILL[:max(size - HEAD.size, 0)]

    def number(self, origin, size, count=1):
        """New numbers for COUNT frames; the first"""
        first = self.next_number
        self.next_number += count
        self.origins.append((first, origin, size))
        return first

    def origin(self, number):
        at = bisect.bisect(self.origins, number, key=lambda o: o[0])
        return self.origins[at - 1][1:]

    def look(self, frame, where):
        """Which one a frame is; it must be as it was sent."""
        if len(frame) < HEAD.size:
            raise Failure('order', f'{where} got {len(frame)} bytes')
        to, sender, ethertype, serial, number = HEAD.unpack_from(frame)
        if serial != self.serial or not 0 < number < self.next_number or \
                (to, sender, ethertype) != (TO, FROM, ETHERTYPE):
            raise Failure('order', f'{where} got a frame that is not of this '
                          f'sequence: {bytes(frame[:32]).hex()}')
        origin, size = self.origin(number)
        if len(frame) != size or frame[HEAD.size:] != \
                FILL[:size - HEAD.size]:
            raise Failure('order', f'{where} got frame {number} of {size} '
                          f'bytes changed, with {len(frame)} bytes')
        return number, origin

    def arrive(self, tap, frame, where):
        """A frame at the guest or the network, or taken from the former"""
        number, origin = self.look(frame, where)
        arrived = tap.arrived_network if where == 'network' else tap.arrived
        key = where, origin
        if number in arrived or number < tap.last.get(key, 0):
            raise Failure('order', f'{tap.name}: frame {number} of {origin} '
                          f'came to {where} twice or late')
        arrived.add(number)
        tap.last[key] = number
        if origin == 'host':
            tap.arrived_sent += 1
        elif origin in self.injectors:
            injector = self.injectors[origin]
            if injector.tap is not tap:
                raise Failure('order', f'frame of {origin} at {tap.name}')
            if (where == 'network') == (injector.queue == 'rx'):
                injector.reached += 1

    def got_frame(self, o, frame):
        o.got += 1
        if o.takes:
            self.arrive(o.tap, frame, o.key)
        else:
            o.expect(self.look(frame, o.id)[0])

    def parse(self, o):
        """What a peer has read so far"""
        at, data = 0, memoryview(o.buffer)
        while len(data) - at >= o.head.size:
            length, header = o.lengths(data, at)
            begin = at + o.head.size
            if len(data) - begin < length:
                break
            self.got_frame(o, data[begin + header:begin + length])
            at = begin + length
        data.release()
        del o.buffer[:at]

    def read(self, o, limit=1 << 30):
        """What is there; returns whether that was the end."""
        while limit > 0:
            try:
                if o.dump:
                    data = o.file.read(1 << 20)
                    if not data:
                        return False
                else:
                    data = o.out.recv(min(limit, 1 << 18))
            except BlockingIOError:
                return False
            except ConnectionResetError:
                return True
            if not data:
                return True
            limit -= len(data)
            if not o.dump:
                o.got_bytes += len(data)
            o.buffer += data
            o.progress = time.monotonic()
            self.parse(o)
        return False

    def write(self, o):
        while o.to_write and o.into:
            try:
                del o.to_write[:o.into.send(memoryview(o.to_write)[:1 << 18])]
            except BlockingIOError:
                return
            except OSError as err:
                raise Failure('alive', f'{o.id}: QEMU ended the connection: '
                              f'{err.strerror}') from None

    def pump(self):
        """Everybody who reads or writes does so."""
        for o in self.objects.values():
            if (o.dump or o.out and not o.stalled) and self.read(o):
                raise Failure('alive', f'QEMU has ended {o.id}\'s connection')
            if o.into:
                self.write(o)
        for tap in self.taps:
            for where, sock in (('guest', tap.guest),
                                ('network', tap.network)):
                try:
                    while True:
                        self.arrive(tap, sock.recv(1 << 17), where)
                except OSError:
                    pass        # nothing is there, or the interface is down

    # Chardevs

    def add_chardev(self, o, end):
        o.chardevs[end] = f'{o.key}{end}'
        self.qemu.add_socket(
            o.chardevs[end], self.directory / o.chardevs[end],
            o.spec['server'], **{} if o.spec['server'] else
            {'reconnect-ms': 20})

    def is_connected(self, o, end, want):
        for chardev in self.qemu.qmp('query-chardev'):
            if chardev['label'] == o.chardevs[end]:
                if chardev['filename'].startswith('disconnected') == want:
                    return f'{o.id} {end}: {chardev["filename"]}'
        return None

    def connect(self, o, end):
        path = str(self.directory / o.chardevs[end])
        if o.spec['server']:
            peer = socket.socket(socket.AF_UNIX)
            peer.connect(path)
        else:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(path)
                listener.listen(1)
                listener.settimeout(LIMIT)
                peer = listener.accept()[0]
            os.unlink(path)
        peer.setblocking(False)
        setattr(o, end, peer)
        if end == 'out':
            o.peers += 1
        self.wait('source', 'connecting',
                  lambda: self.is_connected(o, end, True))

    def disconnect(self, o, end):
        peer = getattr(o, end)
        if end == 'out':
            # No more can come, and what has come can be read.
            peer.shutdown(socket.SHUT_RD)
            self.read(o)
            o.buffer.clear()
        else:
            # What QEMU has not read is lost.
            unread = struct.unpack('i', fcntl.ioctl(
                peer, termios.TIOCOUTQ, b'\0' * 4))[0]
            if unread or o.to_write:
                o.unsure = o.written
            o.to_write.clear()
        peer.close()
        setattr(o, end, None)
        self.wait('source', 'the peer has left',
                  lambda: self.is_connected(o, end, False))

    # Objects

    def do_add(self, slot, spec):
        tap = self.taps[spec['tap']]
        if slot in self.objects:
            return
        o = Object(spec, slot, tap)
        # What one injects toward the network the other would capture, when
        # QEMU comes to it.
        if o.queue != 'tx' and any(
                other.tap is tap and other.queue != 'tx' and
                other.injects != o.injects for other in self.objects.values()):
            return
        self.names += 1
        o.key = f'o{slot}.{self.names}'
        arguments = {'status': 'on' if o.status else 'off'}
        if o.dump:
            path = self.directory / o.key
            path.unlink(missing_ok=True)
            arguments['file'] = str(path)
        else:
            arguments['vnet_hdr_support'] = spec['vnet']
            for end, wanted in ('out', o.captures), ('into', o.injects):
                if wanted:
                    self.add_chardev(o, end)
                    arguments['outdev' if end == 'out' else 'indev'] = \
                        o.chardevs[end]
        kind = spec['kind'] if spec['kind'] in ('dump', 'mirror') else \
            'redirector'
        if spec['size']:
            arguments['buffer-size'] = spec['size']
        arguments['packet-socket'] = 'on'
        self.qemu.add_filter(kind, o.id, f'n{tap.number}', queue=o.queue,
                             enable_when_running=spec['running'],
                             enable_when_stopped=spec['stopped'], **arguments)
        if o.dump:
            o.file = open(path, 'rb', buffering=0)
            o.file.seek(24)             # behind the header
        self.objects[slot] = o
        if o.injects:
            self.injectors[o.key] = o
        for end in o.chardevs:
            if spec['connected']:
                self.connect(o, end)

    def look_counters(self, objects):
        if objects:
            answer = self.qemu.qmp(
                'qom-list-get', paths=[f'/objects/{o.id}' for o in objects])
            for o, listed in zip(objects, answer):
                o.counters = {p['name']: p.get('value')
                              for p in listed['properties']}

    def sync(self, limit=3):
        """Wait until sources are as they must be."""
        objects = [o for o in self.objects.values() if o.captures]

        def wrong():
            self.look_counters(objects)
            for o in objects:
                want = o.source(self.running)
                if o.counters['source'] != want:
                    return f'{o.id} has source {o.counters["source"]}, ' \
                        f'not {want}'
            return None
        if objects:
            self.wait('source', 'sources', wrong, limit)

    def do_del(self, slot, fast=False):
        o = self.objects.get(slot)
        if not o:
            return
        if o.exists:
            if not fast:
                self.look_counters([o])
            self.check_alive()
            said = len(self.qemu.said())
            self.qemu.qmp('object-del', id=o.id)
        o.exists, was = False, o.exists
        for chardev in o.chardevs.values():
            self.qemu.qmp('chardev-remove', id=chardev)
        o.stalled = False
        if o.out:
            end = time.monotonic() + LIMIT
            while not self.read(o):
                select.select([o.out], [], [], 0.1)
                if time.monotonic() > end:
                    raise Failure('alive', f'the connection of {o.id} stays')
            o.out.close()
        if o.into:
            o.into.close()
        if o.dump:
            self.read(o)
            o.file.close()
            (self.directory / o.key).unlink()
        del self.objects[slot]
        if not was:
            return
        self.check_alive()
        lost = sum(map(int, re.findall(
            r'(\d+) packets (?:that the guest did not get )?are lost',
            self.qemu.said()[said:])))
        if o.takes:
            o.tap.lost += lost
        elif o.captures and not fast:
            if o.account() + lost != o.offered:
                raise Failure('accounting', f'{o.id}, deleted: '
                              + self.balance(o) + f', lost {lost}')
        elif o.captures and o.got + lost > o.offered:
            raise Failure('accounting', f'{o.id}, deleted: offered '
                          f'{o.offered}, got {o.got}, lost {lost}')

    def balance(self, o):
        return f'offered {o.offered}, got {o.got}, ' + ', '.join(
            f'{name} {o.counters[name]}' for name in COUNTERS
            if o.counters[name])

    # Steps; each does nothing where it makes no sense.

    def do_status(self, slot, on):
        o = self.objects.get(slot)
        if o:
            o.status = on
            self.qemu.set(o.id, 'status', 'on' if on else 'off')

    def do_stop(self):
        self.qemu.qmp('stop')
        self.running = False

    def do_cont(self):
        self.qemu.qmp('cont')
        self.running = True

    def offer(self, tap, origin, other_queue, count, size):
        """New numbers, for frames that those who capture are to get"""
        first = self.number(origin, size, count)
        for o in self.objects.values():
            if self.copies(o) and o.tap is tap and o.queue != other_queue:
                o.offered += count
                o.offered_bytes += count * size
                o.ranges.append([first, first + count])
        return first

    def copies(self, o):
        return o.source(self.running) == 'packet-socket'

    def do_send(self, number, count, size):
        """From the host toward the guest"""
        tap = self.taps[number]
        if not tap.up:
            return
        size = min(size, tap.mtu + 14)
        first = self.offer(tap, 'host', 'rx', count, size)
        tap.sent += count
        for i in range(count):
            tap.host.send(self.frame(first + i, size))
            if i % 200 == 199:
                self.pump()

    def do_answer(self, number, count, size):
        """From the guest toward the network"""
        tap = self.taps[number]
        if not tap.up or not self.running:
            return
        size = min(size, tap.mtu + 14)
        first = self.offer(tap, 'guest', 'tx', count, size)
        mine = range(first, first + count)
        for i in mine:
            tap.guest.send(self.frame(i, size))
            if i % 200 == 199:
                self.pump()
        self.wait('accounting', 'from the guest', lambda: None if
                  tap.arrived_network.issuperset(mine) else
                  f'of {count} frames {len(set(mine) & tap.arrived_network)} '
                  'came')

    def do_fill(self, slot, size, extra):
        """Send what a peer that does not read makes wait in QEMU, exactly."""
        o = self.objects.get(slot)
        if not (o and self.copies(o) and o.out and o.stalled and
                o.peers == 1 and o.tap.up and o.queue != 'rx'):
            return
        size = min(size, o.tap.mtu + 14)
        head = o.head.size

        def behind():
            self.look_counters([o])
            missing = o.offered - o.counters['capture-packets'] - sum(
                o.counters[name] for name in COUNTERS)
            return f'{missing} not captured' if missing else None
        for _ in range(60):
            try:
                self.wait('pending', 'filling', behind, 0.2)
            except Failure:
                break           # full
            inside = struct.unpack('i', fcntl.ioctl(
                o.out, termios.FIONREAD, b'\0' * 4))[0]
            staged = o.offered_bytes - inside - o.got_bytes + \
                head * o.counters['capture-packets']
            left = o.limit // 8 - staged
            if left <= 0:
                break
            self.do_send(o.tap.number, max(1, left // (size + head)), size)
        if extra:
            self.do_send(o.tap.number, extra, size)

    def do_stall(self, slot):
        o = self.objects.get(slot)
        if o and o.captures and not o.dump:
            o.stalled = True

    def do_read(self, slot, amount):
        """All, from now on, or an amount once; do not wait for QEMU."""
        o = self.objects.get(slot)
        if not o or not o.out:
            return
        if amount is None:
            o.stalled = False
            self.read(o)
            return
        o.stalled = True
        end = time.monotonic() + 0.05
        goal = o.got_bytes + amount
        while o.got_bytes < goal and time.monotonic() < end:
            if self.read(o, goal - o.got_bytes):
                break
            select.select([o.out], [], [], 0.005)

    def do_close(self, slot, end):
        o = self.objects.get(slot)
        if o and getattr(o, end):
            self.disconnect(o, end)

    def do_connect(self, slot, end, stalled):
        o = self.objects.get(slot)
        if o and end in o.chardevs and not getattr(o, end):
            if end == 'out':
                o.stalled = stalled
            self.connect(o, end)

    def do_inject(self, slot, count, size):
        o = self.objects.get(slot)
        if not (o and o.injects and o.into):
            return
        first = self.number(o.key, size, count) if size > HEAD.size else 0
        for i in range(first, first + count):
            if o.spec['vnet']:
                header = bytes(o.spec['header'])
                o.to_write += struct.pack('>II', len(header) + size,
                                          len(header)) + header
            else:
                o.to_write += struct.pack('>I', size)
            o.to_write += self.frame(i, size)
        o.written += count
        self.write(o)

    def do_mtu(self, number, mtu):
        tap = self.taps[number]
        tap.mtu = mtu
        tap.control(SIOCSIFMTU, mtu)

    def do_down(self, number):
        tap = self.taps[number]
        if tap.up:
            tap.up = False
            tap.was_down = True
            tap.control(SIOCSIFFLAGS, 0)

    def do_up(self, number):
        tap = self.taps[number]
        if not tap.up:
            tap.up = True
            tap.control(SIOCSIFFLAGS, IFF_UP)

    def do_linger(self):
        """Wait until who does not capture is not hooked either."""
        want = sum(self.copies(o) and o.tap.up for o in self.objects.values())
        self.wait('sockets', f'{want} captures', lambda: self.hooked() != want
                  and f'{self.hooked()} packet sockets are hooked', 2 * SOON)

    # Sequences

    def run(self, steps):
        """Of one sequence"""
        if not self.qemu:
            self.start()
        self.serial = (self.serial + 1) & 0xffffffff
        self.next_number = 1
        self.origins = [(0, '', 0)]
        self.objects = {}
        self.injectors = {}
        for tap in self.taps:
            tap.reset()
        fds = self.fds()
        for name, *arguments in steps:
            if name == 'end':
                continue
            getattr(self, f'do_{name}')(*arguments)
            if name in CHANGES:
                self.sync()
        self.settle()
        order, netdevs, quits = steps[-1][1:]
        if quits:
            self.quit()
            return
        if netdevs:
            # The filters go with them.
            for number, tap in enumerate(self.taps):
                tap.close()
                self.taps[number] = Interface(self, number)
            for o in self.objects.values():
                o.exists = False
        for slot in order:
            self.do_del(slot)
        self.check_leftovers(fds)
        self.age += 1
        if self.age == RESTART:
            self.quit()

    def settle(self):
        """Let all frames come to where they go, and count."""
        for tap in self.taps:
            self.do_up(tap.number)
        for o in self.objects.values():
            o.stalled = False
        self.sync()
        self.wait_accounts()
        self.expect_idle('with objects')
        if not self.running:
            self.do_cont()
            self.sync()
        for o in self.objects.values():
            if o.takes and not o.out and \
                    o.counters['capture-pending']:
                self.connect(o, 'out')
        self.wait_accounts()
        for tap in self.taps:
            self.wait('accounting', tap.name,
                      lambda tap=tap: self.wrong_tap(tap), SOON)

    def wait_accounts(self):
        objects = list(self.objects.values())
        start, looks = time.monotonic(), 0

        def wrong():
            nonlocal looks
            looks += 1
            self.look_counters(objects)
            for o in objects:
                failure = self.wrong_object(o)
                # A peer that still gets something may be a while.
                late = time.monotonic() - max(start, o.progress) > SOON
                if failure and late and looks > LOOKS:
                    raise Failure(*failure)
                if failure:
                    return str(failure)
            return None
        self.wait('accounting', 'in vain', wrong)

    def wrong_object(self, o):
        c = o.counters
        if o.captures:
            if c['capture-pending'] and (o.out or o.dump or not o.takes):
                return 'pending', f'{o.id} has capture-pending; ' \
                    + self.balance(o)
            if not o.takes and o.account() != o.offered:
                return 'accounting', f'{o.id}: ' + self.balance(o)
            if not c['capture-pending'] and not c['capture-peer-drops'] and \
                    o.got != c['capture-packets']:
                return 'accounting', f'{o.id}: captured ' \
                    f'{c["capture-packets"]}, got {o.got}'
        if o.injects and o.status and (self.running or o.queue == 'tx') and \
                o.spec['running' if self.running else 'stopped']:
            count = sum(c[name] for name in INJECT_COUNTERS)
            if not o.written - o.unsure <= count <= o.written or o.to_write:
                return 'accounting', f'{o.id}: to inject {o.written}, of ' \
                    f'which {o.unsure} unsure; counted {count}'
            if c.get('inject-pending') and not o.unsure:
                return 'pending', f'{o.id} has inject-pending ' \
                    f'{c["inject-pending"]}'
        elif o.injects and sum(c[name] for name in INJECT_COUNTERS) > \
                o.written:
            return 'accounting', f'{o.id}: injected more than was written'
        return None

    def wrong_tap(self, tap):
        """Where what was sent toward the guest has come to"""
        injectors = [o for o in self.injectors.values() if o.tap is tap]
        dropped = tap.tx_dropped() - tap.dropped
        missing = tap.sent - tap.arrived_sent - tap.lost
        # What is injected and waits for room counts each time as dropped.
        if missing > dropped or missing != dropped and not injectors:
            return f'sent {tap.sent}, arrived {tap.arrived_sent}, lost with ' \
                f'filters {tap.lost}, dropped by the TAP {dropped}'
        for o in injectors:
            if not o.exists or tap.lost:
                continue
            missing = o.counters['inject-packets'] - o.reached
            # The kernel may still drop what is on its way to the network
            # when the interface goes down.
            if missing < 0 or missing and not (o.queue == 'rx' and
                                               tap.was_down):
                return f'{o.id} has injected ' \
                    f'{o.counters["inject-packets"]}, of which {o.reached} ' \
                    'arrived'
        return None

    def check_leftovers(self, fds):
        for tap in self.taps:
            self.do_mtu(tap.number, MAX_MTU)
        self.wait('sockets', 'after the last object', lambda: self.hooked() and
                  f'{self.hooked()} packet sockets are hooked', SOON)
        self.expect_idle('without objects')

        def wrong():
            now = self.fds()
            if len(now) <= len(fds):
                return None
            more = collections.Counter(now) - collections.Counter(fds)
            return f'{len(now)} file descriptors, not {len(fds)}: {more}'
        self.wait('descriptors', 'after the last object', wrong, SOON)
        self.check_alive()
