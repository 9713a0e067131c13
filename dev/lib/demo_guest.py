# SPDX-License-Identifier: GPL-2.0-or-later
"""
The guest of the demonstration, a Linux that counts numbered UDP packets, and
who sends them.
"""

import os
import signal
import subprocess

from lib import guest
from lib.common import (
    BUILD, TOP, Failure, die_with_parent, run, wait_for, wait_steady)
from lib.guest import LIMIT

PROGRAM = BUILD / 'demo/demo-packets'

GUEST_MAC, GUEST_ADDRESS = '52:54:00:00:00:02', '192.0.2.2'
HOST_MAC, HOST_ADDRESS = '52:54:00:00:00:01', '192.0.2.1'
PORT = 9000

# A permanent neighbour, so that no packet ever waits for an address.  The
# packets are polled for every 20 ms: an interrupt for each would take most of
# the time of a guest that is emulated by an emulated machine.
INIT = f'''for module in $(cat /lib/modules/order); do
    insmod /lib/modules/$module.ko
done
ip address add {GUEST_ADDRESS}/24 dev eth0
ip link set eth0 up
echo 1000000 > /sys/class/net/eth0/napi_defer_hard_irqs
echo 20000000 > /sys/class/net/eth0/gro_flush_timeout
arp -s {HOST_ADDRESS} {HOST_MAC}
demo-packets receive {PORT} &
'''

# The guest is booted without vhost: it must not be offered what vhost lacks.
NIC = f'virtio-net-pci,id=nic,netdev=n0,mac={GUEST_MAC},romfile=,' \
      'queue_reset=off,rx_queue_size=1024'


def compile_program():
    source = TOP / 'dev/demo/demo-packets.c'
    PROGRAM.parent.mkdir(parents=True, exist_ok=True)
    if not PROGRAM.exists() or \
            PROGRAM.stat().st_mtime < source.stat().st_mtime:
        part = PROGRAM.with_suffix(f'.{os.getpid()}')   # others may look now
        run('gcc', '-std=gnu11', '-static', '-O2', '-Wall', '-o', part,
            source)
        part.rename(PROGRAM)


def make_state(say, scratch):
    """Boot the guest unless its state is there; return the state's path."""
    compile_program()
    return guest.make_state(
        'demo', INIT, NIC, 'ipv6.disable=1',
        {'bin/demo-packets': PROGRAM.read_bytes()}, say, scratch)


class Packets:
    """
    Numbered packets, sent to the guest from now on.  VM is what can ask() the
    guest.
    """

    runs = 0

    def __init__(self, rate=100):
        self.number = Packets.runs
        Packets.runs += 1
        self.rate = rate
        self.dropped = 0
        self.process = subprocess.Popen(
            [PROGRAM, 'send', GUEST_ADDRESS, str(PORT), str(rate),
             str(self.number)], stdout=subprocess.PIPE, text=True,
            preexec_fn=die_with_parent)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end()

    def begin(self, vm, seconds=1):
        """The guest is in VM; wait until packets come to it."""
        self.dropped = self.socket_drops(vm)
        self.await_more(vm, seconds)

    @staticmethod
    def socket_drops(vm):
        """
        How many packets the guest's kernel dropped since its program got no
        time to take them, which happens on a very busy machine.
        """
        return int(vm.ask("awk 'NR == 2 { print $NF }' /proc/net/udp"))

    def count(self, vm):
        return int(vm.ask(f'demo-packets count {self.number}'))

    def await_more(self, vm, seconds=1):
        """Wait until the packets of so many SECONDS came to the guest."""
        wanted = self.count(vm) + seconds * self.rate
        wait_for(f'packets at the guest in {vm.name}',
                 lambda: self.count(vm) >= wanted, LIMIT, 1)

    def result(self, vm):
        """Stop sending; return what became of the packets."""
        self.process.send_signal(signal.SIGTERM)
        sent = int(self.process.communicate(timeout=20)[0] or -1)
        if self.process.returncode:
            raise Failure('the sender failed')
        wait_steady('the last packets', lambda: self.count(vm), LIMIT)
        return Result(sent, self.socket_drops(vm) - self.dropped, *map(
            int, vm.ask(f'demo-packets report {self.number} {sent}').split()))

    def end(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class Result:
    def __init__(self, sent, dropped, lost, twice, first, last, late, depth):
        self.sent, self.lost, self.twice = sent, lost, twice
        self.dropped, self.late = dropped, late
        self.range = f'{first}..{last}' if lost else '-'
        self.text = f'{sent} sent, {lost} lost, {twice} twice, {late} late'
        if lost:
            self.text += f', lost {self.range}'
        if dropped:
            self.text += f', {dropped} dropped by the guest\'s socket'
        if late:
            self.text += f', by up to {depth} packets'

    def clean(self):
        """Did each packet come to the guest once?"""
        return self.sent > 0 and self.lost == self.dropped and not self.twice
