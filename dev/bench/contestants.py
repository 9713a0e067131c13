# SPDX-License-Identifier: GPL-2.0-or-later
"""
Who is measured.  Each contestant captures from, or injects into, TAPs of its
own, and one trial is one load.  Every trial checks that what was sent came or
was counted as dropped, in order and once.
"""

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

DROPS = 'kernel-drops', 'peer-drops', 'skipped'

# More than a ring of the redirector has
RING_FRAMES = 3500


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
        return program.result()


class Contestant:
    """One with a TAP that nobody captures."""

    def __init__(self, name, _directory, _taps=1):
        self.name = name
        self.taps = [Tap()]
        self.taps[0].offload()

    def end(self):
        pass

    def capture(self, load):
        sender = send(self.taps, load)
        return self.outcome(load, sender, {'frames': sender['sent']}, 0, 0)

    def outcome(self, load, sender, tally, drops, cpu):
        """
        The metrics of report.py.  SENDER and TALLY are what the programs that
        sent and received have counted, DROPS what somebody has, CPU is the
        contestant's.
        """
        sent, received = sender['sent'], tally['frames']
        if received + drops != sent:
            raise Mismatch(f'{self.name}: {sent} frames were sent, {received} '
                           f'came, {drops} are counted as dropped ({load})')
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


def listening(name, path):
    """The options for a character device"""
    return ['-chardev', f'socket,id={name},path={path},server=on,wait=off']


def redirector(name, i, properties):
    return ['-object', f'filter-redirector,id={name}{i},netdev=n{i},'
            f'vnet_hdr_support=on,{properties}']


class Redirector(Contestant):
    """On each of TAPS TAPs one that captures and one that injects"""

    BINARY = PRODUCT
    QEMU = rig.Qemu
    STEER = True        # See rig.Tap.
    MORE = ''           # properties of what captures
    socket = None       # that QEMU inherits

    def __init__(self, name, directory, taps=1):
        if not os.access(self.BINARY, os.X_OK):
            raise Failure(f'there is no {self.BINARY}: run "make bench"')
        self.name = name
        self.taps = [Tap(self.STEER) for _ in range(taps)]
        self.out, self.into = (
            [f'{directory}/{name}-{taps}.{end}{i}' for i in range(taps)]
            for end in ('out', 'in'))
        options = [word for i in range(taps) for word in self.filters(i)]
        self.qemu = self.QEMU(f'{name}-{taps}', self.BINARY, directory,
                              self.taps, options, self.socket)
        # The first use of a ring's memory costs more than what comes later.
        try:
            self.capture(Load(seconds=taps * RING_FRAMES / Load.rate))
        except Mismatch:
            self.end()
            raise

    def filters(self, i):
        """The options for those of a TAP"""
        return [*listening(f'out{i}', self.out[i]),
                *listening(f'in{i}', self.into[i]),
                *redirector('cap', i, f'outdev=out{i},packet-socket=on'
                            + self.MORE),
                *redirector('inj', i, f'indev=in{i},packet-socket=on,'
                            'queue=tx')]

    def end(self):
        self.qemu.end()

    def count(self, *names):
        """The sum of these counters of all captures"""
        return sum(self.qemu.get(f'cap{i}', f'capture-{name}')
                   for i in range(len(self.taps)) for name in names)

    def dropped(self):
        return self.count(*DROPS)

    def captures(self):
        """For each TAP whether it is captured, as its peer is there"""
        return [self.qemu.get(f'cap{i}', 'source') != 'none'
                for i in range(len(self.taps))]

    def await_capture(self, wanted):
        wait_for(f'all captures of {self.name} to begin or to end',
                 lambda: set(self.captures()) == {wanted})

    @contextlib.contextmanager
    def peers(self):
        """Yields their sockets."""
        with all_closed([connect(path) for path in self.out]) as peers:
            self.await_capture(True)
            yield peers
        self.await_capture(False)

    @contextlib.contextmanager
    def watched(self, dropped):
        """Yields a dict, for the CPU time and by how much DROPPED() grew."""
        grown = {}
        before, cpu = dropped(), self.qemu.cpu_ns()
        yield grown
        # QEMU may look at its sockets once more.
        time.sleep(0.05)
        grown['cpu'] = self.qemu.cpu_ns() - cpu
        grown['drops'] = dropped() - before

    def capture(self, load):
        with self.peers() as peers, Program('read', peers, load) as reader:
            reader.ready()
            with self.watched(self.dropped) as grown:
                sender = send(self.taps, load)
                tally = reader.result(sender['sent'])
        return self.outcome(load, sender, tally, **grown)

    def inject(self, load):
        def dropped():
            return self.qemu.get('inj0', 'inject-interface-drops')
        with connect(self.into[0]) as peer, self.tap_reader(load) as reader, \
                self.watched(dropped) as grown, \
                Program('write', [peer], load) as writer:
            sender = writer.result()
            tally = reader.result(sender['sent'])
        return self.outcome(load, sender, tally, **grown)


class OnlySent(Redirector):
    """The capture sees only what is sent to the guest."""

    MORE = ',queue=tx'


class SwitchedOff(Redirector):
    """It has a peer, and is off."""

    MORE = ',status=off'

    def capture(self, load):
        with connect(self.out[0]):
            return Contestant.capture(self, load)


class Dump(Redirector):
    """filter-dump.  Nobody reads what it writes, so its counters must do."""

    def filters(self, i):
        return ['-object', f'filter-dump,id=cap{i},netdev=n{i},'
                'maxlen=262144,file=/dev/null,packet-socket=on']

    def capture(self, load):
        self.await_capture(True)
        before = self.count('packets')
        seen = before + self.dropped()
        with self.watched(self.dropped) as grown:
            sender = send(self.taps, load)
            wait_for(f'{sender["sent"]} frames of {self.name}', lambda: (
                self.count('packets', *DROPS) - seen >= sender['sent']))
        return self.outcome(
            load, sender, {'frames': self.count('packets') - before}, **grown)


class Chain(Redirector):
    """Upstream's redirector"""

    BINARY = PEER
    STEER = False

    def filters(self, i):
        return [*listening(f'out{i}', self.out[i]),
                *redirector('cap', i, f'outdev=out{i}')]

    def dropped(self):
        return sum(tap.tx_dropped() for tap in self.taps)

    def captures(self):
        return [not device['filename'].startswith('disconnected')
                for device in self.qemu.qmp('query-chardev')
                if device['label'].startswith('out')]


class Straightforward(Chain):
    """The same, on a packet socket; see straightforward.patch"""

    STEER = True
    drops = 0           # The socket forgets those that it has told.

    def filters(self, i):
        self.socket = rig.packet_socket(self.taps[i].name, rig.ETH_P_ALL)
        self.socket.setblocking(False)
        return super().filters(i)

    def dropped(self):
        self.drops += rig.packet_socket_drops(self.socket)
        return self.drops


class Tcpdump(Contestant):
    """tcpdump, which writes to a cat that is not counted"""

    def capture(self, load):
        cat = subprocess.Popen(['cat'], stdin=subprocess.PIPE,
                               stdout=subprocess.DEVNULL)
        tcpdump = subprocess.Popen(
            ['tcpdump', '-n', '-Z', 'root', '-i', self.taps[0].name,
             '-w', '-'], stderr=subprocess.PIPE, stdout=cat.stdin, text=True)
        cat.stdin.close()
        try:
            said = ''
            while 'listening on' not in said:
                line = tcpdump.stderr.readline()
                if not line:
                    raise Failure(f'tcpdump: {said.strip()}')
                said += line
            cpu = rig.cpu_ns(tcpdump.pid)
            sender = send(self.taps, load)
            # The kernel hands a block of its ring over after up to 1 s.
            time.sleep(1.1)
            cpu = rig.cpu_ns(tcpdump.pid) - cpu
            tcpdump.send_signal(signal.SIGINT)
            said = tcpdump.stderr.read()
        finally:
            for process in (tcpdump, cat):
                process.kill()
                process.wait()
        captured, drops = (int(re.search(rf'(\d+) packets? {name}', said)[1])
                           for name in ('captured', 'dropped by kernel'))
        return self.outcome(load, sender, {'frames': captured}, drops, cpu)


class Loop(Contestant):
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
