# SPDX-License-Identifier: GPL-2.0-or-later
"""
What the benchmark has found: tables and the goals.
"""

import math
import statistics

# Section: metric, its title, and how to show a value.
CPU = 'cpu_ns_per_packet', 'CPU time per packet, ns', '.0f'
LOST = 'lost', 'Packets lost, %', '.1f'
METRICS = {
    'capture': (CPU, LOST, (
        'max_rate', 'Highest rate without loss, packets/s', '.0f')),
    'inject': (CPU, LOST),
    'latency': (
        ('p50_us', 'Latency, median, us', '.0f'),
        ('p99_us', 'Latency, 99 %, us', '.0f')),
    'monitor': (
        ('p50_us', 'Round trip, median, us', '.0f'),
        ('p99_us', 'Round trip, 99 %, us', '.0f'),
        ('max_us', 'Round trip, longest, us', '.0f')),
    'sender': (('sender_ns_per_packet',
                "The sender's CPU time per packet, ns", '.0f'),),
    'growth': (CPU, LOST),
    'hold': (
        ('turns', 'Turns of the capture', '.0f'),
        ('p50_us', 'It holds the main loop for, median, us', '.0f'),
        ('max_us', 'Longest, us', '.0f'),
        ('long_turns', 'Turns of more than 300 us', '.0f')),
}

RATES = ('40k/s', '100k/s', '200k/s')


class Results:
    def __init__(self):
        self.samples = {}       # (section, metric): {row: {name: [values]}}
        self.errors = []

    def add(self, section, row, name, metrics):
        for metric, value in metrics.items():
            self.rows(section, metric).setdefault(row, {}).setdefault(
                name, []).append(value)

    def rows(self, section, metric):
        return self.samples.setdefault((section, metric), {})

    def values(self, section, row, name, metric):
        return self.rows(section, metric).get(row, {}).get(name, [])


def goals(results):
    """
    List (title, value, limit as text, 'met', 'missed', or 'open': the rounds
    differ by more than what is missing).
    """
    found = []

    def goal(section, row, metric, other=None, other_row=None,
             most=math.inf, least=0):
        """Of ours, or of its ratio to the contestant OTHER."""
        title = f'{section}, {row}, {metric}'
        ours, theirs = results.values(section, row, 'ours', metric), [1]
        if other:
            title += f': ours / {other}'
            theirs = results.values(section, other_row or row, other, metric)
        if not ours or not theirs or not min(theirs):
            return
        if not other or section == 'sender':
            # One round that is better than the others does not excuse.
            ours = [statistics.median(ours)]
            theirs = [statistics.median(theirs)]
        value = statistics.median(ours) / statistics.median(theirs)
        could = min(ours) / max(theirs) <= most and \
            max(ours) / min(theirs) >= least
        state = 'met' if least <= value <= most else \
            'open' if could else 'missed'
        limit = f'>= {least:g}' if least else f'<= {most:g}'
        found.append((title, value, limit, state))

    for size, chain, tcpdump in (('64 B', 1 / 20, 2), ('1500 B', 1 / 8, 1)):
        for row in (f'{size} {rate}' for rate in RATES):
            goal('capture', row, CPU[0], 'chain', most=chain)
            goal('capture', row, CPU[0], 'tcpdump-cat', most=tcpdump)
            # Else the time of the others would be worth nothing.
            goal('capture', row, 'lost', most=0.1)
            for way in ('', ', rx', ', both'):
                goal('capture', row + way, CPU[0], 'ours-tx', row, most=1.5)
            goal('inject', row, CPU[0], 'bare', most=2)
    for size, chain in (('64 B', 6), ('64000 B GSO', 1.2),
                        ('64 B and GSO', 1.2)):
        goal('capture', f'{size} max', 'max_rate', 'chain', least=chain)
        goal('capture', f'{size} max', 'max_rate', 'tcpdump-cat', least=0.8)
    for row in ('64000 B GSO 2k/s', '64000 B GSO 10k/s'):
        goal('capture', row, CPU[0], 'bare-cat', most=1.15)
    goal('growth', '128 TAPs', CPU[0], 'ours', '1 TAP', most=3)
    goal('latency', 'capture 1k/s', 'p50_us', 'straightforward', most=1.5)
    goal('latency', 'capture 100k/s', 'p99_us', 'straightforward', most=1)
    for row in ('full capture', 'peer stalled'):
        goal('monitor', row, 'p99_us', most=5000)
    goal('hold', 'flood', 'max_us', most=1000)
    goal('sender', '100k/s, status=off', 'sender_ns_per_packet', 'ours',
         '100k/s, absent', most=1.05)
    return found


# Text

def show(results, section, row, name, metric, style):
    values = results.values(section, row, name, metric)
    if not values:
        return '-'
    # What is known of these is only that it is more.
    more = results.values(section, row, name, 'sender_limit'
                          if metric == 'max_rate' else 'unanswered')
    text = '> ' if more and statistics.median(more) else ''
    text += format(statistics.median(values), style)
    if len(values) > 1:
        text += f' [{min(values):{style}}..{max(values):{style}}]'
    return text


def print_table(results, section, metric, title, style):
    rows = results.rows(section, metric)
    if metric == 'lost':
        rows = {row: found for row, found in rows.items()
                if any(max(values) >= 0.05 for values in found.values())}
    if not rows:
        return
    names = list(dict.fromkeys(name for found in rows.values()
                               for name in found))
    lines = [[title, *names]] + [
        [f'  {row}', *(show(results, section, row, name, metric, style)
                       for name in names)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for first, *others in lines:
        print(first.ljust(widths[0]), *map(str.rjust, others, widths[1:]),
              sep='  ')
    print()


def print_all(results, about, rounds, found=()):
    """ABOUT is a line, FOUND what goals() returns"""
    print(about)
    print(f'Medians of {rounds} rounds, with [least..greatest].\n')
    for section, metrics in METRICS.items():
        if any(results.rows(section, metric) for metric, _, _ in metrics):
            print(f'=== {section}\n')
        for metric, title, style in metrics:
            print_table(results, section, metric, title, style)
    if found:
        print('=== goals\n')
    for title, value, limit, state in found:
        print(f'  {state:6}  {title:64} {value:9.3g}  {limit}')
    for text in results.errors:
        print(f'ERROR {text}')
