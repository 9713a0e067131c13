# SPDX-License-Identifier: GPL-2.0-or-later
"""
What the benchmark has found: tables and the goals.
"""

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
        self.samples = {}       # (section, row, name): {metric: [values]}
        self.errors = []

    def add(self, section, row, name, metrics):
        sample = self.samples.setdefault((section, row, name), {})
        for metric, value in metrics.items():
            sample.setdefault(metric, []).append(value)

    def values(self, section, row, name, metric):
        return self.samples.get((section, row, name), {}).get(metric)

    def median(self, section, row, name, metric):
        values = self.values(section, row, name, metric)
        return statistics.median(values) if values else None

    def rows(self, section, metric):
        found = {}
        for (where, row, name), sample in self.samples.items():
            if where == section and metric in sample:
                found.setdefault(row, []).append(name)
        return found


# Goals

def goals(results):
    """
    List (title, value, limit as text, 'met', 'missed', or 'open': the rounds
    differ by more than what is missing).
    """
    found = []

    def add(title, ours, theirs=(1,), most=None, least=None):
        """Of the ratio OURS / THEIRS; each is a list"""
        if not ours or not theirs or not min(theirs):
            return
        value = statistics.median(ours) / statistics.median(theirs)
        if least is None:
            best = min(ours) / max(theirs)
            met, could, limit = value <= most, best <= most, f'<= {most:g}'
        else:
            best = max(ours) / min(theirs)
            met, could, limit = value >= least, best >= least, f'>= {least:g}'
        found.append((title, value, limit,
                      'met' if met else 'open' if could else 'missed'))

    def compare(title, section, row, metric, other, other_row=None, **limit):
        add(f'{title}: ours / {other}',
            results.values(section, row, 'ours', metric),
            results.values(section, other_row or row, other, metric), **limit)

    def compare_cpu(title, section, row, other, most, other_row=None):
        compare(f'{title}, CPU', section, row, CPU[0], other, other_row,
                most=most)

    def middle(section, row, metric):
        """Alone: a round that is better than the others does not excuse."""
        value = results.median(section, row, 'ours', metric)
        return None if value is None else [value]

    for size, chain, tcpdump in (('64 B', 1 / 20, 2), ('1500 B', 1 / 8, 1)):
        for row in (f'{size} {rate}' for rate in RATES):
            compare_cpu(f'capture {row}', 'capture', row, 'chain', chain)
            compare_cpu(f'capture {row}', 'capture', row, 'tcpdump-cat',
                        tcpdump)
            # Else the time of the others would be worth nothing.
            add(f'capture {row}, lost, %', middle('capture', row, 'lost'),
                most=0.1)
            for way in ('', ', rx', ', both'):
                compare_cpu(f'capture {row}{way}', 'capture', row + way,
                            'ours-tx', 1.5, row)
            compare_cpu(f'inject {row}', 'inject', row, 'bare', 2)
    for size, chain in (('64 B', 6), ('64000 B GSO', 1.2),
                        ('64 B and GSO', 1.2)):
        for other, least in (('chain', chain), ('tcpdump-cat', 0.8)):
            compare(f'capture {size}, highest rate', 'capture', f'{size} max',
                    'max_rate', other, least=least)
    for row in ('64000 B GSO 2k/s', '64000 B GSO 10k/s'):
        compare_cpu(f'capture {row}', 'capture', row, 'bare-cat', 1.15)
    compare_cpu('128 TAPs', 'growth', '128 TAPs', 'ours', 3, '1 TAP')
    for rate, metric, title, most in (
            ('1k/s', 'p50_us', 'median', 1.5), ('100k/s', 'p99_us', '99 %', 1)):
        compare(f'latency of capture at {rate}, {title}', 'latency',
                f'capture {rate}', metric, 'straightforward', most=most)
    for row in ('full capture', 'peer stalled'):
        add(f'monitor, {row}, 99 %, ms', middle('monitor', row, 'p99_us'),
            [1e3], most=5)
    add('main loop held, longest, ms', middle('hold', 'flood', 'max_us'),
        [1e3], most=1)
    add("sender's CPU, 100k/s: status=off / absent",
        *(middle('sender', f'100k/s, {case}', 'sender_ns_per_packet')
          for case in ('status=off', 'absent')), most=1.05)
    return found


# Text

def show(values, style):
    if not values:
        return '-'
    middle = format(statistics.median(values), style)
    if len(values) == 1:
        return middle
    return (f'{middle} [{format(min(values), style)}..'
            f'{format(max(values), style)}]')


def beyond(results, section, row, name, metric):
    """What is known is only that it is more."""
    more = 'sender_limit' if metric == 'max_rate' else 'unanswered'
    return '> ' if results.median(section, row, name, more) else ''


def print_table(results, section, metric, title, style):
    rows = results.rows(section, metric)
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    if metric == 'lost':
        rows = {row: names for row in rows
                if any(max(results.values(section, row, name, metric) or [0])
                       >= 0.05 for name in names)}
    if not rows:
        return
    cells = [[title, *names]]
    for row in rows:
        cells.append([f'  {row}'] + [
            beyond(results, section, row, name, metric)
            + show(results.values(section, row, name, metric), style)
            for name in names])
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    for line in cells:
        print('  '.join(
            [line[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in
               zip(line[1:], widths[1:])]).rstrip())
    print()


def print_all(results, about, rounds, found=()):
    """ABOUT is a line, FOUND what goals() returns"""
    print(about)
    print(f'Medians of {rounds} rounds, with [least..greatest].\n')
    for section, metrics in METRICS.items():
        if any(where == section for where, _, _ in results.samples):
            print(f'=== {section}\n')
        for metric, title, style in metrics:
            print_table(results, section, metric, title, style)
    if found:
        print('=== goals\n')
    for title, value, limit, state in found:
        print(f'  {state:6}  {title:62} {value:9.3g}  {limit}')
    for text in results.errors:
        print(f'ERROR {text}')
