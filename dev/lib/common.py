# SPDX-License-Identifier: GPL-2.0-or-later
"""
Shared by the project's Python programs: where things are, and how to run
something, wait for it and report.  Its sibling for shells is
dev/build/common.sh.
"""

import argparse
import ctypes
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

TOP = pathlib.Path(__file__).resolve().parents[2]
BUILD = pathlib.Path(os.environ.get('BUILD') or TOP / 'build')
CACHE = pathlib.Path(
    os.environ.get('VHOST_NETFILTER_CACHE')
    or pathlib.Path(os.environ.get('XDG_CACHE_HOME')
                    or pathlib.Path.home() / '.cache') / 'vhost-netfilter')
# Unpacked packages; dev/build/apt-other-suites makes both.
ROOT = CACHE / 'packages'
KERNELS = CACHE / 'kernels'
QEMU = os.environ.get('VM_QEMU') or str(BUILD / 'qemu/qemu-system-x86_64')

# qemu.qmp is there.
PACKAGES = ROOT / 'usr/lib/python3/dist-packages'
sys.path.append(str(PACKAGES))

CLONE_NEWNET, CLONE_NEWUSER = 0x40000000, 0x10000000
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33
libc = ctypes.CDLL(None, use_errno=True)


class Failure(Exception):
    """What was to be done could not be; the text says why, and what to do."""


class Skip(Failure):
    """It cannot be done on this machine."""


def parser(doc):
    """Of the arguments of a program whose docstring is DOC"""
    return argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter)


def say(text):
    print('>>>', text, file=sys.stderr, flush=True)


def attempt(*command, **options):
    """Return the exit status of COMMAND and what it prints."""
    done = subprocess.run(command, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True,
                          errors='replace', check=False, **options)
    return done.returncode, done.stdout


def run(*command, **options):
    """Return what COMMAND prints; raise Failure if it fails."""
    status, said = attempt(*command, **options)
    if status:
        raise Failure(f'{" ".join(map(str, command))}: {said.strip()}')
    return said


def wait_for(what, condition, limit=60, pause=0.2):
    """Poll until CONDITION() returns something, and return that.  A poll
    takes time of the machine that a guest lacks, so PAUSE in between."""
    end = time.monotonic() + limit
    while not (result := condition()):
        if time.monotonic() > end:
            raise Failure(f'waited {limit} s in vain for {what}')
        time.sleep(pause)
    return result


def die_with_parent(signum=signal.SIGKILL):
    """In a child: get SIGNUM when the parent ends, however it does."""
    pr_set_pdeathsig = 1
    libc.prctl(pr_set_pdeathsig, signum)


def silence_ipv6():
    """New interfaces shall not send anything by themselves."""
    for scope in 'all', 'default':
        path = pathlib.Path(f'/proc/sys/net/ipv6/conf/{scope}/disable_ipv6')
        if path.exists():
            path.write_text('1')


def enter_namespace():
    """Go to a network namespace of our own, whoever we are."""
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWNET | (CLONE_NEWUSER if uid else 0)):
        raise Skip('no network namespace: ' + os.strerror(ctypes.get_errno()))
    if uid:
        for name, text in (('setgroups', 'deny'), ('uid_map', f'0 {uid} 1'),
                           ('gid_map', f'0 {gid} 1')):
            pathlib.Path('/proc/self', name).write_text(text)
    silence_ipv6()
    try:
        os.close(os.open('/dev/net/tun', os.O_RDWR))
    except OSError as err:
        raise Skip(f'/dev/net/tun: {err.strerror}') from err


def force_buffer(sock, option, size):
    """Set a size of SOCK; as far as we may, if we are not root."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, option, size)
    except PermissionError:
        # SO_SNDBUF or SO_RCVBUF
        sock.setsockopt(socket.SOL_SOCKET, option - 25, size)


def tx_dropped(name):
    """Of an interface in our network namespace; None if there is none.
    (/sys/class/net shows the namespace in which sysfs was mounted.)"""
    for line in pathlib.Path('/proc/thread-self/net/dev').open():
        ifname, _, numbers = line.partition(':')
        if ifname.strip() == name:
            return int(numbers.split()[11])
    return None


def hooked_sockets():
    """The inodes of the packet sockets that get frames"""
    lines = pathlib.Path('/proc/thread-self/net/packet').read_text()
    fields = [line.split() for line in lines.splitlines()[1:]]
    return [int(f[8]) for f in fields if f[3] == '0003' and f[5] == '1']
