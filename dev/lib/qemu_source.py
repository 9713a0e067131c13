# SPDX-License-Identifier: GPL-2.0-or-later
"""
QEMU's sources: pinned releases, from the cache or from the archive that apt
is set up with.
"""

import hashlib
import re
import shutil
import tarfile
import urllib.request

from lib.common import BUILD, CACHE, Failure, attempt, run, say

# The first of them is the base, and the next one to use if it cannot be had.
# All of a release's files must have the sum.  The last is what Debian's index
# names as the newest; its archive need not have it yet, or any more.
RELEASES = {
    '11.1.1': {
        'qemu_11.1.1+ds.orig.tar.xz':
        '0b1376e75dbe3e2fea4e408f8669f88a723f419f36a5b7d74cc6a4cfe07e4f5e',
    },
    '11.0.3': {
        'qemu_11.0.3+ds.orig.tar.xz':
        '62e174790c8f9b44388ef16550ef4820dba87c619cfe2a5596869ef6bef660dd',
    },
    '11.1.3': {
        'qemu_11.1.3+ds.orig.tar.xz':
        '502fe33503df3520b6a81176a94d77eef908eb252bacc675d7199f379ac26641',
    },
}
PINNED = next(iter(RELEASES))

# What Debian packages PINNED with.
DEBIAN = {
    'qemu_11.1.1+ds-1.debian.tar.xz':
    '870a1193f28ce522ac91f68100d75dce5527e08d8958344b389c9fa24b44968f',
}


def sha256(path):
    with open(path, 'rb') as stream:
        return hashlib.file_digest(stream, 'sha256').hexdigest()


def archive_uri():
    """The address of the Debian archive that apt is set up with."""
    try:
        _, listing = attempt('apt-get', 'indextargets', '--format',
                             '$(ORIGIN) $(REPO_URI)', 'Created-By: Packages')
    except OSError:
        return None
    for line in listing.splitlines():
        origin, _, uri = line.partition(' ')
        if origin == 'Debian' and 'security' not in uri:
            return uri.rstrip('/')
    return None


def download(uri, target):
    part = target.with_suffix(target.suffix + '.part')
    with urllib.request.urlopen(uri, timeout=60) as reply, \
            open(part, 'wb') as out:
        say(f'fetching {target.name}, '
            f'{int(reply.headers.get("Content-Length") or 0) >> 20} MiB')
        shutil.copyfileobj(reply, out)
    part.rename(target)


def fetch(name, wanted):
    """Return the path of NAME in the cache, downloading it at need."""
    target = CACHE / name
    CACHE.mkdir(parents=True, exist_ok=True)
    if target.exists():
        if sha256(target) == wanted:
            return target
        say(f'{target} has the wrong SHA-256; it is fetched again')
    uri = archive_uri()
    if not uri:
        raise Failure(f'{name} is not in {CACHE}, and apt knows no Debian '
                      'archive to fetch it from')
    uri = f'{uri}/pool/main/q/qemu/{name}'
    try:
        download(uri, target)
    except OSError as err:
        raise Failure(f'could not fetch {name} from the archive that apt is '
                      f'set up with: {err}') from err
    found = sha256(target)
    if found != wanted:
        target.unlink()
        raise Failure(f'{name} was fetched with SHA-256 {found}, but '
                      f'{wanted} is pinned; it was removed')
    return target


def copy(source, target):
    """With its mode, and with the directories that it needs."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)


def in_cache(files):
    return all((CACHE / name).exists() for name in files)


def tarballs(release):
    """The release's files, downloaded at need."""
    return [fetch(*item) for item in RELEASES[release].items()]


def unpack(tarballs, tree):
    for tarball in tarballs:
        run('tar', '-xf', tarball, '-C', tree, '--strip-components=1')


def find_release():
    failures = []
    for release in RELEASES:
        try:
            return release, tarballs(release)
        except Failure as err:
            failures.append(str(err))
    raise Failure('no QEMU base to work on:\n  ' + '\n  '.join(failures)
                  + '\n  Connect to the archive and run again, put the file '
                  f'into {CACHE}, or name a tree with QEMU_SRC=<dir>')


def release_files(release, names, target):
    """Put the files NAMES of the release into TARGET; return what exists.

    From build/base, if that is it, since to unpack a release takes seconds.
    """
    base = BUILD / 'base'
    stamp = base / '.base'
    if stamp.exists() and stamp.read_text() == f'release {release}':
        found = [name for name in names if (base / name).is_file()]
        for name in found:
            copy(base / name, target / name)
        return found
    found = []
    for tarball in tarballs(release):
        with tarfile.open(tarball) as archive:
            for member in archive:
                member.name = member.name.partition('/')[2]
                if member.name in names and member.isfile():
                    archive.extract(member, target)
                    found.append(member.name)
    return found


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
