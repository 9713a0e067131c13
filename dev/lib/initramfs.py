# SPDX-License-Identifier: GPL-2.0-or-later
"""
Kernels of the cache, and initial file systems for them.

Shared by the tools that boot a virtual machine.  Both are made uncompressed,
because under TCG to unpack costs more than to copy: a kernel that unpacks
itself takes 6 s longer to boot.  An initial file system holds busybox and
kernel modules.
"""

import hashlib
import lzma
import os
import pathlib
import re
import struct
import subprocess
import tempfile

from lib.common import BUILD, KERNELS, ROOT, Failure

# How the first program of each of them begins.
INIT = '''#!/bin/sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
'''

DIRECTORIES = ('bin', 'dev', 'lib', 'lib/modules', 'mnt', 'proc', 'run',
               'sys', 'tmp')


def find_kernel(version=None):
    """
    Return (VERSION, path of its file).  Without VERSION it is the kernel that
    all tools use.  Else it is, of the other kernels, the newest whose version
    begins with VERSION, or for 'newest' the newest of all.
    """
    def numbers(name):
        return [int(number) for number in re.findall(r'\d+', name)]

    root = KERNELS if version else ROOT
    images = {path.name.partition('-')[2]: path
              for path in root.glob('boot/vmlinuz-*')}
    # Where Debian has it since 7.2.
    images.update((path.parent.name, path)
                  for path in root.glob('usr/lib/modules/*/vmlinuz'))
    found = [name for name in images if version in (None, 'newest')
             or re.match(re.escape(version) + r'\b', name)]
    if not found:
        option = ' --kernels' if version else ''
        raise Failure(f'no kernel {version or ""} in the cache: run '
                      f'dev/build/apt-other-suites{option} to fetch one')
    name = max(found, key=numbers)
    return name, uncompressed_kernel(name, images[name])


def uncompressed_kernel(version, image):
    """Return the path of the ELF file in the bzImage IMAGE, which QEMU boots
    by its PVH entry; the image itself if it is not compressed with xz."""
    target = BUILD / 'vm' / f'vmlinux-{version}'
    if target.exists() and \
            target.stat().st_mtime_ns == image.stat().st_mtime_ns:
        return target
    contents = image.read_bytes()
    # See Documentation/arch/x86/boot.rst: setup_sects, payload_offset and
    # payload_length.
    start = ((contents[0x1f1] or 4) + 1) * 512
    offset, length = struct.unpack_from('<II', contents, 0x248)
    payload = contents[start + offset:start + offset + length]
    if not payload.startswith(b'\xfd7zXZ'):
        return image
    # What follows the xz stream is the size, which is not needed.
    store(target, lzma.LZMADecompressor().decompress(payload))
    os.utime(target, ns=(image.stat().st_mtime_ns,) * 2)
    return target


def store(target, contents):
    """Write TARGET at one go, as other tools may run at once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f'{target.name}.{os.getpid()}')
    part.write_bytes(contents)
    part.rename(target)


def firmware_options():
    """QEMU's options to find the firmware of the cache."""
    return [option for name in ('seabios', 'qemu')
            for option in ('-L', str(ROOT / 'usr/share' / name))]


def directory_of(version):
    """The directory of the modules of the kernel VERSION"""
    for root in (ROOT, KERNELS):
        for place in ('lib/modules', 'usr/lib/modules'):
            if (root / place / version).is_dir():
                return root / place / version
    raise Failure(f'the kernel {version} has no modules in {ROOT.parent}')


def modules(version, wanted):
    """
    Return {name: contents} of the modules WANTED and those that they need,
    in the order to load them.  One that VERSION lacks is taken as built in.
    """
    # The unpacked package has no modules.dep, which depmod makes when it is
    # installed.  The modules name their dependencies themselves.
    files = {path.name.partition('.')[0].replace('-', '_'): path
             for path in directory_of(version).rglob('*.ko*')}
    loaded = {}

    def load(name):
        if name in loaded or name not in files:
            return
        contents = files[name].read_bytes()
        if files[name].suffix == '.xz':
            contents = lzma.decompress(contents)
        depends = re.search(rb'\0depends=([^\0]*)\0', contents)
        for other in (depends.group(1).decode() if depends else '').split(','):
            load(other.replace('-', '_'))
        loaded[name] = contents

    for name in wanted:
        load(name)
    return loaded


def cpio(entries):
    """
    Return a cpio archive of ENTRIES: {name: contents}, where contents is bytes
    (a file, executable), str (the target of a symbolic link) or None (a
    directory, before what is in it).
    """
    with tempfile.TemporaryDirectory() as top:
        for name, contents in entries.items():
            path = pathlib.Path(top, name)
            if contents is None:
                path.mkdir()
            elif isinstance(contents, str):
                path.symlink_to(contents)
            else:
                path.write_bytes(contents)
                path.chmod(0o755)
        return subprocess.run(
            [ROOT / 'bin/busybox', 'cpio', '-o', '-H', 'newc'], cwd=top,
            input='\n'.join(entries).encode(), stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, check=True).stdout


def cached(kind, version, wanted_modules, init):
    """
    Return the path of a cpio archive for the kernel VERSION, in build/KIND:
    busybox, the modules with a list of them in load order, and INIT (the rest
    of a shell script) as /init.
    """
    # Everything that decides the contents decides the name.
    key = hashlib.sha256(pathlib.Path(__file__).read_bytes())
    key.update(repr((version, wanted_modules, init, *(
        path.stat().st_mtime_ns for path in (ROOT / '.list',
                                             directory_of(version))
    ))).encode())
    target = BUILD / kind / f'initramfs-{version}-{key.hexdigest()[:16]}.cpio'
    if target.exists():
        return target
    for old in target.parent.glob(f'initramfs-{version}-*.cpio'):
        old.unlink(missing_ok=True)
    found = modules(version, wanted_modules)
    store(target, cpio({
        **dict.fromkeys(DIRECTORIES),
        'bin/busybox': (ROOT / 'bin/busybox').read_bytes(),
        'bin/sh': 'busybox',
        **{f'lib/modules/{name}.ko': contents
           for name, contents in found.items()},
        'lib/modules/order': '\n'.join([*found, '']).encode(),
        'init': (INIT + init).encode()}))
    return target
