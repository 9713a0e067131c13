#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""
Write the series of patches, to be mailed or applied, to build/series:

N-NAME/0000-cover-letter.patch  patches/cover/N-NAME, with tables filled in
N-NAME/NNNN-*.patch             its part of patches/, each with the files of
                                our own that it adds
debian/                         all for debian/patches of Debian's qemu

Each series is mailed by itself, and builds on the one before.  A cover letter
begins with the subject of its series' first patch, whose number may change.

Usage: mails.py
The result depends on this repository's contents and the date of its last
commit alone.
"""

import email.utils
import os
import pathlib
import re
import shutil
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from lib import overlay  # noqa: E402
from lib.common import BUILD, TOP, Failure, run  # noqa: E402
from lib.qemu_source import PINNED, release_files  # noqa: E402

SERIES = BUILD / 'series'
RESULTS = TOP / 'docs/devel/filter-redirector-vhost.rst'


class Repository:
    """One of git's that holds just the files that the series changes."""

    def __init__(self, tree):
        self.tree = tree
        # Not the user's settings
        self.env = {key: value for key, value in os.environ.items()
                    if not key.startswith('GIT_')}
        self.env.update(GIT_CONFIG_GLOBAL='/dev/null',
                        GIT_CONFIG_NOSYSTEM='1', TZ='UTC')
        self.git('init', '-q', '-b', 'series')

    def git(self, *arguments, text=None):
        run('git', '-c', 'core.abbrev=12', *arguments, cwd=self.tree,
            env=self.env, input=text)

    def commit(self, sender, seconds, message):
        name, address = email.utils.parseaddr(sender)
        for who in 'AUTHOR', 'COMMITTER':
            self.env[f'GIT_{who}_NAME'] = name
            self.env[f'GIT_{who}_EMAIL'] = address
            self.env[f'GIT_{who}_DATE'] = f'{seconds} +0000'
        self.git('add', '--all', '--force')
        self.git('commit', '-q', '--no-verify', '-F', '-', text=message)


def results(title):
    """The table behind the line that begins with TITLE, for a mail."""
    found = re.search(rf'^({title}.*:)\n\n((?:\S.*\n)+)', RESULTS.read_text(),
                      flags=re.M)
    if not found:
        raise Failure(f'{RESULTS} has no table "{title}"')
    rows = found[2].splitlines()
    places = [match.span() for match in re.finditer('=+', rows[0])]
    cells = [[row[start:end].strip() for start, end in places]
             for row in rows if not row.startswith('=')]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ['  ' + ' '.join(
        word.rjust(width) if i else word.ljust(width)
        for i, (word, width) in enumerate(zip(row, widths))) for row in cells]
    return '\n'.join([found[1], '', *lines])


def letters(series):
    """
    For each series that is mailed: its name, the place of its first patch, and
    the subject and the text of its cover letter.
    """
    places = {patch.subject: i for i, patch in enumerate(series)}
    found = []
    for path in sorted((overlay.PATCHES / 'cover').iterdir()):
        head, _, text = path.read_text().partition('\n\n')
        match = re.fullmatch('First patch: (.*)\nSubject: (.*)', head)
        if not match or match[1] not in places:
            raise Failure(f'patches/cover/{path.name} must begin with "First '
                          'patch:" and the subject of one, and "Subject:"')
        found.append((path.name, places[match[1]], match[2], text))
    starts = [start for _, start, *_ in found]
    if starts[:1] != [0] or starts != sorted(set(starts)):
        raise Failure('the first patches that patches/cover names are not in '
                      'the order of patches/series, from its first one on')
    return found


def fill_in(path, subject, text, message_id, seconds, below):
    """Complete the cover letter that git has made."""
    text = re.sub('^@results (.*)@$', lambda match: results(match[1]), text,
                  flags=re.M).rstrip()
    if below:
        text += f'\n\nBased-on: {below[0]}\n("{below[1]}")'
    stamp = email.utils.formatdate(seconds)
    mail = re.sub('^Date: .*', f'Message-ID: {message_id}\nDate: {stamp}',
                  path.read_text(), count=1, flags=re.M)
    path.write_text(mail.replace('*** SUBJECT HERE ***', subject).replace(
        '*** BLURB HERE ***', text))


def commit_all(series, repository, seconds):
    release_files(PINNED, overlay.edited(series), repository.tree)
    repository.commit(series[0].sender, seconds, f'QEMU {PINNED}')
    added = set()
    for number, patch in enumerate(series, 1):
        overlay.apply(patch, repository.tree, added)
        repository.commit(patch.sender, seconds + number,
                          f'{patch.subject}\n\n{patch.message}')


def make():
    """Write all series; return the patches of each, by its name."""
    series = overlay.patches()
    covers = letters(series)
    total = len(series)
    address = email.utils.parseaddr(series[0].sender)[1]
    seconds = int(run('git', '-C', TOP, 'log', '-1', '--format=%ct'))
    made = {}
    shutil.rmtree(SERIES, ignore_errors=True)
    with tempfile.TemporaryDirectory() as tree:
        repository = Repository(pathlib.Path(tree))
        commit_all(series, repository, seconds)

        def mails(name, *arguments):
            repository.git('format-patch', '-q', '--zero-commit',
                           '--no-signature', '-o', SERIES / name, *arguments)
            return sorted((SERIES / name).glob('*.patch'))

        below = None
        ends = [start for _, start, *_ in covers[1:]] + [total]
        for (name, start, subject, text), end in zip(covers, ends):
            letter, *made[name] = mails(
                name, '--cover-letter', f'HEAD~{total - start}..'
                f'HEAD~{total - end}')
            # In git's form, but known in advance, for the next series.
            message_id = f'<cover.{seconds}.{name}.{address}>'
            fill_in(letter, subject, text, message_id, seconds + start, below)
            below = message_id, subject
        (SERIES / 'debian/series').write_text(''.join(
            f'{path.name}\n' for path in mails('debian', f'HEAD~{total}')))
    return made


def main():
    try:
        made = make()
    except (Failure, OSError) as err:
        print(f'error: {err}', file=sys.stderr)
        return 1
    print(f'{SERIES}:')
    for name, patches in made.items():
        print(f'  {name}: the cover letter, patches: {len(patches)}')
    print('  mail one, after those before: '
          f'git send-email build/series/{next(iter(made))}/*.patch')
    print('  in a clone of QEMU:           git am build/series/debian/*.patch')
    print('  or in any of its trees:       '
          'cat build/series/debian/*.patch | patch -p1')
    print("  in Debian's package:          "
          'copy build/series/debian/*.patch to debian/patches,')
    print('                                append build/series/debian/series '
          'to debian/patches/series')
    return 0


if __name__ == '__main__':
    sys.exit(main())
