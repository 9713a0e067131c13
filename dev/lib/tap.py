# SPDX-License-Identifier: GPL-2.0-or-later
"""
The results of a test, in the Test Anything Protocol.
"""

import re
import subprocess
import time

from lib.common import Failure


class Tap:
    def __init__(self, prefix):
        self.prefix = prefix
        self.count = self.failed = 0
        self.started = time.monotonic()

    def ok(self, condition, name, detail=''):
        self.count += 1
        self.failed += not condition
        print(f'{"" if condition else "not "}ok {self.count} - '
              f'{self.prefix}/{name}', flush=True)
        if not condition and detail:
            self.note(detail)
        return bool(condition)

    def attempt(self, name, function, *arguments):
        """A test that is passed if FUNCTION raises nothing"""
        try:
            function(*arguments)
        except (Failure, OSError, LookupError, ValueError,
                subprocess.SubprocessError) as err:
            return self.ok(False, name, f'{type(err).__name__}: {err}')
        return self.ok(True, name)

    def skip(self, name, reason):
        self.count += 1
        reason = ' '.join(str(reason).split())
        print(f'ok {self.count} - {self.prefix}/{name} # SKIP {reason}',
              flush=True)

    def note(self, text):
        print(re.sub('^', '# ', str(text), flags=re.M), flush=True)

    def say(self, text):
        """What is done, and how long after the start"""
        self.note(f'[{time.monotonic() - self.started:5.1f} s] {text}')

    def end(self):
        """Print the plan; return the exit status."""
        print(f'1..{self.count}', flush=True)
        return 1 if self.failed else 0
