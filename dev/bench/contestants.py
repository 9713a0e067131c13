# SPDX-License-Identifier: GPL-2.0-or-later
"""
Who is measured.  Each contestant captures from, or injects into, TAPs of its
own, and one trial is one load.  Every trial checks that what was sent came or
was counted as dropped, in order and once.
"""

import collections
import contextlib
import dataclasses
import os
import re
import signal
import socket
import subprocess
import time

import rig
from lib.common import BUILD, Failure
from rig import Mismatch, Program, Tap, all_closed, connect, wait_for

PRODUCT, PEER = (where / 'qemu/qemu-system-x86_64'
                 for where in (BUILD, rig.BENCH))

CAPTURE_DROPS = 'kernel-drops', 'peer-drops', 'skipped'

# Frames per second; more than anybody can send
FLOOD = 1e7


@dataclasses.dataclass(frozen=True)
class Load:
    """What is sent; see traffic.c."""
    size: int = 64
    rate: float = 40000
    seconds: float = 0.7
    gso: int = 0
    batch_us: int = 0
    burst: int = 1
    mix: int = 0
    written: int = 0    # every so many frames comes from the guest

    def limit(self):
        return 30 + 3 * self.seconds


@contextlib.contextmanager
def sending(taps, load, bypass=False):
    """Yields the program."""
    with all_closed([rig.packet_socket(tap.name, bypass=bypass)
                     for tap in taps]) as sockets:
        files = [*sockets, taps[0].reader] if load.written else sockets
        with Program('send', files, load) as program:
            yield program


def send(taps, load, bypass=False):
    with sending(taps, load, bypass) as program:
        return program.result(limit=load.limit())


class Contestant:
    """One with a TAP, of which nothing has to be ended."""

    def __init__(self, name):
        self.name = name
        self.taps = [Tap(name.replace('-', ''))]
        self.taps[0].offload()

    def end(self):
        pass

    def outcome(self, load, sender, tally, drops, cpu, passed=None):
        """
        The metrics of report.py.  SENDER and TALLY are what the programs that
        sent and received have counted, DROPS what somebody has, CPU is the
        contestant's, PASSED what it has counted, if it does.  What was sent
        came, or was counted; in order, once.
        """
        sent, received = sender['sent'], tally['frames']
        if received + drops != sent or passed not in (None, received) or \
                tally.get('disorder') or tally.get('foreign') or \
                tally.get('missing', 0) > drops:
            raise Mismatch(f'{self.name}: {sent} frames were sent, {drops} '
                           f'are counted as dropped, {passed} as passed; '
                           f'what came is {tally} ({load})')
        return {'rate': sent / sender['ns'] * 1e9,
                'lost': 100 * (1 - received / max(sent, 1)),
                'cpu_ns_per_packet': cpu / max(received, 1),
                'sender_ns_per_packet': sender['cpu_ns'] / max(sent, 1),
                **{f'{name}_us': tally[f'{name}_ns'] / 1e3
                   for name in ('p50', 'p99') if f'{name}_ns' in tally}}

    def tap_reader(self, load):
        """The program that reads what comes out of the TAP"""
        reader = self.taps[0].reader
        while reader.read(1 << 17):
            pass                # What is left of earlier trials
        return Program('tap', [reader], load).ready()


class QemuContestant(Contestant):
    """
    A redirector.  SOURCE is 'product', or what the QEMU without it has.  With
    GUEST QEMU is started by that class, and reads the TAP itself.
    """

    def __init__(self, name, directory, source, taps=1, inject=True,
                 options=(), guest=None, queue=None,):
        binary = PRODUCT if source == 'product' else PEER
        if not os.access(binary, os.X_OK):
            raise Failure(f'there is no {binary}: run "make bench"')
        self.name = name
        self.queue = queue      # of the capture, or None: the default
        self.source = source
        self.where = ',packet-socket=on' if source == 'product' else ''
        prefix = re.sub('[^a-z0-9]', '', name)[:8]
        self.taps = [Tap(f'{prefix}{i}', steer=source != 'chain' and not guest)
                     for i in range(taps)]
        self.out = [f'{directory}/{name}.out{i}' for i in range(taps)]
        self.into = [f'{directory}/{name}.in{i}' for i in range(taps)]
        self.sockets = []       # that QEMU inherits, and ...
        self.env = {}           # ... where it learns of them
        options = list(options)
        for i in range(taps):
            options += self.capture_options(i)
            if inject:
                options += self.inject_options(i)
        self.qemu = (guest or rig.Qemu)(name, binary, directory, self.taps,
                                        options, self.sockets, self.env)

    @staticmethod
    def stream(name, path):
        return ['-chardev',
                f'socket,id={name},path={path},server=on,wait=off']

    @staticmethod
    def redirector(name, netdev, queue, ends):
        return ['-object', f'filter-redirector,id={name},netdev={netdev},'
                f'{f"queue={queue}," if queue else ""}{ends},'
                'vnet_hdr_support=on']

    def capture_options(self, i):
        return self.stream(f'out{i}', self.out[i]) + self.redirector(
            f'cap{i}', f'n{i}', self.queue,
            f'outdev=out{i}{self.where}')

    def inject_options(self, i):
        # What the chain injects toward the guest needs a guest.
        queue = 'rx' if self.source == 'chain' else 'tx'
        return self.stream(f'in{i}', self.into[i]) + self.redirector(
            f'inj{i}', f'n{i}', queue, f'indev=in{i}' + self.where)

    def end(self):
        self.qemu.end()

    def counters(self, kind):
        """Of all TAPs: the numbers of packets that the filters show"""
        total = collections.Counter()
        for i, tap in enumerate(self.taps):
            total['tx_dropped'] += tap.statistic('tx_dropped')
            name = f'{kind}{i}'
            for entry in self.qemu.qmp('qom-list', path=f'/objects/{name}'):
                if entry['type'] == 'uint64' and \
                        re.match('(capture|inject)-', entry['name']):
                    total[entry['name']] += self.qemu.get(name, entry['name'])
        return total

    def await_source(self, wanted):
        """Until the redirector has seen that its peer came or went."""
        if self.source == 'product':
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
        """Yields a Counter, and puts in by how much the others have grown."""
        before, cpu = self.counters(kind), self.qemu.cpu_ns()
        grown = collections.Counter()
        yield grown
        self.qemu.settle()
        grown['cpu'] = self.qemu.cpu_ns() - cpu
        grown.update(self.counters(kind))
        grown.subtract(before)

    def capture(self, load):
        with all_closed([connect(path) for path in self.out]) as peers, \
                Program('read', peers, load) as reader:
            reader.ready()
            self.await_source('packet-socket')
            with self.watched('cap') as grown:
                sender = send(self.taps, load)
                tally = reader.result(sender['sent'])
        self.await_source('none')
        drops = grown['tx_dropped'] if self.source == 'chain' else sum(
            grown[f'capture-{name}'] for name in CAPTURE_DROPS)
        return self.outcome(load, sender, tally, drops, grown['cpu'],
                            grown.get('capture-packets'))

    def inject(self, load):
        with all_closed([connect(path) for path in self.into]) as peers:
            if self.source == 'chain':
                return self.inject_chain(load, peers)
            with self.tap_reader(load) as reader, \
                    self.watched('inj') as grown, \
                    Program('write', peers, load) as writer:
                sender = writer.result(limit=load.limit())
                tally = reader.result(sender['sent'])
        drops = grown['inject-interface-drops'] + sum(
            value for name, value in grown.items()
            if name.startswith('inject-skipped'))
        return self.outcome(load, sender, tally, drops, grown['cpu'],
                            grown.get('inject-packets'))

    def inject_chain(self, load, peers):
        """
        Written to the TAP, as if the guest had sent it: nobody has to read
        it, and the interface counts it.
        """
        def received():
            return self.taps[0].statistic('rx_packets') - before
        before = self.taps[0].statistic('rx_packets')
        with self.watched('inj') as grown, \
                Program('write', peers, load) as writer:
            sender = writer.result(limit=load.limit())
            wait_for(f'{sender["sent"]} frames of {self.name}',
                     lambda: received() >= sender['sent'])
        return self.outcome(load, sender, {'frames': received()}, 0,
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


class Straightforward(QemuContestant):
    """
    Upstream's redirector on a packet socket; see straightforward.patch.  The
    socket is opened here, with its BPF filter.
    """

    drops = 0       # which the socket forgets when it tells them

    def capture_options(self, i):
        sock = rig.packet_socket(self.taps[i].name, rig.ETH_P_ALL,
                                 only_sent=self.queue == 'tx')
        sock.setblocking(False)
        self.sockets.append(sock)
        # QEMU gets it under the same number.
        self.env['BENCH_CAPTURE_SOCKET'] = str(sock.fileno())
        return super().capture_options(i)

    def counters(self, kind):
        """QEMU counts nothing; the socket does."""
        self.drops += rig.packet_socket_drops(self.sockets[0])
        return {'capture-kernel-drops': self.drops}


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
            cpu = rig.cpu_ns(tcpdump.pid)
            sender = send(self.taps, load)
            time.sleep(self.FLUSH)
            cpu = rig.cpu_ns(tcpdump.pid) - cpu
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

    def capture(self, load):
        with all_closed([
                rig.packet_socket(self.taps[0].name, rig.ETH_P_ALL),
                *socket.socketpair()]) as (source, end, peer), \
                Program('capture', [source, end], load) as loop, \
                Program('read', [peer], load) as reader:
            reader.ready()
            loop.ready()
            cpu = rig.cpu_ns(loop.process.pid)
            sender = send(self.taps, load)
            tally = reader.result(sender['sent'])
            cpu = rig.cpu_ns(loop.process.pid) - cpu
            drops = rig.packet_socket_drops(source)
        return self.outcome(load, sender, tally, drops, cpu)

    def inject(self, load):
        with self.tap_reader(load) as reader:
            sender = send(self.taps, load, bypass=True)
            tally = reader.result(sender['sent'])
        sender['sent'] += sender['refused']
        return self.outcome(load, sender, tally, sender['refused'],
                            sender['cpu_ns'])
