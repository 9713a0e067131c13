# SPDX-License-Identifier: GPL-2.0-or-later
"""
Who is measured.  Each contestant captures from, or injects into, TAPs of its
own, and one trial is one load.  Every trial checks that what was sent came or
was counted as dropped, in order and once.
"""

import contextlib
import ctypes
import dataclasses
import os
import re
import signal
import socket
import struct
import subprocess
import time

from lib.common import BUILD, Failure
from rig import (BENCH, Mismatch, Program, Qemu, Tap, RECEIVER_CPU,
                 SENDER_CPU, cpu_ns, wait_for)

PRODUCT, PEER = (where / 'qemu/qemu-system-x86_64' for where in (BUILD, BENCH))

# Of the kernel's headers; Python has no names for them.
SOL_PACKET, PACKET_STATISTICS, PACKET_VNET_HDR = 263, 6, 15
PACKET_QDISC_BYPASS = 20
SO_ATTACH_FILTER, SO_RCVBUFFORCE = 26, 33
ETH_P_ALL = 3

CAPTURE_DROPS = 'kernel-drops', 'peer-drops', 'skipped'


@dataclasses.dataclass(frozen=True)
class Load:
    """What is sent; see traffic.h."""
    size: int = 64
    rate: float = 40000
    seconds: float = 0.7
    gso: int = 0
    batch_us: int = 0
    burst: int = 1
    mix: int = 0
    written: int = 0    # every so many frames comes from the guest

    def options(self):
        return {**dataclasses.asdict(self), 'cpu': SENDER_CPU}

    def shape(self):
        """What a receiver has to know."""
        return {'size': self.size, 'gso': self.gso, 'mix': self.mix}

    def limit(self):
        return 30 + 3 * self.seconds


class Contestant:
    """One with a TAP, of which nothing has to be ended."""

    def __init__(self, name):
        self.name = name
        self.taps = [Tap(name.replace('-', ''))]
        self.taps[0].offload()

    def end(self):
        pass

    def outcome(self, load, sender, tally, drops, cpu, refused=0):
        """
        The metrics of report.py.  SENDER and TALLY are what the programs that
        sent and received have counted, DROPS what somebody has, CPU is the
        contestant's.  What was sent came, or was counted; in order, once.
        """
        sent, received = sender['sent'] + refused, tally['frames']
        if received + drops != sent:
            raise Mismatch(f'{self.name}: {sent} frames were sent, '
                           f'{received} came and {drops} were counted as '
                           f'dropped ({load})')
        if tally.get('disorder') or tally.get('foreign'):
            raise Mismatch(f'{self.name}: {tally["disorder"]} frames came '
                           f'late or twice, {tally["foreign"]} are not the '
                           f"benchmark's ({load})")
        if tally.get('missing', 0) > drops:
            raise Mismatch(f'{self.name}: {tally["missing"]} numbers are '
                           f'missing, {drops} were counted as dropped '
                           f'({load})')
        return {'rate': sent / sender['ns'] * 1e9,
                'lost': 100 * (1 - received / max(sent, 1)),
                'cpu_ns_per_packet': cpu / max(received, 1),
                'sender_ns_per_packet': sender['cpu_ns'] / max(sent, 1),
                **{f'{name}_us': tally[f'{name}_ns'] / 1e3
                   for name in ('p50', 'p99') if f'{name}_ns' in tally}}

    def tap_reader(self, load):
        """The program that reads what comes out of the TAP"""
        fds = [self.taps[0].reader]
        return Program('tap', fds, fds=fds, **load.shape(),
                       cpu=RECEIVER_CPU).ready()


def send(taps, load, **more):
    fds = ()
    if load.written:
        fds = [taps[0].reader]
        more['tap'] = fds[0]
    with Program('send', [tap.name for tap in taps], fds=fds,
                 **load.options(), **more) as sender:
        return sender.result(load.limit())


class QemuContestant(Contestant):
    """
    A redirector.  SOURCE is 'product', or what the QEMU without it has:
    'straightforward' or 'chain'.  With GUEST QEMU is started by that class,
    and reads the TAP itself.
    """

    def __init__(self, name, directory, source, taps=1,
                 inject=True, options=(), guest=None, queue=None, steer=True):
        binary = PRODUCT if source == 'product' else PEER
        if not os.access(binary, os.X_OK):
            raise Failure(f'there is no {binary}: run "make bench"')
        self.name = name
        self.queue = queue      # of the capture, or None: the default
        self.source = source
        self.product = source == 'product'
        prefix = re.sub('[^a-z0-9]', '', name)[:8]
        self.taps = [Tap(f'{prefix}{i}', steer=steer and source != 'chain'
                         and not guest)
                     for i in range(taps)]
        self.out = [f'{directory}/{name}.out{i}' for i in range(taps)]
        self.into = [f'{directory}/{name}.in{i}' for i in range(taps)]
        self.sockets = []       # that QEMU inherits
        options = list(options)
        for i in range(taps):
            options += self.capture_options(i)
            if inject:
                options += self.inject_options(i)
        self.qemu = (guest or Qemu)(
            name, binary, directory, self.taps, options,
            source == 'straightforward',
            [packet_socket.fileno() for packet_socket in self.sockets])

    @staticmethod
    def stream(name, path):
        return ['-chardev',
                f'socket,id={name},path={path},server=on,wait=off']

    @staticmethod
    def redirector(name, netdev, queue, ends):
        return ['-object', f'filter-redirector,id={name},netdev={netdev},'
                f'{f"queue={queue}," if queue else ""}{ends},'
                'vnet_hdr_support=on']

    def where(self):
        return ',packet-socket=on' if self.product else ''

    def capture_options(self, i):
        return self.stream(f'out{i}', self.out[i]) + self.redirector(
            f'cap{i}', f'n{i}', self.queue, f'outdev=out{i}' + self.where())

    def inject_options(self, i):
        # What the chain injects toward the guest needs a guest.
        queue = 'rx' if self.source == 'chain' else 'tx'
        return self.stream(f'in{i}', self.into[i]) + self.redirector(
            f'inj{i}', f'n{i}', queue, f'indev=in{i}' + self.where())

    def end(self):
        self.qemu.end()

    def counters(self, kind):
        total = {}
        for i, tap in enumerate(self.taps):
            for name, value in self.qemu.counters(f'{kind}{i}').items():
                total[name] = total.get(name, 0) + value
            total['tx_dropped'] = \
                total.get('tx_dropped', 0) + tap.statistic('tx_dropped')
        return total

    def await_source(self, wanted):
        """Until the redirector has seen that its peer came or went."""
        if self.product:
            wait_for(f'the source {wanted} of {self.name}', lambda: all(
                self.qemu.get(f'cap{i}', 'source') == wanted
                for i in range(len(self.taps))))
            return
        wait_for(f'the peer of {self.name}', lambda: all(
            dev['filename'].startswith('disconnected') == (wanted == 'none')
            for dev in self.qemu.qmp('query-chardev')
            if dev['label'].startswith('out')))

    @contextlib.contextmanager
    def watched(self, kind):
        """Yields a dict, and puts in by how much the counters have grown."""
        before, cpu = self.counters(kind), self.qemu.cpu_ns()
        grown = {}
        yield grown
        self.qemu.settle()
        grown['cpu'] = self.qemu.cpu_ns() - cpu
        after = self.counters(kind)
        grown.update({name: after[name] - before[name] for name in after})

    def outcome(self, load, sender, tally, drops, cpu, passed=None):
        """PASSED is how many packets the redirector has counted, if it
        does."""
        if passed not in (None, tally['frames']):
            raise Mismatch(f'{self.name}: {tally["frames"]} frames came, and '
                           f'{passed} are counted ({load})')
        return super().outcome(load, sender, tally, drops, cpu)

    def capture(self, load):
        with Program('read', self.out, **load.shape(),
                     cpu=RECEIVER_CPU) as reader:
            reader.ready()
            self.await_source('packet-socket')
            with self.watched('cap') as grown:
                sender = send(self.taps, load)
                reader.tell(sender['sent'])
                tally = reader.result()
        self.await_source('none')
        drops = grown['tx_dropped'] if self.source == 'chain' else sum(
            grown.get(f'capture-{name}', 0) for name in CAPTURE_DROPS)
        return self.outcome(load, sender, tally, drops, grown['cpu'],
                            grown['capture-packets'] if self.product else None)

    def inject(self, load):
        if self.source == 'chain':
            return self.inject_chain(load)
        with self.tap_reader(load) as reader, \
                Program('write', self.into, **load.options()) as writer, \
                self.watched('inj') as grown:
            writer.tell('')
            sender = writer.result(load.limit())
            reader.tell(sender['sent'])
            tally = reader.result()
        drops = sum(value for name, value in grown.items()
                    if name.startswith('inject-skipped')
                    or name == 'inject-interface-drops')
        return self.outcome(load, sender, tally, drops, grown['cpu'],
                            grown.get('inject-packets'))

    def inject_chain(self, load):
        """
        Written to the TAP, as if the guest had sent it: nobody has to read
        it, and the interface counts it.
        """
        tap = self.taps[0]
        before = tap.statistic('rx_packets')
        with Program('write', self.into, **load.options()) as writer, \
                self.watched('inj') as grown:
            writer.tell('')
            sender = writer.result(load.limit())
            wait_for(f'{sender["sent"]} frames of {self.name}', lambda:
                     tap.statistic('rx_packets') - before >= sender['sent'])
        received = tap.statistic('rx_packets') - before
        return self.outcome(load, sender, {'frames': received}, 0,
                            grown['cpu'])


class Dump(QemuContestant):
    """filter-dump.  Nobody reads what it writes, so its counters must do."""

    def capture_options(self, i):
        return ['-object', f'filter-dump,id=cap{i},netdev=n{i},'
                'maxlen=262144,file=/dev/null,packet-socket=on']

    def capture(self, load):
        self.await_source('packet-socket')
        with self.watched('cap') as grown:
            before = self.counters('cap')
            sender = send(self.taps, load)

            def done():
                after = self.counters('cap')
                return sender['sent'] <= sum(
                    after[f'capture-{name}'] - before[f'capture-{name}']
                    for name in ('packets', *CAPTURE_DROPS))
            wait_for(f'{sender["sent"]} frames of {self.name}', done)
        return self.outcome(
            load, sender, {'frames': grown['capture-packets']},
            sum(grown[f'capture-{name}'] for name in CAPTURE_DROPS),
            grown['cpu'])


def attach_filter(packet_socket):
    """Only what is sent to the interface."""
    code = b''.join(struct.pack('HBBI', *line) for line in (
        (0x20, 0, 0, 0xfffff004),               # ld [SKF_AD_PKTTYPE]
        (0x15, 0, 1, socket.PACKET_OUTGOING),
        (6, 0, 0, 0xffffffff), (6, 0, 0, 0)))
    memory = ctypes.create_string_buffer(code, len(code))
    packet_socket.setsockopt(
        socket.SOL_SOCKET, SO_ATTACH_FILTER,
        struct.pack('HxxxxxxQ', len(code) // 8, ctypes.addressof(memory)))


class Reuse(QemuContestant):
    """
    Upstream's redirectors on something else that has a packet socket: a
    netdev, or a character device; see netdev.patch and chardev.patch.  The
    socket is opened here, as by management software, with its BPF filter.
    """

    drops = 0       # which the socket forgets when it tells them

    def open_socket(self, i, protocol, vnet_hdr, bypass=False):
        """Returns the number under which QEMU gets it, too."""
        packet_socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        packet_socket.setsockopt(SOL_PACKET, PACKET_VNET_HDR, vnet_hdr)
        packet_socket.setsockopt(SOL_PACKET, PACKET_QDISC_BYPASS, bypass)
        packet_socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 2 << 20)
        if self.queue == 'tx':
            attach_filter(packet_socket)
        packet_socket.bind((self.taps[i].name, protocol))
        self.sockets.append(packet_socket)
        return packet_socket.fileno()

    def capture_options(self, i):
        fd = self.open_socket(i, ETH_P_ALL, self.source == 'netdev')
        # Without the second port the hub takes nothing, and the netdev of
        # which it has not taken a packet is not read again.
        hub = ['-netdev', f'hubport,id=h{i},hubid={i},netdev=p{i}',
               '-netdev', f'hubport,id=sink{i},hubid={i}']
        end = self.stream(f'out{i}', self.out[i]) + self.redirector(
            f'cap{i}', f'p{i}', 'tx', f'outdev=out{i}')
        if self.source == 'netdev':
            return ['-netdev', f'dgram,id=p{i},local.type=fd,local.str={fd}',
                    *hub, *end]
        # Only redirectors join two character devices, and they need a
        # netdev.  This one has no virtio-net header, so that the socket must
        # not have one either, or the stream would not tell its length.
        return ['-chardev', f'packet,id=packet{i},fd={fd}',
                '-netdev', f'hubport,id=p{i},hubid={1000 + i}', *hub,
                '-object', f'filter-redirector,id=from{i},netdev=p{i},'
                f'queue=tx,indev=packet{i}', *end]

    def inject_options(self, i):
        options = []
        if self.source == 'chardev':
            # A character device has one user, so this is another socket.
            fd = self.open_socket(i, 0, True, bypass=True)
            options = ['-chardev', f'packet,id=into{i},fd={fd}'] + \
                self.redirector(f'to{i}', f'p{i}', 'rx', f'outdev=into{i}')
        return options + self.stream(f'in{i}', self.into[i]) + \
            self.redirector(f'inj{i}', f'p{i}', 'rx', f'indev=in{i}')

    def counters(self, kind):
        """QEMU counts nothing; the socket and the interface do."""
        self.drops += struct.unpack('II', self.sockets[0].getsockopt(
            SOL_PACKET, PACKET_STATISTICS, 8))[1]
        return {'capture-kernel-drops': self.drops, 'inject-interface-drops':
                self.taps[0].statistic('tx_dropped')}


class Tcpdump(Contestant):
    """tcpdump, which writes to a cat that is not counted"""

    # A block of the kernel's ring is handed over after a second at the
    # latest.
    FLUSH = 1.1

    def capture(self, load):
        cat = subprocess.Popen(['cat'], stdin=subprocess.PIPE,
                               stdout=subprocess.DEVNULL)
        tcpdump = subprocess.Popen(
            ['tcpdump', '-n', '-Z', 'root', '-i', self.taps[0].name,
             '-w', '-'], stderr=subprocess.PIPE, stdout=cat.stdin)
        cat.stdin.close()
        try:
            said = b''
            while b'listening on' not in said:
                line = tcpdump.stderr.readline()
                if not line:
                    raise Failure(f'tcpdump: {said.decode().strip()}')
                said += line
            cpu = cpu_ns(tcpdump.pid)
            sender = send(self.taps, load)
            time.sleep(self.FLUSH)
            cpu = cpu_ns(tcpdump.pid) - cpu
            tcpdump.send_signal(signal.SIGINT)
            said = tcpdump.communicate(timeout=30)[1].decode()
        finally:
            for process in (tcpdump, cat):
                process.kill()
                process.wait()
        captured, drops = (int(re.search(rf'(\d+) packets? {name}', said)[1])
                           for name in ('captured', 'dropped by kernel'))
        return self.outcome(load, sender, {'frames': captured}, drops, cpu)


class Bare(Contestant):
    """
    A loop around recvmmsg() that also writes each frame to a peer, or one
    around sendmmsg()
    """

    def __init__(self, name, directory):
        super().__init__(name)
        self.path = f'{directory}/{name}'

    def capture(self, load):
        with Program('capture', [self.taps[0].name, self.path]) as loop:
            wait_for(self.path, lambda: os.path.exists(self.path))
            with Program('read', [self.path], **load.shape(),
                         cpu=RECEIVER_CPU) as reader:
                reader.ready()
                loop.ready()
                sender = send(self.taps, load)
                loop.tell(sender['sent'])
                result = loop.result()
                reader.tell(sender['sent'])
                tally = reader.result()
        os.unlink(self.path)
        return self.outcome(load, sender, tally, result['drops'],
                            result['cpu_ns'])

    def inject(self, load):
        with self.tap_reader(load) as reader:
            sender = send(self.taps, load, bypass=1)
            reader.tell(sender['sent'])
            tally = reader.result()
        return self.outcome(load, sender, tally, sender['refused'],
                            sender['cpu_ns'], sender['refused'])
