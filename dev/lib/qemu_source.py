# SPDX-License-Identifier: GPL-2.0-or-later
"""
QEMU's sources: pinned releases, from the cache or from the archive that apt
is set up with.
"""

import hashlib
import re
import shutil
import tarfile
import textwrap

from lib.common import CACHE, TOP, Failure, attempt, run, say

# With the sums of their files.  The first is the base; the other stands in for it.
# It is what Debian's index names as the newest; its archive may lack it.
RELEASES = {
    '11.1.1':
    '0b1376e75dbe3e2fea4e408f8669f88a723f419f36a5b7d74cc6a4cfe07e4f5e',
    '11.1.3':
    '502fe33503df3520b6a81176a94d77eef908eb252bacc675d7199f379ac26641',
}
PINNED = next(iter(RELEASES))

# What Debian packages PINNED with.
DEBIAN = (
    'qemu_11.1.1+ds-1.debian.tar.xz',
    '870a1193f28ce522ac91f68100d75dce5527e08d8958344b389c9fa24b44968f')


def archive_uri():
    """The address of the Debian archive that apt is set up with, or ''"""
    return attempt('bash', '-c', '. "$0"; archive_uri',
                   TOP / 'dev/build/common.sh')[1].strip()


def sha256(path):
    with open(path, 'rb') as stream:
        return hashlib.file_digest(stream, 'sha256').hexdigest()


def fetch(name, wanted):
    """Return the path of NAME in the cache, downloading it at need."""
    target = CACHE / name
    if target.exists():
        if sha256(target) == wanted:
            return target
        say(f'{target} has the wrong SHA-256; it is fetched again')
        target.unlink()
    uri = archive_uri()
    if not uri:
        raise Failure(f'{name} is not in {CACHE}, and apt knows no Debian '
                      'archive to fetch it from: put it there')
    say(f'fetching {name}')
    CACHE.mkdir(parents=True, exist_ok=True)
    status, said = attempt(
        '/usr/lib/apt/apt-helper', '-qq', '-o', 'APT::Sandbox::User=',
        'download-file', f'{uri}/pool/main/q/qemu/{name}', target,
        f'SHA256:{wanted}')
    if status:
        raise Failure(f'could not fetch {name}:\n' +
                      textwrap.indent(said.rstrip(), '    '))
    return target


def copy(source, target):
    """With its mode, and with the directories that it needs."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)


def file_name(release):
    return f'qemu_{release}+ds.orig.tar.xz'


def tarball(release):
    """The release's file, downloaded at need."""
    return fetch(file_name(release), RELEASES[release])


def unpack(tar, tree):
    run('tar', '-xf', tar, '-C', tree, '--strip-components=1')


def find_release():
    failures = []
    for release in RELEASES:
        try:
            return release, tarball(release)
        except Failure as err:
            failures.append(str(err))
    raise Failure('no QEMU base to work on:\n  ' + '\n  '.join(failures)
                  + '\n  Connect to the archive and run again, put the file '
                  f'into {CACHE}, or name a tree with QEMU_SRC=<dir>')


def release_files(release, names, target):
    """Put the files NAMES of the release into TARGET."""
    with tarfile.open(tarball(release)) as archive:
        for member in archive:
            member.name = member.name.partition('/')[2]
            if member.name in names:
                archive.extract(member, target)


# Debian's source package leaves out firmware blobs.  These edits, the same as
# Debian's skip-unpack-edk2-blobs.patch and skip-install-dtb.patch, let
# configure do without them; a tree that has the blobs is left alone.
def allow_missing_blobs(base):
    path = base / 'pc-bios' / 'meson.build'
    text = path.read_text()
    if not list((base / 'pc-bios').glob('edk2-*.fd.bz2')):
        text = text.replace('if unpack_edk2_blobs\n',
                            'if unpack_edk2_blobs and false\n')
    if not list((base / 'pc-bios' / 'dtb').glob('*.dtb')):
        text = re.sub(r"^subdir\('dtb'\)$", "#subdir('dtb')", text,
                      flags=re.M)
    path.write_text(text)
