# SPDX-License-Identifier: GPL-2.0-or-later
"""
A QEMU with TAPs and no guest, what is done to it, and where each frame must
have come to; for test-model.
"""

import collections
import fcntl
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

LIMIT = 20              # seconds that anything may take
TAPS = 2
RESTART = 50            # sequences that one QEMU sees
MAX_MTU = 65521
# Addresses, EtherType; then the sequence, the frame, its origin and its size
HEAD = struct.Struct('>6s6sHIIII')
TO, FROM, ETHERTYPE = b'\2\0\0\0\0\1', b'\2\0\0\0\0\2', 0x88b5
WILD = b'\2\0\0\0\0\3'  # the address to which wild frames go
HOST, GUEST = 0, 1      # origins; others are objects that inject
FILL = memoryview(random.Random(1).randbytes(1 << 17))
MIB = 1 << 20
QUEUE_LEN = 8000        # of the TAP, in frames

SOL_PACKET, PACKET_IGNORE_OUTGOING = 263, 23
SIOCSIFFLAGS, SIOCSIFMTU, SIOCSIFTXQLEN = 0x8914, 0x8922, 0x8943
IFF_UP = 1

# The steps after which captures may have other sources
CHANGES = ('add', 'status', 'run', 'close', 'connect', 'link')
COUNTERS = ('capture-kernel-drops', 'capture-peer-drops',
            'capture-skipped')
INJECT_COUNTERS = ('inject-packets', 'inject-skipped',
                   'inject-interface-drops')


class Failure(Exception):
    def __init__(self, kind, text):
        super().__init__(f'{kind}: {text}')
        self.kind = kind


def enter_namespace():
    """A network namespace of our own, where sockets queue many frames."""
    common.enter_namespace()
    path = pathlib.Path('/proc/sys/net/unix/max_dgram_qlen')
    if path.exists():
        path.write_text(str(1 << 20))


def wild_record(rng):
    """For an indev: a frame with a header of which some fields are anything"""
    size, at = rng.choice((20, rng.randrange(3000), 20000)), rng.randrange(999)
    protocol, gso_type, csum_offset = rng.choice((
        (6, 0, 16), (6, 1, 16), (6, 1 | 128, 16), (17, 3, 6), (17, 5, 6)))
    frame = struct.pack('>6s6sHBBHHHBBHII', WILD, FROM, 0x800,
                        0x45, 0, 20 + size, 1, 0x4000, 64, protocol, 0,
                        0xc0000201, 0xc0000202) + FILL[at:at + size]
    fields = [1, gso_type, rng.choice((0, 42, 54)),
              rng.choice((48, 100, 1400)), 34, csum_offset]
    for i in range(len(fields)):
        if rng.random() < 0.07:
            fields[i] = rng.randrange(256 if i < 2 else 65536)
    header = struct.pack('<BBHHHH', *fields) + \
        rng.randbytes(rng.choice((0, 2, 2, 14, 14, 15)))
    length = len(header)
    if rng.random() < 0.1:
        length = rng.choice((1, 9, rng.randrange(1 << 32)))
    if rng.random() < 0.1:
        frame = frame[:rng.randrange(60)]
    return struct.pack('>II', len(header) + len(frame), length) + \
        header + frame


class Interface:
    """A TAP, its hub, and what stands for the guest."""

    def __init__(self, qemu, number):
        self.name = f'mt{number}'
        self.guest, other = socket.socketpair(socket.AF_UNIX,
                                              socket.SOCK_DGRAM)
        for end in self.guest, other:
            force_buffer(end, SO_SNDBUFFORCE, 256 * MIB)
        self.guest.setblocking(False)
        qemu.monitor.send_fd_scm(other.fileno())
        qemu.qmp('getfd', fdname=f'g{number}')
        other.close()
        qemu.qmp('netdev_add', type='tap', id=f'n{number}', ifname=self.name,
                 script='no', downscript='no', vhost=False)
        qemu.qmp('netdev_add', type='hubport', id=f'h{number}', hubid=number,
                 netdev=f'n{number}')
        qemu.qmp('netdev_add', type='dgram', id=f'd{number}',
                 local={'type': 'fd', 'str': f'g{number}'})
        qemu.qmp('netdev_add', type='hubport', id=f'p{number}', hubid=number,
                 netdev=f'd{number}')
        self.host = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self.control(SIOCSIFTXQLEN, QUEUE_LEN)
        self.host.bind((self.name, 0))
        force_buffer(self.host, SO_SNDBUFFORCE, 64 * MIB)
        # What leaves the TAP toward the network
        self.network = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self.network.setblocking(False)
        self.network.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        force_buffer(self.network, SO_RCVBUFFORCE, 64 * MIB)
        self.network.bind((self.name, 3))

    def control(self, request, value):
        fcntl.ioctl(self.host, request,
                    struct.pack('16si12x', self.name.encode(), value))

    def set_mtu(self, mtu):
        self.mtu = mtu
        self.control(SIOCSIFMTU, mtu)

    def set_link(self, up):
        self.up = up
        self.was_down |= not up
        self.control(SIOCSIFFLAGS, IFF_UP if up else 0)

    def reset(self):
        """At the beginning of a sequence"""
        self.sent = 0                   # toward the guest
        self.arrived = set()            # of these and of what was injected
        self.arrived_sent = 0
        self.arrived_network = set()
        self.last = {}                  # of each origin, at each receiver
        self.lost = 0                   # with a filter that had taken them
        self.injected = self.was_down = False
        self.dropped = self.tx_dropped()
        self.set_mtu(MAX_MTU)
        self.set_link(True)

    def tx_dropped(self):
        return common.tx_dropped(self.name)


class Object:
    """A filter, its character devices, and who is at their other ends."""

    def __init__(self, spec, slot, tap, origin):
        self.spec, self.tap, self.origin = spec, tap, origin
        self.id = f'o{slot}'
        self.captures = spec['kind'] != 'inject'
        self.injects = spec['kind'] in ('inject', 'both')
        self.head = struct.Struct('>II' if spec['vnet'] else '>I')
        self.takes = spec['kind'] == 'redirector' and not spec['running']
        self.chardevs = {}              # for 'out' and 'into'
        self.queue = spec['queue']
        self.status = spec['status']
        self.stalled = spec['stalled']
        self.out = self.into = None     # the peers' sockets
        self.buffer = bytearray()       # read and not a frame yet
        self.expected = collections.deque()     # frames that were copied
        self.offered = self.offered_bytes = 0
        self.got = self.got_bytes = 0
        self.to_write = bytearray()
        self.written = 0                # frames to inject
        self.wild = 0                   # of these, are anything
        self.unsure = 0                 # of these, may not have been read
        self.reached = 0                # of these, came to where they go
        self.counters = {}

    def works(self, running):
        return self.status and self.spec['running' if running else 'stopped']

    def source(self, running):
        """What the manual says."""
        if not self.works(running):
            return 'none'
        if self.takes:
            return 'chain'
        return 'packet-socket' if self.captures and self.out else 'none'

    def expect(self, number):
        """A frame was copied."""
        while self.expected and self.expected[0] < number:
            self.expected.popleft()
        if not self.expected or self.expected.popleft() != number:
            raise Failure('order', f'{self.id}: got frame {number}, which '
                          'it had before, or was not to get')

    def dropped(self):
        return sum(self.counters[name] for name in COUNTERS)

    def balance(self):
        return f'offered {self.offered}, got {self.got}, ' + ', '.join(
            f'{name} {self.counters[name]}' for name in COUNTERS
            if self.counters[name])


class World:
    """QEMU and everything around it."""

    def __init__(self, directory):
        self.directory = pathlib.Path(directory)
        self.qemu = None
        self.serial = 0
        self.taps = []
        self.objects = {}

    # QEMU

    def start(self):
        self.qemu = Qemu('qemu', self.directory, '-machine', 'none',
                         '-accel', 'qtest')
        self.qemu.connect()
        self.running = True
        self.taps = [Interface(self.qemu, number) for number in range(TAPS)]
        self.age = 0

    def quit(self):
        try:
            self.qemu.qmp('quit')
            status = self.qemu.process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            status = 'none'
        if status:
            raise Failure('alive', f'after "quit", status {status}: '
                          f'{self.qemu.said()[-2000:]}')
        self.stop()

    def stop(self):
        if not self.qemu:
            return
        self.qemu.end()
        for tap in self.taps:
            for sock in tap.guest, tap.host, tap.network:
                sock.close()
        self.qemu = None

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
        return found

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
        while True:
            late = time.monotonic() > end
            self.pump()
            wrong = condition()
            if not wrong:
                return
            if late:
                self.check_alive()
                raise Failure(kind, f'{what}: {wrong}')
            time.sleep(pause)
            pause = min(2 * pause, 0.005)

    # Frames

    def frames(self, origin, count, size):
        """New ones: the number of each, and its bytes"""
        for _ in range(count):
            number = self.next_number
            self.next_number += 1
            yield number, HEAD.pack(TO, FROM, ETHERTYPE, self.serial, number,
                                    origin, size)[:size] + \
                FILL[:max(size - HEAD.size, 0)]

    def look(self, frame, where):
        """Which one a frame is; it must be as it was sent."""
        if frame[:6] == WILD:
            return 0, None
        if len(frame) < HEAD.size:
            raise Failure('order', f'{where} got {len(frame)} bytes')
        *head, serial, number, origin, size = HEAD.unpack_from(frame)
        if serial != self.serial or number >= self.next_number or \
                head != [TO, FROM, ETHERTYPE]:
            raise Failure('order', f'{where} got a frame that is not of this '
                          f'sequence: {bytes(frame[:32]).hex()}')
        if len(frame) != size or frame[HEAD.size:] != \
                FILL[:size - HEAD.size]:
            raise Failure('order', f'{where} got frame {number} of {size} '
                          f'bytes changed, with {len(frame)} bytes')
        return number, origin

    def arrive(self, tap, frame, where):
        """A frame at the guest or the network, or taken from the former"""
        number, origin = self.look(frame, where)
        if not number:
            return
        arrived = tap.arrived_network if where == 'network' else tap.arrived
        key = where, origin
        if number in arrived or number < tap.last.get(key, 0):
            raise Failure('order', f'{tap.name}: frame {number} of {origin} '
                          f'came to {where} twice or late')
        arrived.add(number)
        tap.last[key] = number
        if origin == HOST:
            tap.arrived_sent += 1
        elif origin != GUEST:
            injector = self.injectors[origin]
            if injector.tap is not tap:
                raise Failure('order', f'frame of {origin} at {tap.name}')
            if (where == 'network') == (injector.queue == 'rx'):
                injector.reached += 1

    def parse(self, o):
        """What a peer has read so far"""
        at, data = 0, o.buffer
        while len(data) - at >= o.head.size:
            length, *more = o.head.unpack_from(data, at)
            header = more[0] if more else 0
            begin, end = at + o.head.size, at + o.head.size + length
            if not header <= length <= 69632:
                raise Failure('order', f'{o.id}: a record of {length} bytes, '
                              f'with a header of {header}')
            if end > len(data):
                break
            o.got += 1
            frame = data[begin + header:end]
            if o.takes:
                self.arrive(o.tap, frame, o.origin)
            else:
                o.expect(self.look(frame, o.id)[0])
            at = end
        del data[:at]

    def read(self, o, limit=1 << 30):
        """What is there; returns whether that was the end."""
        while limit > 0:
            try:
                data = o.out.recv(min(limit, 1 << 18))
            except BlockingIOError:
                return False
            except ConnectionResetError:
                return True
            if not data:
                return True
            limit -= len(data)
            o.got_bytes += len(data)
            o.buffer += data
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
            if o.out and not o.stalled and self.read(o):
                raise Failure('alive', f'QEMU has ended {o.id}\'s connection')
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

    def expect_connected(self, o, end, want):
        def wrong():
            for chardev in self.qemu.qmp('query-chardev'):
                if chardev['label'] == o.chardevs[end] and want == \
                        chardev['filename'].startswith('disconnected'):
                    return chardev['filename']
            return None
        self.wait('source', f'{o.id} {end}', wrong)

    def connect(self, o, end):
        peer = socket.socket(socket.AF_UNIX)
        peer.connect(str(self.directory / o.chardevs[end]))
        peer.setblocking(False)
        setattr(o, end, peer)
        self.expect_connected(o, end, True)

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
        self.expect_connected(o, end, False)

    # Counters

    def look_counters(self, objects):
        if objects:
            answer = self.qemu.qmp(
                'qom-list-get', paths=[f'/objects/{o.id}' for o in objects])
            for o, listed in zip(objects, answer):
                o.counters = {p['name']: p.get('value')
                              for p in listed['properties']}

    def sync(self):
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
        self.wait('source', 'sources', wrong)

    def copies(self, o):
        return o.source(self.running) == 'packet-socket'

    # Steps; each does nothing where it makes no sense.

    def do_add(self, slot, spec):
        tap = self.taps[spec['tap']]
        if slot in self.objects:
            return
        o = Object(spec, slot, tap, self.next_origin)
        # What one injects toward the network the other would capture, when
        # QEMU comes to it.
        if o.queue != 'tx' and any(
                other.tap is tap and other.queue != 'tx' and
                other.injects != o.injects for other in self.objects.values()):
            return
        self.next_origin += 1
        properties = {'buffer-size': spec['size']} if spec['size'] else {}
        for end, name, wanted in (('out', 'outdev', o.captures),
                                  ('into', 'indev', o.injects)):
            if wanted:
                chardev = o.chardevs[end] = f'{end}{o.origin}'
                self.qemu.add_socket(chardev, self.directory / chardev, True)
                properties[name] = chardev
        self.qemu.add_filter(
            'mirror' if spec['kind'] == 'mirror' else 'redirector', o.id,
            f'n{spec["tap"]}', queue=o.queue, vnet_hdr_support=spec['vnet'],
            enable_when_running=spec['running'],
            enable_when_stopped=spec['stopped'],
            status='on' if o.status else 'off',
            **{'packet-socket': 'on'}, **properties)
        self.objects[slot] = o
        if o.injects:
            self.injectors[o.origin] = o
            tap.injected = True
        if spec['connected']:
            for end in o.chardevs:
                self.connect(o, end)

    def do_del(self, slot):
        o = self.objects.get(slot)
        if not o:
            return
        self.look_counters([o])
        said = len(self.qemu.said())
        self.qemu.qmp('object-del', id=o.id)
        for chardev in o.chardevs.values():
            self.qemu.qmp('chardev-remove', id=chardev)
        if o.out:
            end = time.monotonic() + LIMIT
            while not self.read(o):
                select.select([o.out], [], [], 0.1)
                if time.monotonic() > end:
                    raise Failure('alive', f'the connection of {o.id} stays')
            o.out.close()
        if o.into:
            o.into.close()
        del self.objects[slot]
        self.check_alive()
        lost = sum(map(int, re.findall(
            r'(\d+) packets (?:that the guest did not get )?were lost',
            self.qemu.said()[said:])))
        if o.takes:
            o.tap.lost += lost
        elif o.captures and o.got + o.dropped() + lost != o.offered:
            raise Failure('accounting', f'{o.id}, deleted: {o.balance()}, '
                          f'lost {lost}')

    def do_status(self, slot, on):
        o = self.objects.get(slot)
        if o:
            o.status = on
            self.qemu.set(o.id, 'status', 'on' if on else 'off')

    def do_run(self, on):
        """The VM runs, or not."""
        self.qemu.qmp('cont' if on else 'stop')
        self.running = on

    def send(self, tap, origin, count, size):
        """Frames that those who capture are to get; return their numbers."""
        size = min(size, tap.mtu + 14)
        sock, other = (tap.host, 'rx') if origin == HOST else (tap.guest, 'tx')
        captures = [o for o in self.objects.values() if self.copies(o) and
                    o.tap is tap and o.queue != other]
        numbers = []
        for number, frame in self.frames(origin, count, size):
            for o in captures:
                o.offered += 1
                o.offered_bytes += o.head.size + size
                o.expected.append(number)
            try:
                sock.send(frame)
            except BlockingIOError:     # without privilege its buffer is small
                self.pump()
                select.select([], [sock], [], LIMIT)
                sock.send(frame)
            numbers.append(number)
            if len(numbers) % 200 == 0:
                self.pump()
        return numbers

    def do_send(self, number, count, size):
        """From the host toward the guest"""
        tap = self.taps[number]
        if tap.up:
            tap.sent += count
            self.send(tap, HOST, count, size)

    def do_answer(self, number, count, size):
        """From the guest toward the network"""
        tap = self.taps[number]
        if tap.up and self.running:
            missing = set(self.send(tap, GUEST, count, size))
            self.wait('accounting', 'of frames from the guest do not come',
                      lambda: len(missing - tap.arrived_network))

    def do_fill(self, slot, size, extra):
        """Send what a peer that does not read makes wait in QEMU, exactly."""
        o = self.objects.get(slot)
        if not (o and self.copies(o) and o.stalled and o.tap.up and
                o.queue != 'rx'):
            return
        size = min(size, o.tap.mtu + 14)

        def behind():
            self.look_counters([o])
            return o.offered - o.counters['capture-packets'] - o.dropped()
        for _ in range(60):
            try:
                self.wait('accounting', 'not captured', behind, 0.2)
            except Failure as err:
                if err.kind == 'accounting':
                    break       # full
                raise
            unread = struct.unpack('i', fcntl.ioctl(
                o.out, termios.FIONREAD, b'\0' * 4))[0]
            left = (o.spec['size'] or 8 * MIB) // 8 - \
                (o.offered_bytes - o.got_bytes - unread)
            if left <= 0:
                break
            self.do_send(o.spec['tap'], max(1, left // (size + o.head.size)),
                         size)
        self.do_send(o.spec['tap'], extra, size)

    def do_read(self, slot, amount):
        """All, from now on, or an amount once; do not wait for QEMU."""
        o = self.objects.get(slot)
        if not o or not o.captures:
            return
        o.stalled = amount is not None
        end = time.monotonic() + 0.05
        goal = o.got_bytes + (amount or 0)
        while o.out and o.got_bytes < goal and time.monotonic() < end and \
                not self.read(o, goal - o.got_bytes):
            select.select([o.out], [], [], 0.005)

    def do_close(self, slot, end):
        o = self.objects.get(slot)
        if o and getattr(o, end):
            self.disconnect(o, end)

    def do_connect(self, slot, end):
        o = self.objects.get(slot)
        if o and end in o.chardevs and not getattr(o, end):
            self.connect(o, end)

    def do_inject(self, slot, count, size, wild):
        """WILD is the seed of wild frames, which may come to somewhere."""
        o = self.objects.get(slot)
        if not (o and o.into):
            return
        if wild and o.spec['vnet']:
            rng = random.Random(wild)
            for _ in range(count):
                o.to_write += wild_record(rng)
            o.wild += count
        else:
            header = bytes(o.spec['header'] if o.spec['vnet'] else 0)
            prefix = o.head.pack(len(header) + size, len(header)) \
                if o.spec['vnet'] else o.head.pack(size)
            for _, frame in self.frames(o.origin, count, size):
                o.to_write += prefix + header + frame
        o.written += count
        self.write(o)

    def do_mtu(self, number, mtu):
        self.taps[number].set_mtu(mtu)

    def do_link(self, number, up):
        self.taps[number].set_link(up)

    # Sequences

    def run(self, steps):
        """Of one sequence"""
        if not self.qemu:
            self.start()
        self.serial = (self.serial + 1) & 0xffffffff
        self.next_number, self.next_origin = 1, GUEST + 1
        self.objects, self.injectors = {}, {}
        for tap in self.taps:
            tap.reset()
        fds = self.fds()
        for name, *arguments in steps:
            getattr(self, f'do_{name}')(*arguments)
            if name in CHANGES:
                self.sync()
        self.settle()
        self.age += 1
        if self.age == RESTART:
            # The objects end with QEMU.
            self.quit()
            return
        for slot in list(self.objects):
            self.do_del(slot)
        self.check_leftovers(fds)

    def settle(self):
        """Let all frames come to where they go, and count."""
        for tap in self.taps:
            tap.set_link(True)
        for o in self.objects.values():
            o.stalled = False
        self.sync()
        self.wait('accounting', 'objects', self.wrong_objects)
        self.expect_idle('with objects')
        if not self.running:
            self.do_run(True)
            self.sync()
        for o in self.objects.values():
            if o.takes and not o.out and o.counters['capture-pending']:
                self.connect(o, 'out')
        self.wait('accounting', 'objects', self.wrong_objects)
        for tap in self.taps:
            self.wait('accounting', tap.name,
                      lambda tap=tap: self.wrong_tap(tap))

    def wrong_objects(self):
        objects = list(self.objects.values())
        self.look_counters(objects)
        return next(filter(None, map(self.wrong_object, objects)), None)

    def wrong_object(self, o):
        c = o.counters
        if o.captures:
            if c['capture-pending'] and (o.out or not o.takes):
                return f'{o.id} has capture-pending; {o.balance()}'
            if not o.takes and o.got + o.dropped() != o.offered:
                return f'{o.id}: {o.balance()}'
            if not c['capture-pending'] and not c['capture-peer-drops'] and \
                    o.got != c['capture-packets']:
                return f'{o.id}: captured {c["capture-packets"]}, got {o.got}'
        if not o.injects:
            return None
        count = sum(c[name] for name in INJECT_COUNTERS)
        said = f'{o.id}: to inject {o.written}, of which {o.unsure} unsure; ' \
            f'counted {count}, pending {c.get("inject-pending")}'
        if count > o.written:
            return said
        if o.works(self.running) and (self.running or o.queue == 'tx') and (
                count < o.written - o.unsure or o.to_write or
                c.get('inject-pending') and not o.unsure):
            return said
        return None

    def wrong_tap(self, tap):
        """Where what was sent toward the guest has come to"""
        dropped = tap.tx_dropped() - tap.dropped
        missing = tap.sent - tap.arrived_sent - tap.lost
        # What is injected and waits for room counts each time as dropped.
        if missing > dropped or missing != dropped and not tap.injected:
            return f'sent {tap.sent}, arrived {tap.arrived_sent}, lost with ' \
                f'filters {tap.lost}, dropped by the TAP {dropped}'
        for o in self.objects.values():
            if o.tap is not tap or not o.injects or tap.lost:
                continue
            injected = o.counters['inject-packets']
            # The kernel may still drop what is on its way to the network
            # when the interface goes down.
            if not 0 <= injected - o.reached <= o.wild and not (
                    o.reached < injected and o.queue == 'rx' and tap.was_down):
                return f'{o.id} has injected {injected}, of which ' \
                    f'{o.reached} arrived, and {o.wild} need not'
        return None

    def check_leftovers(self, fds):
        ours = {os.fstat(tap.network.fileno()).st_ino for tap in self.taps}
        self.wait('sockets', 'packet sockets that are hooked',
                  lambda: set(common.hooked_sockets()) - ours)
        self.expect_idle('without objects')

        def wrong():
            now = self.fds()
            if len(now) <= len(fds):
                return None
            more = collections.Counter(now) - collections.Counter(fds)
            return f'{len(now)} file descriptors, not {len(fds)}: {more}'
        self.wait('descriptors', 'after the last object', wrong)
        self.check_alive()
