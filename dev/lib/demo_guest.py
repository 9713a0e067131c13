# SPDX-License-Identifier: GPL-2.0-or-later
"""
The guest of the demonstration: a Linux that counts numbered UDP packets.
"""

import subprocess

from lib import guest
from lib.common import BUILD, TOP, Failure

PROGRAM = BUILD / 'demo/demo-packets'

GUEST_MAC, GUEST_ADDRESS = '52:54:00:00:00:02', '192.0.2.2'
HOST_MAC, HOST_ADDRESS = '52:54:00:00:00:01', '192.0.2.1'
PORT = 9000

# A permanent neighbour, so that no packet ever waits for an address.  The
# packets are polled for every 20 ms: an interrupt for each would take most of
# the time of a guest that is emulated by an emulated machine.
INIT = f'''#!/bin/sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for module in $(cat /lib/modules/order); do
    insmod /lib/modules/$module.ko
done
ip address add {GUEST_ADDRESS}/24 dev eth0
ip link set eth0 up
echo 1000000 > /sys/class/net/eth0/napi_defer_hard_irqs
echo 20000000 > /sys/class/net/eth0/gro_flush_timeout
arp -s {HOST_ADDRESS} {HOST_MAC}
exec demo-packets receive {PORT} /dev/ttyS1
'''

# The guest is booted without vhost: it must not be offered what vhost lacks.
NIC = f'virtio-net-pci,id=nic,netdev=n0,mac={GUEST_MAC},romfile=,' \
      'queue_reset=off,rx_queue_size=1024'


def compile_program():
    source = TOP / 'dev/demo/demo-packets.c'
    PROGRAM.parent.mkdir(parents=True, exist_ok=True)
    if PROGRAM.exists() and \
            PROGRAM.stat().st_mtime >= source.stat().st_mtime:
        return
    run = subprocess.run(['gcc', '-std=gnu11', '-static', '-O2', '-Wall',
                          '-o', PROGRAM, source], check=False)
    if run.returncode:
        raise Failure('cannot compile dev/demo/demo-packets.c: install gcc '
                            'and libc6-dev')


def make_state(scratch, say):
    """Boot the guest unless its state is there; return the state's path."""
    compile_program()
    return guest.make_state(
        'demo', INIT, NIC, 'ipv6.disable=1',
        {'bin/demo-packets': PROGRAM.read_bytes()}, say, scratch)
