# SPDX-License-Identifier: GPL-2.0-or-later
"""
What this repository puts on QEMU's tree: the patches to files that QEMU has,
and files of our own.

Each patch names, between its message and its diff, the files that it adds:

    Adds: net/packet-socket.c include/net/packet-socket.h

so that it is whole, and can be mailed.  The section of MAINTAINERS grows with
them.
"""

import collections
import fnmatch
import pathlib
import re
import textwrap

from lib.common import TOP, Failure, attempt
from lib.qemu_source import copy

PATCHES = TOP / 'patches'

# Where our own files lie in QEMU's tree.
DIRECTORIES = ('net', 'include', 'tests', 'contrib', 'docs/devel',
               'docs/system')

# Our section of MAINTAINERS goes behind this one, where its name belongs.
NEIGHBOUR = 'Network device backends'


class Patch:
    """A file of patches/."""

    def __init__(self, path):
        self.path = path
        # Quilt leaves the first line out that git writes.
        head, *diff = re.split(r'\n(?=diff --git |--- a/)', path.read_text(), 1)
        mail, dashes, notes = f'{head}\n'.partition('\n---\n')
        fields, blank, self.message = mail.partition('\n\n')
        match = re.fullmatch(r'From: (.*)\nSubject: \[PATCH\] (.*)', fields)
        if not (diff and dashes and blank and match):
            raise Failure(f'patches/{path.name} is not in the form of the '
                          'others: From, Subject, message, ---, diff')
        self.sender, self.subject = match.groups()
        self.adds = ' '.join(
            re.findall(r'^Adds: (.*)', notes, flags=re.M)).split()
        self.edits = re.findall(r'^\+\+\+ b/(\S+)', ''.join(diff),
                                flags=re.M)

    def __str__(self):
        return f'patches/{self.path.name}'


def patches():
    """The series"""
    names = re.findall(r'^[^#\s]\S*', (PATCHES / 'series').read_text(),
                       flags=re.M)
    series = [Patch(PATCHES / name) for name in names]
    check(series)
    return series


def check(series):
    left = {p.name for p in PATCHES.glob('*.patch')} - \
        {patch.path.name for patch in series}
    if left:
        raise Failure(f'patches/series does not name {", ".join(sorted(left))}')
    own = own_files()
    uses = collections.Counter(sum((patch.adds for patch in series), []))
    uses.subtract(own)
    if wrong := [name for name, more in uses.items() if more]:
        raise Failure('each file of our own must be in one line "Adds:", '
                      'before the diff of the patch in patches/ that it '
                      f'belongs to, and no other file: {", ".join(wrong)}')
    for name in own:
        if not any(covers(line, name) for line in section()):
            raise Failure(f'MAINTAINERS has no line "F:" for {name}')
    for line in section():
        if line.startswith('F:') and not any(covers(line, n) for n in own):
            raise Failure(f'MAINTAINERS: "{line}" is no file of ours')


def own_files():
    return [str(path.relative_to(TOP)) for top in DIRECTORIES
            for path in sorted((TOP / top).rglob('*'))
            if path.is_file() and '__pycache__' not in path.parts]


def edited(series):
    """The files of QEMU that the series changes."""
    return {name for patch in series for name in patch.edits} | \
        {'MAINTAINERS'}


def section():
    return (TOP / 'MAINTAINERS').read_text().splitlines()


def covers(line, name):
    """Whether a line of MAINTAINERS is about the file."""
    pattern = re.sub('/$', '/*', line[2:].strip())
    return line.startswith('F:') and fnmatch.fnmatch(name, pattern)


def add_section(text, names):
    """Put our section, as far as it is about NAMES, into QEMU's MAINTAINERS.

    The file's sections are not sorted; ours goes before the first one behind
    NEIGHBOUR that comes after it in the alphabet.
    """
    ours = section()
    title = ours[0]
    ours = '\n'.join(line for line in ours if not line.startswith('F:')
                     or any(covers(line, name) for name in names))
    paragraphs = [p for p in text.split('\n\n')
                  if p.partition('\n')[0] != title]
    titles = [p.strip('\n').partition('\n')[0] for p in paragraphs]
    if NEIGHBOUR not in titles:
        raise Failure(f'MAINTAINERS has no section "{NEIGHBOUR}": is it a '
                      'QEMU of another version?')
    start = titles.index(NEIGHBOUR)
    place = next((i for i in range(start, len(titles))
                  if titles[i].casefold() > title.casefold()), len(titles))
    paragraphs.insert(place, ours)
    return '\n\n'.join(paragraphs)


def apply(patch, tree, added):
    """Apply PATCH to TREE, whose files of our own so far are ADDED."""
    status, said = attempt(
        'patch', '-p1', '-F0', '-s', '-f', '--no-backup-if-mismatch',
        '-r', '-', '-i', patch.path, cwd=tree)
    if status:
        raise Failure(f'{patch} does not apply:\n' +
                      textwrap.indent(said.rstrip(), '    '))
    for name in patch.adds:
        copy(TOP / name, pathlib.Path(tree, name))
    added.update(patch.adds)
    if patch.adds:
        maintainers = pathlib.Path(tree, 'MAINTAINERS')
        maintainers.write_text(add_section(maintainers.read_text(), added))


def apply_all(base, scratch):
    """
    Apply the series to copies of BASE's files in SCRATCH.  Return the names
    of all files that are there then; BASE is only read.
    """
    series = patches()
    for name in edited(series):
        if (base / name).exists():
            copy(base / name, scratch / name)
    added = set()
    for patch in series:
        apply(patch, scratch, added)
    return edited(series) | added
