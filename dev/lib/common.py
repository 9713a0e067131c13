# SPDX-License-Identifier: GPL-2.0-or-later
"""
Shared by the project's Python programs: where things are, and how to run
something, wait for it and report.  Its sibling for shells is build/common.sh.
"""

import ctypes
import os
import pathlib
import signal
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

STARTED = time.monotonic()


class Failure(Exception):
    """What was to be done could not be; the text says why, and what to do."""


def say(text):
    print('>>>', text, file=sys.stderr, flush=True)


def run(*command, **options):
    """Return what COMMAND prints; raise Failure if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True,
                          errors='replace', check=False, **options)
    if done.returncode:
        raise Failure(f'{" ".join(map(str, command))}: {done.stdout.strip()}')
    return done.stdout


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
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signum)
